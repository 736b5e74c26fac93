"""Garbled chats: which tokens of a question may be exchanged, and which never are."""

import random

import torch

from deltacome.compression.garble import SHARE, garbled, half_garbled
from deltacome.rows import Row

OPENING, ANSWER, SPECIAL = [1, 2], [3, 4], 9
"""What a template puts before a question and before its answer, and a token within questions."""


def first(ids):
    """As in a chat's row: the last token of what opens the answer; 0 for a text."""
    at = [i for i in range(len(ids) - 1) if ids[i : i + 2] == ANSWER]
    return at[-1] + 1 if at else 0


def chat(question, answer):
    return Row([*OPENING, *question, *ANSWER, *answer])


def chats(n=400, length=10):
    draw = random.Random(0)
    return [
        chat([SPECIAL, *(draw.randrange(10, 90) for _ in range(length))], [90 + i % 5, 100])
        for i in range(n)
    ]


def test_tokens_of_questions_are_exchanged_and_nothing_else():
    rows = chats()
    copies = garbled(rows, first, {SPECIAL}, seed=0)
    assert [len(copy) for copy in copies] == [len(row) for row in rows]
    changed = 0
    for row, copy in zip(rows, copies, strict=True):
        assert copy.ids[:3] == row.ids[:3]  # the template's, and a special token
        assert copy.ids[-4:] == row.ids[-4:]  # the opening of the answer, and the answer
        changed += sum(a != b for a, b in zip(row.ids, copy.ids, strict=True))
        assert all(10 <= token < 90 for token in copy.ids[3:-4])
    # A token in 80 is exchanged for itself; four standard errors.
    assert abs(changed / 4000 - SHARE * 79 / 80) < 4 * (SHARE / 4000) ** 0.5
    assert rows[0].ids == chats()[0].ids  # the rows stay as they are


def test_the_seed_decides():
    one, same, other = ([r.ids for r in garbled(chats(), first, {SPECIAL}, s)] for s in (0, 0, 1))
    assert one == same != other


def test_special_tokens_are_not_put_elsewhere():
    rows = [chat([10 + i, SPECIAL, 50 + i], [90]) for i in range(40)]
    found = {token for copy in garbled(rows, first, {SPECIAL}, 0) for token in copy.ids[2:-3]}
    assert SPECIAL in found
    assert all(copy.ids.count(SPECIAL) == 1 for copy in garbled(rows, first, {SPECIAL}, 0))


def test_texts_and_pictures_have_no_copy_and_questions_that_are_all_alike_stay():
    text, seen = Row([5, 6, 7, 8]), Row(chats(1)[0].ids, {"pixel_values": torch.zeros(1, 3)})
    two = chats(2)
    copies = garbled([text, *two, seen], first, set(), 0)
    assert [copy.ids[-2:] for copy in copies] == [row.ids[-2:] for row in two]
    assert garbled([text, seen], first, set(), 0) == []
    alone = chats(1)
    assert [copy.ids for copy in garbled(alone, first, set(), 0)] == [alone[0].ids]


def test_every_second_chat_is_garbled_in_its_place():
    rows = [Row([5, 6, 7, 8]), *chats(4), Row([5, 6, 7]), *chats(3)]
    found = half_garbled(rows, first, {SPECIAL}, 0)
    copies = garbled(rows, first, {SPECIAL}, 0)
    assert [row.ids for row in found] == [
        row.ids
        for row in (
            rows[0],
            copies[0],
            rows[2],
            copies[2],
            *rows[4:6],
            copies[4],
            rows[7],
            copies[6],
        )
    ]
    texts = [Row([5, 6, 7, 8])]
    assert half_garbled(texts, first, {SPECIAL}, 0) == texts
