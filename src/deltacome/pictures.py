"""Chats with pictures as rows, as a model's own processor makes them.

Messages are those of transformers' chat templates: the content of a turn is a list of parts,
`{"type": "text", "text": …}` and `{"type": "image", "path": …}`. No family is named here: which tokens
stand for a picture, and what else the model is given (pixels, grids, kinds of tokens), is up to the
processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

from deltacome.errors import PictureError
from deltacome.rows import Row

PLACES = ("path", "image", "url", "base64")
"""Keys of a part's picture: the first two name a file, or hold what a data set gives."""


@dataclass(frozen=True)
class Seen:
    """Messages whose pictures are not opened yet: of many chats, only some are drawn."""

    messages: list[dict[str, Any]]
    where: str
    """What an error names."""


def seen_in(item: dict[str, Any], folder: Path, where: str) -> Seen | None:
    """The chat of a line that has pictures, or None if it has none.

    The pictures are in the parts of its `messages`, or in `image` or `images`: beside `messages`, in the
    order of the parts that say only `{"type": "image"}`, or beside `prompt` and `answer`.

    Raises:
        PictureError: a picture is missing (relative paths are resolved in `folder`) or has no place in
            the chat, or a prompt or answer is not text.
    """
    given = given_in(item)
    messages = item.get("messages")
    if messages is None and given and {"prompt", "answer"} <= item.keys():
        prompt, answer = (_string(item, key, where) for key in ("prompt", "answer"))
        asked = question(prompt, [{"type": "image"} for _ in given])
        said = {"role": "assistant", "content": [_text(answer)]}
        messages = [*system_of(item), asked, said]
    if not isinstance(messages, list) or not any(map(_pictures, messages)):
        if given:
            raise PictureError(
                f"{where}: has {len(given)} pictures, and neither prompt and answer nor messages with a "
                "part of type image for each"
            )
        return None
    left = iter(given)
    found = []
    for m in messages:
        parts = [_placed(part, left, folder, where) for part in _parts(m)]
        # A turn that calls a tool may have no content; how to write that is up to the template.
        found.append({**m, "content": parts} if parts else m)
    if rest := list(left):
        raise PictureError(f"{where}: {len(rest)} more pictures than its messages have parts for")
    return Seen(found, where)


def system_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The turn that a line's `system` stands for, in a list; an empty one if it has none."""
    text = item.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def given_in(item: dict[str, Any]) -> list[Any]:
    """What a line has in `image` or `images`; a data set with both columns leaves one of them null."""
    images = item.get("images")
    given = item.get("image") if images is None else images
    return given if isinstance(given, list) else [] if given is None else [given]


def question(prompt: str, pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A user's turn: pictures, as parts of a message, and what is asked about them."""
    return {"role": "user", "content": [*pictures, _text(prompt)]}


def load_processor(folder: str | Path, revision: str | None = None) -> Any:
    """The processor of a vision-language model, from its folder or the Hub.

    Raises:
        PictureError: there is none.
    """
    try:
        found = AutoProcessor.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except Exception as error:  # which one depends on what is missing
        raise PictureError(f"{folder}: expected a processor for pictures: {error}") from error
    if not hasattr(found, "image_processor"):  # for a text-only model it is the tokenizer
        kind = type(found).__name__
        raise PictureError(f"{folder}: expected a processor for pictures, got {kind}")
    return found


def picture_row(processor: Any, seen: Seen, *, opens: bool = False) -> Row:
    """What a model is given for a chat with pictures.

    Args:
        processor: what `load_processor` returned.
        opens: the row ends where the model's next turn begins.

    Raises:
        PictureError: the processor refuses the messages, or gives no tensors for their pictures.
    """
    try:
        inputs = processor.apply_chat_template(
            seen.messages,
            tokenize=True,
            add_generation_prompt=opens,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # templates and image processors may raise anything
        raise PictureError(f"{seen.where}: the processor refuses it: {error}") from error
    (ids,) = inputs.pop("input_ids").tolist()
    inputs.pop("attention_mask", None)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    names = [name for name in processor.image_processor.model_input_names if name in inputs]
    if not tensors or not tensors.keys() >= set(names):
        got = ", ".join(f"{name} ({type(value).__name__})" for name, value in inputs.items())
        raise PictureError(
            f"{seen.where}: expected tensors for its pictures from {type(processor).__name__}, got "
            f"{got or 'nothing'}"
        )
    return Row(ids, tensors)


def _string(item: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(item[key], str | int | float):  # null would become the word None
        raise PictureError(f"{where}: expected a text as {key}, got {item[key]!r:.80}")
    return str(item[key])


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if content is None:
        return []
    return content if isinstance(content, list) else [_text(str(content))]


def _pictures(message: Any) -> bool:
    return any(isinstance(part, dict) and part.get("type") == "image" for part in _parts(message))


def _placed(part: Any, left: Iterator[Any], folder: Path, where: str) -> Any:
    """A part of a message with its picture; a file is named by a path from which it can be opened."""
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    if not any(part.get(key) is not None for key in PLACES):
        picture = next(left, None)
        if picture is None:
            raise PictureError(f"{where}: its messages have more parts of type image than pictures")
        part = {key: value for key, value in part.items() if key not in PLACES} | {"image": picture}
    for key in PLACES[:2]:
        if isinstance(part.get(key), str):
            file = folder / part[key]
            if not file.is_file():
                raise PictureError(f"{where}: expected a picture at {file}, found none")
            part = {**part, key: str(file)}
    return part
