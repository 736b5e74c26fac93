"""Chats with pictures, as rows of calibration: what the tuned model's own processor makes of them.

Messages are those of transformers' chat templates: the content of a turn is a list of parts,
`{"type": "text", "text": …}` and `{"type": "image", "path": …}`. No family is named here: which tokens
stand for a picture, and what else the model is given (pixels, grids, kinds of tokens), is the processor's
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

from deltacome.compression.rows import Row
from deltacome.errors import CalibrationError

PLACES = ("path", "image", "url", "base64")
"""Where a part of a message has its picture: the first two name a file, or hold what a data set gives."""


@dataclass(frozen=True)
class Seen:
    """Messages with pictures that were not opened yet: of many only some are drawn."""

    messages: list[dict[str, Any]]
    where: str
    """What an error names."""


def seen_in(item: dict[str, Any], folder: Path, where: str) -> Seen | None:
    """The chat of a line that has pictures, or None if it has none.

    They are in the parts of its `messages`, or in `image` or `images` beside them, in the order of parts
    that say `{"type": "image"}` and nothing more, or beside `prompt` and `answer`.

    Raises:
        CalibrationError: a picture is not there (relative paths are in `folder`), or belongs nowhere.
    """
    given = item.get("images", item.get("image"))
    given = given if isinstance(given, list) else [] if given is None else [given]
    messages = item.get("messages")
    if messages is None and given and {"prompt", "answer"} <= item.keys():
        asked = [*({"type": "image"} for _ in given), _text(str(item["prompt"]))]
        turns = [("user", asked), ("assistant", [_text(str(item["answer"]))])]
        messages = [{"role": role, "content": content} for role, content in turns]
    if not isinstance(messages, list) or not any(map(_pictures, messages)):
        if given:
            raise CalibrationError(
                f"{where}: has {len(given)} pictures, and neither prompt and answer nor messages with a "
                "part of type image for each"
            )
        return None
    left = iter(given)
    found = [
        {**m, "content": [_placed(part, left, folder, where) for part in _parts(m)]}
        for m in messages
    ]
    if rest := list(left):
        raise CalibrationError(
            f"{where}: {len(rest)} more pictures than its messages have parts for"
        )
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


def _placed(part: Any, left: Iterator[Any], folder: Path, where: str) -> Any:
    """A part of a message with its picture, a file named from where it can be opened."""
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    if not any(part.get(key) is not None for key in PLACES):
        picture = next(left, None)
        if picture is None:
            raise CalibrationError(
                f"{where}: a part of its messages is a picture, and there is none"
            )
        part = {**part, "image": picture}
    for key in PLACES[:2]:
        if isinstance(part.get(key), str):
            file = folder / part[key]
            if not file.is_file():
                raise CalibrationError(f"{where}: expected a picture at {file}, found none")
            part = {**part, key: str(file)}
    return part
