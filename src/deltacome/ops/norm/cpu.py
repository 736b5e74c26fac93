"""The op on a CPU (`ops.native` says how and why): one thread, as a row is a few thousand numbers.

Legend: T tokens, H size, S slots.
"""

from __future__ import annotations

from torch import Tensor

from deltacome.ops import native


def norm(
    y_TH: Tensor,
    x_TH: Tensor,
    slot_T: Tensor,
    weights_SH: Tensor,
    eps: float,
) -> None:
    """`y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot]` for rows that have a slot, as `api.norm` says."""
    native.check("norm", y_TH, slot_T, weights_SH)
    y, x = native.readable(y_TH), native.readable(x_TH)
    slots, size = weights_SH.shape
    result = native.library(native.default_isa()).deltacome_norm(
        *(*native.matrix(y), *native.matrix(x), slot_T.data_ptr(), len(slot_T)),
        *(weights_SH.data_ptr(), slots, size, eps),
    )
    native.check_result("norm", result, slots)
    if y is not y_TH:
        y_TH.copy_(y)
