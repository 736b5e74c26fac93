"""KL on questions that the fine-tune was trained on, on others of their distribution, on held-out ones.

A fine-tune is surest of what it was trained on, the more the longer that took (here as in `longer`), and
calibration text is of that kind, so a delta can be close there and farther elsewhere. Only the questions
of the first column are in the calibration text.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cells as md
from ablation import Without, ungarbled
from lab import Lab, Variant
from longer import TIMES
from rows import RATIO

from deltacome import Adaptive, DeltaCome
from deltacome.evals.divergence import over_rows
from deltacome.evals.tasks import Question
from deltacome.methods.method import Method

FURTHER = 2000
"""Seed of the further questions; calibration text has 1000 and those after it."""


def make(lab: Lab) -> str:
    fit, task, half = lab.size.fit, lab.size.side[0], 2 * RATIO
    ours = f"adaptive, 1/{half:g}"
    as_asked = Without(distill=fit, part="garbled")
    late = Without(distill=fit, part="garbled in the sweep")
    points: list[tuple[str, Method, float, AbstractContextManager[Any]]] = [
        (f"Delta-CoMe, 1/{RATIO:g}", DeltaCome(), RATIO, nullcontext()),
        (f"{ours}, not distilled", Adaptive(distill=0), half, nullcontext()),
        (f"{ours}, no question garbled", as_asked, half, ungarbled()),
        (f"{ours}, garbled in the last step only", late, half, ungarbled(last=False)),
        (ours, Adaptive(distill=fit), half, nullcontext()),
    ]
    where = lab.training(TIMES * lab.size.steps)
    rows, sets = [], _questions(where, task)
    for name, method, ratio, change in points:
        if not where.wanted(task, method, ratio):
            continue
        with change:
            cell = where.cell(task, method, ratio)
        variant = where.packed(where.artifact(task, method, ratio))
        kls = [_kl(where, task, variant, some) for some in sets.values()]
        rows.append([name, *kls, md.kl(cell, "task"), md.kl(cell, "text")])
    header = [f"{task}, KL", *sets, "held out", "text"]
    counts = ", ".join(f"{len(some)} {name}" for name, some in sets.items())
    held = f"{len(where.questions(task))} held out"
    title = "## Known questions: KL on what was trained on and on what was not"
    said = f"A training of {where.size.steps} steps. Questions: {counts}, {held}."
    return f"{title}\n\n{md.table(header, rows)}\n\n{said}"


def _questions(lab: Lab, task: str) -> dict[str, list[Question]]:
    """Questions that are not held out, by what training and the calibration text have of them."""
    from tasks import TASKS, training

    said: dict[str, Any] = json.loads((lab.tenant(task) / "training.json").read_text())
    steps = range(said["steps"])
    trained = {
        q.prompt for s in steps for q in training(TASKS[task], said["seed"], s, said["batch"])
    }
    lines = map(json.loads, lab.calibration(task).read_text().splitlines())
    text = {line["prompt"]: line["answer"] for line in lines if "prompt" in line}
    drawn = training(TASKS[task], FURTHER, 0, 2 * lab.size.questions)
    further = [q for q in {q.prompt: q for q in drawn}.values() if q.prompt not in text]
    return {
        "in the text": [Question(*pair) for pair in text.items()][: lab.size.questions // 2],
        "trained on": [q for q in further if q.prompt in trained],
        "not trained on": [q for q in further if q.prompt not in trained],
    }


def _kl(lab: Lab, task: str, variant: Variant, questions: list[Question]) -> str:
    return md.nats(*over_rows(lab.distances(task, variant, questions))) if questions else "–"
