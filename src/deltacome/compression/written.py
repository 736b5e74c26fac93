"""Calibration text that the tuned model writes itself, so that no data set is needed.

Half of the rows are conversations: with the chat template opened at the user's turn, an
instruction-tuned model invents the question too (as in Magpie, Xu et al. 2024, arXiv 2406.08464), then
answers it. The other half starts from a random token (as in LLM-QAT, Liu et al. 2023,
arXiv 2305.17888), so that the rest of what the model knows is covered. The text is sampled, since greedy
text repeats itself. It also answers prompts that a file has no answers for.

The whole tuned model is in memory while it writes, in float32 on a CPU that is slow at 16 bit. Where it
does not fit, give a file instead. Nor does it write pictures: for a vision-language model, give a file
with some (`pictures`).
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from deltacome.chats import chat_text
from deltacome.compression.calibration import Calibration, check_tokens, positions_of
from deltacome.skeleton import model_class, read_config

_MARK = "USERTEXT"
_QUESTION_TOKENS = 64
_BATCH = 32


def write_rows(
    asked: Calibration,
    tokenizer: Any,
    tuned: Path,
    device: str,
    on_step: Callable[[int, int], None],
) -> list[list[int]]:
    """Has the tuned model write rows; the global random state is left as it was."""
    samples, seq_len = asked.samples, asked.seq_len
    model = _load(tuned, device)
    draw = random.Random(asked.seed)
    special = set(tokenizer.all_special_ids)
    size = len(model.get_input_embeddings().weight)  # a tokenizer may have more tokens
    ordinary = [i for i in range(min(len(tokenizer), size)) if i not in special]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    opening = _opening(tokenizer)
    chats = samples // 2 if opening else 0
    rows: list[list[int]] = []
    with _seeded(asked.seed, device):
        for start in range(0, samples, _BATCH):
            size = min(_BATCH, samples - start)
            in_chat = max(0, min(chats - start, size))
            if in_chat:
                rows += _converse(model, tokenizer, [opening] * in_chat, seq_len)
            if size > in_chat:
                prompts = [[*bos, draw.choice(ordinary)] for _ in range(size - in_chat)]
                rows += _continue(model, tokenizer, prompts, seq_len)
            on_step(start + size, samples)
    del model
    gc.collect()
    return rows


def write_answers(
    prompts: list[list[int]],
    asked: Calibration,
    tokenizer: Any,
    tuned: Path,
    device: str,
    on_step: Callable[[int, int], None],
) -> list[list[int]]:
    """Has the tuned model answer prompts, each shorter than a row; returns rows in their order."""
    model = _load(tuned, device)
    check_tokens(asked.source, prompts, len(model.get_input_embeddings().weight))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding in a batch
    rows: dict[int, list[int]] = {}
    with _seeded(asked.seed, device):
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            found = _continue(model, tokenizer, [prompts[i] for i in batch], asked.seq_len)
            rows.update(zip(batch, found, strict=True))
            on_step(start + len(batch), len(order))
    del model
    gc.collect()
    return [rows[i] for i in range(len(prompts))]


def _load(tuned: Path, device: str) -> Any:
    kind = model_class(read_config(tuned), tuned)  # a vision-language model can write too
    dtype = torch.float32 if device == "cpu" and _slow_at_16_bit() else "auto"
    model: Any = kind.from_pretrained(tuned, dtype=dtype, trust_remote_code=False)
    model.to(device).eval()
    # The model as it is, without its makers' settings against repetition and the like.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        yield


def _slow_at_16_bit() -> bool:
    """Whether this CPU lacks 16-bit arithmetic: dozens of rows are then written faster in float32."""
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def _opening(tokenizer: Any) -> list[int]:
    """Token ids of a chat up to where the user's words begin; empty without a template."""
    if not tokenizer.chat_template:
        return []
    text = chat_text(tokenizer, [{"role": "user", "content": _MARK}])
    return tokenizer(text.split(_MARK)[0], add_special_tokens=False)["input_ids"]


def _converse(
    model: Any, tokenizer: Any, openings: list[list[int]], seq_len: int
) -> list[list[int]]:
    """A question invented by the model, and its answer to it."""
    limit = len(openings[0]) + min(_QUESTION_TOKENS, seq_len // 2)
    drafts = _continue(model, tokenizer, openings, limit)
    prompts = []
    for row, opening in zip(drafts, openings, strict=True):
        question = tokenizer.decode(row[len(opening) :], skip_special_tokens=True).strip()
        asked = [{"role": "user", "content": question}]
        text = chat_text(tokenizer, asked, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return _continue(model, tokenizer, prompts, seq_len)


def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], seq_len: int
) -> list[list[int]]:
    """Samples a continuation of each prompt, up to `seq_len` tokens in all."""
    prompts = [prompt[: seq_len - 1] for prompt in prompts]
    longest = max(len(prompt) for prompt in prompts)
    shortest = min(len(prompt) for prompt in prompts)
    check_tokens("self", prompts, len(model.get_input_embeddings().weight))
    # Nobody looks at padding. The tokenizer's own may have been added without a row for the model.
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # What the longest prompt gets beyond its row is dropped; there may be no position for it.
        max_new_tokens=min(seq_len - shortest, (positions_of(model.config) or math.inf) - longest),
        pad_token_id=0,
    )
    rows = []
    for prompt, full in zip(prompts, output.tolist(), strict=True):
        rows.append((prompt + _until_end(full[longest:], model, tokenizer))[:seq_len])
    return rows


def _until_end(tokens: list[int], model: Any, tokenizer: Any) -> list[int]:
    """Tokens up to and including the first that ends a text; after it there is padding."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens
