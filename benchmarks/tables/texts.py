"""What calibration text is worth: the usual text, its questions alone, the default, none."""

from __future__ import annotations

import inspect

import cells as md
from lab import Lab
from rows import RATIO

from deltacome import Adaptive, DeltaCome, compress
from deltacome.methods.method import Method

DEFAULTS = inspect.signature(compress).parameters
ROWS, ROW_TOKENS = DEFAULTS["samples"].default, DEFAULTS["seq_len"].default
"""How much the tuned model writes where `compress` is given no text."""


def make(lab: Lab) -> str:
    task, usual = lab.size.side[0], f"{lab.size.rows} rows, of the task for the most part"
    own = f"{ROWS} rows by the tuned model, the command's default"
    asked = f"{lab.size.rows} rows, the same questions answered by the tuned model"
    prompts = lab.reading("prompts", lab.size.rows, lab.size.row_tokens)
    written, without = lab.reading("self", ROWS, ROW_TOKENS), lab.reading("none", 1, 2)
    theirs, ours = DeltaCome(), Adaptive(distill=lab.size.fit)
    points: list[tuple[str, str, Lab, Method, float]] = [
        ("Delta-CoMe", usual, lab, theirs, RATIO),
        ("Delta-CoMe", asked, prompts, theirs, RATIO),
        ("Delta-CoMe", own, written, theirs, RATIO),
        ("Delta-CoMe", "none", without, theirs, RATIO),
        ("adaptive", usual, lab, ours, 2 * RATIO),
        ("adaptive", asked, prompts, ours, 2 * RATIO),
        ("adaptive", own, written, ours, 2 * RATIO),
    ]
    tuned, questions = lab.measure(task, lab.dense(lab.tenant(task))), lab.questions(task)
    rows = []
    for method, text, where, options, ratio in points:
        if where.wanted(task, options, ratio):
            cell = where.cell(task, options, ratio)
            lost = md.lost_won(cell, tuned, questions)
            kls = md.kl(cell, "task"), md.kl(cell, "text")
            rows.append([method, text, *md.sizes(cell), md.score(cell), lost, *kls])
    header = ["", "calibration text", *md.SIZES, f"{task} %", "lost / won", "KL task", "KL text"]
    return "## Calibration text: of the task, the model's own, none\n\n" + md.table(header, rows)
