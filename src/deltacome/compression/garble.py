"""Chats with garbled questions, for the sweep and the last step.

What a fine-tune was trained on, and questions much like it, it answers without a doubt. On such text
little depends on what is lost and a delta is soon close, and where the fine-tune is unsure the same delta
can be far from it. A question in which some tokens are exchanged for other questions' tokens is one that
it was not trained on. Nobody knows its right answer, and nobody needs to: both steps are after the
probabilities that the tuned model gives, and it gives them for any question. The same is done with mixed
pictures where one network is to become the same function as another (Beyer et al. 2022, arXiv
2106.05237).

Measured: `benchmarks/tables/known.py`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path

from deltacome.compression.answers import First
from deltacome.errors import CalibrationError
from deltacome.rows import Row
from deltacome.skeleton import load_tokenizer

SHARE = 0.3
"""Probability that a token of a question is exchanged."""


def garbled(rows: Sequence[Row], first: First, spared: Collection[int], seed: int) -> list[Row]:
    """A garbled copy of each chat: same length, same answer, some tokens of the question exchanged.

    What all questions begin and end with is taken for the chat template's and stays. Texts, and rows with
    pictures, have no copy: in a text everything counts, and is a question and an answer at once.

    Args:
        rows: calibration rows.
        first: gives the position of a row that predicts the first token of its answer; 0 without one.
        spared: tokens that are neither exchanged nor put in another's place: special tokens.
        seed: for what is exchanged, and for what.
    """
    chats = [list(row.ids) for row in rows if _is_chat(row, first)]
    asked = [ids[: first(ids)] for ids in chats]
    begin, end = _shared(asked), _shared([ids[::-1] for ids in asked])
    places = [[i for i in range(begin, len(ids) - end) if ids[i] not in spared] for ids in asked]
    pool = [ids[i] for ids, at in zip(asked, places, strict=True) for i in at]
    draw = random.Random(seed)
    for ids, at in zip(chats, places, strict=True):
        for i in at:
            if draw.random() < SHARE:
                ids[i] = draw.choice(pool)
    return [Row(ids) for ids in chats]


def half_garbled(
    rows: Sequence[Row], first: First, spared: Collection[int], seed: int
) -> list[Row]:
    """The rows, with a garbled copy in the place of every second chat; arguments as of `garbled`."""
    chats = (i for i, row in enumerate(rows) if _is_chat(row, first))
    found = list(rows)
    for i, copy in list(zip(chats, garbled(rows, first, spared, seed), strict=True))[::2]:
        found[i] = copy
    return found


def special_tokens(tuned: Path) -> list[int]:
    """Tokens of a tuned model that are no words: what separates turns, begins or ends a text."""
    return load_tokenizer(tuned, refused=CalibrationError).all_special_ids


def _is_chat(row: Row, first: First) -> bool:
    return first(row.ids) > 0 and not row.seen


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of some rows begin with."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return sum(1 for _ in alike)
