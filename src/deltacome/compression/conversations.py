"""Turns chats in the format of ShareGPT and LLaVA into the messages of a chat template.

A turn in it is `{"from": "human", "value": "…"}`; where a picture enters, its text says `<image>`.
"""

from __future__ import annotations

import re
from typing import Any

from deltacome.errors import CalibrationError
from deltacome.pictures import given_in, system_of

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles that have another name in templates."""
MARK = re.compile(r"\s*<image>\s*")


def as_messages(item: dict[str, Any], where: str) -> dict[str, Any]:
    """An object of a data set with its `conversations` as `messages`, and its `system` as their first.

    Any other is returned as it is.

    Raises:
        CalibrationError: a turn lacks who speaks or what is said.
    """
    messages, turns = item.get("messages"), item.get("conversations")
    if messages is None and isinstance(turns, list):
        sees = bool(given_in(item))
        messages = [_message(turn, sees, where) for turn in turns]
    if not isinstance(messages, list):
        return item
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    before = [] if first.get("role") == "system" else system_of(item)
    rest = {key: value for key, value in item.items() if key != "conversations"}
    return {**rest, "messages": [*before, *messages]}


def _message(turn: Any, sees: bool, where: str) -> dict[str, Any]:
    said = turn if isinstance(turn, dict) else {}
    role, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
    if not isinstance(role, str) or not isinstance(text, str):
        raise CalibrationError(
            f"{where}: expected turns with from and value, or role and content, got {turn!r:.80}"
        )
    role = ROLES.get(role, role)
    if not sees or not MARK.search(text):
        return {"role": role, "content": text}
    parts: list[dict[str, str]] = []
    for i, words in enumerate(MARK.split(text)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": words}] if words else []
    return {"role": role, "content": parts}
