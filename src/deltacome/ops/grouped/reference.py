"""Plain torch: what the grouped op means, one tenant after the other.

It reads widths and counts back from the table and asks the format where things lie, so that it does
not share the table's offsets, nor the grouping of rows, with the kernels that are tested against it.
It waits for the device to read the table: a CUDA graph cannot hold it.

Legend: T tokens, I in, O out, S slots, N bytes of a slot, B bands, F fields.
"""

from __future__ import annotations

from torch import Tensor

from deltacome.format.spec import Band, bands_nbytes
from deltacome.ops.bands import reference as one_tenant
from deltacome.ops.grouped.pool import BITS, COUNT


def grouped_bands(
    y_TO: Tensor,
    x_TI: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    table_SBF: Tensor,
    group_size: int,
) -> None:
    """`y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g` with the bands of the slot of t, summed in float32."""
    shape = (y_TO.shape[1], x_TI.shape[1])
    for slot, fields in enumerate(table_SBF.tolist()):
        plan = tuple(Band(f[BITS], f[COUNT]) for f in fields if f[COUNT])
        rows = (slot_T == slot).nonzero().view(-1)
        if plan and len(rows):
            blob = blobs_SN[slot, : bands_nbytes(shape, plan, group_size)]
            part_TO = y_TO[rows]
            one_tenant.bands(part_TO, x_TI[rows], blob, plan, group_size)
            y_TO[rows] = part_TO
