"""What each method keeps of a skill that the calibration text does not show: some kinds of programs.

All rows have the same text: the usual one without these kinds, which the fine-tune was trained on like
the others. So this is what happens to a skill that nobody thought of when compressing the model.
"""

from __future__ import annotations

from typing import Any

import cells as md
from lab import Lab, shares
from rows import RATIO

from deltacome import Adaptive, BitDelta, DeltaCome, LowRank, PrinMix
from deltacome.evals.divergence import over_rows
from deltacome.evals.tasks import Question
from deltacome.methods.method import Method

MARKS = ("sorted(", ".append(", ".join(", " if ")
"""Marks of the hidden programs: four of the eleven kinds of `snippets.py`."""


def make(lab: Lab) -> str:
    lab, task, fit = lab.hiding(MARKS), lab.size.side[0], lab.size.fit
    rows: list[tuple[str, Method, float | None]] = [
        ("low rank", LowRank(), RATIO),
        ("BitDelta", BitDelta(distill=lab.size.distill), None),
        ("Delta-CoMe", DeltaCome(), RATIO),
        ("PrinMix", PrinMix(), RATIO),
        ("Delta-CoMe, distilled too", DeltaCome(distill=fit), RATIO),
        ("adaptive, not distilled", Adaptive(distill=0), RATIO),
        ("adaptive", Adaptive(distill=fit), RATIO),
        ("Delta-CoMe", DeltaCome(), 2 * RATIO),
        ("adaptive, not distilled", Adaptive(distill=0), 2 * RATIO),
        ("adaptive", Adaptive(distill=fit), 2 * RATIO),
    ]
    tuned = lab.measure(task, lab.dense(lab.tenant(task)))
    questions = lab.questions(task)
    hidden = [any(mark in q.prompt for mark in MARKS) for q in questions]
    lines = [["tuned", "–", *_halves(questions, tuned, tuned, hidden)]]
    for name, method, ratio in rows:
        if lab.wanted(task, method, ratio):
            cell = lab.cell(task, method, ratio)
            lines.append([name, f"{cell['ratio']:.2f}", *_halves(questions, cell, tuned, hidden)])
    columns = ("%", "lost / won", "KL")
    header = [f"{kinds}, {column}" for kinds in ("shown", "hidden") for column in columns]
    marks = ", ".join(f"`{mark.strip()}`" for mark in MARKS)
    return (
        f"## Hidden kinds on {task}: calibration text without some kinds of programs\n\n"
        + md.table(["", "ratio", *header], lines)
        + f"\n\nHidden: {sum(hidden)} of {len(hidden)} held-out questions, programs with {marks}."
    )


def _halves(
    asked: list[Question], cell: dict[str, Any], tuned: dict[str, Any], hidden: list[bool]
) -> list[str]:
    """Score, lost and won questions, and KL, for shown kinds and for hidden ones."""
    found = []
    for wanted in (False, True):
        of = [i for i, kind in enumerate(hidden) if kind == wanted]
        questions = [asked[i] for i in of]
        part, theirs = (c | {"answers": [c["answers"][i] for i in of]} for c in (cell, tuned))
        measured = [cell["rows_task"][i] for i in of if i < len(cell["rows_task"])]
        found += [
            md.score(shares(part["answers"], questions)),
            md.lost_won(part, theirs, questions),
        ]
        found.append(md.nats(*over_rows(measured)))
    return found
