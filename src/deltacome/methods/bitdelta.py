"""BitDelta: the sign of every entry of the delta, and one scale for a matrix.

Liu et al., NeurIPS 2024, arXiv 2402.10193. `D̂ = α Sign(D)`, where Sign is −1 for what is not above
0 (equation 2), and the α of least squared error is the mean of |D| (equation 3). The paper then
distils the scales, and nothing else, against the logits of the tuned model (equation 4): that needs
the model, so `compression.distill` does it, if `distill` asks for steps. The paper compresses the linear
layers of the blocks; signs for the embedding and the head are an extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deltacome.format.codec import Packed, SignTensors
from deltacome.methods.method import Matrix, Planner, Shape, Terms, check_option

Scales = Literal["matrix", "rows"]
"""One scale for a matrix, or one for each of its rows."""
Loss = Literal["logits", "answers"]
"""What distilled scales bring close to the tuned model."""


@dataclass(frozen=True)
class BitDelta:
    """A sign for each entry and one scale for each matrix (arXiv 2402.10193).

    Attributes:
        scales: one for a matrix, as in the paper, or one for each row.
        distill: steps that optimise the scales; 0 leaves them at their initial values.
        rate: learning rate of their Adam, as a share of a scale; it falls linearly to 0. (The authors' is
            1e-4 whatever the scale, and falls along a cosine.)
        loss: of the distillation: squared distance of logits at every token, in steps of four rows, as in
            the paper; or that of the other methods' last step, KL on the tokens of answers, in steps of
            sixteen rows.
    """

    scales: Scales = "matrix"
    distill: int = 0
    rate: float = 0.1
    loss: Loss = "logits"

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        check_scales(self.scales)
        check_option(self.distill >= 0, "distill", "0 or more steps", self.distill)
        check_option(0 < self.rate < math.inf, "rate", "a share above 0", self.rate)
        check_option(self.loss in ("logits", "answers"), "loss", "logits or answers", self.loss)

    default_ratio = None  # it follows from the one bit
    calibrates = False  # signs are data-free; distillation wants text, but no grams

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "bitdelta", **asdict(self)}

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """Signs for every matrix."""
        return lambda nbytes: {
            name: Terms(sign_scales=scale_count(matrix.shape, self.scales))
            for name, matrix in matrices.items()
        }

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """Signs and their initial scales (see `Method.compress`)."""
        return {name: Packed(signs=signs_of(d, self.scales)) for name, d in deltas.items()}


def check_scales(scales: str) -> None:
    """Refuses anything but the two kinds with PlanError."""
    check_option(scales in ("matrix", "rows"), "scales", "matrix or rows", scales)


def scale_count(shape: Shape, scales: Scales) -> int:
    """How many scales the signs of a matrix (out, in) have."""
    return 1 if scales == "matrix" else shape[0]


def signs_of(delta_OI: Tensor, scales: Scales) -> SignTensors:
    """Signs of a delta and the scales of least squared error, the mean of its magnitudes."""
    size = delta_OI.abs().mean(1) if scales == "rows" else delta_OI.abs().mean().reshape(1)
    return SignTensors.from_signs((delta_OI > 0).cpu(), size.to("cpu", torch.float32))
