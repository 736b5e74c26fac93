"""From singular triples to bands: what the methods that quantise singular vectors share.

V first: its rows are independent in GPTQ, so the bands of all linears that share an input go through
one sweep, each row with its width. Then U, band by band, against the gram of what it will multiply,
`(S V̂ᵀ) C (S V̂ᵀ)ᵀ` (Delta-CoMe, arXiv 2406.08903, section 3.3).

Triples are scaled to unit root mean square, with the scale moved into s: entries of a unit vector of
150,000 rows are so small that the float16 scales of an 8-bit grid would be subnormal.

Legend: O out, I in, R directions of all bands, B directions of one band.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Factor
from deltacome.format.spec import Plan
from deltacome.numerics.gptq import GramFactor, Quantized, quantize_u, quantize_v
from deltacome.numerics.grid import min_max_grid, round_to_grid
from deltacome.numerics.svd import svd


@dataclass(frozen=True)
class Gptq:
    """How codes are chosen.

    Attributes:
        damping: share of the mean diagonal that is added to a gram's diagonal.
        act_order: whether inputs are gone through by falling activation.
        nearest: round to nearest instead, whatever the inputs are.
    """

    damping: float = 0.01
    act_order: bool = True
    nearest: bool = False

    def v_factors(
        self, groups: list[tuple[Tensor, Plan]], gram_II: Tensor | GramFactor | None
    ) -> list[list[Factor]]:
        """V of all bands of linears with one input: (v_RI, plan) of each → its factors by band.

        Instead of the gram its factor will do, for those who quantise against it many times.
        """
        v_RI = torch.cat([v for v, _ in groups])
        bits = [band.bits for _, plan in groups for band in plan for _ in range(band.count)]
        # Rows of 16-bit bands ride along at 8 bits and are not used: float16 needs no grid.
        bits_R = torch.tensor(bits, device=v_RI.device).clamp(max=8)
        if gram_II is None or self.nearest:
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
                factors[-1].append(factor_of(band.bits, v_RI[rows], quantized, rows))
                start += band.count
        return factors

    def with_u(
        self, u_RO: Tensor, s_R: Tensor, v: list[Factor], plan: Plan, gram_II: Tensor | None
    ) -> list[BandTensors]:
        """The bands: U of each is rounded against what its V̂ lets through."""
        counts = [band.count for band in plan]
        bands = []
        for band, v_factor, u_BO, s_B in zip(
            plan, v, u_RO.split(counts), s_R.split(counts), strict=True
        ):
            quantized = self._quantize_u(u_BO, s_B, v_factor, min(band.bits, 8), gram_II)
            u_factor = factor_of(band.bits, u_BO, quantized, slice(None))
            bands.append(BandTensors(v_factor, u_factor, s_B.cpu()))
        return bands

    def _quantize_u(
        self, u_BO: Tensor, s_B: Tensor, v: Factor, bits: int, gram_II: Tensor | None
    ) -> Quantized:
        a_BI = s_B[:, None] * v.dequantize().to(s_B.device)
        gram_BB = (a_BI if gram_II is None else a_BI @ gram_II) @ a_BI.T
        gram_BB.diagonal().clamp_(min=0)  # rounding alone takes what no input reaches below it
        if self.nearest or not float(gram_BB.diagonal().sum()) > 0:
            # Nothing passes this band (its singular values are 0): plain rounding is all there is.
            gram_BB = torch.eye(len(s_B), device=s_B.device)
        return quantize_u(u_BO, gram_BB, bits, damping=self.damping, act_order=self.act_order)


def scaled_svd(delta_OI: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """u_RO, s_R, v_RI with `D ≈ Uᵀ diag(s) V`, rows of u and v of unit root mean square."""
    u_RO, s_R, v_RI = svd(delta_OI, directions)
    out_size, in_size = delta_OI.shape
    scale = math.sqrt(out_size * in_size)
    return u_RO * math.sqrt(out_size), s_R / scale, v_RI * math.sqrt(in_size)


def factor_of(bits: int, values_BN: Tensor, quantized: Quantized, rows: slice) -> Factor:
    """A band's factor: the rounded values at 16 bits, packed codes below."""
    if bits == 16:
        return Factor.from_values(values_BN.cpu())
    codes, scale, zero = quantized.codes[rows], quantized.scale[rows], quantized.zero[rows]
    return Factor.from_codes(codes.cpu(), scale.cpu(), zero.cpu(), bits)
