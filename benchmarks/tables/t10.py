"""Table 10: a base served at 4 bits, under a delta that was taken against the 16-bit base.

Weights of the blocks' linears are rounded to nearest, asymmetric, in groups of 128 inputs: what a plain
4-bit server does. The delta takes no account of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import cells as md
from lab import Lab, Variant, hash_of
from rows import RATIO, main_rows
from torch import Tensor

from deltacome.format.codec import dequantize
from deltacome.numerics.grid import min_max_grid, round_to_grid


def make(lab: Lab) -> str:
    rows = []
    for task in lab.size.side:
        base4, tuned = _rounded(lab.dense(lab.base)), lab.dense(lab.tenant(task))
        found = {
            "tuned": lab.measure(task, tuned),
            "tuned, itself at 4 bits": lab.measure(task, _rounded(tuned)),
            "base at 4 bits": lab.measure(task, base4),
        }
        for name, method, ratio in main_rows(lab.size):
            if ratio not in (RATIO, None) or not lab.wanted(task, method, ratio):
                continue
            artifact = lab.artifact(task, method, ratio)
            found[f"base at 16 bits + {name}"] = lab.measure(task, lab.packed(artifact))
            found[f"base at 4 bits + {name}"] = lab.measure(task, lab.packed(artifact, base4))
        for name, cell in found.items():
            rows.append([f"{task}: {name}", *md.figures(cell)])
    header = ["", *md.SIZES, "score %", "KL task", "KL text"]
    return "## T10: a 4-bit base under the delta\n\n" + md.table(header, rows)


def _rounded(variant: Variant) -> Variant:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, value in variant.weights():
            inside = value.ndim == 2 and ".layers." in name
            yield name, _round(value) if inside else value

    return Variant(hash_of(variant.key, "4 bits, groups of 128"), weights)


def _round(weight: Tensor) -> Tensor:
    scale, zero = min_max_grid(weight.float(), 4)
    return dequantize(round_to_grid(weight.float(), scale, zero, 4), scale, zero)
