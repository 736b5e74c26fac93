"""From two checkpoints to a folder: sources, plans, kinds of tensors, and what is reported of them."""

import json
import shutil
import warnings

import pytest
import torch
from tiny_pairs import copy_of, fine_tune, rewrite, text_lines, tree, weights_of, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome import Artifact, DeltaCome, compress, merge
from deltacome.compression import survey
from deltacome.evals.run import delta_tokenizer
from deltacome.format.codec import dense
from deltacome.methods.template import PRECISIONS, parse_template

QUICK = {"samples": 6, "seq_len": 16}


def run(pair, output, **options):
    return compress(*pair, output, **QUICK | options)


def mean_error(artifact):
    errors = [r.error for r in artifact.manifest.records.values() if r.error is not None]
    return sum(errors) / len(errors)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    lines = text_lines(12, seed=9)
    (folder / "c.txt").write_text("\n".join(lines))
    turns = [{"role": "user", "content": lines[0]}, {"role": "assistant", "content": lines[1]}]
    objects = [{"text": lines[2]}, {"messages": turns}, {"prompt": lines[3], "answer": lines[4]}]
    write_jsonl(folder / "c.jsonl", objects)
    return {
        "none": "none",
        "self": "self",
        "txt": str(folder / "c.txt"),
        "jsonl": str(folder / "c.jsonl"),
    }


@pytest.mark.parametrize("source", ["none", "self", "txt", "jsonl"])
def test_sources_of_calibration(pairs, sources, source, tmp_path):
    before = [tree(folder) for folder in pairs["llama"]]
    artifact = run(pairs["llama"], tmp_path / "a", ratio=8, calibration=sources[source])
    assert artifact.ratio() == pytest.approx(8, rel=0.02)
    assert 0 < mean_error(artifact) < 0.05
    assert [tree(folder) for folder in pairs["llama"]] == before
    said = artifact.manifest.provenance["calibration"]
    if source == "none":
        assert said == {"source": "none"}
    else:
        name = source if source == "self" else f"c.{source}"
        assert said == {"source": name, "samples": 6, "seq_len": 16, "seed": 0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("ratio", [5, 6.5])
def test_ratios(pairs, ratio, tmp_path):
    artifact = run(pairs["llama-tied"], tmp_path / "a", ratio=ratio, calibration="none")
    files = [f for f in (tmp_path / "a").iterdir() if f.name.startswith("delta")]
    nbytes = sum(file.stat().st_size for file in files)
    tuned = sum(2 * w.numel() for w in weights_of(pairs["llama-tied"][1]).values())
    assert artifact.bytes_on_disk() == nbytes
    assert artifact.manifest.tuned_nbytes() == tuned
    assert tuned / nbytes == pytest.approx(ratio, rel=0.02)
    assert artifact.ratio() == tuned / nbytes


def test_precisions(pairs, tmp_path):
    errors = {}
    for name, text in PRECISIONS.items():
        method = DeltaCome(parse_template(text.replace("1/128", "1/16")))
        artifact = run(pairs["llama"], tmp_path / name, method=method, ratio=8, calibration="none")
        assert artifact.ratio() == pytest.approx(8, rel=0.02)
        assert artifact.manifest.nominal_ratio() > artifact.ratio()
        errors[name] = mean_error(artifact)
    assert errors["single"] > errors["double"] > errors["triple"]


def test_a_plan_without_a_hole(pairs, tmp_path):
    method = DeltaCome(parse_template("8:2,3:4,2:10"))
    artifact = run(pairs["llama"], tmp_path / "a", method=method, ratio=None, calibration="none")
    records = [r for r in artifact.manifest.records.values() if r.plan]
    assert records
    covered = codes = 0
    for record in records:
        assert [(b.bits, b.count) for b in record.plan] == [(8, 2), (3, 4), (2, 10)]
        covered += 16 * record.shape[0] * record.shape[1]
        codes += (2 * 8 + 4 * 3 + 10 * 2) * sum(record.shape)
    assert artifact.manifest.nominal_ratio() == pytest.approx(covered / codes)
    assert artifact.manifest.nominal_ratio() > artifact.ratio()
    assert artifact.manifest.method["template"] == "8:2,3:4,2:10"


def test_gptq_beats_rounding(pairs, sources, tmp_path):
    errors = {}
    for gptq in (True, False):
        method = DeltaCome(gptq=gptq)
        artifact = run(
            pairs["llama"], tmp_path / str(gptq), method=method, ratio=8, calibration=sources["txt"]
        )
        errors[gptq] = mean_error(artifact)
        assert artifact.manifest.method["gptq"] is gptq
    assert errors[True] < errors[False]


def test_side_files(pairs, tmp_path):
    base, tuned = pairs["llama"]
    tuned = copy_of(tuned, tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tuned / "tokenizer").mkdir()  # a folder is not a file to carry
    run((base, tuned), tmp_path / "a", ratio=8, calibration="none")
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {
        "README.md",
        "canary.json",
        "chat_template.jinja",
        "delta-00001-of-00001.safetensors",
        "delta.safetensors.index.json",
        "delta_config.json",
        "tuned_config.json",
    }  # what equals the base's file is not stored again
    config = (tuned / "config.json").read_bytes()
    assert (tmp_path / "a" / "tuned_config.json").read_bytes() == config
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "base_model:" not in card  # a local folder is not a link
    assert str(tmp_path) not in card


def test_templates_for_other_uses_are_left_out(pairs, tmp_path):
    """An artifact's files have no folders."""
    base, tuned = pairs["small"][0], copy_of(pairs["small"][1], tmp_path / "tuned")
    more = tuned / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools }}")
    with pytest.warns(UserWarning, match=r"one chat template; left out are .*: tool_use\.jinja"):
        run((base, tuned), tmp_path / "a", ratio=4, calibration="none")


