"""Each method end to end: ratio on disk, manifest, attach equals merge, resumed bytes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_pairs import copy_of, rewrite, tree, weights_of
from transformers import AutoModelForCausalLM

from deltacome import (
    Adaptive,
    Artifact,
    BitDelta,
    DeltaCome,
    LowRank,
    PrinMix,
    Residual,
    attach,
    compress,
    merge,
)
from deltacome.compression import planning, polish
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.compression.distill import SLOTS, Trained, distill, divergence, squared_distance
from deltacome.compression.sensitivity import Weights
from deltacome.errors import ArtifactError, CalibrationError, CheckpointError, PlanError
from deltacome.format.codec import Packed
from deltacome.methods.template import parse_template
from deltacome.rows import Row, alike

METHODS = {
    "adaptive": (Adaptive(), 8),
    "adaptive-diagonal": (Adaptive(distill=0, diagonal=True), 8),
    "adaptive-start": (Adaptive(distill=0), 8),
    "delta-come": (DeltaCome(), 8),
    "delta-come-distilled": (DeltaCome(distill=20), 8),
    "low-rank": (LowRank(), 8),
    "low-rank-fixed": (LowRank(3), None),
    "prinmix": (PrinMix(), 8),
    "residual": (Residual(), 5),
    "residual-rows": (Residual(parse_template("8:2,2:*"), "rows"), 8),
    "bitdelta": (BitDelta(), None),
    "bitdelta-rows": (BitDelta("rows"), None),
    "bitdelta-distilled": (BitDelta(distill=40), None),
    "bitdelta-answers": (BitDelta(distill=4, loss="answers"), None),
}
QUICK = {"samples": 6, "seq_len": 16}


def run(pair, output, name, text, **options):
    method, ratio = METHODS[name]
    reads = method.calibrates or getattr(method, "distill", 0)
    source = {"calibration": text} if reads else {}
    return compress(*pair, output, method=method, **QUICK | source | {"ratio": ratio} | options)


@pytest.fixture(scope="module")
def artifacts(pairs, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return {name: run(pairs["llama-tied"], folder / name, name, text) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_ratio_and_manifest(artifacts, name):
    method, ratio = METHODS[name]
    artifact, manifest = artifacts[name], artifacts[name].manifest
    assert ratio is None or artifact.ratio() == pytest.approx(ratio, rel=0.02)
    assert manifest.method == method.options()
    text = method.calibrates or getattr(method, "distill", 0) > 0
    assert (manifest.provenance["calibration"]["source"] != "none") == text
    matrices = [record for record in manifest.records.values() if len(record.shape) == 2]
    kinds = {"bitdelta": "signs", "residual": "signs+bands"}.get(name.split("-")[0], "bands")
    assert {record.kind for record in matrices} == {kinds}
    assert all(0 < record.error < 0.7 for record in matrices)
    assert f"Method `{method.options()['name']}`" in (artifact.path / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_attached_and_merged_are_one_model(pairs, artifacts, name, tmp_path):
    base, ids = pairs["llama-tied"][0], torch.tensor([[1, 5, 9, 60, 200, 3, 3]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    copy = artifacts[name]
    merged = merge(base, copy, tmp_path / "merged")
    dense = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        expected, before = dense(input_ids=ids).logits, model(input_ids=ids).logits
        with attach(model, copy):
            got = model(input_ids=ids).logits
    # Merged weights are rounded to the bfloat16 of the tuned checkpoint.
    assert (got - expected).norm() < 0.02 * (before - expected).norm() + 0.005 * expected.norm()


def test_a_ratio_that_is_not_asked_for(pairs, tmp_path):
    one, other = (
        compress(*pairs["small"], tmp_path / str(len(option)), method=BitDelta(), **option)
        for option in ({}, {"ratio": None})
    )
    assert tree(one.path) == tree(other.path)
    with pytest.raises(PlanError, match="ratio 12 cannot be met"):  # by so small a model
        compress(*pairs["small"], tmp_path / "b", method=Residual())


def test_the_order_of_errors(artifacts):
    def error(name):
        matrices = [r.error for r in artifacts[name].manifest.records.values() if r.error]
        return sum(matrices) / len(matrices)

    assert error("prinmix") < error("delta-come")
    assert error("adaptive") != error("adaptive-diagonal")
    assert error("residual") < error("bitdelta")
    assert error("residual-rows") < error("bitdelta-rows")
    assert error("bitdelta-rows") < error("bitdelta")


@pytest.mark.parametrize("name", ["adaptive", "prinmix", "bitdelta-distilled"])
def test_resumed_runs_have_the_same_bytes(pairs, artifacts, text, name, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    distilled = [] if name == "prinmix" else [("distill", 7)]
    points = [("blocks", 1), ("blocks", 3), *distilled, ("write", 0)]

    def stop(point):
        def progress(step):
            if (step.phase, step.done) == point:
                raise Killed

        return progress

    for point in points:
        with pytest.raises(Killed):
            run(pairs["llama-tied"], tmp_path / "a", name, text, progress=stop(point), resume=True)
    # What was measured is not measured again.
    monkeypatch.setattr(PrinMix, "planner", None)
    monkeypatch.setattr(Adaptive, "planner", None)
    monkeypatch.setattr(polish, "distill", None)
    again = run(pairs["llama-tied"], tmp_path / "a", name, text, resume=True)
    assert tree(again.path) == tree(artifacts[name].path)


def test_a_kept_sweep_serves_other_ratios(pairs, artifacts, text, tmp_path, monkeypatch):
    pair, kept = pairs["llama-tied"], {"sweeps": tmp_path / "sweeps"}
    first = run(pair, tmp_path / "first", "adaptive-start", text, **kept)
    assert tree(first.path) == tree(artifacts["adaptive-start"].path)
    other = run(pair, tmp_path / "other", "adaptive-start", text, ratio=12)
    with monkeypatch.context() as patch:
        patch.setattr(planning, "sweep", None)
        again = run(pair, tmp_path / "again", "adaptive-start", text, ratio=12, **kept)
    assert tree(again.path) == tree(other.path)
    run(pair, tmp_path / "seed", "adaptive-start", text, seed=1, **kept)
    assert len(list((tmp_path / "sweeps").iterdir())) == 2


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"x")])
def test_a_kept_sweep_that_is_damaged_is_named(pairs, text, damage, tmp_path):
    kept = {"sweeps": tmp_path / "sweeps", "ratio": 4}
    run(pairs["small"], tmp_path / "a", "adaptive-start", text, **kept)
    file = next(kept["sweeps"].glob("*/*down_proj*"))
    damage(file)
    with pytest.raises(ArtifactError, match=rf"{file.name}: cannot be read: .*; remove the folder"):
        run(pairs["small"], tmp_path / "b", "adaptive-start", text, **kept)


def test_a_kept_sweep_serves_no_other_rows(pairs, tmp_path, monkeypatch):
    """What `self` writes depends on the machine, and nothing else shows that."""
    folders = []

    def note(run, method, folder, *text):
        folders.append(folder.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "_sweep", note)
    for name, last in (("one", 60), ("other", 61), ("again", 60)):
        rows = [Row([1, 5, 9, last])]
        monkeypatch.setattr(planning, "calibration_rows", lambda *args, rows=rows, **options: rows)
        kept = {"sweeps": tmp_path / "sweeps", "ratio": 4, "samples": 1}
        with pytest.raises(KeyboardInterrupt):
            run(pairs["small"], tmp_path / name, "adaptive-start", "self", **kept)
    assert folders[0] == folders[2] != folders[1]


def test_what_a_killed_sweep_left_is_thrown_away(pairs, text, tmp_path):
    def stop(step):
        if step.phase == "sweep":
            raise KeyboardInterrupt

    again, left = {"progress": stop, "resume": True}, tmp_path / "a.partial" / "sweep.left"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(pairs["llama-tied"], tmp_path / "a", "adaptive-start", text, **again)
        assert not list(left.parent.glob("sweep*"))
        left.mkdir()


def test_a_run_killed_while_it_writes_distilled_scales(
    pairs, artifacts, text, tmp_path, monkeypatch
):
    from deltacome.format.writer import ArtifactWriter

    saved, save = [], ArtifactWriter.save

    def dying(writer, name, unit):
        saved.append(name)
        if len(saved) == 5:  # three blocks' worth, then the second unit with its new scales
            raise KeyboardInterrupt
        save(writer, name, unit)

    monkeypatch.setattr(ArtifactWriter, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(pairs["llama-tied"], tmp_path / "a", "bitdelta-distilled", text)
    monkeypatch.setattr(ArtifactWriter, "save", save)
    again = run(pairs["llama-tied"], tmp_path / "a", "bitdelta-distilled", text, resume=True)
    assert tree(again.path) == tree(artifacts["bitdelta-distilled"].path)


def test_distilled_scales_bring_the_logits_closer(pairs, artifacts, text):
    base, tuned = pairs["llama-tied"]
    rows = calibration_rows(Calibration(text, **QUICK, seed=0), tuned)
    ids = torch.tensor([row.ids for row in rows if len(row) == QUICK["seq_len"]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    distance = {}
    with torch.no_grad():
        wanted = dense(input_ids=ids).logits
        for name in ("bitdelta", "bitdelta-distilled"):
            with attach(model, artifacts[name]):
                distance[name] = float((model(input_ids=ids).logits - wanted).square().mean())
    assert distance["bitdelta-distilled"] < 0.99 * distance["bitdelta"]
    for name, record in artifacts["bitdelta"].manifest.records.items():
        if record.sign_scales:
            before, after = (artifacts[n].signs(name) for n in distance)
            assert torch.equal(before.words, after.words)
            assert 0.5 < after.scale / before.scale < 2


def test_distillation_finds_scales_that_were_lost(pairs, artifacts, text):
    base, tuned = pairs["llama-tied"]
    before = artifacts["bitdelta"]
    names = [n for n, record in before.manifest.records.items() if record.sign_scales]
    signs = {name: before.signs(name) for name in names}
    rows, weights = calibration_rows(Calibration(text, **QUICK, seed=0), tuned), weights_of(base)
    halved = {
        name: Trained(Packed(signs=replace(term, scale=term.scale / 2)), partial(weights.get, name))
        for name, term in signs.items()
    }
    load = partial(AutoModelForCausalLM.from_pretrained, tuned, dtype=torch.float32)
    how = {"loss": squared_distance, "rate": 0.01, "batch": 4, "seed": 0}
    found = distill(load, halved, rows, steps=80, **how)
    ratios = torch.cat([found[name].signs.scale / signs[name].scale for name in names])
    assert (ratios > 0.6).float().mean() > 0.8
    with pytest.raises(CheckpointError, match=r"^LlamaForCausalLM has no parameter other"):
        distill(load, {"other": halved[names[0]]}, rows, steps=1, **how)


def test_a_pass_has_few_rows_of_about_one_length():
    rows = [Row([0] * size) for size in (2, 3, 4, 5, 100, 120, *[400] * 5)]
    assert [[len(row) for row in some] for some in alike(rows, SLOTS, least=0.5)] == [
        [2, 3, 4],
        [5],
        [100, 120],
        [400, 400],
        [400, 400],
        [400],
    ]


@pytest.mark.parametrize("method", ["adaptive", "delta-come"])
def test_distilled_singular_values_bring_the_answers_closer(pairs, artifacts, text, method):
    base, tuned = pairs["llama-tied"]
    names = {"adaptive": ("adaptive-start", "adaptive")}.get(
        method, (method, f"{method}-distilled")
    )
    rows = calibration_rows(Calibration(text, **QUICK, seed=0), tuned)
    ids = torch.tensor([row.ids for row in rows if len(row) == QUICK["seq_len"]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    found = []
    with torch.no_grad():
        wanted = dense(input_ids=ids).logits.flatten(0, 1)
        for name in names:
            with attach(model, artifacts[name]):
                got = model(input_ids=ids).logits.flatten(0, 1)
            found.append(float(divergence(got, wanted).mean()))
    assert found[1] < 0.98 * found[0]
    for name, record in artifacts[names[0]].manifest.records.items():
        if record.plan:
            for one, other in zip(*(artifacts[n].bands(name) for n in names), strict=True):
                assert torch.equal(one.u.dequantize(), other.u.dequantize())
                assert torch.equal(one.v.dequantize(), other.v.dequantize())


def test_rows_added_to_the_vocabulary_are_exact_beside_signs(pairs, text, tmp_path):
    base, tuned = pairs["llama-tied"]
    grown = copy_of(tuned, tmp_path / "grown")
    weights = {
        name: torch.cat([w, torch.ones(2, 128, dtype=w.dtype)]) if w.shape[0] == 300 else w
        for name, w in weights_of(tuned).items()
    }
    rewrite(grown, weights)
    config = (grown / "config.json").read_text()
    (grown / "config.json").write_text(config.replace('"vocab_size": 300', '"vocab_size": 302'))
    artifact = run((base, grown), tmp_path / "a", "bitdelta-distilled", text)
    record = artifact.manifest.records["model.embed_tokens.weight"]
    assert (record.sign_scales, record.exact_rows) == (1, (300, 302))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bitdelta", {"ratio": 32}, "within 2%"),
        ("low-rank", {"ratio": None}, "expected a ratio"),
        ("residual", {"ratio": 17}, "cannot be met, the largest possible is about 1[0-6]"),
        ("low-rank", {"calibration": "self"}, "low-rank .* uses no text"),
        (
            "bitdelta-distilled",
            {"calibration": "none"},
            "fits its scales or singular values to text",
        ),
        ("adaptive", {"calibration": "none"}, "give some, or distill 0"),
        ("adaptive-start", {"calibration": "none", "sweeps": "s"}, "expected adaptive and text"),
        ("prinmix", {"sweeps": "s"}, "sweeps: expected adaptive and text, got prinmix"),
    ],
)
def test_refusals(pairs, text, name, options, reason, tmp_path):
    with pytest.raises(PlanError, match=reason):
        run(pairs["llama-tied"], tmp_path / "a", name, text, **options)
    assert not list(tmp_path.iterdir())


def test_a_gram_that_no_plan_can_be_made_of_is_named(pairs, text, tmp_path, monkeypatch):
    def negative(run, name):
        return Weights(*(-torch.eye(size) for size in reversed(run.records[name].bands_shape)))

    monkeypatch.setattr(planning, "measured_weights", negative)
    with pytest.raises(CalibrationError, match=r"^model\.embed_tokens\.weight: weights of inputs:"):
        run(pairs["llama-tied"], tmp_path / "a", "adaptive-start", text)


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_scales_that_overflow_are_refused(pairs, text, rate, tmp_path):
    method = BitDelta(distill=5, rate=rate)
    with pytest.raises(CalibrationError, match=r"distillation: after step \d of 5 .* not finite"):
        compress(*pairs["small"], tmp_path / "a", method=method, calibration=text, **QUICK)
    assert not (tmp_path / "a").exists()


def test_nothing_is_distilled_where_nothing_changed(pairs, text, tmp_path):
    base, _ = pairs["llama-tied"]
    artifact = compress(
        *(base, copy_of(base, tmp_path / "same"), tmp_path / "a"),
        method=Adaptive(),
        ratio=8,
        calibration=text,
        **QUICK,
    )
    assert {record.kind for record in artifact.manifest.records.values()} == {"same"}


def test_an_artifact_opens_again(artifacts):
    for artifact in artifacts.values():
        assert Artifact.open(artifact.path).manifest == artifact.manifest
