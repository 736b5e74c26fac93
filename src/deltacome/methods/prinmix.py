"""PrinMix: widths from an integer program, and a left factor refitted to the rounded right one.

Xiong et al., arXiv 2506.11087. An error of a right singular vector reaches the output scaled by its
singular value, so each direction i costs `σᵢ² ‖v̂ᵢ(b) − vᵢ‖²` at width b, and σᵢ² if it is dropped. A
0/1 program picks one width for each direction such that the total is least and the bytes of the matrix
are not exceeded; `scipy.optimize.milp` (HiGHS) solves it. Then V is quantised by GPTQ, and U is refitted
to V̂ ("reconstruction target correction", `numerics.refit`) and quantised by GPTQ as well.

Three choices are ours. Embedding and head are treated like any other matrix, where the paper compresses
the linear layers of blocks. Costs are measured by rounding the vectors to nearest before any input is
known, so that a ratio is refused before the work begins. And the program counts bytes on disk, scales
included, where the paper counts codes.

Legend: O out, I in, R directions, W widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye, kron
from torch import Tensor

from deltacome.errors import PlanError, naming
from deltacome.format.codec import Packed
from deltacome.format.spec import Band, Plan, bands_nbytes
from deltacome.methods.bands import Gptq, direction_nbytes, rms, scaled_svd
from deltacome.methods.method import DEFAULT_RATIO, Matrix, Planner, Shape, Terms, check_common
from deltacome.numerics.gptq import round_nearest
from deltacome.numerics.refit import refit_u

WIDTHS = (8, 4, 3, 2)
"""What the program chooses from, besides dropping a direction."""


@dataclass(frozen=True)
class PrinMix:
    """Widths by an integer program, and U refitted to the rounded V (arXiv 2506.11087).

    Attributes:
        damping: share of the mean diagonal that GPTQ adds to a gram's diagonal.
        refit: False quantises the singular vectors themselves, the paper's ablation.
        distill: steps that fit the singular values to the tuned model's logits, which the paper does
            not do (`compression.distill`).
    """

    damping: float = 0.01
    refit: bool = True
    distill: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        check_common(self.distill, self.damping)

    default_ratio = DEFAULT_RATIO  # the program fills whatever bytes there are
    calibrates = True  # GPTQ and the refit are against the inputs

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "prinmix", **asdict(self)}

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """Measures what each direction of each matrix costs at each width, by an SVD of every delta."""
        costs = {name: direction_costs(matrix.delta()) for name, matrix in matrices.items()}
        shapes = {name: matrix.shape for name, matrix in matrices.items()}
        size = sum(out * inputs for out, inputs in shapes.values())

        def plans(nbytes: float) -> dict[str, Terms]:
            # Every matrix at one ratio; what one cannot spend goes to those after it.
            found, spare = {}, 0.0
            for name, shape in shapes.items():
                share = nbytes * shape[0] * shape[1] / size + spare
                with naming([name]):
                    found[name] = Terms(best_plan(shape, costs[name], share))
                spare = share - found[name].nbytes(shape)
            return found

        return plans

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """V by GPTQ, then U refitted to it and also by GPTQ (see `Method.compress`).

        Raises:
            CalibrationError: the gram is not positive definite even after damping.
        """
        gptq = Gptq(self.damping)
        packed = {}
        for name, (u_RO, s_R, v) in gptq.halves(deltas, plans, gram_II).items():
            if self.refit:
                v_RI = torch.cat([factor.dequantize() for factor in v]).to(s_R.device)
                u_RO = refit_u(deltas[name], s_R[:, None] * v_RI, gram_II)
                # Where s is next to 0, in a delta of low rank, U comes out as large as s is small.
                size_R1 = rms(u_RO)
                u_RO, s_R = u_RO / size_R1, s_R * size_R1[:, 0]
            packed[name] = Packed(gptq.with_u(u_RO, s_R, v, plans[name].bands, gram_II))
        return packed


def direction_costs(delta_OI: Tensor) -> np.ndarray:
    """What each direction adds to the squared error, float64 (R, 1 + W).

    Column 0 is the cost of dropping it, the others those of `WIDTHS`.
    """
    _, s_R, v_RI = scaled_svd(delta_OI, min(delta_OI.shape))
    columns = [torch.ones_like(s_R)]
    for bits in WIDTHS:
        error_RI = round_nearest(v_RI, bits).dequantize() - v_RI
        columns.append(error_RI.square().mean(1))  # at most 1, as 0 is on every grid
    return (torch.stack(columns, 1) * s_R[:, None].square()).double().cpu().numpy()


def best_plan(shape: Shape, costs_RW: np.ndarray, nbytes: float) -> Plan:
    """The bands of least cost within the bytes; one direction if nothing fits.

    The widths that the program chose are given to the directions in descending order. Costs at one
    width fall with the singular value nearly everywhere, so that is mostly the program's own order.

    Raises:
        PlanError: the solver gives up.
    """
    price_W = [0, *(direction_nbytes(shape, bits) for bits in WIDTHS)]
    # Directions beyond what fits at the smallest width are dropped in any case.
    count = min(len(costs_RW), max(1, int(nbytes / price_W[-1]) + 1))
    costs_RW = costs_RW[:count] / max(costs_RW[0].max(), 1e-300)
    widths = len(price_W)
    one_each = kron(eye(count), np.ones((1, widths)), "csr")
    bytes_row = csr_array(np.tile(price_W, count)[None])
    result = milp(
        costs_RW.ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes_row, 0, max(nbytes, 0)),
        ],
        integrality=np.ones(count * widths),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3},
    )
    if result.x is None:
        raise PlanError(f"integer program of {count} directions of {shape}: {result.message}")
    chosen_R = result.x.reshape(count, widths).argmax(1)
    bits = sorted((WIDTHS[w - 1] for w in chosen_R if w), reverse=True)
    # The program knows nothing of the padding between sections.
    while len(bits) > 1 and bands_nbytes(shape, _bands(bits)) > nbytes:
        bits.pop()
    return _bands(bits or [WIDTHS[-1]])


def _bands(bits: list[int]) -> Plan:
    return tuple(Band(b, len(list(run))) for b, run in itertools.groupby(bits))
