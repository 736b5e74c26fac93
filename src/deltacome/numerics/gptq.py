"""GPTQ: rounding that makes up for the errors it has already made.

Minimises tr(E C Eᵀ), E = Ŵ − W, one column after another (Frantar et al. 2023, arXiv 2210.17323:
lazy blocks of 128 columns, 1 % damping, activation order). One core, two users:
`quantize_v` for the right and `quantize_u` for the left singular vectors of Delta-CoMe
(arXiv 2406.08903).

GPTQ writes its update with the Cholesky factor of C⁻¹. We never invert C: with C = R Rᵀ, R upper
triangular, the loss is ‖E R‖² and its column j holds no error of a later column than j, so

    target_j = w_j + Σ_{k<j} (w_k − ŵ_k) R_kj / R_jj,    ŵ_j = nearest grid value to target_j

is the same greedy choice: (R_jj)⁻¹ R_kj is what the updates of GPTQ add up to. One Cholesky of C
in reversed order (n³/3) replaces a Cholesky, an inverse and a second Cholesky (4n³/3). It is also
better conditioned, and a column gathers the errors before it when its turn comes (one matrix
product per block), instead of each error being spread over all later columns.

The factor is computed in float64 and used in float32. Computing it in float32 would halve its time,
which at 11008 inputs is most of the total, with errors as good; but one code in a hundred would then
depend on the rounding of the factor, and so on the machine. The sweep is in float32: what its sums
lose is far below the step between codes.

R rows, N columns (inputs or directions) in the order of the sweep, B columns of a block;
I inputs, O outputs, G groups of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltacome.errors import CalibrationError, MismatchError
from deltacome.format.codec import dequantize
from deltacome.format.spec import GROUP
from deltacome.numerics.grid import min_max_grid, round_to_grid, spread

BLOCK = 128

Grid = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(place in the sweep, target_R) → step_R, and the lowest and highest number of steps, float32."""


class Quantized(NamedTuple):
    """Codes of direction-major factors; a code means `(code − zero) · scale` (format.codec)."""

    codes: Tensor  # (R, N) uint8
    scale: Tensor  # (R, G) float16
    zero: Tensor  # (R, G) uint8

    def dequantize(self, group_size: int = GROUP) -> Tensor:
        """What the codes mean, float32 (R, N)."""
        return dequantize(self.codes, self.scale, self.zero, group_size)


@dataclass(frozen=True)
class GramFactor:
    """What the sweep needs of a gram: made once by `factor_gram`, used for any number of sweeps."""

    ratio_NN: Tensor
    """float32, [j, k] = R_kj / R_jj for k < j in the order of the sweep (nothing else is read)."""
    order_N: Tensor
    """int64, the column at each place of the sweep."""


def factor_gram(gram_NN: Tensor, damping: float = 0.01, act_order: bool = True) -> GramFactor:
    """Factors C + damping · mean(diag C) · I, largest diagonal entries first if `act_order`.

    `gram_NN` is symmetric (one triangle is read) and is left untouched. Inputs that were never
    active (zero rows and columns) are coupled to no other and so get plain rounding.

    Raises `CalibrationError` if the gram is not square or finite, is all zeros, or is not positive
    definite after damping.
    """
    diag_N = _check_gram(gram_NN)
    mean = float(diag_N.double().mean())
    if act_order:
        order_N = diag_N.argsort(descending=True, stable=True)
    else:
        order_N = torch.arange(len(diag_N), device=gram_NN.device)
    last_first_N = order_N.flip(0)
    a_NN = gram_NN[last_first_N[:, None], last_first_N].double() / mean
    a_NN.diagonal().add_(damping)
    l_NN, info = torch.linalg.cholesky_ex(a_NN)
    if info.item():
        raise CalibrationError(
            f"a gram of size {len(diag_N)} is not positive definite after {damping:g} damping: "
            f"the pivot {info.item()} from the end of the order is not positive; {_facts(diag_N)}"
        )
    ratio_NN = (l_NN / l_NN.diagonal()).T.flip(0, 1)
    return GramFactor(ratio_NN.float().contiguous(), order_N)


def round_nearest(w_RN: Tensor, bits: Tensor | int) -> Quantized:
    """Rounds to the nearest codes, whatever the inputs are; GPTQ does the same for white inputs.

    `w_RN` and `bits` are as in `min_max_grid`, and so are the errors raised.
    """
    scale_RG, zero_RG = min_max_grid(w_RN, bits)
    return Quantized(round_to_grid(w_RN, scale_RG, zero_RG, bits), scale_RG, zero_RG)


