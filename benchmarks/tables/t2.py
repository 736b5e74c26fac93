"""Table 2: precision strategies of Delta-CoMe at equal bytes."""

import cells as md
from lab import Lab
from rows import RATIO

from deltacome import DeltaCome
from deltacome.methods.template import PRECISIONS, parse_template

STRATEGIES = {
    "single 16": "16:*",
    "single 8": "8:*",
    "single 4": "4:*",
    "single 3": "3:*",
    "single 2": PRECISIONS["single"],
    "double 16+3": "16:2,3:*",
    "double 8+3": "8:2,3:*",
    "double 8+2": PRECISIONS["double"],
    "triple 8+3+2": PRECISIONS["triple"],
}


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    rows = []
    for name in lab.size.strategies or STRATEGIES:
        template = STRATEGIES[name]
        cell = lab.cell(task, DeltaCome(parse_template(template)), RATIO)
        rows.append([name, f"`{template}`", *md.figures(cell)])
    header = ["strategy", "plan", *md.SIZES, f"{task} %", "KL task", "KL text"]
    return "## T2: precision strategies of Delta-CoMe\n\n" + md.table(header, rows)
