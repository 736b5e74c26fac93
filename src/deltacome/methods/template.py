"""Plans with a hole: `8:2,3:1/128,2:*`, filled to a number of bytes.

A template is given once for a whole model; the shape of a weight and its share of the bytes
turn it into a plan. A count is a number, a fraction of the weight's smaller side (the paper's 32
directions at 3 bits of 4096 are `1/128`), or `*`: as many as fit.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from deltacome.errors import PlanError
from deltacome.format.spec import WIDTHS, Band, Plan, bands_nbytes, rank
from deltacome.methods.method import Matrix, Planner, Shape, Terms, share_evenly

PRECISIONS = {"single": "2:*", "double": "8:2,2:*", "triple": "8:2,3:1/128,2:*"}
"""Delta-CoMe's precision strategies (section 4.1, table 2) at a given number of bytes."""

_ENTRY = re.compile(r"(\d+):(\*|\d+(?:/\d+)?)")


@dataclass(frozen=True)
class Template:
    """Entries (bits, count); a `Fraction` counts as a share of the smaller side, None is the hole."""

    entries: tuple[tuple[int, int | Fraction | None], ...]

    @property
    def has_hole(self) -> bool:
        """Whether the plan adapts to a number of bytes."""
        return any(count is None for _, count in self.entries)

    def __str__(self) -> str:
        return ",".join(f"{bits}:{'*' if count is None else count}" for bits, count in self.entries)

    def fill(self, shape: Shape, nbytes: float) -> Plan:
        """The plan for a weight (out, in) that takes at most `nbytes` bytes on disk.

        Where the fixed counts do not fit, directions are dropped from the end. Without a hole
        `nbytes` is ignored.

        Returns:
            The plan; empty if not even one direction fits.
        """
        full = self._full(shape)
        if not self.has_hole:
            return full
        counts = range(1, rank(full) + 1)
        fitting = bisect_right(counts, nbytes, key=lambda n: bands_nbytes(shape, _clip(full, n)))
        return _clip(full, fitting)

    def grow(self, shape: Shape, plan: Plan) -> Plan | None:
        """The plan with one more direction at its end, or None if the rank is full."""
        full = self._full(shape)
        if not self.has_hole or rank(plan) >= rank(full):
            return None
        return _clip(full, rank(plan) + 1)

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """Fills the template for all matrices at one ratio, with at least one direction each."""
        shapes = {name: matrix.shape for name, matrix in matrices.items()}

        def fill(shape: Shape, nbytes: float) -> Terms:
            return Terms(self.fill(shape, nbytes) or _clip(self._full(shape), 1))

        def grow(shape: Shape, terms: Terms) -> Terms | None:
            grown = self.grow(shape, terms.bands)
            return None if grown is None else Terms(grown)

        return lambda nbytes: share_evenly(shapes, fill, grow, nbytes)

    def _full(self, shape: Shape) -> Plan:
        """The plan if bytes were unlimited; all others are its first directions."""
        bands = []
        for bits, count in self.entries:
            if count is None:
                count = min(shape)
            elif isinstance(count, Fraction):
                count = max(1, round(count * min(shape)))
            bands.append(Band(bits, count))
        return _clip(tuple(bands), min(shape))


def parse_template(text: str) -> Template:
    """Parses `8:2,3:32,2:*`.

    Raises:
        PlanError: not of the form bits:count, an unknown width, two holes, a hole that is not last,
            or widths that rise (larger singular values come first and get more bits).
    """
    entries: list[tuple[int, int | Fraction | None]] = []
    for part in text.split(","):
        match = _ENTRY.fullmatch(part.strip())
        if not match or int(match[1]) not in WIDTHS:
            raise PlanError(
                f"plan {text!r}: expected bits:count with bits in {WIDTHS}, got {part!r}"
            )
        bits, count = int(match[1]), match[2]
        if entries and entries[-1][1] is None:
            raise PlanError(f"plan {text!r}: expected the hole * in the last band, got it before")
        if entries and entries[-1][0] < bits:
            raise PlanError(
                f"plan {text!r}: expected widths that fall, got {bits} after lower ones"
            )
        if count != "*" and ("/0" in count or Fraction(count) <= 0):
            raise PlanError(f"plan {text!r}: expected a count above 0, got {count!r}")
        entries.append((bits, None if count == "*" else _number(count)))
    return Template(tuple(entries))


def _number(count: str) -> int | Fraction:
    return Fraction(count) if "/" in count else int(count)


def _clip(bands: Plan, directions: int) -> Plan:
    """The first `directions` directions of a plan."""
    clipped = []
    for band in bands:
        count = min(band.count, directions - sum(b.count for b in clipped))
        if count > 0:
            clipped.append(Band(band.bits, count))
    return tuple(clipped)
