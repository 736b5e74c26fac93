"""Calibration text, as rows of token ids."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome.chats import chat_text
from deltacome.compression.calibration import Calibration, check_source
from deltacome.compression.conversations import as_messages
from deltacome.compression.written import write_answers, write_rows
from deltacome.errors import CalibrationError
from deltacome.pictures import Seen, load_processor, picture_row, seen_in, system_of
from deltacome.rows import Row
from deltacome.skeleton import load_tokenizer


@dataclass(frozen=True)
class Text:
    """A text of the source."""

    text: str
    is_chat: bool = False
    """Rendered by the chat template, which has written the special tokens."""
    opened: str = ""
    """If an answer is missing: the text up to where it begins."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that the tuned model is to answer."""

    ids: list[int]


def calibration_rows(
    asked: Calibration,
    tuned: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Rows of token ids, no more and no longer than asked for.

    Args:
        asked: its source is `self` (`written`); a `.txt` file (cut into rows); a `.jsonl` file with an
            object per line that has `text`, `messages`, `conversations`, or `prompt` and `answer`,
            with pictures too (`pictures`); or a data set on the Hub with such columns (needs the
            `datasets` package). The tuned model answers a `prompt` alone, and a chat that ends with
            the user's turn, if the row has room for an answer; a warning says how many.
        tuned: folder of the tuned model, for its tokenizer, template and (`self`) weights.
        on_step: called with the steps done and their total while the model writes.

    Raises:
        CalibrationError: the source is missing, malformed or empty, or a chat with pictures is longer
            than a row and cannot be cut.
        PictureError: a picture is missing or belongs nowhere, or no processor takes it.
    """
    tokenizer = load_tokenizer(tuned, refused=CalibrationError)
    if asked.source == "self":
        rows = [Row(ids) for ids in write_rows(asked, tokenizer, tuned, device, on_step)]
    else:
        drawn = _cut(_read_texts(asked, tokenizer), tokenizer, asked)
        sees = any(isinstance(one, Seen) for one in drawn)
        processor = load_processor(tuned) if sees else None
        prompts = [one.ids for one in drawn if isinstance(one, Prompt)]
        answered = []
        if prompts:
            warnings.warn(
                f"calibration {asked.source}: {len(prompts)} of its rows have no answer, and the tuned "
                "model writes it",
                stacklevel=2,
            )
            answered = write_answers(prompts, asked, tokenizer, tuned, device, on_step)
        whole, rows = map(Row, answered), []
        for one in drawn:
            if isinstance(one, Seen):
                one = _open(processor, one, asked.seq_len)
            rows.append(next(whole) if isinstance(one, Prompt) else one)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise CalibrationError(
            f"calibration {asked.source}: expected text, got no row of two tokens"
        )
    return rows


def _read_texts(asked: Calibration, tokenizer: Any) -> list[Text | Seen]:
    check_source(asked.source)
    path = Path(asked.source)
    if path.suffix == ".txt":
        return [Text(_read_file(path))]
    if path.suffix == ".jsonl":
        texts: list[Text | Seen] = []
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows in a string.
        for number, line in enumerate(_read_file(path).split("\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                texts.append(_text_of(_json(line, where), tokenizer, where, path.parent))
        return texts
    return _read_hub(asked.source, tokenizer, 4 * asked.samples)


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
            if item.get("tools"):
                raise CalibrationError(f"{where}: expected a chat with pictures or tools, got both")
            return seen
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return Text(item["text"])
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        return _chat(tokenizer, item["messages"], where, item.get("tools"))
    if isinstance(item, dict) and ({"prompt", "answer"} <= item.keys() or _is_prompt(item)):
        return _turn(item, tokenizer, where)
    raise CalibrationError(
        f"{where}: expected an object with text, messages, conversations, prompt and answer, or prompt "
        f"alone, got {item!r:.80}"
    )


def _is_prompt(item: dict[str, Any]) -> bool:
    """Whether a line is a prompt alone; beside other columns, one of those may be the answer."""
    return "prompt" in item and item.keys() <= {"prompt", "system"}


def _turn(item: dict[str, Any], tokenizer: Any, where: str) -> Text:
    """A question and its answer, or a question alone."""
    keys = [key for key in ("prompt", "answer") if key in item]
    for key in keys:
        if not isinstance(item[key], str | int | float):  # null would become the word None
            raise CalibrationError(f"{where}: expected a text as {key}, got {item[key]!r:.80}")
    turns = [
        {"role": role, "content": str(item[key])}
        for role, key in zip(("user", "assistant"), keys, strict=False)
    ]
    messages = [*system_of(item), *turns]
    if not tokenizer.chat_template:
        text = "".join(message["content"] for message in messages)
        return Text(text, opened="" if "answer" in item else text)
    return _chat(tokenizer, messages, where)


def _chat(tokenizer: Any, messages: list, where: str, tools: Any = None) -> Text:
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where}: has messages, but the tuned model has no chat template")
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    try:
        if isinstance(tools, str):  # as many data sets of the Hub have them
            tools = json.loads(tools)
        options = {"tools": tools} if tools else {}
        text, opened = chat_text(tokenizer, messages, **options), ""
        if last.get("role") in ("user", "tool"):
            opened = chat_text(tokenizer, messages, add_generation_prompt=True, **options)
        return Text(text, is_chat=True, opened=opened)
    except Exception as error:  # a template is a program and raises what it likes
        raise CalibrationError(f"{where}: the chat template refuses it: {error}") from error


def _read_hub(source: str, tokenizer: Any, items: int) -> list[Text | Seen]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CalibrationError(
            f"calibration {source}: no such file; to read it as a data set of the Hub, "
            "install the package `datasets`"
        ) from error
    try:
        stream = load_dataset(source, split="train", streaming=True)
        found = list(stream.take(items))
    except Exception as error:
        raise CalibrationError(f"calibration {source}: {error}") from error
    return [_text_of(one, tokenizer, f"{source}[{i}]", Path()) for i, one in enumerate(found)]


def _cut(texts: list[Text | Seen], tokenizer: Any, asked: Calibration) -> list[Row | Seen | Prompt]:
    """Cuts texts into rows of at most `seq_len` tokens, and draws `samples` of these.

    Chats with pictures stay whole. So does what lacks an answer, unless it fills a row by itself: then it
    is text like any other.

    A short remainder of a text is dropped: it would count like any other row, and a few tokens without
    what came before them say little.
    """
    seq_len = asked.seq_len
    rows: list[Row | Seen | Prompt] = []
    for one in texts:
        if isinstance(one, Seen):
            rows.append(one)
            continue
        opened = _tokens(tokenizer, one, one.opened)
        if 0 < len(opened) < seq_len:
            rows.append(Prompt(opened))
            continue
        ids = _tokens(tokenizer, one, one.text)
        pieces = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
        if len(pieces) > 1 and len(pieces[-1]) < seq_len / 4:
            pieces.pop()
        rows += map(Row, pieces)
    if len(rows) <= asked.samples:
        return rows
    return random.Random(asked.seed).sample(rows, asked.samples)


def _tokens(tokenizer: Any, of: Text, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=not of.is_chat)["input_ids"]) if text else []


def _open(processor: Any, seen: Seen, seq_len: int) -> Row:
    row = picture_row(processor, seen)
    if len(row) > seq_len:
        raise CalibrationError(
            f"{seen.where}: expected at most seq_len = {seq_len} tokens, got {len(row)} with its "
            "pictures, and these cannot be cut"
        )
    return row
