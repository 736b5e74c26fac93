"""Two kernels for NVIDIA GPUs (Ampere and newer): shrink `t = (x V̂ᵀ) · s`, expand `y += t Û`.

One launch of each does all tenants and all bands: a program takes a tile of rows of one slot and a
block of directions (shrink) or of outputs (expand), and looks up in the table what lies there. The
packed bytes are read once for a tile and become numbers in registers; dense weights are never
written to memory. There are two ways to multiply, and the caller's tile picks one:

*Tiles of one row* are for a batch of many tenants. What limits them, beside the bandwidth, is the
instructions that a code costs. A thread unpacks the words that it has loaded and needs no other
thread's, and a code becomes a float by a mask and the bits of 1: `1 + code · 2ᵏ` is the code within
the mantissa of 1. A shift serves several codes, at the price of at most four bits of accuracy. The
ones, and the zero points, are subtracted from sums, not from codes. Three bits are the sum of a 2-bit
plane and four times a 1-bit plane. All arithmetic is float32.

*Tiles of 16 rows and more* use the tensor cores, in TF32: every float16, every bfloat16 and every
`code − zero` is exact in its 11 bits, so one path serves both 16-bit dtypes. Products in bfloat16
have twice the peak, which prefill would feel, but 16-bit bands do not fit into it. Only t, rounded to
11 bits between the two products, loses anything. For float32 activations products are float32,
without tensor cores. Scales stay outside of products (a scaled entry would need 19 bits): a chunk of
the long axis lies within one group, shrink multiplies its partial sums and expand multiplies t.

*Splits.* Few rows make few programs, so shrink can cut its sum over `in` into several parts, which
expand adds in a fixed order: results do not depend on timing, as those of atomic additions do.

Legend: T tokens (a tile's rows here), R directions of a block, I in, O out, K entries of a chunk, B
packed blocks of a chunk, W words of a block, J codes of a word, S slots, N bytes of a slot, F fields,
M tiles. Upper case names are constants of a compilation.
"""

# Kernels are Python by syntax alone: their ints are constants, their loops unrolled by a compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.spec import BLOCK
from deltacome.ops.grouped import pool as fields

ROW_BLOCKS = 8
"""Packed blocks that shrink takes at a time for a tile of one row: 128 bytes of 2-bit codes."""
PROGRAMS = 512
"""Shrink splits its sums while it has fewer programs: about four for each multiprocessor."""
MAX_SPLITS = 8
DIRECTIONS = 32
"""Directions of a block: with more, some width does not fit into the registers."""


class Config(NamedTuple):
    """How the kernels for one size of tile are compiled."""

    warps: int
    stages: int
    """Iterations whose loads are in flight, where a loop has dots."""
    registers: int | None
    """Limit of a thread's; without one ptxas spills some to fit one more program."""


CONFIGS = {1: Config(4, 1, 224), 16: Config(4, 2, None), 64: Config(8, 1, None)}
"""By rows of a tile; chosen for the registers they leave, not yet tuned on a GPU."""

