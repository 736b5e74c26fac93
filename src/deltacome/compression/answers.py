"""Where the last answer of a chat lies, in a row of token ids.

An answer is what follows the opening that a chat template writes when it is asked for one:
`<|im_start|>assistant`, `[/INST]`. Its tokens are taken as they are within a chat, since many tokenizers
split them otherwise where they stand alone. It ends with the token by which the template closes it,
`<|im_end|>`: what follows (a line break, another chat) no fine-tune was trained on and nobody asks for.
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
Answer = Callable[[list[int]], slice | None]


def answers_of(tuned: Path) -> Answer:
    """What tells the positions of a row that predict the last answer of a chat and its end, or that
    there is none.

    Where no answer would be found, in a chat of two turns that the template itself writes, a warning
    says so: all tokens count alike then, as they do without a template.

    Args:
        tuned: folder of the tuned model, for its tokenizer and template.
    """
    tokenizer = load_tokenizer(tuned, refused=CalibrationError)
    if not tokenizer.chat_template:
        return lambda row: None
    opening, end = _opening(tokenizer), _end(tokenizer)

    def answer(row: list[int]) -> slice | None:
        for start in range(len(row) - len(opening) - 1, 0, -1):
            if row[start : start + len(opening)] == opening:
                begins = start + len(opening)
                ends = row.index(end, begins) if end in row[begins:] else None
                return slice(begins - 1, ends)
        return None

    if not tokenizer.decode(opening).strip() or not _finds(answer, tokenizer):
        warnings.warn(
            f"{tuned}: where answers begin in a chat of its template cannot be told by tokens: in "
            "calibration text questions weigh like answers",
            stacklevel=2,
        )
        return lambda row: None
    return answer


def _opening(tokenizer: Any) -> list[int]:
    """Tokens between a question and what would be its answer, or the last of them that are no part of
    how a question ends; none where they cannot be told."""
    asked, closed = (
        _chat(tokenizer, {"user": _ASKED}, add_generation_prompt=opens) for opens in (True, False)
    )
    adds = asked.startswith(closed) and asked != closed
    start = len(closed) if adds else asked.find(_ASKED) + len(_ASKED)
    return _between(tokenizer, asked + _SAID, start, len(asked))


def _end(tokenizer: Any) -> int | None:
    """The token that closes an answer; None where it is a word, which an answer may have too."""
    text = _chat(tokenizer, {"user": _ASKED, "assistant": _SAID})
    closing = _between(tokenizer, text, text.rfind(_SAID) + len(_SAID), len(text))
    added = set(tokenizer.get_added_vocab().values())
    return closing[0] if closing and closing[0] in added else None


def _finds(answer: Answer, tokenizer: Any) -> bool:
    """Whether the answer of a chat is found, and no word of its question is taken for it."""
    text = _chat(tokenizer, {"user": _ASKED, "assistant": _SAID})
    row = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = answer(row)
    begins = 0 if found is None else found.start + 1
    until_question = _between(tokenizer, text, 0, text.find(_ASKED) + len(_ASKED))
    until_answer = _between(tokenizer, text, 0, text.find(_SAID))
    return len(until_question) < begins <= len(until_answer)


def _chat(tokenizer: Any, turns: dict[str, str], **options: Any) -> str:
    messages = [{"role": role, "content": said} for role, said in turns.items()]
    return chat_text(tokenizer, messages, **options)


def _between(tokenizer: Any, text: str, start: int, end: int) -> list[int]:
    """Tokens of a text that lie wholly within two of its characters."""
    if not tokenizer.is_fast:  # others do not say where a token lies
        return []
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(said["input_ids"], said["offset_mapping"], strict=True)
    return [token for token, (at, to) in pairs if at >= start and to <= end]
