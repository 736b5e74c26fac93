"""The leading singular triples of a weight delta, direction-major.

O outputs, I inputs, R directions, M the smaller of O and I.
"""

import torch
from torch import Tensor

from deltacome.errors import CheckpointError, PlanError


def svd(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples: u_RO, s_R (descending), v_RI, all float32.

    Signs: the entry of largest magnitude of each right direction v_r is positive (the first one
    in a tie). Raises `PlanError` unless 1 ≤ rank ≤ min(O, I), `CheckpointError` for NaN or Inf.
    """
    if delta_OI.ndim != 2 or not 1 <= rank <= min(delta_OI.shape):
        raise PlanError(
            f"rank {rank} is asked of a delta of shape {tuple(delta_OI.shape)}; "
            f"it must be a matrix and the rank within 1 and its smaller side"
        )
    if not torch.isfinite(delta_OI).all():
        bad = int((~torch.isfinite(delta_OI)).sum())
        raise CheckpointError(f"a delta of shape {tuple(delta_OI.shape)} holds {bad} NaN or Inf")
    if delta_OI.shape[0] >= delta_OI.shape[1]:
        u_RO, s_R, v_RI = _tall(delta_OI, rank)
    else:
        v_RI, s_R, u_RO = _tall(delta_OI.T, rank)
    peak_R1 = v_RI.abs().argmax(1, keepdim=True)
    sign_R1 = torch.where(v_RI.gather(1, peak_R1) < 0, -1.0, 1.0)
    return (u_RO * sign_R1).contiguous(), s_R, (v_RI * sign_R1).contiguous()


def _tall(a_LM: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triples of a matrix whose columns are its smaller side, by its (M, M) gram in float64."""
    a_LM = a_LM.double()
    _, vectors_MM = torch.linalg.eigh(a_LM.T @ a_LM)  # ascending
    short_MR = vectors_MM[:, -rank:].flip(1)
    # QR rather than a division by s: long vectors are orthonormal even where s is 0.
    long_LR, r_RR = torch.linalg.qr(a_LM @ short_MR)
    s_R = r_RR.diagonal()
    sign_R = torch.where(s_R < 0, -1.0, 1.0)
    return (long_LR * sign_R).T.float(), s_R.abs().float(), short_MR.T.float()
