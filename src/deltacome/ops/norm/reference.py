"""Plain torch: what the op means.

Legend: T tokens, H size, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm(y_TH: Tensor, x_TH: Tensor, slot_T: Tensor, weights_SH: Tensor, eps: float) -> None:
    """`y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot]` for rows that have a slot, in float32."""
    rows = (slot_T >= 0).nonzero().view(-1)
    x = x_TH[rows].float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y_TH[rows] = (normed * weights_SH[slot_T[rows].long()]).to(y_TH.dtype)
