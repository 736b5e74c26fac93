"""Tiny random models that differ in where matrices lie and what they are called."""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
from tiny_pairs import SIZES, make_tokenizer, rewrite, weights_of
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = SIZES | HEADS | {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
FAMILIES = {
    "GPT2LMHeadModel": lambda: GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=128, **ENDS
    ),
    "GPTJForCausalLM": lambda: GPTJConfig(  # blocks return tuples; the head has a bias
        vocab_size=300, n_embd=64, n_layer=3, n_head=2, rotary_dim=16, n_positions=128, **ENDS
    ),
    "Gemma2ForCausalLM": lambda: Gemma2Config(
        **TEXT, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    ),
    "MambaForCausalLM": lambda: MambaConfig(  # multiplies by a linear's weight itself
        vocab_size=300, hidden_size=64, state_size=8, num_hidden_layers=3, time_step_rank=4, **ENDS
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
RATIOS = {"GPT2LMHeadModel": 3.7, "GPTJForCausalLM": 4, "LlavaForConditionalGeneration": 2}
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
    """Moves every tensor a little, matrices along few directions."""
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


def make_vision(folder: Path) -> tuple[Path, Path]:
    """A text base, and a vision-language model made from it with tokens added."""
    config: LlavaConfig = FAMILIES["LlavaForConditionalGeneration"]()
    base = make("LlamaForCausalLM", config.text_config, folder / "base")
    config.text_config.vocab_size += 4
    tuned = make("LlavaForConditionalGeneration", config, folder / "tuned", seed=1)
    weights = weights_of(tuned)
    for name, w in moved(weights_of(base)).items():
        inside = "language_model." + name
        weights[inside] = torch.cat([w, weights[inside][len(w) :]]) if len(w) == 300 else w
    rewrite(tuned, weights, None)
    return base, tuned


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
