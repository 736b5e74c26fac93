"""From singular triples to bands: what the methods that quantise singular vectors share.

V first: its rows are independent in GPTQ, so the bands of all linears that share an input go through
one sweep, each row at its own width. Then U, band by band, against the gram of what it will multiply,
`(S V̂ᵀ) C (S V̂ᵀ)ᵀ` (Delta-CoMe, arXiv 2406.08903, section 3.3).

Triples are scaled to unit root mean square, with the scale moved into s: entries of a unit vector of
150,000 rows are so small that the float16 scales of an 8-bit grid would be subnormal.

Legend: O out, I in, R directions of all bands, B directions of one band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Factor
from deltacome.format.spec import BLOCK, Band, Plan, bands_nbytes, rank
from deltacome.methods.method import Shape, Terms
from deltacome.numerics.gptq import (
    GramFactor,
    Quantized,
    factor_gram,
    quantize_u,
    quantize_v,
    round_nearest,
)
from deltacome.numerics.svd import svd


@dataclass(frozen=True)
class Gptq:
    """How codes are chosen.

    Attributes:
        damping: share of the mean diagonal that is added to a gram's diagonal.
        nearest: round to nearest instead, whatever the inputs are.
    """

    damping: float = 0.01
    nearest: bool = False

    def factor(self, gram_II: Tensor | None) -> GramFactor | None:
        """What V is rounded against; None rounds to nearest."""
        return None if gram_II is None or self.nearest else factor_gram(gram_II, self.damping)

    def halves(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor, list[Factor]]]:
        """u_RO, s_R and the rounded V, by band, of each delta (O, I); all share an input."""
        bands = {name: plans[name].bands for name in deltas}
        triples = {name: scaled_svd(delta, rank(bands[name])) for name, delta in deltas.items()}
        groups = [(triples[name][2], bands[name]) for name in deltas]
        factors = self.v_factors(groups, self.factor(gram_II))
        return {name: (*triples[name][:2], v) for name, v in zip(deltas, factors, strict=True)}

    def v_factors(
        self, groups: list[tuple[Tensor, Plan]], factor: GramFactor | None
    ) -> list[list[Factor]]:
        """V of all bands of linears that share an input: (v_RI, plan) of each → its factors by band."""
        v_RI = torch.cat([v for v, _ in groups])
        bits = [band.bits for _, plan in groups for band in plan for _ in range(band.count)]
        # Rows of 16-bit bands ride along at 8 bits and are not used: float16 needs no grid.
        bits_R = torch.tensor(bits, device=v_RI.device).clamp(max=8)
        quantized = (
            round_nearest(v_RI, bits_R) if factor is None else quantize_v(v_RI, factor, bits_R)
        )
        factors = []
        start = 0
        for _, plan in groups:
            factors.append([])
            for band in plan:
                rows = slice(start, start + band.count)
                if band.bits == 16:
                    factors[-1].append(Factor.from_values(v_RI[rows].cpu()))
                else:
                    factors[-1].append(factor_of(quantized, rows, band.bits))
                start += band.count
        return factors

    def with_u(
        self, u_RO: Tensor, s_R: Tensor, v: list[Factor], plan: Plan, gram_II: Tensor | None
    ) -> list[BandTensors]:
        """The bands, with U of each rounded against what its V̂ lets through."""
        counts = [band.count for band in plan]
        bands = []
        for band, v_factor, u_BO, s_B in zip(
            plan, v, u_RO.split(counts), s_R.split(counts), strict=True
        ):
            if band.bits == 16:
                u_factor = Factor.from_values(u_BO.cpu())
            else:
                quantized = self._quantize_u(u_BO, s_B, v_factor, band.bits, gram_II)
                u_factor = factor_of(quantized, slice(None), band.bits)
            bands.append(BandTensors(v_factor, u_factor, s_B.cpu()))
        return bands

    def _quantize_u(
        self, u_BO: Tensor, s_B: Tensor, v: Factor, bits: int, gram_II: Tensor | None
    ) -> Quantized:
        if self.nearest:
            return round_nearest(u_BO, bits)
        a_BI = s_B[:, None] * v.dequantize().to(s_B.device)
        gram_BB = (a_BI if gram_II is None else a_BI @ gram_II) @ a_BI.T
        gram_BB.diagonal().clamp_(min=0)  # where no input reaches, rounding errors can go below 0
        if not float(gram_BB.diagonal().sum()) > 0:
            # Nothing passes this band: its singular values are 0.
            return round_nearest(u_BO, bits)
        return quantize_u(u_BO, factor_gram(gram_BB, self.damping), bits)


def scaled_svd(delta_OI: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """u_RO, s_R, v_RI with `D ≈ Uᵀ diag(s) V`, rows of u and v of unit root mean square."""
    u_RO, s_R, v_RI = svd(delta_OI, directions)
    out_size, in_size = delta_OI.shape
    scale = math.sqrt(out_size * in_size)
    return u_RO * math.sqrt(out_size), s_R / scale, v_RI * math.sqrt(in_size)


def factor_of(quantized: Quantized, rows: slice, bits: int) -> Factor:
    """The packed codes of a band, which has those rows."""
    codes, scale, zero = quantized.codes[rows], quantized.scale[rows], quantized.zero[rows]
    return Factor.from_codes(codes.cpu(), scale.cpu(), zero.cpu(), bits)


def direction_nbytes(shape: Shape, bits: int) -> float:
    """Bytes of one direction of a matrix (out, in), with a small share of the padding."""
    return bands_nbytes(shape, (Band(bits, BLOCK),)) / BLOCK


def rms(vectors_RN: Tensor) -> Tensor:
    """Root mean square of each direction, (R, 1); 1 for one of zeros."""
    rms_R1 = vectors_RN.square().mean(1, keepdim=True).sqrt()
    return torch.where(rms_R1 > 0, rms_R1, 1.0)
