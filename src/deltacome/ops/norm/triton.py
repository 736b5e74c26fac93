"""The op on NVIDIA GPUs: one program a row, which holds the row in registers.

Checked in the interpreter and compiled ahead of time; no GPU has run it.

Legend: T tokens, H size, S slots.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.ops.triton_launch import check_gpu

WARPS = 8


def norm(y_TH: Tensor, x_TH: Tensor, slot_T: Tensor, weights_SH: Tensor, eps: float) -> None:
    """See `api.norm`; one launch.

    Raises:
        UnsupportedError: the device or a dtype is not covered.
    """
    check_gpu("norm", y_TH, x_TH)
    tokens, size = x_TH.shape
    if not tokens:
        return
    with torch.cuda.device_of(x_TH):
        normalise[(tokens,)](
            *(y_TH, x_TH, slot_T, weights_SH),
            *(*y_TH.stride(), *x_TH.stride(), weights_SH.stride(0), size, eps),
            SIZE=triton.next_power_of_2(size),
            num_warps=WARPS,
        )


@triton.jit
def normalise(
    y_ptr,
    x_ptr,
    slot_ptr,
    weights_ptr,
    y_stride_t,
    y_stride_h,
    x_stride_t,
    x_stride_h,
    weights_stride,
    size,
    eps,
    SIZE: tl.constexpr,
):
    """y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot] for rows that have a slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    place_H = tl.arange(0, SIZE)
    live_H = place_H < size
    x_H = tl.load(x_ptr + token * x_stride_t + place_H * x_stride_h, live_H, other=0.0)
    x_H = x_H.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x_H * x_H, 0) / size + eps)
    w_H = tl.load(weights_ptr + slot.to(tl.int64) * weights_stride + place_H, live_H, other=0.0)
    y_H = (x_H * factor * w_H).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * y_stride_t + place_H * y_stride_h, y_H, live_H)