def quantize_v(
    v_RI: Tensor, factor: GramFactor, bits_R: Tensor | int, *, group_size: int = GROUP
) -> Quantized:
    """Quantises directions over the inputs of a layer: minimises Σ_r e_r C e_rᵀ, e = V̂ − V.

    Rows are independent, so all bands, and all layers that share the input, go through one sweep:
    concatenate their directions and give each row its width. `factor` is that of the inputs' gram C.
    Groups are static: scales come from the original values, so groups stay contiguous in the input
    whatever the order of the sweep.

    Returns codes (R, I), scale and zero (R, G). With C = I this is plain rounding. Raises
    `MismatchError` for a gram of another size, `CalibrationError` for directions that are not finite
    or an error that overflows, and what `min_max_grid` raises.
    """
    v_RI = v_RI.float()
    scale_RG, zero_RG = min_max_grid(v_RI, bits_R, group_size)
    step_GR = scale_RG.float().T.contiguous()
    low_GR = -zero_RG.float().T.contiguous()
    bits = torch.as_tensor(bits_R, device=v_RI.device)
    high_GR = low_GR + (2.0**bits - 1)
    groups = list(zip(step_GR, low_GR, high_GR, strict=True))
    group_of = (factor.order_N // group_size).tolist()

    codes_IR = _sweep(v_RI.T, factor, lambda place, _: groups[group_of[place]])
    return Quantized(codes_IR.T.contiguous(), scale_RG, zero_RG)


def quantize_u(
    u_RO: Tensor, factor: GramFactor, bits: int, *, group_size: int = GROUP
) -> Quantized:
    """Quantises directions over the outputs of a layer: minimises tr(E G Eᵀ), E = (Û − U)ᵀ.

    `u_RO` is (r, out); `factor` is that of the gram of what Û multiplies, `(S V̂ᵀ) C (S V̂ᵀ)ᵀ`. Here
    the columns of the sweep are the directions and groups run along the outputs within a direction,
    so the grid of a direction is made when its turn comes, from values that already hold the errors
    of the directions before it.

    Returns codes (R, O), scale and zero (R, G). Raises as `quantize_v` does.
    """
    r, o = u_RO.shape
    shape = (r, -(-o // group_size))
    scale_RG = torch.ones(shape, dtype=torch.float16, device=u_RO.device)
    zero_RG = torch.zeros(shape, dtype=torch.uint8, device=u_RO.device)
    direction = factor.order_N.tolist()

    def grid(place: int, target_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale_1G, zero_1G = min_max_grid(target_O[None], bits, group_size)
        scale_RG[direction[place]], zero_RG[direction[place]] = scale_1G[0], zero_1G[0]
        low_O = -spread(zero_1G.float(), group_size, o)[0]
        return spread(scale_1G.float(), group_size, o)[0], low_O, low_O + (2**bits - 1)

    codes_RO = _sweep(u_RO.float(), factor, grid)
    return Quantized(codes_RO, scale_RG, zero_RG)


def _sweep(w_NR: Tensor, factor: GramFactor, grid: Grid) -> Tensor:
    """The greedy sweep. Columns of the method are rows here, so that each is contiguous.

    Returns codes uint8 (N, R), with the columns back in their original order.
    """
    if len(factor.order_N) != len(w_NR):
        raise MismatchError(
            f"{len(w_NR)} columns need a gram of that size, got {len(factor.order_N)}"
        )
    w_NR = w_NR[factor.order_N].contiguous()  # a copy, as indexing makes one
    if not torch.isfinite(w_NR).all():
        raise CalibrationError("the directions to quantise hold NaN or Inf")
    error_NR = torch.empty_like(w_NR)
    codes_NR = torch.empty_like(w_NR, dtype=torch.uint8)
    for start in range(0, len(w_NR), BLOCK):
        block = slice(start, min(start + BLOCK, len(w_NR)))
        w_BR, error_BR, codes_BR = w_NR[block], error_NR[block], codes_NR[block]
        ratio_BB = factor.ratio_NN[block, block]
        gathered_BR = torch.addmm(w_BR, factor.ratio_NN[block, :start], error_NR[:start])
        for b in range(len(w_BR)):
            target_R = torch.addmv(gathered_BR[b], error_BR[:b].T, ratio_BB[b, :b])
            step_R, low_R, high_R = grid(start + b, target_R)
            steps_R = (target_R / step_R).round_().clamp_(low_R, high_R)
            torch.addcmul(w_BR[b], steps_R, step_R, value=-1, out=error_BR[b])
            codes_BR[b] = steps_R.sub_(low_R)
    if not torch.isfinite(error_NR).all():
        raise CalibrationError("error feedback overflowed float32: the gram is too ill-conditioned")
    codes_back_NR = torch.empty_like(codes_NR)
    codes_back_NR[factor.order_N] = codes_NR
    return codes_back_NR


def _check_gram(gram_NN: Tensor) -> Tensor:
    """Refuses what cannot be factored; returns the diagonal."""
    if gram_NN.ndim != 2 or gram_NN.shape[0] != gram_NN.shape[1]:
        raise CalibrationError(f"a gram must be square, got shape {tuple(gram_NN.shape)}")
    diag_N = gram_NN.diagonal()
    if not torch.isfinite(gram_NN).all():
        bad = int((~torch.isfinite(gram_NN)).sum())
        raise CalibrationError(f"a gram of size {len(diag_N)} holds {bad} NaN or Inf")
    if not (diag_N.double().sum() > 0 and (diag_N >= 0).all()):
        raise CalibrationError(
            f"a gram of size {len(diag_N)} must have a diagonal ≥ 0 that is not all zeros; "
            f"{_facts(diag_N)}"
        )
    return diag_N


def _facts(diag_N: Tensor) -> str:
    return (
        f"its diagonal runs from {diag_N.min():g} to {diag_N.max():g}, "
        f"its trace is {diag_N.double().sum():g}"
    )