def test_side_files_of_unknown_kinds_are_left_out(pairs, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    for name in ("vocab.bpe", "tokenizer_own.py"):
        (tuned / name).write_text("tuned")
    (base / "tokenizer_own.py").write_text("tuned")
    with pytest.warns(UserWarning, match=r"of known kinds alone; left out: vocab\.bpe$"):
        run((base, tuned), tmp_path / "a", ratio=4, calibration="none")


def test_side_files_that_the_tuned_model_lacks(pairs, tmp_path):
    """A template file of the base would win over a template in `tokenizer_config.json`."""
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["llama"])
    (base / "chat_template.jinja").write_text("of the base")
    (tuned / "chat_template.jinja").unlink()
    file = tuned / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "of the tuned"}))
    artifact = run((base, tuned), tmp_path / "a", ratio=8, calibration="none")
    assert artifact.manifest.dropped_files == ("chat_template.jinja",)
    merged = merge(base, artifact, tmp_path / "merged")
    for tokenizer in (AutoTokenizer.from_pretrained(merged), delta_tokenizer(base, artifact)):
        assert tokenizer.chat_template == "of the tuned"


def test_a_tuned_model_without_a_tokenizer_has_the_base_s(pairs, tmp_path):
    """As `model.save_pretrained` alone leaves it."""
    base, tuned = pairs["small"][0], copy_of(pairs["small"][1], tmp_path / "tuned")
    for file in [*tuned.glob("*token*"), *tuned.glob("chat_template*")]:
        file.unlink()
    with pytest.warns(UserWarning, match=r"no tokenizer file, so the base's are taken: chat_temp"):
        artifact = run((base, tuned), tmp_path / "a", ratio=4, calibration="none")
    assert artifact.manifest.dropped_files == ()
    wanted = AutoTokenizer.from_pretrained(base)
    merged = merge(base, artifact, tmp_path / "merged")
    for tokenizer in (AutoTokenizer.from_pretrained(merged), delta_tokenizer(base, artifact)):
        assert tokenizer.chat_template == wanted.chat_template
        assert tokenizer("one two") == wanted("one two")


def test_reports_of_progress(pairs, sources, tmp_path):
    steps = []
    artifact = run(
        pairs["llama"], tmp_path / "a", ratio=8, calibration=sources["txt"], progress=steps.append
    )
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases == ["survey", "blocks", "canary", "write"]
    for phase in phases:
        found = [step for step in steps if step.phase == phase]
        assert [s.done for s in found] == sorted(s.done for s in found)
        assert found[-1].done == found[-1].total
    blocks = [step for step in steps if step.phase == "blocks"]
    assert [step.detail for step in blocks] == [
        "model.layers.0",
        "model.layers.1",
        "embedding and head",
    ]
    assert blocks[-1].error == pytest.approx(mean_error(artifact), rel=1e-3)


def test_a_merged_artifact_is_close_to_the_tuned_model(pairs, sources, tmp_path):
    base, tuned = pairs["qwen2"]
    artifact = run((base, tuned), tmp_path / "a", ratio=6, calibration=sources["txt"])
    merged = merge(base, artifact, tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 60, 200]])
    logits = {}
    for name, folder in {"base": base, "tuned": tuned, "merged": merged}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits
    distance = {name: (logits[name] - logits["tuned"]).norm() for name in ("base", "merged")}
    assert distance["merged"] < 0.3 * distance["base"]


