"""Residual: signs for the bulk of the delta, a low rank for what they leave.

D-QRELO (arXiv 2604.16940), made for fine-tunes on large data sets, whose deltas are large and high in
rank: one bit an entry first, as in BitDelta, then an SVD of the residual `D − α Sign(D)`. Data-free.
The compensation that the paper adds to that residual is not implemented.
The singular vectors are kept at 16 bits, or at what the template says, rounded to nearest.

Signs cost a fixed sixteenth, so the ratio must be below 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deltacome.format.codec import Packed
from deltacome.methods.bitdelta import Scales, check_scales, scale_count, signs_of
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.method import Matrix, Planner, Shape, Terms, share_evenly
from deltacome.methods.template import Template, parse_template


@dataclass(frozen=True)
class Residual:
    """Signs, then singular vectors of what they leave (arXiv 2604.16940, less its compensation).

    Attributes:
        template: the bands of the residual.
        scales: of the signs, one for a matrix or one for each row.
    """

    template: Template = parse_template("16:*")  # noqa: RUF009 (a template is frozen)
    scales: Scales = "matrix"

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        check_scales(self.scales)

    calibrates = False  # the method is data-free

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "residual", "template": str(self.template), "scales": self.scales}

    @property
    def default_ratio(self) -> float | None:
        """The ratio where none is asked for, if the template has a hole: signs alone are a sixteenth."""
        return 12.0 if self.template.has_hole else None

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """Signs for every matrix, and bands as far as the ratio allows."""
        shapes = {name: matrix.shape for name, matrix in matrices.items()}

        def signs(shape: Shape) -> Terms:
            return Terms(sign_scales=scale_count(shape, self.scales))

        def fill(shape: Shape, nbytes: float) -> Terms:
            left = nbytes - signs(shape).nbytes(shape)
            return replace(signs(shape), bands=self.template.fill(shape, left))

        def grow(shape: Shape, terms: Terms) -> Terms | None:
            grown = self.template.grow(shape, terms.bands)
            return None if grown is None else replace(terms, bands=grown)

        return lambda nbytes: share_evenly(shapes, fill, grow, nbytes)

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """Signs, then bands of what they leave (see `Method.compress`)."""
        rounding = DeltaCome(self.template, gptq=False)
        packed = {}
        for name, delta_OI in deltas.items():
            signs = signs_of(delta_OI, self.scales)
            bands = ()
            if plans[name].bands:
                left_OI = delta_OI - signs.dense().to(delta_OI.device)
                bands = rounding.compress({name: left_OI}, plans, None)[name].bands
            packed[name] = Packed(bands, signs)
        return packed
