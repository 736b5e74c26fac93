"""Singular triples of a delta, weighted by what its errors cost the model.

An error E of a weight changes a layer's output by E x; how much that changes the model's answer depends
on the output. With C = Σ x xᵀ over the layer's inputs and G = Σ g gᵀ over the gradients of the answer's
log-probability at its outputs, half of tr(G E C Eᵀ) approximates the KL divergence that E costs: the
Fisher information with inputs and gradients taken as independent (K-FAC; Martens & Grosse 2015,
arXiv 1503.05671). So the SVD is taken of `L_Gᵀ D L_C` with C = L_C L_Cᵀ and G = L_G L_Gᵀ: its singular
values are in that unit, so they are comparable between layers, and they fall far more steeply than those
of D. Its triples are mapped back through the inverse factors: `D = Uᵀ diag(s) V` as usual, but with
V C Vᵀ = 1 and U G Uᵀ = 1.

Damping adds a share of the mean diagonal to C and G, so that what calibration never saw keeps a weight.

O outputs, I inputs, R directions.
"""

import torch
from torch import Tensor

from deltacome.errors import CalibrationError, MismatchError
from deltacome.numerics.svd import svd


def weighted_svd(
    delta_OI: Tensor,
    rank: int,
    inputs: Tensor | None,
    outputs: Tensor | None,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest triples of a delta under both weights.

    Args:
        delta_OI: float32 (O, I).
        rank: at most min(O, I).
        inputs: C, float32 (I, I), or None for white inputs.
        outputs: G, float32 (O, O), or its diagonal (O,), or None for outputs of equal worth.
        damping: share of the mean diagonal that is added to each.

    Returns:
        u_RO, s_R, v_RI float32 with `D ≈ Uᵀ diag(s) V`. Σ s² over the triples left out is the squared
        error under the weights.

    Raises:
        CalibrationError: a weight is not positive definite even after damping.
        MismatchError: the sizes do not fit.
    """
    weighted_OI, c_II, g_OO = _weighted(delta_OI, inputs, outputs, damping)
    u_RO, s_R, v_RI = svd(weighted_OI.float(), rank)
    return _back(u_RO, g_OO), s_R, _back(v_RI, c_II)


def weighted_spectrum(
    delta_OI: Tensor, inputs: Tensor | None, outputs: Tensor | None, damping: float = 0.01
) -> Tensor:
    """All σ² of a delta under both weights, in descending order, float32 (min(O, I),).

    Arguments and errors are those of `weighted_svd`. Eigenvalues alone take a fraction of the time of
    eigenvectors, even in float64, where squaring costs no digits that matter here.
    """
    weighted_OI, _, _ = _weighted(delta_OI, inputs, outputs, damping)
    tall_LM = weighted_OI if weighted_OI.shape[0] >= weighted_OI.shape[1] else weighted_OI.T
    squares_M = torch.linalg.eigvalsh(tall_LM.T @ tall_LM)
    return squares_M.flip(0).clamp(min=0).float()


def _weighted(
    delta_OI: Tensor, inputs: Tensor | None, outputs: Tensor | None, damping: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """L_Gᵀ D L_C, float64, and the two roots."""
    out_size, in_size = delta_OI.shape
    for name, weight, size in (("inputs", inputs, in_size), ("outputs", outputs, out_size)):
        if weight is not None and set(weight.shape) != {size}:
            raise MismatchError(
                f"a delta of shape {(out_size, in_size)} needs weights of {size} {name}, got "
                f"{tuple(weight.shape)}"
            )
    c_II = None if inputs is None else _root("inputs", inputs, damping)
    g_OO = None if outputs is None else _root("outputs", outputs, damping)
    weighted_OI = delta_OI.double()
    if c_II is not None:
        weighted_OI = weighted_OI @ c_II
    if g_OO is not None:
        weighted_OI = g_OO[:, None] * weighted_OI if g_OO.ndim == 1 else g_OO.T @ weighted_OI
    return weighted_OI, c_II, g_OO


def _root(name: str, weight: Tensor, damping: float) -> Tensor:
    """L with W = L Lᵀ, lower triangular float64, or the square root of a diagonal."""
    diagonal = weight if weight.ndim == 1 else weight.diagonal()
    extra = damping * float(diagonal.double().mean())
    if weight.ndim == 1:
        root = (weight.double() + extra).sqrt()
        if not (root > 0).all():
            raise CalibrationError(f"weights of {name}: expected positive numbers after damping")
        return root
    damped = weight.double().clone()
    damped.diagonal().add_(extra)
    root, info = torch.linalg.cholesky_ex(damped)
    if info.item():
        raise CalibrationError(
            f"weights of {name}: not positive definite after {damping:g} damping, the pivot "
            f"{info.item() - 1} is not positive"
        )
    return root


def _back(vectors_RN: Tensor, root: Tensor | None) -> Tensor:
    """Maps singular vectors of the weighted matrix back to the matrix itself, by L⁻ᵀ."""
    if root is None:
        return vectors_RN
    if root.ndim == 1:
        return (vectors_RN.to(root.dtype) / root).float()
    solved_NR = torch.linalg.solve_triangular(root.T, vectors_RN.T.to(root.dtype), upper=True)
    return solved_NR.T.float().contiguous()
