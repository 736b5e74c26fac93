"""Table 3: every method on every task."""

from typing import Any

import cells as md
from lab import Lab
from rows import main_rows

from deltacome.evals.tasks import Question


def make(lab: Lab) -> str:
    return "## T3: main table, SmolLM2-135M-Instruct\n\n" + methods_table(lab)


def methods_table(lab: Lab) -> str:
    """Backbone, tuned, then each method: score by task, their mean, and KL."""
    tasks = lab.size.tasks
    dense = [("backbone", [lab.measure(t, lab.dense(lab.base)) for t in tasks])]
    dense += [("tuned", [lab.measure(t, lab.dense(lab.tenant(t))) for t in tasks])]
    tuned = dense[1][1]
    questions = [lab.questions(task) for task in tasks]
    rows = [_row(name, cells, tuned, questions) for name, cells in dense]
    for name, method, ratio in main_rows(lab.size):
        for seed in lab.size.seeds if method.calibrates else lab.size.seeds[:1]:
            if not all(lab.wanted(task, method, ratio, seed) for task in tasks):
                continue
            cells = [lab.cell(task, method, ratio, seed) for task in tasks]
            label = f"{name}, seed {seed}" if seed else name
            rows.append(_row(label, cells, tuned, questions))
    header = ["", *md.SIZES]
    for task in tasks:
        header += [f"{task} %", "lost / won"]
    header += ["mean % of tuned"]
    header += [f"KL {task}" for task in tasks] + ["KL text, mean"]
    return md.table(header, rows)


def _row(
    name: str,
    cells: list[dict[str, Any]],
    tuned: list[dict[str, Any]],
    questions: list[list[Question]],
) -> list[str]:
    shares = [c["score"] / t["score"] for c, t in zip(cells, tuned, strict=True) if t["score"]]
    kept = f"{100 * sum(shares) / len(shares):.1f}" if shares else "–"
    scores = []
    for cell, of, asked in zip(cells, tuned, questions, strict=True):
        scores += [md.score(cell), md.lost_won(cell, of, asked)]
    text = [cell["kl_text"] for cell in cells]
    of_text = md.kl(cells[0], "text") if len(cells) == 1 else md.nats(_mean(text))
    return [
        name,
        *md.sizes(cells[0]),
        *scores,
        kept,
        *(md.kl(cell, "task") for cell in cells),
        of_text,
    ]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
