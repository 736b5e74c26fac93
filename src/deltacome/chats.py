"""The text of a chat, as a model's template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PROBE = "PROBE"


def chat_text(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    """What a tokenizer's chat template makes of messages.

    The templates of some vision-language models take text only in parts, `[{"type": "text", "text": …}]`,
    and write nothing when given a string: they get parts.

    Args:
        tokenizer: with a chat template.
        messages: `{"role": …, "content": …}` each.
        options: of `apply_chat_template`.

    Raises:
        Exception: of any kind, since a template is a program.
    """
    if _takes_parts_alone(tokenizer):
        messages = [_in_parts(message) for message in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _takes_parts_alone(tokenizer: Any) -> bool:
    plain = {"role": "user", "content": _PROBE}
    return not _says(tokenizer, plain) and _says(tokenizer, _in_parts(plain))


def _says(tokenizer: Any, message: dict[str, Any]) -> bool:
    try:
        return _PROBE in tokenizer.apply_chat_template([message], tokenize=False)
    except Exception:  # any kind, as above: a template does not write what it refuses
        return False


def _in_parts(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
