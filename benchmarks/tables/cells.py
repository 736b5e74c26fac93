"""Cells and tables as Markdown."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [list(header), ["---", *["--:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score(cell: dict[str, Any]) -> str:
    """`52.4 (48.0–56.7)`, percent with the 95 % interval."""
    low, high = 100 * cell["score_low"], 100 * cell["score_high"]
    return f"{100 * cell['score']:.1f} ({low:.1f}–{high:.1f})"


def kl(cell: dict[str, Any], kind: str) -> str:
    """`0.00025 ± 0.00003`: a KL in nats per token and its standard error, of `task` or `text`."""
    value, error = cell[f"kl_{kind}"], cell[f"kl_{kind}_error"]
    return "–" if value is None else nats(value) + (f" ± {nats(error)}" if value and error else "")


def nats(value: float | None) -> str:
    """A KL in nats per token."""
    return "–" if value is None else f"{value:.5f}"


def sizes(cell: dict[str, Any]) -> list[str]:
    """Nominal ratio, bytes on disk, ratio on disk."""
    nominal, nbytes, ratio = cell["nominal"], cell["bytes"], cell["ratio"]
    return [
        "–" if nominal is None else f"{nominal:.1f}",
        "–" if nbytes is None else f"{nbytes:,}",
        "–" if ratio is None else f"{ratio:.2f}",
    ]


SIZES = ["nominal", "bytes on disk", "ratio"]