_BLOCK = tl.constexpr(BLOCK)
_BITS = tl.constexpr(fields.BITS)
_COUNT = tl.constexpr(fields.COUNT)
_FIRST = tl.constexpr(fields.FIRST)
_V = tl.constexpr(fields.V)
_U = tl.constexpr(fields.U)
_S = tl.constexpr(fields.S)
_FIELDS = tl.constexpr(fields.FIELDS)
_ROW_BLOCKS = tl.constexpr(ROW_BLOCKS)
_ONE = tl.constexpr(0x3F800000)  # the bits of 1 in float32
_MAGIC = tl.constexpr(0x4B000000)  # those of 2²³: a code in its mantissa is added to it
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def grouped_bands(
    y_TO: Tensor,
    x_TI: Tensor,
    order_T: Tensor,
    tiles_M3: Tensor,
    blobs_SN: Tensor,
    table_SBF: Tensor,
    tile: int,
    max_rank: int,
    group_size: int,
) -> None:
    """See `api.grouped_bands`; launches two kernels and allocates t, splits × T × max_rank floats.

    Raises:
        UnsupportedError: the device, a dtype, the group size or the tile is not covered.
    """
    _check(y_TO, x_TI, tile, group_size)
    tokens = x_TI.shape[0]
    if tokens == 0:
        return
    out_size, in_size = y_TO.shape[1], x_TI.shape[1]
    config = CONFIGS[tile]
    tiles, max_bands = len(tiles_M3), table_SBF.shape[1]
    chunk = chunk_size(tile, group_size)
    steps = triton.cdiv(in_size, ROW_BLOCKS * BLOCK if tile == 1 else chunk)
    # As many blocks of directions as any plan needs: each band may fill its last one in part.
    blocks = (max_rank + max_bands * (DIRECTIONS - 1)) // DIRECTIONS
    splits = split_count(tiles * blocks, steps)
    t_XTR = torch.empty(splits, tokens, max_rank, dtype=torch.float32, device=x_TI.device)
    lookups = (order_T, tiles_M3, blobs_SN, table_SBF, tokens)
    slot_bytes = blobs_SN.shape[1]
    constants = {
        "BANDS": max_bands,
        "MAX_RANK": max_rank,
        "GROUP": group_size,
        "TILE": tile,
        "DIRECTIONS": DIRECTIONS,
        "CHUNK": chunk,
        "SPLITS": splits,
        "PRECISION": "ieee" if x_TI.dtype == torch.float32 else "tf32",
        "num_warps": config.warps,
        "num_stages": 1 if x_TI.dtype == torch.float32 else config.stages,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(x_TI):
        shrink[(tiles, blocks, splits)](
            t_XTR,
            x_TI,
            *lookups,
            *x_TI.stride(),
            slot_bytes,
            SIZE=in_size,
            **constants,
        )
        expand[(tiles, triton.cdiv(out_size, chunk))](
            y_TO,
            t_XTR,
            *lookups,
            *y_TO.stride(),
            slot_bytes,
            SIZE=out_size,
            **constants,
        )


def chunk_size(tile: int, group_size: int) -> int:
    """Entries of the long axis that a program takes at a time; for dots within one scale group."""
    return 2 * BLOCK if tile == 1 or group_size % (2 * BLOCK) == 0 else BLOCK


def split_count(programs: int, steps: int) -> int:
    """Parts that shrink cuts its sums into, a power of two: no more than there are steps."""
    splits = 1
    while 2 * splits <= min(MAX_SPLITS, steps) and programs * splits < PROGRAMS:
        splits *= 2
    return splits


def _check(y_TO: Tensor, x_TI: Tensor, tile: int, group_size: int) -> None:
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and x_TI.device.type != "cuda":
        raise UnsupportedError(
            f"grouped_bands: impl='triton' expects a CUDA device (or TRITON_INTERPRET=1), "
            f"got {x_TI.device}"
        )
    if not interpreted and torch.cuda.get_device_capability(x_TI.device) < (8, 0):
        raise UnsupportedError(
            "grouped_bands: impl='triton' expects compute capability 8.0 or newer, got "
            f"{torch.cuda.get_device_capability(x_TI.device)}"
        )
    if y_TO.dtype not in _DTYPES or x_TI.dtype not in _DTYPES:
        raise UnsupportedError(
            f"grouped_bands: impl='triton' expects dtypes of {_DTYPES}, "
            f"got y of {y_TO.dtype} and x of {x_TI.dtype}"
        )
    if group_size % BLOCK:
        raise UnsupportedError(
            f"grouped_bands: impl='triton' expects scale groups of a multiple of {BLOCK} entries, "
            f"got {group_size}"
        )
    if tile not in CONFIGS:
        raise UnsupportedError(
            f"grouped_bands: impl='triton' expects tiles of {tuple(CONFIGS)} rows, got {tile}"
        )


@triton.jit
def _words(
    slot_ptr,
    offset,
    direction_R,
    live_R,
    block_B,
    SIZE: tl.constexpr,
    PLANE: tl.constexpr,
):
    """int32 (R, B, W): packed blocks of one plane; zero where there is none."""
    BLOCKS: tl.constexpr = (SIZE + _BLOCK - 1) // _BLOCK
    WORDS: tl.constexpr = 2 * PLANE
    words_ptr = (slot_ptr + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.int32))
    word_BW = block_B[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    live_RB = live_R[:, None]
    if BLOCKS % block_B.shape[0] != 0:
        live_RB = live_RB & (block_B < BLOCKS)[None, :]
    return tl.load(
        words_ptr + direction_R[:, None, None] * (BLOCKS * WORDS) + word_BW[None, :, :],
        live_RB[:, :, None],
        other=0,
    )


@triton.jit
def _grid(
    slot_ptr, scale, zero, direction_R, live_R, block_B, SIZE: tl.constexpr, GROUP: tl.constexpr
):
    """Scales and zero points of blocks, float32 (R, B); zero where there is none."""
    GROUPS: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    group_RB = direction_R[:, None] * GROUPS + (block_B * _BLOCK // GROUP)[None, :]
    live_RB = live_R[:, None] & (block_B * _BLOCK < SIZE)[None, :]
    scale_ptr = (slot_ptr + scale).to(tl.pointer_type(tl.float16))
    scale_RB = tl.load(scale_ptr + group_RB, live_RB, other=0.0).to(tl.float32)
    zero_RB = tl.load(slot_ptr + zero + group_RB, live_RB, other=0).to(tl.float32)
    return scale_RB, zero_RB


@triton.jit
def _digits(words_RBW, PLANE: tl.constexpr):
    """`1 + code · 2^(place − 23)` for all digits of words, float32 (R, B, J, W), and 2^(23 − place) (J,).

    Neighbouring digits share a shift and come to lie one behind the other, the last at the top of the
    mantissa. Shifts, masks and powers depend on J alone, whose axis lies within a thread, so they are
    constants of the machine code.
    """
    SHARED: tl.constexpr = 4 if PLANE == 1 else 2 if PLANE < 8 else 1
    j_J = tl.arange(0, 32 // PLANE)
    place_J = 23 - PLANE - PLANE * (SHARED - 1 - j_J % SHARED)
    shift_J = place_J - PLANE * j_J
    left = tl.maximum(shift_J, 0)[None, None, :, None]
    right = tl.maximum(-shift_J, 0)[None, None, :, None]
    mask = (((1 << PLANE) - 1) << place_J)[None, None, :, None]
    R: tl.constexpr = words_RBW.shape[0]
    B: tl.constexpr = words_RBW.shape[1]
    # A reshape, as `[:, :, None, :]` lets the compiler spread J over threads.
    moved = (tl.reshape(words_RBW, (R, B, 1, 2 * PLANE)) << left) >> right
    digits = (moved & mask | _ONE).to(tl.float32, bitcast=True)
    return digits, ((127 + 23 - place_J) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _shrink_plane(
    x_ptr_T,
    x_stride_i,
    slot_ptr,
    offset,
    scale,
    zero,
    direction_R,
    live_R,
    first_step,
    last_step,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    HIGH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """float32 (R,): `Σ_i x · scale · (code − zero)` of one plane; HIGH: `Σ_i x · scale · 4 code`."""
    WORDS: tl.constexpr = 2 * PLANE
    # Each word keeps its sum: all sums but the last stay within a thread.
    sum_RBW = tl.full((DIRECTIONS, _ROW_BLOCKS, WORDS), 0.0, tl.float32)
    for step in range(first_step, last_step):
        block_B = step * _ROW_BLOCKS + tl.arange(0, _ROW_BLOCKS)
        words_RBW = _words(slot_ptr, offset, direction_R, live_R, block_B, SIZE, PLANE)
        scale_RB, zero_RB = _grid(slot_ptr, scale, zero, direction_R, live_R, block_B, SIZE, GROUP)
        place_BK = block_B[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        x_ptr_BK = x_ptr_T[:, None] + place_BK * x_stride_i
        x_BK = tl.load(x_ptr_BK, place_BK < SIZE, other=0.0)
        x_BJW = tl.reshape(x_BK, (_ROW_BLOCKS, 32 // PLANE, WORDS)).to(tl.float32)
        digits, undo_J = _digits(words_RBW, PLANE)
        moved_BJW = x_BJW * undo_J[None, :, None]
        codes_RBW = tl.sum(digits * moved_BJW[None, :, :, :], 2) - tl.sum(moved_BJW, 1)[None, :, :]
        if HIGH:
            codes_RBW *= 4
        else:
            codes_RBW -= zero_RB[:, :, None] * tl.sum(x_BJW, 1)[None, :, :]
        sum_RBW += codes_RBW * scale_RB[:, :, None]
    return tl.sum(tl.sum(sum_RBW, 2), 1)


@triton.jit
def _shrink_row(
    x_ptr_T,
    x_stride_i,
    slot_ptr,
    band_ptr,
    direction_R,
    live_R,
    split,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 (1, R): `x V̂ᵀ` of one row and block of directions, over this split's part of `in`."""
    low, high = tl.load(band_ptr + _V), tl.load(band_ptr + _V + 1)
    scale, zero = tl.load(band_ptr + _V + 2), tl.load(band_ptr + _V + 3)
    STEPS: tl.constexpr = (SIZE + _ROW_BLOCKS * _BLOCK - 1) // (_ROW_BLOCKS * _BLOCK)
    PART: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    start, stop = split * PART, tl.minimum(split * PART + PART, STEPS)
    if BITS == 16:
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        sum_RB = tl.full((DIRECTIONS, _ROW_BLOCKS), 0.0, tl.float32)
        for run in range(start * 8, stop * 8):  # a step's 512 values do not fit into registers
            place_K = run * _BLOCK + tl.arange(0, _BLOCK)
            live_K = place_K < SIZE
            x_K = tl.load(x_ptr_T + place_K * x_stride_i, live_K, other=0.0).to(tl.float32)
            v_ptr_RK = values_ptr + direction_R[:, None] * SIZE + place_K[None, :]
            v_RK = tl.load(v_ptr_RK, live_R[:, None] & live_K[None, :], other=0.0).to(tl.float32)
            products = tl.reshape(v_RK * x_K[None, :], (DIRECTIONS, _ROW_BLOCKS, 8))
            sum_RB += tl.sum(products, 2)
        sum_R = tl.sum(sum_RB, 1)
    else:
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        # fmt: off
        sum_R = _shrink_plane(x_ptr_T, x_stride_i, slot_ptr, low, scale, zero, direction_R, live_R,
                              start, stop, SIZE, GROUP, LOW, False, DIRECTIONS)
        if BITS == 3:
            sum_R += _shrink_plane(x_ptr_T, x_stride_i, slot_ptr, high, scale, zero, direction_R,
                                   live_R, start, stop, SIZE, GROUP, 1, True, DIRECTIONS)
        # fmt: on
    return sum_R[None, :]


@triton.jit
def _t_row(t_ptr_T, split_stride, direction_R, live_R, SPLITS: tl.constexpr):
    """t of one row, float32 (R,): the sum of its splits."""
    t_ptr_R = t_ptr_T + direction_R
    t_ptr_RX = t_ptr_R[:, None] + tl.arange(0, SPLITS)[None, :] * split_stride
    # A sum along an axis, not a loop: the compiler would let each thread load all of t itself.
    return tl.sum(tl.load(t_ptr_RX, live_R[:, None], other=0.0), 1)


@triton.jit
def _expand_plane(
    t_ptr_T,
    split_stride,
    slot_ptr,
    offset,
    scale,
    zero,
    first,
    count,
    block_B,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    HIGH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 (B, K): `Σ_r t · scale · (code − zero)` of one plane; HIGH: `Σ_r t · scale · 4 code`."""
    BLOCKS: tl.constexpr = block_B.shape[0]
    # An accumulator for each code: all sums but the last stay within a thread.
    sum_RBJW = tl.full((DIRECTIONS, BLOCKS, 32 // PLANE, 2 * PLANE), 0.0, tl.float32)
    ones_RB = tl.full((DIRECTIONS, BLOCKS), 0.0, tl.float32)
    zeros_RB = tl.full((DIRECTIONS, BLOCKS), 0.0, tl.float32)
    for start in range(0, count, DIRECTIONS):
        direction_R = start + tl.arange(0, DIRECTIONS)
        live_R = direction_R < count
        words_RBW = _words(slot_ptr, offset, direction_R, live_R, block_B, SIZE, PLANE)
        digits, _ = _digits(words_RBW, PLANE)
        scale_RB, zero_RB = _grid(slot_ptr, scale, zero, direction_R, live_R, block_B, SIZE, GROUP)
        t_R = _t_row(t_ptr_T, split_stride, first + direction_R, live_R, SPLITS)
        t_RB = t_R[:, None] * scale_RB
        sum_RBJW += digits * t_RB[:, :, None, None]
        ones_RB += t_RB
        zeros_RB += t_RB * zero_RB
    sum_BJW = tl.sum(sum_RBJW, 0) - tl.sum(ones_RB, 0)[:, None, None]
    _, undo_J = _digits(tl.full((1, 1, 2 * PLANE), 0, tl.int32), PLANE)
    sum_BJW *= undo_J[None, :, None]
    if HIGH:
        sum_BJW *= 4
    else:
        sum_BJW -= tl.sum(zeros_RB, 0)[:, None, None]
    return tl.reshape(sum_BJW, (BLOCKS, _BLOCK))


@triton.jit
def _expand_row(
    t_ptr_T,
    split_stride,
    slot_ptr,
    band_ptr,
    count,
    chunk,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 (1, K): `t Û` of one row and band, for one chunk of the outputs."""
    low, high = tl.load(band_ptr + _U), tl.load(band_ptr + _U + 1)
    scale, zero = tl.load(band_ptr + _U + 2), tl.load(band_ptr + _U + 3)
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    if BITS == 16:
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        sum_RK = tl.full((DIRECTIONS, CHUNK), 0.0, tl.float32)
        for start in range(0, count, DIRECTIONS):
            direction_R = start + tl.arange(0, DIRECTIONS)
            live_R = direction_R < count
            live_RK = live_R[:, None] & (column_K < SIZE)[None, :]
            u_ptr_RK = values_ptr + direction_R[:, None] * SIZE + column_K[None, :]
            t_R = _t_row(t_ptr_T, split_stride, first + direction_R, live_R, SPLITS)
            sum_RK += tl.load(u_ptr_RK, live_RK, other=0.0).to(tl.float32) * t_R[:, None]
        sum_K = tl.sum(sum_RK, 0)
    else:
        block_B = chunk * (CHUNK // _BLOCK) + tl.arange(0, CHUNK // _BLOCK)
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        # fmt: off
        sum_BK = _expand_plane(t_ptr_T, split_stride, slot_ptr, low, scale, zero, first, count,
                               block_B, SIZE, GROUP, LOW, False, DIRECTIONS, SPLITS)
        if BITS == 3:
            sum_BK += _expand_plane(t_ptr_T, split_stride, slot_ptr, high, scale, zero, first, count,
                                    block_B, SIZE, GROUP, 1, True, DIRECTIONS, SPLITS)
        # fmt: on
        sum_K = tl.reshape(sum_BK, (CHUNK,))
    return sum_K[None, :]


@triton.jit
def _codes(
    slot_ptr,
    offset,
    direction_R,
    live_R,
    chunk,
    SIZE: tl.constexpr,
    PLANE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """int32 (R, K): the codes of one plane, in their order."""
    BLOCKS: tl.constexpr = (SIZE + _BLOCK - 1) // _BLOCK
    WORDS: tl.constexpr = 2 * PLANE
    TAKEN: tl.constexpr = CHUNK // _BLOCK
    words_ptr = (slot_ptr + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.int32))
    word_W = chunk * (TAKEN * WORDS) + tl.arange(0, TAKEN * WORDS)
    live_RW = live_R[:, None]
    if BLOCKS % TAKEN != 0:  # a chunk may reach over the end of a direction
        live_RW = live_RW & (word_W < BLOCKS * WORDS)[None, :]
    words_RW = tl.load(
        words_ptr + direction_R[:, None] * (BLOCKS * WORDS) + word_W[None, :], live_RW, other=0
    )
    words = tl.reshape(words_RW, (DIRECTIONS, TAKEN, 1, WORDS))
    shifts = tl.reshape(tl.arange(0, 32 // PLANE) * PLANE, (1, 1, 32 // PLANE, 1))
    return tl.reshape((words >> shifts) & ((1 << PLANE) - 1), (DIRECTIONS, CHUNK))


@triton.jit
def _entries(
    slot_ptr,
    low,
    high,
    scale,
    zero,
    direction_R,
    live_R,
    chunk,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """Entries of a chunk, float32 (R, K), and the scale (R,) that they still lack."""
    if BITS == 16:
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        live_RK = live_R[:, None] & (column_K < SIZE)[None, :]
        values_RK = tl.load(
            values_ptr + direction_R[:, None] * SIZE + column_K[None, :], live_RK, other=0.0
        )
        entries_RK = values_RK.to(tl.float32)
        scale_R = tl.full((DIRECTIONS,), 1.0, tl.float32)
    else:
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        codes_RK = _codes(slot_ptr, low, direction_R, live_R, chunk, SIZE, PLANE, CHUNK, DIRECTIONS)
        if BITS == 3:
            high_RK = _codes(slot_ptr, high, direction_R, live_R, chunk, SIZE, 1, CHUNK, DIRECTIONS)
            codes_RK = codes_RK | (high_RK << 2)
        GROUPS: tl.constexpr = (SIZE + GROUP - 1) // GROUP
        group_R = direction_R * GROUPS + chunk * CHUNK // GROUP
        scale_ptr = (slot_ptr + scale).to(tl.pointer_type(tl.float16))
        scale_R = tl.load(scale_ptr + group_R, live_R, other=0.0).to(tl.float32)
        zero_R = tl.load(slot_ptr + zero + group_R, live_R, other=0).to(tl.int32)
        magic_zero_R = (zero_R | _MAGIC).to(tl.float32, bitcast=True)
        entries_RK = (codes_RK | _MAGIC).to(tl.float32, bitcast=True) - magic_zero_R[:, None]
    return entries_RK, scale_R


@triton.jit
def _shrink_dot(
    x_ptr_T,
    x_stride_i,
    live_T,
    slot_ptr,
    band_ptr,
    direction_R,
    live_R,
    split,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 (T, R): `x V̂ᵀ` of one block of directions, over this split's part of `in`."""
    low, high = tl.load(band_ptr + _V), tl.load(band_ptr + _V + 1)
    scale, zero = tl.load(band_ptr + _V + 2), tl.load(band_ptr + _V + 3)
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    PART: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    sum_TR = tl.full((TILE, DIRECTIONS), 0.0, tl.float32)
    for chunk in range(split * PART, tl.minimum(split * PART + PART, CHUNKS)):
        entries_RK, scale_R = _entries(
            slot_ptr,
            low,
            high,
            scale,
            zero,
            direction_R,
            live_R,
            chunk,
            SIZE,
            GROUP,
            BITS,
            CHUNK,
            DIRECTIONS,
        )
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        live_TK = live_T[:, None]
        if SIZE % CHUNK != 0:
            live_TK = live_TK & (column_K < SIZE)[None, :]
        x_TK = tl.load(x_ptr_T[:, None] + column_K[None, :] * x_stride_i, live_TK, other=0.0)
        part_TR = tl.dot(x_TK.to(tl.float32), tl.trans(entries_RK), input_precision=PRECISION)
        sum_TR += part_TR * scale_R[None, :]
    return sum_TR


@triton.jit
def _shrink_band(
    x_ptr_T,
    x_stride_i,
    live_T,
    slot_ptr,
    band_ptr,
    direction_R,
    live_R,
    split,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: off
    if TILE == 1:
        sum_TR = _shrink_row(x_ptr_T, x_stride_i, slot_ptr, band_ptr, direction_R, live_R, split,
                             SIZE, GROUP, BITS, DIRECTIONS, SPLITS)
    else:
        sum_TR = _shrink_dot(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                             split, SIZE, GROUP, BITS, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    # fmt: on
    return sum_TR


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    t_ptr,
    x_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    table_ptr,
    tokens,
    x_stride_t,
    x_stride_i,
    slot_bytes,
    SIZE: tl.constexpr,
    BANDS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t (splits, T, max_rank), rows in sorted order: one program for (tile, block, split)."""
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes
    bands_ptr = table_ptr + slot * (BANDS * _FIELDS)

    # Blocks do not reach over bands: this program's block is one of the band that it falls into.
    block = tl.program_id(1)
    band = -1
    for candidate in tl.static_range(BANDS):
        count = tl.load(bands_ptr + candidate * _FIELDS + _COUNT).to(tl.int32)
        blocks = (count + DIRECTIONS - 1) // DIRECTIONS
        found = (band < 0) & (block < blocks)
        block = tl.where((band < 0) & (block >= blocks), block - blocks, block)
        band = tl.where(found, candidate, band)
    if band < 0:
        return
    band_ptr = bands_ptr + band * _FIELDS
    bits = tl.load(band_ptr + _BITS)
    direction_R = block * DIRECTIONS + tl.arange(0, DIRECTIONS)
    live_R = direction_R < tl.load(band_ptr + _COUNT).to(tl.int32)

    row_T = tl.arange(0, TILE)
    live_T = row_T < rows
    token_T = tl.load(order_ptr + start + row_T, live_T, other=0)
    x_ptr_T = x_ptr + token_T.to(tl.int64) * x_stride_t
    split = tl.program_id(2)
    # fmt: off
    if bits == 1:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 1, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 2:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 2, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 3:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 3, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 4:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 4, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 8:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 8, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    else:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, SIZE, GROUP, 16, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    # fmt: on
    s_ptr = (slot_ptr + tl.load(band_ptr + _S)).to(tl.pointer_type(tl.float32))
    sum_TR *= tl.load(s_ptr + direction_R, live_R, other=0.0)[None, :]
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    t_ptr_T = t_ptr + (split * tokens + start + row_T).to(tl.int64) * MAX_RANK
    tl.store(
        t_ptr_T[:, None] + (first + direction_R)[None, :], sum_TR, live_T[:, None] & live_R[None, :]
    )


@triton.jit
def _expand_dot(
    sum_TO,
    t_ptr_T,
    split_stride,
    live_T,
    slot_ptr,
    band_ptr,
    count,
    chunk,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sum += t Û` of one band, for one chunk of the outputs."""
    low, high = tl.load(band_ptr + _U), tl.load(band_ptr + _U + 1)
    scale, zero = tl.load(band_ptr + _U + 2), tl.load(band_ptr + _U + 3)
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    for start in range(0, count, DIRECTIONS):
        direction_R = start + tl.arange(0, DIRECTIONS)
        live_R = direction_R < count
        entries_RO, scale_R = _entries(
            slot_ptr,
            low,
            high,
            scale,
            zero,
            direction_R,
            live_R,
            chunk,
            SIZE,
            GROUP,
            BITS,
            CHUNK,
            DIRECTIONS,
        )
        t_ptr_TR = t_ptr_T[:, None] + (first + direction_R)[None, :]
        live_TR = live_T[:, None] & live_R[None, :]
        t_TR = tl.load(t_ptr_TR, live_TR, other=0.0)
        for split in tl.static_range(1, SPLITS):
            t_TR += tl.load(t_ptr_TR + split * split_stride, live_TR, other=0.0)
        t_TR *= scale_R[None, :]
        if PRECISION == "tf32":
            # The tensor cores would cut off the lower 13 bits: round, half away from zero.
            bits_TR = (t_TR.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            t_TR = bits_TR.to(tl.float32, bitcast=True)
        sum_TO = tl.dot(t_TR, entries_RO, sum_TO, input_precision=PRECISION)
    return sum_TO


@triton.jit
def _expand_band(
    sum_TO,
    t_ptr_T,
    split_stride,
    live_T,
    slot_ptr,
    band_ptr,
    count,
    chunk,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: off
    if TILE == 1:
        sum_TO += _expand_row(t_ptr_T, split_stride, slot_ptr, band_ptr, count, chunk,
                              SIZE, GROUP, BITS, DIRECTIONS, CHUNK, SPLITS)
    else:
        sum_TO = _expand_dot(sum_TO, t_ptr_T, split_stride, live_T, slot_ptr, band_ptr, count, chunk,
                             SIZE, GROUP, BITS, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    # fmt: on
    return sum_TO


@triton.jit(do_not_specialize=["tokens"])
def expand(
    y_ptr,
    t_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    table_ptr,
    tokens,
    y_stride_t,
    y_stride_o,
    slot_bytes,
    SIZE: tl.constexpr,
    BANDS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (T, O) += t Û: one program for (tile, chunk of the outputs), over all bands."""
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    bands_ptr = table_ptr + slot * (BANDS * _FIELDS)
    if tl.load(bands_ptr + _COUNT) == 0:  # bands fill a slot from the front: it is empty
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes
    chunk = tl.program_id(1)

    row_T = tl.arange(0, TILE)
    live_T = row_T < rows
    token_T = tl.load(order_ptr + start + row_T, live_T, other=0)
    t_ptr_T = t_ptr + (start + row_T).to(tl.int64) * MAX_RANK
    stride = tokens.to(tl.int64) * MAX_RANK
    sum_TO = tl.full((TILE, CHUNK), 0.0, tl.float32)
    for band in range(BANDS):
        band_ptr = bands_ptr + band * _FIELDS
        bits = tl.load(band_ptr + _BITS)
        count = tl.load(band_ptr + _COUNT).to(tl.int32)
        # fmt: off
        if bits == 1:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 1, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        elif bits == 2:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 2, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        elif bits == 3:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 3, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        elif bits == 4:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 4, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        elif bits == 8:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 8, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        elif bits == 16:
            sum_TO = _expand_band(sum_TO, t_ptr_T, stride, live_T, slot_ptr, band_ptr, count, chunk,
                                  SIZE, GROUP, 16, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
        # fmt: on
    out_O = chunk * CHUNK + tl.arange(0, CHUNK)
    y_ptr_TO = (y_ptr + token_T.to(tl.int64) * y_stride_t)[:, None] + out_O[None, :] * y_stride_o
    live_TO = live_T[:, None] & (out_O < SIZE)[None, :]
    y_TO = tl.load(y_ptr_TO, live_TO, other=0.0).to(tl.float32) + sum_TO
    tl.store(y_ptr_TO, y_TO.to(y_ptr.dtype.element_ty), live_TO)
