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
"""What is below is drawn here: the scale is logarithmic."""


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    at = {
        (name, r): lab.cell(task, method, r)
        for name, method in curves(lab.size)
        for r in lab.size.ratios
        if lab.wanted(task, method, r)
    }
    found = {name: [cell for (of, _), cell in at.items() if of == name] for name, _ in at}
    bitdelta = BitDelta(distill=lab.size.distill)
    if lab.wanted(task, bitdelta, None):
        found["BitDelta"] = [lab.cell(task, bitdelta, None)]
    tuned = lab.measure(task, lab.dense(lab.tenant(task)))
    rows = "" if lab.size.rows == Size.rows else f"_{lab.size.rows}"
    picture = PICTURES / f"curve_{task}{rows}.png"
    _draw(picture, task, found, tuned)
    table = [
        [name, *md.sizes(c), md.score(c), md.kl(c, "task"), md.kl(c, "text")]
        for name, cells in found.items() for c in cells
    ]  # fmt: skip
    header = ["method", *md.SIZES, f"{task} %", "KL task", "KL text"]
    return (
        f"## T11: ratios\n\n![Score and KL against bytes, {task}]({picture.name})\n\n"
        f"Tuned: {md.score(tuned)}.\n\n" + md.table(header, table) + _goals(at, tuned)
    )


def _goals(at: dict[tuple[str, float], dict[str, Any]], tuned: dict[str, Any]) -> str:
    """Ours against the paper's method, row by row: at equal bytes, and what it sets out for."""
    ratios = [ratio for name, ratio in at if name == "adaptive"]
    said = []
    for ours, theirs in [*((ratio, ratio) for ratio in ratios), (32, 16)]:
        if ours in ratios and ("Delta-CoMe", theirs) in at:
            pair = at["adaptive", ours], at["Delta-CoMe", theirs]
            less = f"adaptive at 1/{ours:g} less Delta-CoMe at 1/{theirs:g}"
            task, text = (md.farther(*pair, kind) for kind in ("task", "text"))
            said.append(f"- {less}: {task} on the task, {text} on text")
    if 64 in ratios and tuned["score"]:
        kept = at["adaptive", 64]["score"] / tuned["score"]
        said.append(f"- adaptive at 1/64 has {100 * kept:.1f} % of the tuned score")
    return "\n\n" + "\n".join(said) if said else ""


def _draw(
    picture: Path, task: str, found: dict[str, list[dict[str, Any]]], tuned: dict[str, Any]
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.axhline(100 * tuned["score"], color="grey", linestyle=":", label="tuned")
    markers = "osD^vP*"
    sizes = [cell["bytes"] / 1e6 for cell in max(found.values(), key=len)]
    for (name, cells), marker in zip(found.items(), markers, strict=False):
        megabytes = [cell["bytes"] / 1e6 for cell in cells]
        left.plot(megabytes, [100 * c["score"] for c in cells], marker=marker, label=name)
        kls = [max(cell["kl_task"], SMALLEST_KL) for cell in cells]
        right.plot(megabytes, kls, marker=marker, label=name)
    for axes, label in ((left, "exact match, %"), (right, "KL to the tuned model, nats a token")):
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
