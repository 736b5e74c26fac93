"""Bytes where they matter: a width for every direction of every matrix, all at once.

A direction of weight σ² costs `bytes(b)` at b bits and leaves σ² · d(b) of error, with d(b) the error
of a code of that width relative to what it encodes (d(0) = 1: the direction is not stored). For a price
λ of a byte each direction takes the width that minimises `σ² d(b) + λ · bytes(b)`, on its own; one λ for
all matrices is optimal for the bytes that it spends (Everett 1963; Shoham & Gersho 1988). It is found by
bisection. An integer program would also use up the last bytes; with thousands of directions the
difference is less than one direction.

R directions of a matrix.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STEPS = 80
"""Bisections of λ, more than float64 can resolve."""


def allocate(
    weights: Mapping[str, Tensor],
    cost: Callable[[str, int], float],
    distortion: Mapping[int, float],
    nbytes: Callable[[Mapping[str, dict[int, int]]], float],
    budget: float,
) -> dict[str, dict[int, int]]:
    """How many directions of each matrix get which width.

    Args:
        weights: σ² of each matrix's directions, in descending order, float (R,).
        cost: bytes of one direction of a matrix at a width.
        distortion: width → d(b), without 0.
        nbytes: bytes on disk of a whole allocation.
        budget: bytes that an allocation may take.

    Returns:
        For each matrix widths → counts, widest first, zero counts left out: the best allocation that
        fits, with no directions at all if not even one fits.
    """
    widths = sorted(distortion)
    flat = torch.cat([w.double() for w in weights.values()])
    sizes = [len(w) for w in weights.values()]
    # (widths + 1, all directions): errors and bytes; the first row is for not storing a direction.
    errors = torch.stack([flat, *(flat * distortion[b] for b in widths)])
    rows = [[cost(name, b) for name in weights] for b in widths]
    each = torch.tensor(sizes)
    prices = torch.stack(
        [torch.zeros_like(flat)]
        + [torch.tensor(row, dtype=torch.float64).repeat_interleave(each) for row in rows]
    )

    def at(log_price: float) -> dict[str, dict[int, int]]:
        choice = (errors + math.exp(log_price) * prices).argmin(0)
        chosen = {}
        for name, part in zip(weights, choice.split(sizes), strict=True):
            counts = torch.bincount(part, minlength=len(widths) + 1).tolist()
            chosen[name] = {b: n for b, n in zip(widths, counts[1:], strict=True) if n}
            chosen[name] = dict(sorted(chosen[name].items(), reverse=True))
        return chosen

    low = math.log(max(float(flat.max()) / float(prices.max()), 1e-300)) - 60
    high = low + 120
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if nbytes(at(middle)) <= budget else (middle, high)
    return at(high)
