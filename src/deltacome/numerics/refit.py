"""The best left factor for a right factor that is already rounded.

With A = diag(s) V̂ᵀ as stored, least squares gives the U that minimises tr((UA − D) C (UA − D)ᵀ):

    U* = D C Aᵀ (A C Aᵀ)⁻¹

PrinMix (arXiv 2506.11087) calls this reconstruction target correction: rounding turned V away from
the singular vectors, and U is turned to follow it before being rounded itself. For a single direction
this is a scale; for many it also removes what their errors have in common.

Directions that are nearly parallel after rounding (1 bit leaves few places to go) make A C Aᵀ nearly
singular, hence the damping. It is relative to each direction's own size, since sizes fall over
orders of magnitude: one damping for all would erase the small ones.

Where there are fewer inputs than U has room for, C says of many changes of U that they cost nothing. The
fit would then be filled with large values that cancel out on these inputs alone, and rounding them ruins
all others. So white inputs are added to C, few enough to change nothing where there is text enough.

O outputs, I inputs, R directions.
"""

import torch
from torch import Tensor

from deltacome.errors import CalibrationError, MismatchError

WHITE = 1e-3
"""Share of the mean diagonal of C that is added to it."""


def refit_u(
    delta_OI: Tensor, a_RI: Tensor, gram_II: Tensor | None = None, damping: float = 1e-4
) -> Tensor:
    """The left factor for which `Uᵀ A` comes closest to the delta.

    Args:
        delta_OI: float32 (O, I).
        a_RI: float32 (R, I), the right factor with its singular values, as stored.
        gram_II: float32 (I, I), or None for white inputs.
        damping: share of its diagonal that is added to A C Aᵀ.

    Returns:
        u_RO, float32, solved in float64. Directions of zeros are 0.

    Raises:
        CalibrationError: A C Aᵀ is not positive definite.
        MismatchError: the sizes do not fit.
    """
    inputs = delta_OI.shape[1]
    if a_RI.shape[1] != inputs or (gram_II is not None and gram_II.shape != (inputs, inputs)):
        raise MismatchError(
            f"a delta of shape {tuple(delta_OI.shape)} needs a right factor and a gram of {inputs} "
            f"inputs, got {tuple(a_RI.shape)} and {None if gram_II is None else tuple(gram_II.shape)}"
        )
    ac_RI = a_RI
    if gram_II is not None:
        ac_RI = a_RI @ gram_II + WHITE * float(gram_II.diagonal().mean()) * a_RI
    normal_RR = ac_RI.double() @ a_RI.double().T
    normal_RR = (normal_RR + normal_RR.T) / 2
    size_R = normal_RR.diagonal().clamp(min=0).sqrt()
    dead_R = size_R <= 1e-12 * size_R.amax()
    size_R = torch.where(dead_R, torch.ones_like(size_R), size_R)
    scaled_RR = normal_RR / size_R / size_R[:, None]
    scaled_RR.diagonal().fill_(1 + damping)
    l_RR, info = torch.linalg.cholesky_ex(scaled_RR)
    if info.item():
        raise CalibrationError(
            f"{len(a_RI)} directions cannot be refitted: the gram of what they let through is not "
            f"positive definite after {damping:g} damping"
        )
    right_RO = (ac_RI @ delta_OI.T).double() / size_R[:, None]
    u_RO = torch.cholesky_solve(right_RO, l_RR) / size_R[:, None]
    return torch.where(dead_R[:, None], 0.0, u_RO).float()
