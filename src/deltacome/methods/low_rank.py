"""Low rank: the first singular directions of the delta, in half precision.

Ryu et al. 2023 (arXiv 2305.18425, "Efficient storage of fine-tuned models via low-rank approximation
of weight residuals"): by Eckart and Young no matrix of that rank is closer to the delta. Inputs are
ignored. A merged LoRA of no higher rank comes back whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltacome.format.codec import BandTensors, Factor, Packed
from deltacome.format.spec import rank
from deltacome.methods.bands import scaled_svd
from deltacome.methods.method import DEFAULT_RATIO, Matrix, Planner, Terms, check_option
from deltacome.methods.template import parse_template


@dataclass(frozen=True)
class LowRank:
    """The first singular directions at 16 bits; uses no text (Ryu et al. 2023).

    Attributes:
        directions: how many to keep of every matrix; None keeps as many as the ratio allows.
    """

    directions: int | None = None

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        many = self.directions is None or self.directions > 0
        check_option(many, "directions", "1 or more", self.directions)

    calibrates = False  # the method is data-free

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "low-rank", **asdict(self)}

    @property
    def default_ratio(self) -> float | None:
        """The ratio where none is asked for, if it determines the rank."""
        return DEFAULT_RATIO if self.directions is None else None

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """One band of 16 bits for every matrix."""
        count = "*" if self.directions is None else self.directions
        return parse_template(f"16:{count}").planner(matrices)

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """The truncated SVD of each delta (see `Method.compress`)."""
        packed = {}
        for name, delta_OI in deltas.items():
            u_RO, s_R, v_RI = scaled_svd(delta_OI, rank(plans[name].bands))
            v, u = Factor.from_values(v_RI.cpu()), Factor.from_values(u_RO.cpu())
            packed[name] = Packed([BandTensors(v, u, s_R.cpu())])
        return packed
