"""Delta-CoMe: singular vectors of the delta, at widths that fall with the singular value.

Ping et al., NeurIPS 2024, arXiv 2406.08903. `D = U S Vᵀ` is cut into bands of one width each
(section 3.2). For each band V is quantised by GPTQ against the inputs' gram C, then U by GPTQ
against the gram of what it will multiply, `(S V̂ᵀ) C (S V̂ᵀ)ᵀ` (section 3.3).

Two choices are ours and change no number that the method defines. The rows of V are independent in
GPTQ, so the bands of all linears that share an input go through one sweep. And factors are scaled to
unit root mean square, with the scale moved into s: entries of a unit vector of 150,000 rows are so
small that the float16 scales of an 8-bit grid would be subnormal.

Legend: O out, I in, R directions of all bands, B directions of one band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Factor, Packed
from deltacome.format.spec import Plan, rank
from deltacome.methods.method import Matrix, Planner, Terms
from deltacome.methods.template import PRECISIONS, Template, parse_template
from deltacome.numerics.gptq import Quantized, quantize_u, quantize_v
from deltacome.numerics.grid import min_max_grid, round_to_grid
from deltacome.numerics.svd import svd

TRIPLE = parse_template(PRECISIONS["triple"])


@dataclass(frozen=True)
class DeltaCome:
    """Options of the method.

    Attributes:
        template: the bands; the default is the paper's triple precision.
        damping: share of the mean diagonal that GPTQ adds to a gram's diagonal.
        act_order: whether GPTQ goes through inputs by falling activation.
        gptq: False rounds to nearest instead, the ablation of the paper's section 5.
    """

    template: Template = TRIPLE
    damping: float = 0.01
    act_order: bool = True
    gptq: bool = True

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {
            "name": "delta-come",
            "template": str(self.template),
            "damping": self.damping,
            "act_order": self.act_order,
            "gptq": self.gptq,
        }

    @property
    def adapts(self) -> bool:
        """Whether the template has a hole."""
        return self.template.has_hole

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
        bands = {name: plans[name].bands for name in deltas}
        triples = {name: _scaled_svd(delta, rank(bands[name])) for name, delta in deltas.items()}
        v_factors = self._quantize_v([(triples[name][2], bands[name]) for name in deltas], gram_II)
        return {
            name: Packed(self._finish(triples[name], bands[name], v, gram_II))
            for name, v in zip(deltas, v_factors, strict=True)
        }

    def _quantize_v(
        self, groups: list[tuple[Tensor, Plan]], gram_II: Tensor | None
    ) -> list[list[Factor]]:
        """All bands of all linears of a group in one sweep."""
        v_RI = torch.cat([v for v, _ in groups])
        bits = [band.bits for _, plan in groups for band in plan for _ in range(band.count)]
        # Rows of 16-bit bands ride along at 8 bits and are not used: float16 needs no grid.
        bits_R = torch.tensor(bits, device=v_RI.device).clamp(max=8)
        if gram_II is None or not self.gptq:
            # GPTQ against white inputs is plain rounding: nothing to factor.
            scale_RG, zero_RG = min_max_grid(v_RI, bits_R)
            codes_RI = round_to_grid(v_RI, scale_RG, zero_RG, bits_R)
            quantized = Quantized(codes_RI, scale_RG, zero_RG)
        else:
            options = {"damping": self.damping, "act_order": self.act_order}
            quantized = quantize_v(v_RI, gram_II, bits_R, **options)
        factors = []
        start = 0
        for _, plan in groups:
            factors.append([])
            for band in plan:
                rows = slice(start, start + band.count)
                factors[-1].append(_factor(band.bits, v_RI[rows], quantized, rows))
                start += band.count
        return factors

    def _finish(
        self,
        triple: tuple[Tensor, Tensor, Tensor],
        plan: Plan,
        v: list[Factor],
        gram_II: Tensor | None,
    ) -> list[BandTensors]:
        """U of each band, against what its V̂ lets through."""
        u_RO, s_R, _ = triple
        counts = [band.count for band in plan]
        bands = []
        for band, v_factor, u_BO, s_B in zip(
            plan, v, u_RO.split(counts), s_R.split(counts), strict=True
        ):
            quantized = self._quantize_u(u_BO, s_B, v_factor, min(band.bits, 8), gram_II)
            u_factor = _factor(band.bits, u_BO, quantized, slice(None))
            bands.append(BandTensors(v_factor, u_factor, s_B.cpu()))
        return bands

    def _quantize_u(
        self, u_BO: Tensor, s_B: Tensor, v: Factor, bits: int, gram_II: Tensor | None
    ) -> Quantized:
        a_BI = s_B[:, None] * v.dequantize().to(s_B.device)
        gram_BB = (a_BI if gram_II is None else a_BI @ gram_II) @ a_BI.T
        if not self.gptq or not float(gram_BB.diagonal().sum()) > 0:
            # Nothing passes this band (its singular values are 0): plain rounding is all there is.
            gram_BB = torch.eye(len(s_B), device=s_B.device)
        return quantize_u(u_BO, gram_BB, bits, damping=self.damping, act_order=self.act_order)


def _factor(bits: int, values_BN: Tensor, quantized: Quantized, rows: slice) -> Factor:
    """A band's factor: the rounded values at 16 bits, packed codes below."""
    if bits == 16:
        return Factor.from_values(values_BN.cpu())
    codes, scale, zero = quantized.codes[rows], quantized.scale[rows], quantized.zero[rows]
    return Factor.from_codes(codes.cpu(), scale.cpu(), zero.cpu(), bits)


def _scaled_svd(delta_OI: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """u_RO, s_R, v_RI with `D ≈ Uᵀ diag(s) V`, rows of u and v of unit root mean square."""
    u_RO, s_R, v_RI = svd(delta_OI, directions)
    out_size, in_size = delta_OI.shape
    scale = math.sqrt(out_size * in_size)
    return u_RO * math.sqrt(out_size), s_R / scale, v_RI * math.sqrt(in_size)
