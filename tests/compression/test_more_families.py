"""Architectures that differ in where matrices lie and what they are called, end to end.

Each is a tiny random model of the real configuration class: compressed, merged, attached. Merged values
are base + terms; the attached base gives the logits of the merged model.
"""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_pairs
import torch
from families import FAMILIES, RATIOS, STREAMED, TEXT, load, logits, make, make_pair, moved
from tiny_pairs import copy_of, rewrite, text_lines, weights_of
from transformers import Glm4MoeConfig

from deltacome import Adaptive, Artifact, DeltaCome, attach, base_for, compress, merge
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.compression.distill import divergence
from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.canary import CANARY_FILE, Canary
from deltacome.format.codec import dense
from deltacome.methods.bitdelta import BitDelta
from deltacome.runtime.choice import Choice
from deltacome.runtime.experts import Expert


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    class Pairs(dict):
        def __missing__(self, name):
            self[name] = make_pair(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Pairs()


@dataclass
class Compressed:
    base: Path
    tuned: Path
    artifact: Artifact
    merged: Path


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    base, tuned = pairs[request.param]
    ratio = RATIOS.get(request.param, 3)
    artifact = compress(base, tuned, folder / "delta", ratio=ratio, calibration="none")
    assert artifact.ratio() == pytest.approx(ratio, rel=0.02)
    return Compressed(base, tuned, artifact, merge(base, artifact, folder / "merged"))


def test_every_matrix_that_a_layer_multiplies_by_is_packed(compressed):
    records, weights = compressed.artifact.manifest.records, weights_of(compressed.tuned)
    assert set(records) == set(weights)
    small = re.compile(r"norm|mlp\.gate\.|moe\.gate\.|position_ids|A_log|dt_proj")
    for name, weight in weights.items():
        packed = records[name].kind == "bands"
        assert packed == (weight.ndim == 2 and not small.search(name)), name


def test_merged_is_base_plus_terms(compressed):
    base, tuned = weights_of(compressed.base), weights_of(compressed.tuned)
    merged = weights_of(compressed.merged)
    assert merged.keys() == tuned.keys()
    for name, record in compressed.artifact.manifest.records.items():
        expected = tuned[name]
        if record.plan:
            delta = dense(compressed.artifact.bands(name))
            delta = delta.T if record.transposed else delta
            expected = base[name] + delta
            # The tuned matrix comes back, not its transpose or another matrix.
            wanted = tuned[name] - base[name]
            assert (delta - wanted).norm() < 0.8 * wanted.norm(), name
        assert torch.equal(merged[name], expected), name


def test_attached_is_the_merged_model(compressed):
    model, merged = load(compressed.base), load(compressed.merged)
    before, wanted = logits(model), logits(merged)
    with attach(model, compressed.artifact):
        got = logits(model)
    assert torch.equal(logits(model), before)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (wanted - before).abs().max() > 1e-2 * wanted.abs().max()


def test_a_causal_model_has_a_canary(compressed, request):
    has = compressed.artifact.describe()["canary"]
    assert has == (request.node.callspec.params["compressed"] in STREAMED)
    if has:
        canary = Canary.from_json(compressed.artifact.file(CANARY_FILE))
        ids = torch.tensor([canary.ids])
        with torch.no_grad():
            said = load(compressed.merged)(input_ids=ids).logits[0].log_softmax(-1)
        said = [float(said[i, id]) for i, id in enumerate(canary.ids[1:])]
        assert canary.distance(said) < 0.02


def test_a_model_without_a_canary_is_told(pairs, tmp_path):
    with pytest.warns(UserWarning, match="no canary: BertFor.* is not a causal language model"):
        compress(*pairs["BertForMaskedLM"], tmp_path / "a", ratio=3, calibration="none")


def test_routers_whose_logits_are_returned(pairs, tmp_path):
    """Configurations of training say so, for a loss that passes block by block cannot compute."""
    base, tuned = pairs["MixtralForCausalLM"]
    tuned = copy_of(tuned, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text()) | {"output_router_logits": True}
    (tuned / "config.json").write_text(json.dumps(config))
    artifact = compress(base, tuned, tmp_path / "a", ratio=4, calibration="none")
    assert artifact.file("canary.json", 1 << 20)
    with attach(load(base), artifact):
        pass


def test_scales_of_stacked_experts_are_not_distilled(pairs, tmp_path):
    source = tmp_path / "c.txt"
    source.write_text("\n".join(text_lines(8)))
    with pytest.raises(
        UnsupportedError, match=r"experts\.\d.*stacked with others.*calibration none"
    ):
        compress(
            *(*pairs["MixtralForCausalLM"], tmp_path / "a"),
            method=BitDelta(distill=2),
            calibration=str(source),
        )


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlavaForConditionalGeneration"])
def test_singular_values_are_distilled_where_weights_lie_otherwise(name, pairs, tmp_path):
    """GPT-2 holds its linears as (in, out), LLaVA its language model beside a tower."""
    base, tuned = pairs[name]
    source = tmp_path / "c.txt"
    source.write_text("\n".join(text_lines(8)))
    options = {"ratio": RATIOS[name], "calibration": str(source), "samples": 6, "seq_len": 16}
    model, dense = load(base), load(tuned)
    ids = torch.tensor(
        [r.ids for r in calibration_rows(Calibration(str(source), 6, 16, 0), tuned) if len(r) == 16]
    )
    found = []
    with torch.no_grad():
        wanted = dense(input_ids=ids).logits.flatten(0, 1)
        for steps in (0, 20):
            method = DeltaCome(distill=steps)
            artifact = compress(base, tuned, tmp_path / str(steps), method=method, **options)
            with attach(model, artifact):
                got = model(input_ids=ids).logits.flatten(0, 1)
            found.append(float(divergence(got, wanted).mean()))
    assert found[1] < 0.98 * found[0]


def test_adaptive_refuses_what_text_does_not_reach_before_it_runs(pairs, tmp_path):
    """GPT-2's position embeddings, and the tower of a vision-language model."""
    for name in ("GPT2LMHeadModel", "LlavaForConditionalGeneration"):
        seen = []
        with pytest.raises(UnsupportedError, match=r"adaptive: \d+ matrices are not reached"):
            compress(
                *pairs[name],
                tmp_path / "a",
                method=Adaptive(distill=0),
                ratio=RATIOS[name],
                samples=4,
                seq_len=16,
                progress=lambda step, seen=seen: seen.append(step.phase),
            )
        assert set(seen) == {"survey"}
        assert not list(tmp_path.iterdir())


def test_a_tied_head_that_is_stored_by_its_own_name_is_distilled(text, tmp_path):
    """As safetensors writes it where it can choose between two names."""
    base, tuned = tiny_pairs.make_pair("llama-tied", tmp_path)
    for folder in (base, tuned):
        weights = weights_of(folder)
        rewrite(
            folder, weights | {"lm_head.weight": weights.pop("model.embed_tokens.weight")}, None
        )
    found = []
    for steps in (0, 2):
        options = {"ratio": 6, "calibration": text, "samples": 6, "seq_len": 16}
        artifact = compress(
            base, tuned, tmp_path / f"{steps}", method=DeltaCome(distill=steps), **options
        )
        found.append(torch.cat([band.s for band in artifact.packed("lm_head.weight").bands]))
    assert not torch.equal(*found)


def test_a_model_that_sees_writes_its_own_calibration(pairs, tmp_path):
    base, tuned = pairs["LlavaForConditionalGeneration"]
    options = {"ratio": 2, "samples": 4, "seq_len": 12}
    with pytest.warns(
        UserWarning, match=r"self: LlavaFor\w+ takes pictures, and none of 4 rows has one"
    ):
        artifact = compress(base, tuned, tmp_path / "a", **options)
    said = artifact.manifest.provenance["calibration"]
    assert (said["source"], said["samples"]) == ("self", 4)
    errors = [record.error for record in artifact.manifest.records.values() if record.packed]
    assert max(error for error in errors if error is not None) < 1


def test_a_router_s_correction_is_there_while_compressing(tmp_path):
    """A saved buffer, not a parameter; without it tokens go to other experts."""
    more = {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
    groups = {"n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
    config = Glm4MoeConfig(**TEXT, **more, **groups, head_dim=32)
    base = make("Glm4MoeForCausalLM", config, tmp_path / "base")
    weights = weights_of(base)
    for name in [name for name in weights if "correction" in name]:
        weights[name] = torch.tensor([0.0, 3.0, -3.0, 1.0])
    rewrite(base, weights, None)
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    same = {name: w for name, w in weights.items() if "correction" in name}
    rewrite(tuned, moved(weights) | same, None)
    source = tmp_path / "c.txt"
    source.write_text("\n".join(text_lines(8, seed=4)))
    options = {"ratio": 3, "samples": 6, "seq_len": 16, "calibration": str(source)}
    artifact = compress(base, tuned, tmp_path / "a", **options)
    canary = Canary.from_json(artifact.file(CANARY_FILE))
    model = base_for(base, artifact, dtype=torch.float32).eval()
    with torch.no_grad(), attach(model, artifact):
        said = model(torch.tensor([list(canary.ids)])).logits[0].log_softmax(-1)
    assert canary.distance([float(said[i, id]) for i, id in enumerate(canary.ids[1:])]) < 0.02


@pytest.mark.parametrize("name", STREAMED)
def test_calibrated(name, pairs, tmp_path):
    base, tuned = pairs[name]
    source = tmp_path / "c.txt"
    source.write_text("\n".join(text_lines(8, seed=4)))
    options = {"ratio": RATIOS.get(name, 3), "samples": 6, "seq_len": 16}
    white = compress(base, tuned, tmp_path / "white", calibration="none", **options)
    artifact = compress(base, tuned, tmp_path / "delta", calibration=str(source), **options)
    said = artifact.manifest.provenance["calibration"]
    experts = [n for n in artifact.manifest.records if re.search(r"experts\.\d", n)]
    beside = [
        n
        for n, r in artifact.manifest.records.items()
        if r.plan and ("vision" in n or "projector" in n or "wpe" in n)
    ]
    assert said.get("matrices_without_inputs", 0) == len(experts) + len(beside)
    changed = [
        n
        for n, r in artifact.manifest.records.items()
        if r.plan == white.manifest.records[n].plan != ()
        and not torch.equal(artifact.blob(n), white.blob(n))
    ]
    assert not set(experts) & set(changed)
    assert len(changed) > 6


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in STREAMED])
def test_calibration_that_is_not_possible_is_refused(name, pairs, tmp_path):
    source = tmp_path / "c.txt"
    source.write_text("\n".join(text_lines(8)))
    for calibration in ("self", str(source), None):
        with pytest.raises(UnsupportedError, match=f"{name}.*compress it with calibration none"):
            compress(*pairs[name], tmp_path / "delta", ratio=4, calibration=calibration)
    assert {file.name for file in tmp_path.iterdir()} == {"c.txt"}


def test_experts_that_do_not_fit(pairs, tmp_path):
    base, tuned = pairs["Qwen3MoeForCausalLM"]
    artifact = compress(base, tuned, tmp_path / "delta", ratio=3, calibration="none")
    whole = artifact.manifest
    name = next(name for name, r in whole.records.items() if "experts.1.up" in name and r.packed)
    rest = {other: record for other, record in whole.records.items() if other != name}
    artifact.manifest = replace(whole, records=rest)
    with pytest.raises(MismatchError, match=r"expected 2 matrices for each of 4 experts, got 7"):
        attach(load(base), artifact)
    exact = replace(whole.records[name], plan=(), exact_rows=(0, whole.records[name].shape[0]))
    artifact.manifest = replace(whole, records=whole.records | {name: exact})
    with pytest.raises(UnsupportedError, match=rf"{name}: one expert stored exactly"):
        attach(load(base), artifact)


def test_experts_answer_to_a_plain_linear_alone():
    linear, x = torch.nn.functional.linear, torch.ones(1, 3)
    expert, bias = Expert([(torch.ones(2, 3), None)], Choice([""], 0), "reference"), torch.ones(2)
    assert torch.equal(linear(x, expert), torch.full((1, 2), 3.0))
    for call in (
        lambda: linear(x, expert, bias),
        lambda: linear(x, expert, bias=bias),
        lambda: torch.matmul(x, expert),
    ):
        with pytest.raises(UnsupportedError, match="expected a plain linear with each"):
            call()


def test_a_forward_of_experts_that_somebody_replaced(pairs, tmp_path):
    base, tuned = pairs["Qwen3MoeForCausalLM"]
    artifact = compress(base, tuned, tmp_path / "delta", ratio=3, calibration="none")
    model = load(base)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    own = experts.forward = experts.forward
    with pytest.raises(UnsupportedError, match=r"the forward of this .*Experts was replaced"):
        attach(model, artifact)
    experts._hf_hook = object()  # accelerate's hook, which moves a layer's inputs
    before = logits(model)
    with attach(model, artifact):
        assert not torch.equal(logits(model), before)
    assert vars(experts)["forward"] is own
