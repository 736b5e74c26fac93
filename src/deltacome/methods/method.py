"""What a method of delta compression is: something that plans bytes and fills them.

A method is a frozen dataclass of options in a file of its own. `compression` calls it twice: for the
plans of all matrices, when nothing but their sizes is fixed yet, and then group by group for the
terms. So a ratio is met, or refused, before the work begins, whatever a method needs for its plans.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from deltacome.errors import PlanError
from deltacome.format.codec import Packed
from deltacome.format.spec import Plan, bands_nbytes, signs_nbytes

Shape = tuple[int, int]


@dataclass(frozen=True)
class Terms:
    """What is to be stored of one matrix; if empty, the matrix stays the base's."""

    bands: Plan = ()
    sign_scales: int | None = None
    """Number of scales of a signs term, 1 or one for each row; None without that term."""

    def nbytes(self, shape: Shape) -> int:
        """Bytes on disk of the terms of a matrix (out, in)."""
        return bands_nbytes(shape, self.bands) + signs_nbytes(shape, self.sign_scales)


@dataclass(frozen=True)
class Matrix:
    """A matrix that is to be planned."""

    shape: Shape
    """(out, in) of the rows that base and tuned have in common."""
    delta: Callable[[], Tensor]
    """Reads tuned − base, float32 (out, in), at the cost of reading both."""
    spectrum: Tensor | None = None
    """What a sweep through the model measured of it; only `Adaptive` gets one."""


DEFAULT_RATIO = 16.0
"""The default of methods whose plans can reach it."""

Planner = Callable[[float], dict[str, Terms]]
"""Bytes for the terms of all matrices → the terms of each, the best that fit, else the smallest.

Called a few times with numbers of bytes that differ little, since what surrounds terms depends on them.
"""


def check_option(good: bool, name: str, expected: str, got: object) -> None:
    """Refuses a value of a method's option with PlanError unless it is good."""
    if not good:
        raise PlanError(f"{name}: expected {expected}, got {got!r}")


def check_common(distill: int, damping: float) -> None:
    """Checks the options that several methods have."""
    check_option(distill >= 0, "distill", "0 or more steps", distill)
    check_option(0 <= damping < math.inf, "damping", "a share of 0 or more", damping)


class Method(Protocol):
    """How deltas become terms. Implementations are frozen dataclasses of options."""

    @property
    def default_ratio(self) -> float | None:
        """The ratio where none is asked for; None where plans follow from the options alone."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether `compress` is to be given grams; a data-free method costs no forward pass."""
        ...

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method: `name`, and the options as JSON."""
        ...

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """Measures once what the plans depend on; where nothing adapts, the planner ignores bytes."""
        ...

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """Compresses the deltas of linears that share an input.

        Args:
            deltas: float32 (out, in) by name; `in` is common to all.
            plans: the terms of each.
            gram_II: float32 (in, in), `Σ x xᵀ` over calibration inputs, or None: data-free, as if the
                inputs were white.

        Returns:
            What is stored of each, on the CPU, as planned.
        """
        ...


def share_evenly(
    shapes: Mapping[str, Shape],
    fill: Callable[[Shape, float], Terms],
    grow: Callable[[Shape, Terms], Terms | None],
    nbytes: float,
) -> dict[str, Terms]:
    """Every matrix at one ratio of its own bytes, as the papers do.

    Args:
        fill: the terms of a matrix that fit in a number of bytes, else its smallest.
        grow: the terms, enlarged by the least step, or None if they cannot grow.
        nbytes: bytes on disk for all matrices.

    Returns:
        The terms at the largest common ratio that fits; what rounding to whole directions leaves over
        is dealt out one direction at a time.
    """

    counts = Counter(shapes.values())  # a large model has hundreds of layers, of a few shapes

    def at(share: float) -> dict[Shape, Terms]:
        return {shape: fill(shape, share * 2 * math.prod(shape)) for shape in counts}

    def size(plans: Mapping[Shape, Terms]) -> int:
        return sum(counts[shape] * plan.nbytes(shape) for shape, plan in plans.items())

    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= nbytes else (low, middle)
    even = at(low)
    plans, left = {name: even[shape] for name, shape in shapes.items()}, nbytes - size(even)
    for name, shape in shapes.items():
        grown = grow(shape, plans[name])
        cost = 0 if grown is None else grown.nbytes(shape) - plans[name].nbytes(shape)
        if grown is not None and cost <= left:
            plans[name] = grown
            left -= cost
    return plans
