"""Plain torch: what the ops mean. Slow, and right on every device.

One factor at a time is decoded to float32 and thrown away, so the extra memory is that of the
largest factor. Merging `Û diag(s) V̂` first would be shorter and would need the dense matrix.

Legend: T tokens, I in, O out, R directions.
"""

from __future__ import annotations

from torch import Tensor

from deltacome.format.codec import read_bands
from deltacome.format.spec import Plan


def bands(y_TO: Tensor, x_TI: Tensor, blob: Tensor, plan: Plan, group_size: int) -> None:
    """`y += Σ_g ((x V̂_gᵀ) · s_g) Û_g`, summed in float32."""
    shape = (y_TO.shape[1], x_TI.shape[1])
    total_TO = y_TO.float()
    x_TI = x_TI.float()
    for band in read_bands(blob, shape, plan, group_size):
        t_TR = x_TI @ band.v.dequantize().T * band.s
        total_TO = total_TO + t_TR @ band.u.dequantize()
    y_TO.copy_(total_TO)


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    blob: Tensor,
    rows: int,
    plan: Plan,
    group_size: int,
    scale: float,
) -> None:
    """`y += scale · Σ_g Û_g[:, ids]ᵀ diag(s_g) V̂_g`, summed in float32."""
    total_TI = y_TI.float()
    # A negative id would count from the end, and one past the end could read another's padding.
    if ids_T.numel() and (int(ids_T.min()) < 0 or int(ids_T.max()) >= rows):
        raise IndexError(
            f"ids: expected each in [0, {rows}), got {int(ids_T.min())} to {int(ids_T.max())}"
        )
    for band in read_bands(blob, (rows, y_TI.shape[1]), plan, group_size):
        t_TR = band.u.dequantize_at(ids_T.long()).T * (scale * band.s)
        total_TI = total_TI + t_TR @ band.v.dequantize()
    y_TI.copy_(total_TI)
