"""Rows of an embedding: one implementation in plain torch, for every device.

A row has one bit for each entry and is looked up once per step, while the layers' op runs hundreds of
times. This is a dozen torch calls on the rows looked up, with no loop over tenants and no wait for the
device, so a kernel of our own would save nothing noticeable.

Legend: T tokens, I in, W words of a row, S slots, N bytes of a slot, P parts, F fields.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltacome.format.codec import unpack
from deltacome.format.spec import BLOCK
from deltacome.ops.slots import SCALE_COUNT, SCALES, WORDS


def sign_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPF: Tensor,
    out: int,
    scale: float,
) -> None:
    """`y[t] += scale · α[ids[t]] · (2 · code[ids[t]] − 1)`, in float32."""
    size = y_TI.shape[1]
    if not y_TI.numel() or not blobs_SN.numel():
        return  # no rows, or no slot that holds anything
    fields_TF = fields_SPF[slot_T.clamp(min=0).long(), 0]
    live_T = (slot_T >= 0) & (fields_TF[:, SCALE_COUNT] > 0)
    known = (~live_T | ((ids_T >= 0) & (ids_T < out))).all()
    torch.ops.aten._assert_async.msg(known, f"sign_rows: ids: expected each in [0, {out})")

    row_T = torch.where(live_T, ids_T.long(), 0)
    start_T = slot_T.clamp(min=0).long() * blobs_SN.shape[1]
    row_words = 2 * math.ceil(size / BLOCK)
    word_W = torch.arange(row_words, device=y_TI.device)
    first_T = (start_T + fields_TF[:, WORDS]) // 4 + row_T * row_words
    alpha_T = torch.where(fields_TF[:, SCALE_COUNT] > 1, row_T, 0)
    alpha_T = (start_T + fields_TF[:, SCALES]) // 4 + alpha_T

    # Rows that get nothing read whatever lies there, within the pool.
    pool = blobs_SN.view(-1).view(torch.int32)
    words_TW = pool[(first_T[:, None] + word_W).clamp(max=len(pool) - 1)]
    alpha_T = pool[alpha_T.clamp(max=len(pool) - 1)].view(torch.float32)
    sign_TI = 2 * unpack((words_TW,), 1, size).float() - 1
    total_TI = y_TI.float() + scale * alpha_T[:, None] * sign_TI
    y_TI.copy_(torch.where(live_T[:, None], total_TI.to(y_TI.dtype), y_TI))
