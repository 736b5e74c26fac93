"""Tiny random bases and fine-tunes of them, of several families, with a tokenizer and a template."""

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, layer_types=LAYERS
    ),
    "phi3": lambda: Phi3Config(**SIZES, tie_word_embeddings=False),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "one two three four five six seven eight nine ten plus minus times is what the sum of"
SMALL = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def text_lines(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(3, 20))) for _ in range(count)]


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(text_lines(50), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def fine_tune(weights: dict, *, rank: int = 4, size: float = 0.2, seed: int = 1) -> dict:
    """Moves every tensor: matrices along a few directions that fall steeply, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, w in sorted(weights.items()):
        w = w.float()
        if w.ndim == 2:
            left = torch.randn(w.shape[0], rank, generator=generator)
            right = torch.randn(rank, w.shape[1], generator=generator)
            fall = 0.5 ** torch.arange(rank)
            delta = (left * fall) @ right / w.shape[1] ** 0.5
            delta += 0.1 * torch.randn(w.shape, generator=generator) / w.shape[1] ** 0.5
            tuned[name] = w + size * delta
        else:
            tuned[name] = w + 0.05 * torch.randn(w.shape, generator=generator)
    return tuned


def make_base(
    family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, families: dict = FAMILIES
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL) if family == "small" else families[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:  # initial norms and biases of ones and zeros would hide mistakes
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_pair(family: str, folder: Path) -> tuple[Path, Path]:
    base, tuned = folder / "base", folder / "tuned"
    make_base(family, base)
    shutil.copytree(base, tuned)
    rewrite(tuned, fine_tune(weights_of(base)))
    return base, tuned


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, weights: dict, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Replaces a checkpoint's weights; `dtype` None keeps those of the tensors."""
    made = {name: (w if dtype is None else w.to(dtype)).contiguous() for name, w in weights.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def write_jsonl(file: Path, items: list) -> str:
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(file)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder → its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
