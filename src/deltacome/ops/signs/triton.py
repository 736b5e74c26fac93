"""The op on NVIDIA GPUs (Ampere and newer): a product with ±1 from packed bits, BitDelta's in one launch.

A program takes a tile of rows of one slot and a block of a part's outputs, and goes along the inputs.
A sign is exact in every dtype, so products are taken in the activations' own on tensor cores, summed in
float32; float32 activations are split into three parts of 11 bits, which together lose nothing. Scales
are applied last, to the sums. Few rows are padded to the 16 that a tensor core takes: decoding is limited
by unpacking the bits, not by multiplying.

Checked in the interpreter and compiled ahead of time, like the kernels of `bands`; no GPU has run it.

Legend: T rows of a tile, I in, O outputs of a block, K inputs of a chunk, W words, S slots, N bytes of
a slot, P parts, F fields, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.format.spec import BLOCK, signs_nbytes
from deltacome.ops import slots as fields
from deltacome.ops.bands.triton_kernels import _codes, _part_of
from deltacome.ops.slots import PlacedSigns, Pool, SignTable, arrange
from deltacome.ops.triton_launch import Tensors, bucket, check_gpu, full_batch, tuned

CONFIGS = {
    torch.float32: ((8, 1, 16, BLOCK),),
    torch.float16: ((4, 2, 64, 2 * BLOCK), (8, 2, 64, 2 * BLOCK), (4, 1, 64, 2 * BLOCK)),
    torch.bfloat16: ((4, 2, 64, 2 * BLOCK), (8, 2, 64, 2 * BLOCK), (4, 1, 64, 2 * BLOCK)),
}
"""(warps, stages, outputs of a block, inputs taken at a time), by the dtype of x; none spills."""

LEAST = 16
"""Rows that a tensor core takes: tiles of fewer are padded."""

_WORDS = tl.constexpr(fields.WORDS)
_SCALES = tl.constexpr(fields.SCALES)
_SCALE_COUNT = tl.constexpr(fields.SCALE_COUNT)
_SIGN_FIELDS = tl.constexpr(fields.SIGN_FIELDS)


def signs(
    y_TO: Tensor,
    x_TI: Tensor,
    order_T: Tensor,
    tiles_M3: Tensor,
    blobs_SN: Tensor,
    fields_SPF: Tensor,
    outs: list[int],
    tile: int,
) -> None:
    """See `api.signs`; one launch.

    Raises:
        UnsupportedError: the device or a dtype is not covered.
    """
    check_gpu("signs", y_TO, x_TI)
    if not len(x_TI):
        return

    (tokens, size), tiles, device = x_TI.shape, len(tiles_M3), x_TI.device

    def run(config: tuple[int, int, int, int], tensors: Tensors) -> None:
        warps, stages, outputs, chunk = config
        blocks = sum(triton.cdiv(out, outputs) for out in outs)
        multiply[(tiles, blocks)](
            *(*tensors, *tensors[0].stride(), *x_TI.stride(), blobs_SN.shape[1], size),
            OUTS=tuple(outs),
            PARTS=len(outs),
            TILE=max(LEAST, tile),
            OUTPUTS=outputs,
            CHUNK=chunk,
            num_warps=warps,
            num_stages=stages,
        )

    def made_up() -> Tensors:
        tenant = _made_up(device, size, outs)
        return torch.empty_like(y_TO), x_TI, *full_batch(tokens, tiles, device), *tenant

    key = ("signs", x_TI.dtype, size, tuple(outs), bucket(tiles), tile)
    tensors = (y_TO, x_TI, order_T, tiles_M3, blobs_SN, fields_SPF)
    with torch.cuda.device_of(x_TI):
        tuned(key, CONFIGS[x_TI.dtype], run, tensors, made_up)


def _made_up(device: torch.device, in_size: int, outs: list[int]) -> tuple[Tensor, Tensor]:
    """Blobs and fields of a pool with one tenant, of zeros, with a scale for each matrix."""
    sizes = {part: signs_nbytes((out, in_size), 1) for part, out in enumerate(outs)}
    offsets, nbytes = arrange(sizes)
    table = SignTable(Pool(1, nbytes, device=device), in_size, outs)
    table.load(0, [PlacedSigns(offset, 1) for offset in offsets.values()])
    return table.pool.blobs_SN, table.fields_SPF


@triton.jit
def multiply(
    y_ptr,
    x_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    fields_ptr,
    y_stride_t,
    y_stride_o,
    x_stride_t,
    x_stride_i,
    slot_bytes,
    size,
    OUTS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y (T, O) += α · Σ ±x: one program for (tile, block of a part's outputs)."""
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    part, block, out, column = _part_of(tl.program_id(1), OUTS, PARTS, OUTPUTS)
    part_ptr = fields_ptr + (slot * PARTS + part) * _SIGN_FIELDS
    scales = tl.load(part_ptr + _SCALE_COUNT)
    if scales == 0:
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes
    words = tl.load(part_ptr + _WORDS)

    row_T = tl.arange(0, TILE)
    live_T = row_T < rows
    token_T = tl.load(order_ptr + start + row_T, live_T, other=0)
    x_ptr_T = x_ptr + token_T.to(tl.int64) * x_stride_t
    out_O = block * OUTPUTS + tl.arange(0, OUTPUTS)
    live_O = out_O < out
    sum_TO = tl.full((TILE, OUTPUTS), 0.0, tl.float32)
    for chunk in range((size + CHUNK - 1) // CHUNK):
        codes_OK = _codes(slot_ptr, words, out_O, live_O, chunk, size, 1, CHUNK, OUTPUTS)
        signs_OK = (2 * codes_OK - 1).to(x_ptr.dtype.element_ty)
        input_K = chunk * CHUNK + tl.arange(0, CHUNK)
        live_TK = live_T[:, None] & (input_K < size)[None, :]
        x_TK = tl.load(x_ptr_T[:, None] + input_K[None, :] * x_stride_i, live_TK, other=0.0)
        sum_TO = tl.dot(x_TK, tl.trans(signs_OK), sum_TO, input_precision="tf32x3")
    scale_ptr = (slot_ptr + tl.load(part_ptr + _SCALES)).to(tl.pointer_type(tl.float32))
    alpha_O = tl.load(scale_ptr + tl.where(scales > 1, out_O, 0), live_O, other=0.0)
    y_ptr_T = y_ptr + token_T.to(tl.int64) * y_stride_t
    y_ptr_TO = y_ptr_T[:, None] + (column + out_O)[None, :] * y_stride_o
    live_TO = live_T[:, None] & live_O[None, :]
    y_TO = tl.load(y_ptr_TO, live_TO, other=0.0).to(tl.float32) + sum_TO * alpha_O[None, :]
    tl.store(y_ptr_TO, y_TO.to(y_ptr.dtype.element_ty), live_TO)
