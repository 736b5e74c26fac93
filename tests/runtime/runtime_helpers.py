"""Tiny random models of the families that differ in what a delta has to reach."""

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

VOCAB = 131
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**TINY, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(**TINY, sliding_window=16, query_pre_attn_scalar=12),
}


def make_base(name, folder, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    for key, parameter in model.named_parameters():
        with torch.no_grad():  # initial biases and norms of zeros and ones would hide mistakes
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() == 2 else 0.1))
            if "norm" in key and "gemma" not in name:
                parameter += 1
    model.save_pretrained(folder)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def some_ids(rows=2, length=9, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def assert_close(got, expected, tolerance=2e-5):
    """Equal up to rounding, relative to the largest logit."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"
