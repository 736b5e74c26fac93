"""The ops on a CPU (`ops.native` says how and why).

Legend: T tokens, I in, O out, S slots, N bytes of a slot, P parts, B bands, F fields.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.ops import native
from deltacome.ops.bands import many


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    outs: list[int],
    group_size: int,
) -> None:
    """`y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g`, summed in float32, as `api.bands` says."""
    native.check("bands", y_TO, slot_T, blobs_SN, fields_SPBF)
    slots, parts, max_bands, _ = fields_SPBF.shape
    for slot, rows in many.tenants(y_TO, x_TI, slot_T, slots):
        many.bands(y_TO, x_TI, slot, rows, blobs_SN, fields_SPBF, outs, group_size)
        slot_T = slot_T.clone()
        slot_T[rows] = -1
    y, x = native.readable(y_TO), native.readable(x_TI)
    result = native.library(native.default_isa()).deltacome_bands(
        *(*native.matrix(y), *native.matrix(x), slot_T.data_ptr(), len(slot_T)),
        *(blobs_SN.data_ptr(), blobs_SN.stride(0), fields_SPBF.data_ptr(), slots),
        *(parts, max_bands, native.sizes(tuple(outs))),
        *(x_TI.shape[1], group_size, torch.get_num_threads()),
    )
    native.check_result("bands", result, slots)
    if y is not y_TO and result:
        y_TO.copy_(y)


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    out: int,
    group_size: int,
    scale: float,
) -> None:
    """`y[t] += scale · Σ_g Û_g[:, ids[t]]ᵀ diag(s_g) V̂_g`, in float32, as `api.band_rows` says."""
    native.check("band_rows", y_TI, slot_T, blobs_SN, fields_SPBF)
    y, ids = native.readable(y_TI), ids_T.to(torch.int64).contiguous()
    slots, _, max_bands, _ = fields_SPBF.shape
    result = native.library(native.default_isa()).deltacome_band_rows(
        *(*native.matrix(y), ids.data_ptr(), slot_T.data_ptr(), len(slot_T)),
        *(blobs_SN.data_ptr(), blobs_SN.stride(0), fields_SPBF.data_ptr(), slots),
        *(max_bands, out, y_TI.shape[1], group_size, scale, torch.get_num_threads()),
    )
    native.check_result("band_rows", result, slots)
    if result == -2:
        live = ids[slot_T >= 0]
        raise IndexError(
            f"ids: expected each in [0, {out}), got {int(live.min())} to {int(live.max())}"
        )
    if y is not y_TI and result:
        y_TI.copy_(y)
