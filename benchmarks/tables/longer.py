"""What a longer training does to every method: the usual fine-tune, and one of four times as many steps.

Most tables have fine-tunes of few steps; a delta grows with its training. What the two deltas look like,
their norms and how steeply their spectra fall, is printed with the table.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import cells as md
import torch
from lab import Lab, device, hash_of
from rows import RATIO

from deltacome import Adaptive, BitDelta, DeltaCome, LowRank, PrinMix
from deltacome.arch.checkpoint import Checkpoint
from deltacome.methods.method import Method

TIMES = 4
"""How many times as many steps the longer training has."""


def make(lab: Lab) -> str:
    fit = lab.size.fit
    points: list[tuple[str, Method, float | None]] = [
        ("low rank", LowRank(), RATIO),
        ("BitDelta", BitDelta(distill=lab.size.distill), None),
        ("Delta-CoMe", DeltaCome(), RATIO),
        ("PrinMix", PrinMix(), RATIO),
        ("adaptive", Adaptive(distill=fit), 2 * RATIO),
        ("adaptive", Adaptive(distill=fit), 4 * RATIO),
    ]
    rows, said = [], []
    for where in (lab, lab.training(TIMES * lab.size.steps)):
        found, steps, task = _measured(where, points), where.size.steps, where.size.side[0]
        tuned, questions = found["tuned"], where.questions(task)
        rows += [
            [
                str(steps),
                name,
                *md.sizes(cell),
                md.score(cell),
                md.lost_won(cell, tuned, questions),
                md.kl(cell, "task"),
                md.kl(cell, "text"),
            ]
            for name, cell in found.items()
        ]
        names = f"adaptive, 1/{2 * RATIO:g}", f"Delta-CoMe, 1/{RATIO:g}"
        if all(name in found for name in names):
            ours, theirs = (found[name] for name in names)
            said.append(
                f"{names[0]}, less {names[1]}, {steps} steps: {md.differ(ours, theirs)}; "
                + md.spread(ours, theirs)
            )
        said.append(f"the delta of {steps} steps: {_look(where, task)}")
    header = ["steps", "", *md.SIZES, f"{lab.size.side[0]} %", "lost / won", "KL task", "KL text"]
    lines = "\n".join(f"- {line}" for line in said)
    return f"## Longer training: every method\n\n{md.table(header, rows)}\n\n{lines}"


def _measured(
    lab: Lab, points: list[tuple[str, Method, float | None]]
) -> dict[str, dict[str, Any]]:
    """The base, the tuned model and each method's delta."""
    task = lab.size.side[0]
    dense = {"base": lab.base, "tuned": lab.tenant(task)}
    found = {name: lab.measure(task, lab.dense(folder)) for name, folder in dense.items()}
    for name, method, ratio in points:
        if lab.wanted(task, method, ratio):
            said = name if ratio is None else f"{name}, 1/{ratio:g}"
            found[said] = lab.cell(task, method, ratio)
    return found


def _look(lab: Lab, task: str) -> str:
    """Norm of the decoder blocks' deltas against their weights, and how steeply their spectra fall."""
    key = hash_of(*(lab.dense(folder).key for folder in (lab.base, lab.tenant(task))))
    norm, half, most = lab.kept(f"spectra/{key}", lambda: _spectra(lab.base, lab.tenant(task)))
    return (
        f"its norm is {100 * norm:.2f} % of the weights'; half of a matrix's squared norm is in "
        f"{100 * half:.1f} % of its singular directions, nine tenths in {100 * most:.1f} % (medians)"
    )


def _spectra(base: Path, tuned: Path) -> tuple[float, float, float]:
    """Medians over the matrices of the blocks: relative norm, shares of directions for 50 and 90 %."""
    of_base, of_tuned = Checkpoint(base), Checkpoint(tuned)
    found = []
    for name, info in of_base.tensors.items():
        if len(info.shape) == 2 and ".layers." in name:
            weight = of_base.read(name).float().to(device())
            delta = of_tuned.read(name).float().to(device()) - weight
            squares = torch.linalg.svdvals(delta).square()
            filled = squares.cumsum(0) / squares.sum()
            shares = [int((filled < part).sum() + 1) / len(filled) for part in (0.5, 0.9)]
            found.append((float(delta.norm() / weight.norm()), *shares))
    norms, halves, mosts = zip(*found, strict=True)
    return median(norms), median(halves), median(mosts)
