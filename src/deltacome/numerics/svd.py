"""The leading singular triples of a weight delta, direction-major.

They come from the eigenvectors of the smaller gram matrix (M, M). Squaring halves the digits, which
matters only for directions far below the first: in float32 the sum of squares that is left out comes
out too large by about 1e-7 of the whole. A delta of bfloat16 checkpoints ends in a long tail of
rounding noise and leaves out some 1e-1 at the ranks we keep. For it float32 is exact to 1e-5, and
takes half the time of LAPACK's SVD, half that of float64 and half their memory. A delta whose
spectrum falls steeply (a merged LoRA, a whitened delta) leaves out less. If that is less than `STEEP`,
the factors are computed again in float64, which costs half as much again as LAPACK's SVD would have.

Rejected: randomised subspace iteration (Halko et al. 2011). The rank lies within the flat tail, so
there is no gap to converge by: sixteen products with the matrix still leave a truncation error
0.3 % above the exact one at M = 4096, and take longer. `benchmarks/svd.py` prints the figures.

O outputs, I inputs, R directions, M the smaller of O and I, L the larger.
"""

import math

import torch
from torch import Tensor

from deltacome.errors import CheckpointError, PlanError

STEEP = 1e-2
"""If a smaller share of the squares than this is left out, float32 is not trusted."""


def svd(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples: u_RO, s_R (descending up to rounding), v_RI, float32.

    Directions are orthonormal even where s is 0. Signs: the entry of largest magnitude of each
    right direction v_r is positive (the first one in a tie). `delta_OI` may have any strides and
    stays as it is. Raises `PlanError` unless 1 ≤ rank ≤ min(O, I), `CheckpointError` for NaN or
    Inf.
    """
    if delta_OI.ndim != 2 or not 1 <= rank <= min(delta_OI.shape):
        raise PlanError(
            f"rank {rank} was asked for, of a delta of shape {tuple(delta_OI.shape)}; "
            f"expected a matrix and a rank from 1 to its smaller side"
        )
    if not torch.isfinite(delta_OI).all():
        bad = int((~torch.isfinite(delta_OI)).sum())
        raise CheckpointError(f"a delta of shape {tuple(delta_OI.shape)} holds {bad} NaN or Inf")
    # Squares must stay within float32; a power of two costs no digits.
    unit = 2.0 ** (math.frexp(float(delta_OI.abs().max()))[1] - 1)
    a_OI = delta_OI.float() / unit
    if a_OI.shape[0] >= a_OI.shape[1]:
        u_RO, s_R, v_RI = _tall(a_OI, rank)
    else:
        v_RI, s_R, u_RO = _tall(a_OI.T, rank)
    peak_R1 = v_RI.abs().argmax(1, keepdim=True)
    sign_R1 = torch.where(v_RI.gather(1, peak_R1) < 0, -1.0, 1.0)
    return (u_RO * sign_R1).contiguous(), s_R * unit, (v_RI * sign_R1).contiguous()


def _tall(a_LM: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triples (long, s, short) of a matrix whose columns are its smaller side."""
    triple = _by_gram(a_LM, rank)
    energy = float(a_LM.square().sum(dtype=torch.float64))
    kept = float(triple[1].square().sum(dtype=torch.float64))
    return triple if energy - kept >= STEEP * energy else _by_gram(a_LM.double(), rank)


def _by_gram(a_LM: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triples (long, s, short) computed in the matrix's precision, returned in float32."""
    vectors_MM = torch.linalg.eigh(a_LM.T @ a_LM).eigenvectors  # eigenvalues ascend
    short_MR = vectors_MM[:, -rank:].flip(1)
    # QR rather than a division by s: long vectors are orthonormal even where s is 0.
    long_LR, r_RR = torch.linalg.qr(a_LM @ short_MR)
    s_R = r_RR.diagonal()
    sign_R = torch.where(s_R < 0, -1.0, 1.0)
    return (long_LR * sign_R).T.float(), s_R.abs().float(), short_MR.T.float()
