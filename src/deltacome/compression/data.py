"""Calibration text, as rows of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltacome.chats import chat_text
from deltacome.compression.calibration import Calibration, check_source
from deltacome.compression.conversations import as_messages
from deltacome.compression.written import write_rows
from deltacome.errors import CalibrationError
from deltacome.pictures import Seen, load_processor, picture_row, seen_in, system_of
from deltacome.rows import Row
from deltacome.skeleton import load_tokenizer

Text = tuple[str, bool]
"""A text, and whether it is a rendered chat: its template has written the special tokens."""


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
            `datasets` package).
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
        rows = [
            one if isinstance(one, Row) else _open(processor, one, asked.seq_len) for one in drawn
        ]
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
        return [(_read_file(path), False)]
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
        return item["text"], False
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        return _chat(tokenizer, item["messages"], where, item.get("tools"))
    if isinstance(item, dict) and {"prompt", "answer"} <= item.keys():
        for key in ("prompt", "answer"):
            if not isinstance(item[key], str | int | float):  # null would become the word None
                raise CalibrationError(f"{where}: expected a text as {key}, got {item[key]!r:.80}")
        asked = {"role": "user", "content": str(item["prompt"])}
        messages = [*system_of(item), asked, {"role": "assistant", "content": str(item["answer"])}]
        if not tokenizer.chat_template:
            return "".join(message["content"] for message in messages), False
        return _chat(tokenizer, messages, where)
    raise CalibrationError(
        f"{where}: expected an object with text, messages, conversations, or prompt and answer, got "
        f"{item!r:.80}"
    )


def _chat(tokenizer: Any, messages: list, where: str, tools: Any = None) -> Text:
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where}: has messages, but the tuned model has no chat template")
    try:
        if isinstance(tools, str):  # as many data sets of the Hub have them
            tools = json.loads(tools)
        return chat_text(tokenizer, messages, **({"tools": tools} if tools else {})), True
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


def _cut(texts: list[Text | Seen], tokenizer: Any, asked: Calibration) -> list[Row | Seen]:
    """Cuts texts into rows of at most `seq_len` tokens, and draws `samples` of these.

    Chats with pictures stay whole.

    A short remainder of a text is dropped: it would count like any other row, and a few tokens without
    what came before them say little.
    """
    seq_len = asked.seq_len
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
    if len(rows) <= asked.samples:
        return rows
    return random.Random(asked.seed).sample(rows, asked.samples)


def _open(processor: Any, seen: Seen, seq_len: int) -> Row:
    row = picture_row(processor, seen)
    if len(row) > seq_len:
        raise CalibrationError(
            f"{seen.where}: expected at most seq_len = {seq_len} tokens, got {len(row)} with its "
            "pictures, and these cannot be cut"
        )
    return row
