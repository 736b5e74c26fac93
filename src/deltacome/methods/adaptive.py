"""Adaptive: bits where the model's answers need them. This project's own method.

What it does otherwise than Delta-CoMe (arXiv 2406.08903), `docs/results/adaptive.md` has each part
by itself:

- The SVD is of the delta as the model feels it, weighted by the inputs' gram C and by the Fisher
  information G of the layer's outputs (`numerics.weigh`).
- The singular values of all matrices, embedding and head too, are then in one unit, the KL divergence to
  the tuned model. One price of a byte decides for every direction of every matrix how many bits it gets,
  or none (`numerics.allocate`). A matrix that hardly matters gets hardly any bytes.
- V is quantised by GPTQ against C, as there. U is then refitted to what V became (`numerics.refit`, as
  PrinMix does) and quantised by GPTQ against G, along the outputs: after weighting, directions hardly
  disturb each other, while outputs do.
- Grids are those of least squared error instead of min–max.

Without calibration there is no C and no G: a plain SVD with one price for all matrices.

Legend: O out, I in, R directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Packed
from deltacome.format.spec import Band, bands_nbytes, rank
from deltacome.methods.bands import factor_of
from deltacome.methods.method import Matrix, Planner, Shape, Terms
from deltacome.numerics.allocate import allocate
from deltacome.numerics.gptq import Quantized, quantize_v
from deltacome.numerics.grid import least_squares_grid, round_to_grid
from deltacome.numerics.refit import refit_u
from deltacome.numerics.weigh import weighted_svd

DISTORTION = {2: 0.16, 3: 0.045, 4: 0.013, 8: 0.0002}
"""Squared error of a direction whose two vectors are stored at a width, relative to its weight."""


@dataclass(frozen=True)
class Adaptive:
    """Options of the method.

    Attributes:
        damping: share of the mean diagonal that is added to C and G.
        diagonal: use the diagonal of G alone. G of all layers lies on disk while a run works: 4 · out²
            bytes a linear, which for a 7B model is 40 GB.
    """

    damping: float = 0.01
    diagonal: bool = False

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "adaptive", "damping": self.damping, "diagonal": self.diagonal}

    @property
    def adapts(self) -> bool:
        """Plans fill whatever bytes there are."""
        return True

    @property
    def calibrates(self) -> bool:
        """Inputs, and what outputs are worth, are measured on text."""
        return True

    def spectrum(self, delta_OI: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        """σ² of a matrix's directions, twice the KL that each is worth: float32 (R,)."""
        _, s_R, _ = weighted_svd(delta_OI, min(delta_OI.shape), inputs, outputs, self.damping)
        return s_R.square()

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """One price of a byte for all directions of all matrices."""
        spectra = {
            name: self.spectrum(matrix.delta(), None, None)
            if matrix.spectrum is None
            else matrix.spectrum
            for name, matrix in matrices.items()
        }
        shapes = {name: matrix.shape for name, matrix in matrices.items()}

        def size(counts: Mapping[str, dict[int, int]]) -> float:
            return sum(_terms(counts[name]).nbytes(shape) for name, shape in shapes.items())

        def plans(nbytes: float) -> dict[str, Terms]:
            counts = allocate(
                spectra, lambda name, bits: _price(shapes[name], bits), DISTORTION, size, nbytes
            )
            return {name: _terms(counts[name]) for name in shapes}

        return plans

    def compress(
        self,
        deltas: Mapping[str, Tensor],
        plans: Mapping[str, Terms],
        gram_II: Tensor | None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Packed]:
        """V against C, U refitted to it and against G (see `Method.compress`).

        Raises:
            CalibrationError: C or G is not positive definite even after damping.
        """
        some = [name for name in deltas if plans[name].bands]
        right = []
        for name in some:
            worth, delta = (outputs or {}).get(name), deltas[name]
            _, _, v_RI = weighted_svd(delta, rank(plans[name].bands), gram_II, worth, self.damping)
            right.append(v_RI / _rms(v_RI))
        if not some:
            return {name: Packed() for name in deltas}
        bits = {
            name: torch.tensor([b.bits for b in plans[name].bands for _ in range(b.count)])
            for name in some
        }
        every = self._quantize(torch.cat(right), torch.cat(list(bits.values())), gram_II)
        packed, start = {name: Packed() for name in deltas}, 0
        for name in some:
            rows = slice(start, start + len(bits[name]))
            start = rows.stop
            v = Quantized(*(part[rows] for part in every))
            packed[name] = self._finish(
                deltas[name], plans[name], bits[name], v, gram_II, (outputs or {}).get(name)
            )
        return packed

    def _finish(
        self,
        delta_OI: Tensor,
        plan: Terms,
        bits_R: Tensor,
        v: Quantized,
        gram_II: Tensor | None,
        worth: Tensor | None,
    ) -> Packed:
        """U refitted to a V that is rounded, and rounded itself."""
        stops = itertools.accumulate(band.count for band in plan.bands)
        runs = [slice(n - band.count, n) for n, band in zip(stops, plan.bands, strict=True)]
        v_factors = [
            factor_of(band.bits, v.codes[run].float(), v, run)
            for band, run in zip(plan.bands, runs, strict=True)
        ]
        v_RI = torch.cat([factor.dequantize() for factor in v_factors]).to(delta_OI.device)
        u_RO = refit_u(delta_OI, v_RI, gram_II)
        s_R1 = _rms(u_RO)
        full = worth if worth is not None and worth.ndim == 2 else None
        u = self._quantize(u_RO / s_R1, bits_R, full)
        return Packed(
            [
                BandTensors(
                    v_factor, factor_of(band.bits, u_RO[run], u, run), s_R1[run, 0].float().cpu()
                )
                for band, run, v_factor in zip(plan.bands, runs, v_factors, strict=True)
            ]
        )

    def _quantize(self, vectors_RN: Tensor, bits_R: Tensor, gram_NN: Tensor | None) -> Quantized:
        bits_R = bits_R.to(vectors_RN.device)
        if gram_NN is not None:
            return quantize_v(
                vectors_RN, gram_NN, bits_R, damping=self.damping, make_grid=least_squares_grid
            )
        grid = least_squares_grid(vectors_RN, bits_R)
        return Quantized(round_to_grid(vectors_RN, *grid, bits_R), *grid)


def _rms(vectors_RN: Tensor) -> Tensor:
    """Root mean square of each direction, (R, 1); 1 for one of zeros."""
    rms_R1 = vectors_RN.square().mean(1, keepdim=True).sqrt()
    return torch.where(rms_R1 > 0, rms_R1, 1.0)


def _terms(counts: Mapping[int, int]) -> Terms:
    return Terms(tuple(Band(bits, count) for bits, count in counts.items()))


def _price(shape: Shape, bits: int) -> float:
    """Bytes of a direction, its share of the padding left out."""
    return bands_nbytes(shape, (Band(bits, 64),)) / 64
