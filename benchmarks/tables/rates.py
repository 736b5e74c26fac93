"""BitDelta's scales fitted at several rates, and by the other methods' loss: whether ours are fair."""

import cells as md
from lab import Lab
from rows import RATIO

from deltacome import BitDelta, DeltaCome
from deltacome.methods.method import Method

RATES = (0.01, 0.03, 0.1)


def make(lab: Lab) -> str:
    """The initial scales, the scales that each rate gives, and Delta-CoMe at about the same bytes."""
    task, steps = lab.size.side[0], lab.size.distill
    found: list[tuple[str, Method, float | None]] = [("initial scales", BitDelta(), None)]
    found += [(f"rate {r:g}", BitDelta(distill=steps, rate=r), None) for r in RATES]
    same = BitDelta(distill=lab.size.fit, loss="answers")
    found += [
        (f"KL on answers, {lab.size.fit} steps of sixteen rows, rate {same.rate:g}", same, None)
    ]
    found += [("Delta-CoMe", DeltaCome(), RATIO)]
    cells = {
        name: lab.cell(task, method, ratio)
        for name, method, ratio in found
        if lab.wanted(task, method, ratio)
    }
    header = ["", "ratio", f"{task} %", "KL task", "KL text"]
    rows = [
        [name, f"{cell['ratio']:.2f}", md.score(cell), md.kl(cell, "task"), md.kl(cell, "text")]
        for name, cell in cells.items()
    ]
    return f"## Rates of BitDelta's scales: {steps} steps of four rows\n\n" + md.table(header, rows)