# --- kinds of tensors ----------------------------------------------------------------------------


def changed(pair, folder, change, dtype=torch.bfloat16):
    """A pair whose tuned weights went through `change`."""
    weights = change(weights_of(pair[1]))
    tuned = copy_of(pair[1], folder / "changed")
    rewrite(tuned, weights, dtype)
    return pair[0], tuned


def test_identical_models(pairs, tmp_path):
    base, _ = pairs["llama"]
    twin = copy_of(base, tmp_path / "twin")
    with pytest.warns(UserWarning, match="every tensor equals that of"):
        artifact = run((base, twin), tmp_path / "a", calibration="none")
    assert {record.kind for record in artifact.manifest.records.values()} == {"same"}
    assert artifact.ratio() > 16
    assert artifact.manifest.nominal_ratio() is None
    merged = merge(base, artifact, tmp_path / "merged")
    for name, tensor in weights_of(merged).items():
        assert torch.equal(tensor, weights_of(base)[name])


def test_a_fine_tune_of_matrices_alone_is_not_taken_for_the_base(pairs, tmp_path):
    """As a merged LoRA is: no norm changed, so nothing is stored exactly."""
    original = weights_of(pairs["llama"][0])
    norms = {name: w for name, w in original.items() if w.ndim == 1}
    pair = changed(pairs["llama"], tmp_path, lambda w: w | norms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact = run(pair, tmp_path / "a", ratio=8, calibration="none")
    assert {record.kind for record in artifact.manifest.records.values()} == {"bands", "same"}


def test_what_did_not_change_is_not_stored(pairs, sources, tmp_path):
    kept = {"model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"}
    original = weights_of(pairs["llama"][0])
    pair = changed(pairs["llama"], tmp_path, lambda w: w | {name: original[name] for name in kept})
    artifact = run(pair, tmp_path / "a", ratio=8, calibration=sources["txt"])
    records = artifact.manifest.records
    assert {name for name, record in records.items() if record.kind == "same"} == kept
    assert all(records[name].nbytes() == 0 for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_is_seen_in_whatever_piece_it_lies(dtype, monkeypatch):
    """Large tensors are compared in pieces."""
    monkeypatch.setattr(survey, "CHUNK", 2)
    base = torch.ones(5, 3, dtype=torch.bfloat16)
    assert survey._compare(base, base.to(dtype)) == (True, 0, 15)
    for row in (0, 3, 4):
        tuned = base.to(dtype, copy=True)
        tuned[row, 1] = 2
        assert survey._compare(base, tuned) == (False, 1, 15)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_models_of_different_precision(pairs, dtypes, tmp_path):
    base, tuned = (
        copy_of(folder, tmp_path / name)
        for folder, name in zip(pairs["llama"], ("base", "tuned"), strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    for folder, dtype in zip((base, tuned), dtypes, strict=True):
        weights = {
            name: w.float() + 1e-4 * torch.randn(w.shape, generator=generator)
            for name, w in weights_of(folder).items()
        }
        rewrite(folder, weights, getattr(torch, dtype))
    artifact = run((base, tuned), tmp_path / "a", ratio=8, calibration="none")
    assert {record.dtype for record in artifact.manifest.records.values()} == {dtypes[1]}
    tensors = weights_of(tuned)
    assert artifact.manifest.tuned_nbytes() == sum(2 * w.numel() for w in tensors.values())
    assert artifact.ratio() == pytest.approx(8, rel=0.02)
    merged = weights_of(merge(base, artifact, tmp_path / "merged"))
    for name, tensor in tensors.items():
        assert merged[name].dtype == tensor.dtype
        if tensor.ndim == 1:
            assert torch.equal(merged[name], tensor)


def test_a_tensor_that_only_the_tuned_model_has_is_exact(pairs, sources, tmp_path):
    new = torch.randn(40, 30).to(torch.bfloat16)
    inside = torch.arange(5)
    pair = changed(
        pairs["llama"],
        tmp_path,
        lambda w: w | {"projector.weight": new, "model.layers.1.extra": inside},
        dtype=None,
    )
    artifact = run(pair, tmp_path / "a", ratio=8, calibration=sources["txt"])
    records = artifact.manifest.records
    assert records["projector.weight"].kind == records["model.layers.1.extra"].kind == "exact"
    assert torch.equal(artifact.exact("projector.weight"), new)
    assert torch.equal(artifact.exact("model.layers.1.extra"), inside)
    assert records["projector.weight"].nbytes() == new.nbytes
    assert artifact.ratio() == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_rows_added_to_the_vocabulary(pairs, sources, family, tmp_path):
    def grow(weights):
        rows = torch.randn(2, 128)
        return {
            name: torch.cat([w, rows.to(w.dtype)]) if w.shape[0] == 300 else w
            for name, w in weights.items()
        }

    base, tuned = changed(pairs[family], tmp_path, grow)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": 302}))
    artifact = run((base, tuned), tmp_path / "a", ratio=8, calibration=sources["txt"])
    record = artifact.manifest.records["model.embed_tokens.weight"]
    assert (record.shape, record.base_shape) == ((302, 128), (300, 128))
    assert record.bands_shape == (300, 128)
    assert record.exact_rows == (300, 302)
    weights = weights_of(tuned)
    assert torch.equal(artifact.exact(record.name), weights[record.name][300:])
    assert artifact.ratio() == pytest.approx(8, rel=0.02)
    merged = weights_of(merge(base, artifact, tmp_path / "merged"))
    assert torch.equal(merged[record.name][300:], weights[record.name][300:])
    assert ("lm_head.weight" in merged) == (family == "llama")


def test_a_head_that_the_base_ties(pairs, sources, tmp_path):
    # The tuned model stores a head of its own: its delta is taken against the embedding.
    base, tuned = pairs["llama-tied"]
    weights = weights_of(base)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    untied = copy_of(tuned, tmp_path / "untied")
    rewrite(untied, fine_tune(weights, seed=8))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    artifact = run((base, untied), tmp_path / "a", ratio=8, calibration=sources["txt"])
    record = artifact.manifest.records["lm_head.weight"]
    assert record.base_name == "model.embed_tokens.weight"
    delta = dense(artifact.bands("lm_head.weight"))
    tuned_head, head = weights_of(untied)["lm_head.weight"], weights["lm_head.weight"]
    assert (head.float() + delta - tuned_head.float()).norm() < 0.3 * (head - tuned_head).norm()


def test_dead_inputs(pairs, sources, tmp_path):
    # Rows of up and gate that are zero in both models: inputs of down that are never active.
    def silence(folder, to):
        copied = copy_of(folder, to)
        weights = weights_of(copied)
        for layer in range(2):
            weights[f"model.layers.{layer}.mlp.gate_proj.weight"][:50] = 0
        rewrite(copied, weights)
        return copied

    pair = tuple(silence(folder, tmp_path / folder.name) for folder in pairs["llama"])
    artifact = run(pair, tmp_path / "a", ratio=8, calibration=sources["txt"])
    assert 0 < artifact.manifest.records["model.layers.0.mlp.down_proj.weight"].error < 0.1


def test_a_delta_on_dead_inputs_alone(pairs, sources, tmp_path):
    # Nothing of this delta reaches the outputs: 0 / 0 or x / 0 must not break its reported error.
    name = "model.layers.0.mlp.down_proj.weight"

    def copies():
        for number, folder in enumerate(pairs["llama"]):
            copied = copy_of(folder, tmp_path / folder.name)
            weights = weights_of(copied)
            weights["model.layers.0.mlp.gate_proj.weight"][:50] = 0
            weights[name] = weights_of(pairs["llama"][0])[name]
            weights[name][:, :50] += number * 0.01 * torch.randn(128, 50)
            rewrite(copied, weights)
            yield copied

    artifact = run(tuple(copies()), tmp_path / "a", ratio=8, calibration=sources["txt"])
    error = artifact.manifest.records[name].error
    assert error is None or 0 <= error < float("inf")


def test_shards_of_a_model(pairs, tmp_path):
    base, tuned = pairs["llama"]
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").save_pretrained(
        sharded, max_shard_size="300KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for file in tuned.iterdir():
        if "token" in file.name or "chat" in file.name:
            shutil.copy(file, sharded)
    one = run((base, tuned), tmp_path / "one", ratio=8, calibration="none")
    two = run((base, sharded), tmp_path / "two", ratio=8, calibration="none")
    for name in ("delta-00001-of-00001.safetensors", "delta_config.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_bytes_depend_on_inputs_alone(pairs, tmp_path):
    first, second = (
        run(pairs["small"], tmp_path / name, ratio=4, calibration="self") for name in "ab"
    )
    assert tree(first.path) == tree(second.path)
    assert isinstance(first, Artifact)
