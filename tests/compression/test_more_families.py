"""Architectures that differ in where matrices lie and what they are called, end to end.

Each is a tiny random model of the real configuration class: compressed, merged, attached. Merged values
are base + terms; the attached base gives the logits of the merged model.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tiny_pairs import SIZES, make_tokenizer, rewrite, text_lines, weights_of
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

from deltacome import Artifact, attach, compress, merge
from deltacome.errors import UnsupportedError
from deltacome.format.codec import dense

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = SIZES | HEADS | {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
FAMILIES = {
    "GPT2LMHeadModel": lambda: GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=128, **ENDS
    ),
    "Gemma2ForCausalLM": lambda: Gemma2Config(
        **TEXT, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    ),
    "MixtralForCausalLM": lambda: MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2MoeForCausalLM": lambda: Qwen2MoeConfig(
        **TEXT, **MOE, shared_expert_intermediate_size=64
    ),
    "Qwen3MoeForCausalLM": lambda: Qwen3MoeConfig(**TEXT, **MOE, head_dim=32),
    "BertForMaskedLM": lambda: BertConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, **HEADS, pad_token_id=0
    ),
    "T5ForConditionalGeneration": lambda: T5Config(
        vocab_size=300, d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2, **ENDS
    ),
    "LlavaForConditionalGeneration": lambda: LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, image_size=28, patch_size=14, **HEADS
        ),
        image_token_id=299,
        pad_token_id=0,
    ),
}
RATIOS = {"GPT2LMHeadModel": 3.7, "LlavaForConditionalGeneration": 2}
"""What a tiny model has room for, its exact tensors being float32; 3 for the others."""
STREAMED = [name for name in FAMILIES if not re.match("Bert|T5", name)]


def make(name: str, config, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, name)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def moved(weights: dict, seed: int = 1) -> dict:
    """Every tensor moved a little, matrices by few directions."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, w in sorted(weights.items()):
        noise = torch.randn(w.shape, generator=generator)
        if w.ndim == 2:
            left = torch.randn(w.shape[0], 3, generator=generator)
            noise = left @ torch.randn(3, w.shape[1], generator=generator)
        scale = 0.1 * w.float().square().mean().sqrt() + 1e-3
        tuned[name] = (w.float() + scale * noise / max(1.0, float(noise.std()))).to(w.dtype)
    return tuned


def make_pair(name: str, folder: Path) -> tuple[Path, Path]:
    base = make(name, FAMILIES[name](), folder / "base")
    tuned = Path(shutil.copytree(base, folder / "tuned"))
    rewrite(tuned, moved(weights_of(base)), None)
    return base, tuned


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
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compressed")
    base, tuned = pairs[request.param]
    ratio = RATIOS.get(request.param, 3)
    artifact = compress(base, tuned, folder / "delta", ratio=ratio, calibration="none")
    assert artifact.ratio() == pytest.approx(ratio, rel=0.02)
    return Compressed(base, tuned, artifact, merge(base, artifact, folder / "merged"))


def load(folder: Path) -> PreTrainedModel:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model: PreTrainedModel) -> dict:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 290, (3, 11), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :6].flip(1)
    if model.config.model_type == "llava":
        ids[:, 1:5] = model.config.image_token_id
        inputs["pixel_values"] = torch.randn(3, 3, 28, 28, generator=generator)
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs_of(model)).logits


def test_every_matrix_that_a_layer_multiplies_by_is_packed(compressed):
    records, weights = compressed.artifact.manifest.records, weights_of(compressed.tuned)
    assert set(records) == set(weights)
    small = re.compile(r"norm|mlp\.gate\.|moe\.gate\.|position_ids")
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
            # It is the tuned matrix that comes back, not its transpose or another's.
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
