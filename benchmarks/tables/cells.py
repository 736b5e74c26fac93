"""Cells and tables as Markdown."""

from collections.abc import Sequence
from typing import Any

from deltacome.evals.divergence import over_rows
from deltacome.evals.score import exact_match
from deltacome.evals.tasks import Question


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [list(header), ["---", *["--:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score(cell: dict[str, Any]) -> str:
    """`52.4 (48.0–56.7)`, percent with the 95 % interval."""
    low, high = 100 * cell["score_low"], 100 * cell["score_high"]
    return f"{100 * cell['score']:.1f} ({low:.1f}–{high:.1f})"


def right(cell: dict[str, Any], questions: Sequence[Question]) -> list[bool]:
    """Which questions a cell answers right."""
    answered = zip(cell["answers"], questions, strict=True)
    return [exact_match(said, question.answer) for said, question in answered]


def lost_won(cell: dict[str, Any], tuned: dict[str, Any], questions: Sequence[Question]) -> str:
    """`3 / 1`: questions that the tuned model answers right and a cell does not, and the reverse.

    Both were asked the same questions, so this says more than a difference of two scores with intervals.
    """
    pairs = list(zip(right(cell, questions), right(tuned, questions), strict=True))
    lost = sum(theirs and not ours for ours, theirs in pairs)
    won = sum(ours and not theirs for ours, theirs in pairs)
    return f"{lost} / {won}"


def kl(cell: dict[str, Any], kind: str) -> str:
    """`0.000252 ± 0.000031`: a KL in nats per token and its standard error, of `task` or `text`."""
    value, error = cell[f"kl_{kind}"], cell[f"kl_{kind}_error"]
    return nats(value, error)


def farther(cell: dict[str, Any], than: dict[str, Any], kind: str) -> str:
    """`+0.000382 ± 0.000184`: how much farther from the tuned model a cell is than another.

    Both were asked the same, so the error is that of differences, row by row, which is much smaller than
    those of the two KLs where both find the same rows hard.
    """
    pairs = zip(cell[f"rows_{kind}"], than[f"rows_{kind}"], strict=True)
    found = over_rows([(a - b, tokens) for (a, tokens), (b, _) in pairs])
    digits = _digits(found.nats)
    return f"{found.nats:+.{digits}f} ± {found.error:.{digits}f}"


def differ(cell: dict[str, Any], than: dict[str, Any]) -> str:
    """How much farther a cell is than another, on the task and on text."""
    task, text = (farther(cell, than, kind) for kind in ("task", "text"))
    return f"{task} on the task, {text} on text"


def averaged(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The KLs of several draws of calibration text, averaged row by row."""
    kinds = ("rows_task", "rows_text")
    drawn = {kind: zip(*(cell[kind] for cell in cells), strict=True) for kind in kinds}
    return {
        kind: [(sum(nats for nats, _ in row) / len(row), row[0][1]) for row in rows]
        for kind, rows in drawn.items()
    }


def spread(cell: dict[str, Any], than: dict[str, Any]) -> str:
    """On how many questions a cell is closer than another, and what its ten farthest hold of its KL."""
    ours, theirs = ([nats for nats, _ in one["rows_task"]] for one in (cell, than))
    closer = sum(a < b for a, b in zip(ours, theirs, strict=True))
    held = sum(sorted(ours)[-10:]) / sum(ours) if any(ours) else 0.0  # nothing differs
    return f"closer on {closer} of {len(ours)} questions, ten hold {100 * held:.0f} % of its KL"


def nats(value: float | None, error: float | None = None) -> str:
    """A KL in nats per token and its standard error; a value slightly below 0 (float32) is shown as 0."""
    if value is None:
        return "–"
    digits = _digits(value)
    return f"{max(0.0, value):.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def _digits(value: float) -> int:
    """Decimals to show: of small values five would leave one significant digit or none."""
    return 5 if value == 0 else 7 if abs(value) < 1e-5 else 6 if abs(value) < 1e-3 else 5


def sizes(cell: dict[str, Any]) -> list[str]:
    """Nominal ratio, bytes on disk, ratio on disk."""
    nominal, nbytes, ratio = cell["nominal"], cell["bytes"], cell["ratio"]
    return [
        "–" if nominal is None else f"{nominal:.1f}",
        "–" if nbytes is None else f"{nbytes:,}",
        "–" if ratio is None else f"{ratio:.2f}",
    ]


def figures(cell: dict[str, Any]) -> list[str]:
    """Sizes, score, and both KLs."""
    return [*sizes(cell), score(cell), kl(cell, "task"), kl(cell, "text")]


SIZES = ["nominal", "bytes on disk", "ratio"]
