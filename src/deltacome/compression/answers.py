"""Where the last answer of a chat begins, in a row of token ids.

An answer is what follows the opening that a chat template writes when it is asked for one:
`<|im_start|>assistant`, `[/INST]`. The opening's tokens are taken as they are within a chat, since many
tokenizers split it differently where it stands alone.

What follows the end of an answer in its row (`<|im_end|>`, a line break, what the model expects next)
counts with the answer. No fine-tune was trained on that, but it is where the model is unsure of many
words, and without it a delta of few bytes was farther from the tuned model (DESIGN.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltacome.chats import chat_text
from deltacome.errors import CalibrationError
from deltacome.skeleton import load_tokenizer

_ASKED, _SAID = "USERTEXT", "ANSWER"
First = Callable[[list[int]], int]


def answers_from(tuned: Path) -> First:
    """A function from a row to its first position that predicts a chat's last answer; 0 without one.

    Warns if it would find no answer in a chat of two turns that the template itself writes; all tokens
    then count alike, as they do without a template.

    Args:
        tuned: folder of the tuned model, for its tokenizer and template.
    """
    tokenizer = load_tokenizer(tuned, refused=CalibrationError)
    if not tokenizer.chat_template:
        return lambda row: 0
    opening = _opening(tokenizer)

    def first(row: list[int]) -> int:
        for start in range(len(row) - len(opening) - 1, 0, -1):
            if row[start : start + len(opening)] == opening:
                return start + len(opening) - 1
        return 0

    if not tokenizer.decode(opening).strip() or not _finds(first, tokenizer):
        warnings.warn(
            f"{tuned}: where answers begin in a chat of its template cannot be told from tokens: in "
            "calibration text questions count as much as answers",
            stacklevel=2,
        )
        return lambda row: 0
    return first


def _opening(tokenizer: Any) -> list[int]:
    """Tokens that a generation prompt adds, or if it adds none, all those between question and answer.

    Empty where they cannot be told.
    """
    asked, closed = (
        _chat(tokenizer, {"user": _ASKED}, add_generation_prompt=opens) for opens in (True, False)
    )
    adds = asked.startswith(closed) and asked != closed
    start = len(closed) if adds else asked.find(_ASKED) + len(_ASKED)
    return _between(tokenizer, asked + _SAID, start, len(asked))


def _finds(first: First, tokenizer: Any) -> bool:
    """Whether the answer of a chat is found, and no word of its question is taken for it."""
    text = _chat(tokenizer, {"user": _ASKED, "assistant": _SAID})
    row = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    begins = first(row) + 1
    until_question = _between(tokenizer, text, 0, text.find(_ASKED) + len(_ASKED))
    until_answer = _between(tokenizer, text, 0, text.find(_SAID))
    return len(until_question) < begins <= len(until_answer)


def _chat(tokenizer: Any, turns: dict[str, str], **options: Any) -> str:
    messages = [{"role": role, "content": said} for role, said in turns.items()]
    return chat_text(tokenizer, messages, **options)


def _between(tokenizer: Any, text: str, start: int, end: int) -> list[int]:
    """Tokens of a text that lie wholly between two of its character positions."""
    if not tokenizer.is_fast:  # slow ones do not say where a token lies
        return []
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(said["input_ids"], said["offset_mapping"], strict=True)
    return [token for token, (at, to) in pairs if at >= start and to <= end]
