"""Calibration text, as rows of token ids.

The default, `self`, needs no data set: the tuned model writes the text. Half of the rows are
conversations: with the chat template opened at the user's turn, an instruction-tuned model invents
the question too (as in Magpie, Xu et al. 2024, arXiv 2406.08464), then answers it. The other half
starts from a random token (as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888), so that the rest of
what the model knows is covered. Sampling, not greedy: greedy text repeats itself.

`self` holds the whole tuned model in memory while it writes, in float32 on a CPU that is slow at 16 bit.
Where it does not fit, give a file. It has no pictures either: for a vision-language model, give a file
with some (`pictures`).
"""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from deltacome.chats import chat_text
from deltacome.compression.conversations import as_messages
from deltacome.errors import CalibrationError
from deltacome.pictures import Seen, load_processor, picture_row, seen_in
from deltacome.rows import Row
from deltacome.skeleton import load_tokenizer, model_class, read_config

_MARK = "USERTEXT"
_QUESTION_TOKENS = 64
Text = tuple[str, bool]
"""A text, and whether it is a rendered chat: its template has written the special tokens."""


def calibration_rows(
    source: str,
    tuned: Path,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Rows of token ids, at most `samples` of at most `seq_len` tokens.

    Args:
        source: `self`; a `.txt` file (cut into rows); a `.jsonl` file with an object per line that
            has `text`, `messages`, `conversations`, or `prompt` and `answer`, with pictures too
            (`pictures`); or a data set on the Hub with such columns (needs the `datasets` package).
        tuned: folder of the tuned model, for its tokenizer, template and (`self`) weights.
        on_step: called with steps done and in all while the model writes.

    Raises:
        CalibrationError: the source is missing, malformed or empty, or a chat with pictures is longer
            than a row: they cannot be cut.
        PictureError: a picture is missing or belongs nowhere, or no processor takes it.
    """
    tokenizer = load_tokenizer(tuned, refused=CalibrationError)
    if source == "self":
        written = _write(tokenizer, tuned, samples, seq_len, seed, device, on_step)
        rows = [Row(ids) for ids in written]
    else:
        texts = _read_texts(source, tokenizer, samples)
        drawn = _cut(texts, tokenizer, samples, seq_len, seed)
        sees = any(isinstance(one, Seen) for one in drawn)
        processor = load_processor(tuned) if sees else None
        rows = [one if isinstance(one, Row) else _open(processor, one, seq_len) for one in drawn]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise CalibrationError(f"calibration {source}: expected text, got no row of two tokens")
    return rows


def check_source(source: str) -> None:
    """Refuses a file that is not there, or of another kind, before anything is done for its rows.

    Raises:
        CalibrationError: names it.
    """
    path = Path(source)
    if (path.suffix in (".txt", ".jsonl")) != path.is_file():
        raise CalibrationError(f"calibration {source}: expected a .txt or .jsonl file, found none")


def check_length(seq_len: int, tuned: Path) -> None:
    """Refuses rows that are longer than a model has positions for, where its configuration says.

    Raises:
        CalibrationError: says how many there are.
    """
    limit = positions_of(read_config(tuned))
    if limit is not None and seq_len > limit:
        raise CalibrationError(
            f"seq_len: expected at most {limit}, the positions of {tuned}, got {seq_len}"
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, where its configuration says."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def row_shares(counts_BL: Tensor) -> Tensor:
    """What each token that counts weighs, (T,), so that every row weighs 1 in all."""
    in_row_B1 = counts_BL.sum(1, keepdim=True)
    return (1.0 / in_row_B1).expand(counts_BL.shape)[counts_BL]


def _read_texts(source: str, tokenizer: Any, samples: int) -> list[Text | Seen]:
    check_source(source)
    path = Path(source)
    if path.suffix == ".txt":
        return [(_read_file(path), False)]
    if path.suffix == ".jsonl":
        texts: list[Text | Seen] = []
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows in a string.
        for number, line in enumerate(_read_file(path).split("\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                texts.append(_text_of(_json(line, where), tokenizer, where, path.parent))
        return texts
    return _read_hub(source, tokenizer, samples)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration {path}: expected text in UTF-8: {error}") from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: not valid JSON: {error}") from error


def _text_of(item: Any, tokenizer: Any, where: str, folder: Path) -> Text | Seen:
    if isinstance(item, dict):
        item = as_messages(item, where)
        if seen := seen_in(item, folder, where):
            return seen
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return item["text"], False
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        return _chat(tokenizer, item["messages"], where)
    if isinstance(item, dict) and {"prompt", "answer"} <= item.keys():
        for key in ("prompt", "answer"):
            if not isinstance(item[key], str | int | float):  # null would be the word None
                raise CalibrationError(f"{where}: expected a text as {key}, got {item[key]!r:.80}")
        turns = [("user", str(item["prompt"])), ("assistant", str(item["answer"]))]
        if not tokenizer.chat_template:
            return "".join(text for _, text in turns), False
        return _chat(tokenizer, [{"role": role, "content": text} for role, text in turns], where)
    raise CalibrationError(
        f"{where}: expected an object with text, messages, conversations, or prompt and answer, got "
        f"{item!r:.80}"
    )


def _chat(tokenizer: Any, messages: list, where: str) -> Text:
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where}: has messages, but the tuned model has no chat template")
    try:
        return chat_text(tokenizer, messages), True
    except Exception as error:  # a template is a program and raises what it likes
        raise CalibrationError(f"{where}: the chat template refuses it: {error}") from error


def _read_hub(source: str, tokenizer: Any, samples: int) -> list[Text | Seen]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CalibrationError(
            f"calibration {source}: no such file; to read it as a data set of the Hub, "
            "install the package `datasets`"
        ) from error
    try:
        stream = load_dataset(source, split="train", streaming=True)
        items = list(stream.take(4 * samples))
    except Exception as error:
        raise CalibrationError(f"calibration {source}: {error}") from error
    return [_text_of(one, tokenizer, f"{source}[{i}]", Path()) for i, one in enumerate(items)]


def _cut(
    texts: list[Text | Seen], tokenizer: Any, samples: int, seq_len: int, seed: int
) -> list[Row | Seen]:
    """Texts into rows of at most `seq_len` tokens, of which `samples` are drawn.

    Chats with pictures stay whole.

    What cutting leaves over of a text is dropped where it is short: a row counts like any other, and a
    few tokens without what came before them say little.
    """
    rows: list[Row | Seen] = []
    for one in texts:
        if isinstance(one, Seen):
            rows.append(one)
            continue
        text, is_chat = one
        ids = list(tokenizer(text, add_special_tokens=not is_chat)["input_ids"])
        pieces = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
        if len(pieces) > 1 and len(pieces[-1]) < seq_len / 4:
            pieces.pop()
        rows += map(Row, pieces)
    if len(rows) <= samples:
        return rows
    return random.Random(seed).sample(rows, samples)


def _open(processor: Any, seen: Seen, seq_len: int) -> Row:
    row = picture_row(processor, seen)
    if len(row) > seq_len:
        raise CalibrationError(
            f"{seen.where}: expected at most seq_len = {seq_len} tokens, got {len(row)} with its "
            "pictures, and these cannot be cut"
        )
    return row


def _write(
    tokenizer: Any,
    tuned: Path,
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
    on_step: Callable[[int, int], None],
) -> list[list[int]]:
    """Lets the tuned model write; the global random state is left as it was."""
    kind = model_class(read_config(tuned), tuned)  # a model that sees can write, too
    dtype = torch.float32 if device == "cpu" and _slow_at_16_bit() else "auto"
    model: Any = kind.from_pretrained(tuned, dtype=dtype, trust_remote_code=False)
    model.to(device).eval()
    # As the model is, without what its makers set against repetition and the like.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    draw = random.Random(seed)
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    opening = _opening(tokenizer)
    chats = samples // 2 if opening else 0
    rows: list[list[int]] = []
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        for start in range(0, samples, 32):
            size = min(32, samples - start)
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


def _slow_at_16_bit() -> bool:
    """Whether this CPU has no arithmetic for 16 bit: rows by the dozen are sooner written in float32."""
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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(prompts), longest), pad)
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
        # What the longest goes on to beyond its row is dropped; there may be no position for it.
        max_new_tokens=min(seq_len - shortest, (positions_of(model.config) or math.inf) - longest),
        pad_token_id=pad,
    )
    rows = []
    for prompt, full in zip(prompts, output.tolist(), strict=True):
        rows.append((prompt + _until_end(full[longest:], model, tokenizer))[:seq_len])
    return rows


def _until_end(tokens: list[int], model: Any, tokenizer: Any) -> list[int]:
    """Tokens up to and with the first that ends a text; after it there is padding."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens
