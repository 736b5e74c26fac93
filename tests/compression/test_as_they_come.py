"""Checkpoints as users have them: prefixes, mixed types, leftovers, merged adapters, quantised bases."""

import json
import shutil

import pytest
import torch
from families import load as load_any
from families import logits, make_vision
from tiny_pairs import copy_of, fine_tune, rewrite, weights_of
from torch import nn
from transformers import AutoModelForCausalLM

from deltacome import Adaptive, DeltaCome, attach, base_for, compress, merge
from deltacome.errors import MismatchError, UnsupportedError
from deltacome.methods.template import parse_template

PLAN = {"ratio": 4, "calibration": "none"}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def text_logits(model):
    ids = torch.randint(2, 290, (2, 9), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits


def close(got, wanted, tolerance=1e-4):
    return (got - wanted).abs().max() < tolerance * wanted.abs().max()


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return make_vision(tmp_path_factory.mktemp("vision"))


def test_a_vision_language_model_on_a_text_base(vision, tmp_path):
    base, tuned = vision
    artifact = compress(base, tuned, tmp_path / "delta", ratio=1.3, calibration="none")
    records = artifact.manifest.records
    for name, record in records.items():
        if name.startswith("language_model."):
            assert record.base_name == name.removeprefix("language_model.")
        else:
            assert (record.base_name, record.kind) == (None, "exact"), name
    assert records["language_model.model.embed_tokens.weight"].exact_rows == (300, 304)
    merged = load_any(merge(base, artifact, tmp_path / "merged"))
    wanted = logits(merged)
    assert wanted.shape[-1] == 304
    model = base_for(base, artifact)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    with attach(model, artifact):
        assert close(logits(model), wanted)
    weights = weights_of(base)
    for name, parameter in model.named_parameters():
        if "language_model" in name or "lm_head" in name:
            other = name.replace("model.language_model.", "model.")
            assert torch.equal(parameter, weights[other]), name


def test_a_text_model_is_not_the_class_that_the_delta_needs(vision, tmp_path):
    base, tuned = vision
    artifact = compress(base, tuned, tmp_path / "delta", ratio=1.3, calibration="none")
    with pytest.raises(UnsupportedError, match="model_type: the tuned model has 'llava'"):
        attach(load(base), artifact)
    shutil.copy(tuned / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(MismatchError, match="wrong base: it has no tensor"):
        base_for(tmp_path, artifact)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_names_without_the_model_s_prefix(pairs, which, tmp_path):
    """As `LlamaModel.save_pretrained` writes them, and as in GPT-2's own checkpoint."""
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    folder = base if which == "base" else tuned
    rewrite(folder, {n.removeprefix("model."): w for n, w in weights_of(folder).items()}, None)
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    assert all(record.base_name is not None for record in artifact.manifest.records.values())
    wanted = text_logits(load(merge(base, artifact, tmp_path / "merged")))
    model = load(base)
    with attach(model, artifact):
        assert close(text_logits(model), wanted, 0.02)


def test_prefixes_that_fit_alike_are_refused(pairs, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    weights = weights_of(base)
    rewrite(base, {f"x.{name}": w for name, w in weights.items()}, None)
    twice = {f"{side}.{name}": w.clone() for side in "ab" for name, w in weights.items()}
    rewrite(tuned, weights_of(tuned) | twice, None)
    with pytest.raises(MismatchError, match=r"below 'x\.' fit '' and 'a\.' and 'b\.' of the tuned"):
        compress(base, tuned, tmp_path / "delta", **PLAN)


# --- tensors -------------------------------------------------------------------------------------


def test_tables_that_only_one_side_stores(pairs, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(16)}
    rewrite(base, weights_of(base) | table, None)
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    assert artifact.manifest.records.keys() == weights_of(tuned).keys()
    rewrite(tuned, weights_of(tuned) | {"model.rotary_emb.inv_freq": torch.rand(16)}, None)
    artifact = compress(base, tuned, tmp_path / "delta2", **PLAN)
    model = load(base)
    with attach(model, artifact):
        assert text_logits(model).isfinite().all()


def test_a_table_in_a_block_is_no_weight_of_it(pairs, text, tmp_path):
    """Checkpoints of Llama 2's time have one in each block."""
    base, tuned = pairs["small"][0], copy_of(pairs["small"][1], tmp_path / "tuned")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(16)}
    rewrite(tuned, weights_of(tuned) | table, None)
    for method in (Adaptive(distill=0), DeltaCome()):
        options = {"ratio": 4, "calibration": text, "samples": 4, "seq_len": 12}
        out = tmp_path / type(method).__name__
        records = compress(base, tuned, out, method=method, **options).manifest.records
        assert records[next(iter(table))].kind == "exact"


def test_types_mixed_within_a_model(pairs, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    for folder, shift in ((base, 0), (tuned, 1)):
        weights = sorted(weights_of(folder).items())
        mixed = {name: w.to(kinds[(i + shift) % 3]) for i, (name, w) in enumerate(weights)}
        rewrite(folder, mixed, None)
    artifact = compress(base, tuned, tmp_path / "delta", ratio=3, calibration="none")
    merged = weights_of(merge(base, artifact, tmp_path / "merged"))
    for name, w in weights_of(tuned).items():
        assert merged[name].dtype == w.dtype
        assert (merged[name].float() - w.float()).norm() < 0.2 * w.float().norm()


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_a_head_that_one_side_ties(pairs, tied, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    for folder in (base, tuned):
        weights = weights_of(folder)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if folder.name == tied:
            del weights["lm_head.weight"]
            config = json.loads((folder / "config.json").read_text())
            config["tie_word_embeddings"] = True
            (folder / "config.json").write_text(json.dumps(config))
        elif folder.name == "tuned":
            weights["lm_head.weight"] *= 1.1
        rewrite(folder, weights, None)
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    head = artifact.manifest.records.get("lm_head.weight")
    assert (head is None) == (tied == "tuned")
    assert head is None or head.base_name == "model.embed_tokens.weight"
    wanted = text_logits(load(merge(base, artifact, tmp_path / "merged")))
    model = load(base)
    with attach(model, artifact):
        assert close(text_logits(model), wanted, 0.02)


def test_a_tied_head_that_is_stored_all_the_same(pairs, text, tmp_path):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    for folder in (base, tuned):
        weights = weights_of(folder)
        rewrite(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    options = {"ratio": 3, "calibration": text, "samples": 4, "seq_len": 12}
    artifact = compress(base, tuned, tmp_path / "delta", method=Adaptive(distill=2), **options)
    head, embedding = (artifact.blob(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert torch.equal(head, embedding)  # one weight: what is found for one holds for the other


def test_a_head_of_other_values_than_its_configuration_says(pairs, tmp_path):
    """transformers runs it as it is stored: calibration and canary would be of another model."""
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    for folder in (base, tuned):
        weights = weights_of(folder)
        head = weights["model.embed_tokens.weight"] * (1.1 if folder == tuned else 1)
        rewrite(folder, weights | {"lm_head.weight": head})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    said = "tuned: tie_word_embeddings: its configuration ties lm_head.weight to model.embed_tokens"
    with pytest.raises(MismatchError, match=said):
        compress(base, tuned, tmp_path / "delta", **PLAN)
    assert not list(tmp_path.glob("delta*"))


def test_a_padded_vocabulary(pairs, tmp_path):
    """Rows of zeros up to a multiple of 64, as trainers add them."""
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])
    weights = weights_of(tuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = nn.functional.pad(weights[name], (0, 0, 0, 20))
    rewrite(tuned, weights, None)
    config = json.loads((tuned / "config.json").read_text()) | {"vocab_size": 320}
    (tuned / "config.json").write_text(json.dumps(config))
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    assert artifact.manifest.records["lm_head.weight"].exact_rows == (300, 320)
    assert not weights_of(merge(base, artifact, tmp_path / "m"))["lm_head.weight"][300:].any()


def test_an_adapter_that_was_merged_in(pairs, tmp_path):
    """Three directions capture nearly all of a rank-3 LoRA's delta; the other tensors stay the same."""
    base = pairs["small"][0]
    tuned = copy_of(base, tmp_path / "tuned")
    generator = torch.Generator().manual_seed(0)
    weights = {name: w.float() for name, w in weights_of(base).items()}
    touched = [name for name in weights if "q_proj" in name or "v_proj" in name]
    for name in touched:
        left = torch.randn(weights[name].shape[0], 3, generator=generator)
        weights[name] += 0.02 * left @ torch.randn(3, weights[name].shape[1], generator=generator)
    rewrite(tuned, weights, torch.float32)
    three = DeltaCome(parse_template("8:3"))
    options = {"method": three, "ratio": None, "calibration": "none"}
    artifact = compress(base, tuned, tmp_path / "delta", **options)
    records = artifact.manifest.records
    assert {name for name, r in records.items() if r.kind == "bands"} == set(touched)
    assert {r.kind for name, r in records.items() if name not in touched} == {"same"}
    assert max(records[name].error for name in touched) < 1e-3


# --- quantised bases -----------------------------------------------------------------------------


class FourBits(nn.Module):
    """A linear that holds its weight as 4-bit codes under other names, as quantisers' linears do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dense(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


def quantised(folder):
    model = load(folder)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and "layers" in name:
                model.set_submodule(name, FourBits(module))
    return model


def test_a_base_that_is_quantised_when_the_delta_runs(pairs, tmp_path):
    base, tuned = pairs["small"]
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    model, wanted = quantised(base), load(merge(base, artifact, tmp_path / "merged"))
    before = text_logits(model)
    with pytest.raises(MismatchError, match="lacks 14 of the artifact's"):
        attach(model, artifact)
    dense, merged = load(base), dict(wanted.named_modules())
    with torch.no_grad():  # the 4-bit base and the delta, as one dense model
        for name, module in model.named_modules():
            if isinstance(module, FourBits):
                error = module.dense() - dense.get_submodule(name).weight
                merged[name].weight += error
    with attach(model, artifact, quantized_base=True) as attached:
        assert close(text_logits(model), text_logits(wanted), 0.02)
        assert attached.model is model
    assert torch.equal(text_logits(model), before)
    with attach(model, {"a": artifact}, quantized_base=True) as attached, attached.using("a"):
        assert close(text_logits(model), text_logits(wanted), 0.02)


def test_another_base_is_refused_though_it_is_quantised(pairs, tmp_path):
    base, tuned = pairs["small"]
    artifact = compress(base, tuned, tmp_path / "delta", **PLAN)
    other = copy_of(base, tmp_path / "other")
    rewrite(other, fine_tune(weights_of(base), seed=5))
    with pytest.raises(MismatchError, match="wrong base"):
        attach(quantised(other), artifact, quantized_base=True)


def test_a_delta_against_a_quantised_base(pairs, tmp_path):
    """A delta taken against the 4-bit values is right on those, and refused on the 16-bit ones."""
    base, tuned = pairs["small"]
    model = quantised(base)
    weights = weights_of(base)
    for name, module in model.named_modules():
        if isinstance(module, FourBits):
            weights[f"{name}.weight"] = module.dense()
    rough = copy_of(base, tmp_path / "rough")
    rewrite(rough, weights, torch.float32)
    artifact = compress(rough, tuned, tmp_path / "delta", **PLAN)
    wanted = text_logits(load(merge(rough, artifact, tmp_path / "merged")))
    with attach(model, artifact, quantized_base=True):
        assert close(text_logits(model), wanted, 0.02)
    with pytest.raises(MismatchError, match="wrong base"):
        attach(load(base), artifact)
