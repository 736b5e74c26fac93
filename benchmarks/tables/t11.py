"""Table 11: score and KL against bytes, for every method that exists at every ratio."""

from pathlib import Path
from typing import Any

import cells as md
import matplotlib
from lab import Lab, Size
from rows import curves

from deltacome import BitDelta

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURES = Path("docs/results")
SMALLEST_KL = 1e-6
"""Smaller values are drawn here, since the scale is logarithmic."""


def make(lab: Lab) -> str:
    task, seed = lab.size.side[0], lab.size.seeds[0]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, method in curves(lab.size):
        ratios = [r for r in lab.size.ratios if lab.wanted(task, method, r, seed)]
        if ratios:
            found[name] = [lab.cell(task, method, r, seed) for r in ratios]
    bitdelta = BitDelta(distill=lab.size.distill)
    if lab.wanted(task, bitdelta, None):
        found["BitDelta"] = [lab.cell(task, bitdelta, None)]
    tuned = lab.measure(task, lab.dense(lab.tenant(task)))
    rows = "" if lab.size.rows == Size.rows else f"_{lab.size.rows}"
    picture = PICTURES / f"curve_{task}{rows}.png"
    _draw(picture, task, found, tuned)
    named = [(name, cell) for name, cells in found.items() for cell in cells]
    questions = lab.questions(task)
    table = [
        [
            name,
            *md.sizes(cell),
            md.score(cell),
            md.lost_won(cell, tuned, questions),
            md.kl(cell, "task"),
            md.kl(cell, "text"),
        ]
        for name, cell in named
    ]
    header = ["method", *md.SIZES, f"{task} %", "lost / won", "KL task", "KL text"]
    return (
        f"## T11: ratios\n\n![Score and KL against bytes, {task}]({picture.name})\n\n"
        f"Tuned: {md.score(tuned)}.\n\n" + md.table(header, table) + _at_equal_bytes(found)
    )


def _at_equal_bytes(found: dict[str, list[dict[str, Any]]]) -> str:
    """Ours against the paper's method, row by row."""
    theirs = {round(cell["ratio"]): cell for cell in found.get("Delta-CoMe", ())}
    ours = {round(cell["ratio"]): cell for cell in found.get("adaptive", ())}
    said = [
        f"- adaptive less Delta-CoMe at 1/{ratio}: {md.differ(ours[ratio], theirs[ratio])}"
        for ratio in ours
        if ratio in theirs
    ]
    return "\n\n" + "\n".join(said) if said else ""


def _draw(
    picture: Path, task: str, found: dict[str, list[dict[str, Any]]], tuned: dict[str, Any]
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.axhline(100 * tuned["score"], color="grey", linestyle=":", label="tuned, and its interval")
    left.axhspan(100 * tuned["score_low"], 100 * tuned["score_high"], color="grey", alpha=0.12)
    markers = "osD^vP*"
    sizes = [cell["bytes"] / 1e6 for cell in max(found.values(), key=len)]
    for (name, cells), marker in zip(found.items(), markers, strict=False):
        megabytes = [cell["bytes"] / 1e6 for cell in cells]
        left.plot(megabytes, [100 * c["score"] for c in cells], marker=marker, label=name)
        kls = [max(cell["kl_task"], SMALLEST_KL) for cell in cells]
        right.plot(megabytes, kls, marker=marker, label=name)
    for axes, label in ((left, "exact match, %"), (right, "KL to the tuned model, nats per token")):
        axes.set(xscale="log", xlabel="MB on disk", ylabel=label)
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    left.legend(frameon=False)
    figure.suptitle(f"{task}: what a delta keeps, by its size")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
