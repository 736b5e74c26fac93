"""Chats with pictures, as rows of calibration: what the tuned model's own processor makes of them.

Messages are those of transformers' chat templates: the content of a turn is a list of parts,
`{"type": "text", "text": …}` and `{"type": "image", "path": …}`. No family is named here: which tokens
stand for a picture, and what else the model is given (pixels, grids, kinds of tokens), is the processor's
matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

from deltacome.compression.rows import Row
from deltacome.errors import CalibrationError

PLACES = ("path", "image")
"""Where a part of a message has its picture: a file, or under `image` what a data set gives instead."""


@dataclass(frozen=True)
class Seen:
    """Messages with pictures that were not opened yet: of many only some are drawn."""

    messages: list[dict[str, Any]]
    where: str
    """What an error names."""


def seen_in(item: dict[str, Any], folder: Path, where: str) -> Seen | None:
    """The chat of a line that has pictures: in its `messages`, or one beside `prompt` and `answer`.

    Raises:
        CalibrationError: a picture is not there; relative paths are those in `folder`.
    """
    if item.get("image") is not None and {"prompt", "answer"} <= item.keys():
        asked = [{"type": "image", "image": item["image"]}, _text(str(item["prompt"]))]
        turns = [("user", asked), ("assistant", [_text(str(item["answer"]))])]
        messages = [{"role": role, "content": content} for role, content in turns]
    else:
        messages = item.get("messages")
    if not isinstance(messages, list) or not any(map(_pictures, messages)):
        return None
    found = [
        {**m, "content": [_placed(part, folder, where) for part in _parts(m)]} for m in messages
    ]
    return Seen(found, where)


def opener(tuned: Path, seq_len: int) -> Callable[[Seen], Row]:
    """What makes a row of messages, by the processor of the tuned model.

    Raises (from the call):
        CalibrationError: there is no processor, it refuses the messages, or the row is longer than
            `seq_len` tokens: a picture cannot be cut.
    """

    @cache
    def processor() -> Any:
        try:
            return AutoProcessor.from_pretrained(tuned, trust_remote_code=False)
        except Exception as error:  # which one depends on what is missing
            raise CalibrationError(
                f"{tuned}: expected a processor for pictures of calibration: {error}"
            ) from error

    def row(seen: Seen) -> Row:
        made = processor()
        try:
            inputs = made.apply_chat_template(
                seen.messages, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template and an image processor raise what they like
            raise CalibrationError(f"{seen.where}: the processor refuses it: {error}") from error
        (ids,) = inputs.pop("input_ids").tolist()
        inputs.pop("attention_mask", None)
        if len(ids) > seq_len:
            raise CalibrationError(
                f"{seen.where}: expected at most seq_len = {seq_len} tokens, got {len(ids)} with its "
                "pictures, and these cannot be cut"
            )
        return Row(ids, {n: v for n, v in inputs.items() if isinstance(v, Tensor)})

    return row


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else [_text(str(content))]


def _pictures(message: Any) -> bool:
    return any(isinstance(part, dict) and part.get("type") == "image" for part in _parts(message))


def _placed(part: Any, folder: Path, where: str) -> Any:
    """A part of a message, its file named from where it can be opened."""
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    for key in PLACES:
        if isinstance(part.get(key), str):
            file = folder / part[key]
            if not file.is_file():
                raise CalibrationError(f"{where}: expected a picture at {file}, found none")
            part = {**part, key: str(file)}
    return part
