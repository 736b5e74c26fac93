"""Adaptive: bits where the model's answers need them. This project's own method.

How it differs from Delta-CoMe (arXiv 2406.08903):

- The SVD is of the delta weighted by the inputs' gram C and by the Fisher information G of the layer's
  outputs (`numerics.weigh`).
- The singular values of all matrices, embedding and head included, are then in one unit, the KL
  divergence to the tuned model; but for those of blocks, tokens that the model is sure of are lifted,
  which gives blocks more weight (`compression.sensitivity`). One price per byte decides how many bits, if
  any, each direction of each matrix gets (`numerics.allocate`). A matrix that matters less gets fewer
  bytes, but only by half of what the weights say (`ALIKE`).
- V is quantised by GPTQ against C, as in Delta-CoMe. U is then refitted to the rounded V
  (`numerics.refit`, as PrinMix does) and quantised by GPTQ against G, along the outputs: after weighting,
  directions hardly disturb each other, while outputs do.
- The singular values are distilled at the end (`compression.distill` explains why).
- Half of the chats that C and G are measured on have garbled questions, and so has a copy of each in the
  distillation (`compression.garble`).

Without calibration, and with `distill=0`, there is no C and no G, only a plain SVD with one price for all
matrices.

Legend: O out, I in, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Packed
from deltacome.format.spec import Band
from deltacome.methods.bands import direction_nbytes, factor_of, rms
from deltacome.methods.method import DEFAULT_RATIO, Matrix, Planner, Shape, Terms, check_common
from deltacome.numerics.allocate import allocate
from deltacome.numerics.gptq import Quantized, factor_gram, quantize_v, round_nearest
from deltacome.numerics.refit import refit_u
from deltacome.numerics.weigh import weighted_spectrum, weighted_svd

DISTORTION = {2: 0.031, 3: 0.0057, 4: 0.0013, 8: 0.00002}
"""Width → squared error of a direction relative to its weight, with both of its vectors rounded by GPTQ
to that width: medians of `benchmarks/distortion.py --every 20`. Where G is diagonal, as an embedding's
is, the error is over ten times as large at few bits, which plans ignore."""

CUT = 3.0
"""Penalty on leaving a direction out, relative to an equally large rounding error: rounding errs at
random, but what is left out is left out in every layer and adds up (`benchmarks/tables/ablation.py`)."""


ALIKE = 0.5
"""How far plans treat all matrices as mattering equally: 0 goes by what was measured of each, 1 gives
their entries the same weight. The measurement takes inputs and gradients as independent, and sees only
what calibration shows (`benchmarks/tables/ablation.py`)."""


@dataclass(frozen=True)
class Adaptive:
    """Singular vectors with bits where the model's answers need them; needs text. This project's own.

    Attributes:
        damping: share of the mean diagonal that is added to C and G.
        distill: steps that fit the singular values to the tuned model's logits; they need four times the
            tuned model in memory.
        diagonal: use only the diagonal of G. C and G of all layers are on disk during a run, 4 bytes an
            entry: for a 7B model 70 GB, and 28 GB with diagonals.
    """

    damping: float = 0.1
    distill: int = 100
    diagonal: bool = False

    def __post_init__(self) -> None:
        """Refuses values out of range with PlanError."""
        check_common(self.distill, self.damping)

    default_ratio = DEFAULT_RATIO  # plans fill whatever bytes there are
    calibrates = True  # inputs, and what outputs are worth, are measured on text

    def options(self) -> dict[str, Any]:
        """What the manifest says of the method."""
        return {"name": "adaptive", **asdict(self)}

    def spectrum(self, delta_OI: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        """σ² of a matrix's directions, in proportion to the KL that each is worth: float32 (R,)."""
        if any(side is not None and not side.any() for side in (inputs, outputs)):
            # No answer depends on it: an expert that was never used, for example.
            return torch.zeros(min(delta_OI.shape))
        return weighted_spectrum(delta_OI, inputs, outputs, self.damping)

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        """One price per byte for all directions of all matrices."""
        spectra = {
            name: self.spectrum(matrix.delta(), None, None).cpu()  # where prices are
            if matrix.spectrum is None
            else matrix.spectrum
            for name, matrix in matrices.items()
        }
        shapes = {name: matrix.shape for name, matrix in matrices.items()}
        spectra = {name: w_R * _trust(w_R, shapes[name]) for name, w_R in spectra.items()}

        def size(counts: Mapping[str, dict[int, int]]) -> float:
            return sum(_terms(counts[name]).nbytes(shape) for name, shape in shapes.items())

        def cost(name: str, bits: int) -> float:
            return direction_nbytes(shapes[name], bits)

        against_cut = {bits: error / CUT for bits, error in DISTORTION.items()}

        def plans(nbytes: float) -> dict[str, Terms]:
            counts = allocate(spectra, cost, against_cut, size, nbytes)
            return {name: _terms(counts[name]) for name in shapes}

        return plans

    def compress(
        self, deltas: Mapping[str, Tensor], plans: Mapping[str, Terms], gram_II: Tensor | None
    ) -> dict[str, Packed]:
        """Without a sweep's measurements (see `Method.compress`): all outputs are worth the same."""
        return {name: self.pack(d, plans[name], gram_II, None) for name, d in deltas.items()}

    def pack(
        self, delta_OI: Tensor, plan: Terms, inputs: Tensor | None, outputs: Tensor | None
    ) -> Packed:
        """Quantises V against C, then refits U to it and quantises that against G.

        Args:
            delta_OI: float32 (O, I).
            plan: its bands; without any the matrix stays the base's.
            inputs: C, float32 (I, I), or None for white inputs.
            outputs: G, float32 (O, O), or its diagonal (O,), or None.

        Raises:
            CalibrationError: C or G is not positive definite even after damping.
        """
        if not plan.bands:
            return Packed()
        widths = [band.bits for band in plan.bands for _ in range(band.count)]
        bits_R = torch.tensor(widths, device=delta_OI.device)
        _, _, v_RI = weighted_svd(delta_OI, len(widths), inputs, outputs, self.damping)
        v = self._quantize(v_RI / rms(v_RI), bits_R, inputs)
        u_RO = refit_u(delta_OI, v.dequantize(), inputs)
        s_R1 = rms(u_RO)
        # Against a diagonal, GPTQ would be rounding to nearest.
        full = outputs if outputs is not None and outputs.ndim == 2 else None
        u = self._quantize(u_RO / s_R1, bits_R, full)
        bands, start = [], 0
        for band in plan.bands:
            rows = slice(start, start + band.count)
            v_factor, u_factor = (factor_of(side, rows, band.bits) for side in (v, u))
            bands.append(BandTensors(v_factor, u_factor, s_R1[rows, 0].cpu()))
            start = rows.stop
        return Packed(bands)

    def _quantize(self, vectors_RN: Tensor, bits_R: Tensor, gram_NN: Tensor | None) -> Quantized:
        if gram_NN is not None:
            return quantize_v(vectors_RN, factor_gram(gram_NN, self.damping), bits_R)
        return round_nearest(vectors_RN, bits_R)


def _trust(weights_R: Tensor, shape: Shape) -> float:
    """The factor on a matrix's spectrum that evens out its weight against other matrices (`ALIKE`)."""
    mean = float(weights_R.sum()) / (shape[0] * shape[1])
    return mean**-ALIKE if mean > 0 else 1.0


def _terms(counts: Mapping[int, int]) -> Terms:
    return Terms(tuple(Band(bits, count) for bits, count in counts.items()))
