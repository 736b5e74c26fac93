"""Delta-CoMe: singular vectors of the delta, at widths that fall with the singular value.

Ping et al., NeurIPS 2024, arXiv 2406.08903. `D = U S Vᵀ` is cut into bands of one width each
(section 3.2). For each band V is quantised by GPTQ against the inputs' gram C, then U by GPTQ
against the gram of what it will multiply, `(S V̂ᵀ) C (S V̂ᵀ)ᵀ` (section 3.3; `bands` has both).
`compression.search` finds templates by the paper's greedy and genetic search.

The paper compresses the linear layers of the blocks. Treating embedding and head like any other matrix,
the head against the gram of its own inputs, is an extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltacome.format.codec import Packed
from deltacome.methods.bands import Gptq
from deltacome.methods.method import DEFAULT_RATIO, Matrix, Planner, Terms, check_common
from deltacome.methods.template import PRECISIONS, Template, parse_template

TRIPLE = parse_template(PRECISIONS["triple"])


@dataclass(frozen=True)
class DeltaCome:
    """Singular vectors at widths that fall with the singular value, by GPTQ (arXiv 2406.08903).

    Attributes:
        template: the bands; the default is the paper's triple precision.
        damping: share of the mean diagonal that GPTQ adds to a gram's diagonal.
        gptq: False rounds to nearest instead, the ablation of the paper's section 5.
        distill: steps that fit the singular values to the tuned model's logits, which the paper does
            not do (`compression.distill`).
    """

    template: Template = TRIPLE
    damping: float = 0.01
    gptq: bool = True
    distill: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        check_common(self.distill, self.damping)

    calibrates = True  # GPTQ and the reported errors are against the inputs

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "delta-come", **asdict(self), "template": str(self.template)}

    @property
    def default_ratio(self) -> float | None:
        """The ratio where none is asked for, if the template has a hole to fill."""
        return DEFAULT_RATIO if self.template.has_hole else None

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """The template, filled for every matrix at one ratio."""
        return self.template.planner(matrices)

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """Bands by SVD and GPTQ (see `Method.compress`).

        Raises:
            CalibrationError: the gram is not positive definite even after damping.
        """
        gptq = Gptq(self.damping, nearest=not self.gptq)
        return {
            name: Packed(gptq.with_u(*half, plans[name].bands, gram_II))
            for name, half in gptq.halves(deltas, plans, gram_II).items()
        }
