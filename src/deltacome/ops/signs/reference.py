"""Plain torch: what the op means, one tenant after the other.

Legend: T tokens, I in, O out, S slots, N bytes of a slot, P parts, F fields.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.format.codec import read_signs
from deltacome.format.spec import signs_nbytes
from deltacome.ops.slots import SCALE_COUNT, WORDS


def signs(
    y_TO: Tensor,
    x_TI: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPF: Tensor,
    outs: list[int],
) -> None:
    """`y[t, o] += α[o] · Σ_i (2 · code[o, i] − 1) · x[t, i]`, summed in float32."""
    named = set(slot_T.tolist())
    for slot, fields_PF in enumerate(fields_SPF.tolist()):
        if slot not in named:
            continue
        rows = (slot_T == slot).nonzero().view(-1)
        for part_TO, fields_F in zip(torch.split(y_TO, outs, 1), fields_PF, strict=True):
            if not fields_F[SCALE_COUNT]:
                continue
            shape = (part_TO.shape[1], x_TI.shape[1])
            start = fields_F[WORDS]  # a blob begins with its words
            nbytes = signs_nbytes(shape, fields_F[SCALE_COUNT])
            delta_OI = read_signs(
                blobs_SN[slot, start : start + nbytes], shape, fields_F[SCALE_COUNT]
            ).dense()
            total_TO = part_TO[rows].float() + x_TI[rows].float() @ delta_OI.T
            part_TO[rows] = total_TO.to(y_TO.dtype)
