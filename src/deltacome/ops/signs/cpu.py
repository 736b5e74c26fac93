"""The op on a CPU (`ops.native` says how and why).

Legend: T tokens, I in, O out, S slots, N bytes of a slot, P parts, F fields.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.ops import native


def signs(
    y_TO: Tensor,
    x_TI: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPF: Tensor,
    outs: list[int],
) -> None:
    """`y[t, o] += α[o] · Σ_i (2 · code[o, i] − 1) · x[t, i]`, in float32, as `api.signs` says."""
    native.check("signs", y_TO, slot_T, blobs_SN, fields_SPF)
    y, x = native.readable(y_TO), native.readable(x_TI)
    slots, parts, _ = fields_SPF.shape
    result = native.library(native.default_isa()).deltacome_signs(
        *(*native.matrix(y), *native.matrix(x), slot_T.data_ptr(), len(slot_T)),
        *(blobs_SN.data_ptr(), blobs_SN.stride(0), fields_SPF.data_ptr(), slots),
        *(parts, native.sizes(tuple(outs)), x_TI.shape[1], torch.get_num_threads()),
    )
    native.check_result("signs", result, slots)
    if y is not y_TO and result:
        y_TO.copy_(y)
