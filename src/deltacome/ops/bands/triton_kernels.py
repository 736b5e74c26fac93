"""The kernels of `triton.py`, which says what they do and why.

Legend: T tokens (a tile's rows here), R directions of a block, I in, O out, K entries of a chunk, B
packed blocks of a chunk, W words of a block, J codes of a word, X splits, S slots, N bytes of a slot,
F fields, M tiles. Upper case names are constants of a compilation.
"""

# Kernels are Python only in syntax: their ints are constants, their loops unrolled by a compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from deltacome.format.spec import BLOCK
from deltacome.ops import slots as fields

ROW_BLOCKS = 8
"""Packed blocks that shrink takes at a time for a tile of one row: 128 bytes of 2-bit codes."""

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


@triton.jit
def _words(
    slot_ptr,
    offset,
    direction_R,
    live_R,
    block_B,
    size,
    PLANE: tl.constexpr,
):
    """int32 (R, B, W): packed blocks of one plane; zero where there is none."""
    blocks = (size + _BLOCK - 1) // _BLOCK
    WORDS: tl.constexpr = 2 * PLANE
    words_ptr = (slot_ptr + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.int32))
    word_BW = block_B[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    live_RB = live_R[:, None] & (block_B < blocks)[None, :]
    return tl.load(
        words_ptr + direction_R[:, None, None] * (blocks * WORDS) + word_BW[None, :, :],
        live_RB[:, :, None],
        other=0,
    )


@triton.jit
def _grid(slot_ptr, scale, zero, direction_R, live_R, block_B, size, GROUP: tl.constexpr):
    """Scales and zero points of blocks, float32 (R, B); zero where there is none."""
    groups = (size + GROUP - 1) // GROUP
    group_RB = direction_R[:, None] * groups + (block_B * _BLOCK // GROUP)[None, :]
    live_RB = live_R[:, None] & (block_B * _BLOCK < size)[None, :]
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
    # A reshape, because `[:, :, None, :]` lets the compiler spread J over threads.
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
    size,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    HIGH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """float32 (R,): `Σ_i x · scale · (code − zero)` of one plane; HIGH: `Σ_i x · scale · 4 code`."""
    WORDS: tl.constexpr = 2 * PLANE
    # Each word has its own sum, so all sums but the last stay within a thread.
    sum_RBW = tl.full((DIRECTIONS, _ROW_BLOCKS, WORDS), 0.0, tl.float32)
    for step in range(first_step, last_step):
        block_B = step * _ROW_BLOCKS + tl.arange(0, _ROW_BLOCKS)
        words_RBW = _words(slot_ptr, offset, direction_R, live_R, block_B, size, PLANE)
        scale_RB, zero_RB = _grid(slot_ptr, scale, zero, direction_R, live_R, block_B, size, GROUP)
        place_BK = block_B[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        x_ptr_BK = x_ptr_T[:, None] + place_BK * x_stride_i
        x_BK = tl.load(x_ptr_BK, place_BK < size, other=0.0)
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
    size,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 (1, R): `x V̂ᵀ` of one row and block of directions, over this split's part of `in`."""
    low, high = tl.load(band_ptr + _V), tl.load(band_ptr + _V + 1)
    scale, zero = tl.load(band_ptr + _V + 2), tl.load(band_ptr + _V + 3)
    steps = (size + _ROW_BLOCKS * _BLOCK - 1) // (_ROW_BLOCKS * _BLOCK)
    part = (steps + SPLITS - 1) // SPLITS
    start, stop = split * part, tl.minimum(split * part + part, steps)
    if BITS == 16:
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        sum_RB = tl.full((DIRECTIONS, _ROW_BLOCKS), 0.0, tl.float32)
        for run in range(start * 8, stop * 8):  # a step's 512 values do not fit into registers
            place_K = run * _BLOCK + tl.arange(0, _BLOCK)
            live_K = place_K < size
            x_K = tl.load(x_ptr_T + place_K * x_stride_i, live_K, other=0.0).to(tl.float32)
            v_ptr_RK = values_ptr + direction_R[:, None] * size + place_K[None, :]
            v_RK = tl.load(v_ptr_RK, live_R[:, None] & live_K[None, :], other=0.0).to(tl.float32)
            products = tl.reshape(v_RK * x_K[None, :], (DIRECTIONS, _ROW_BLOCKS, 8))
            sum_RB += tl.sum(products, 2)
        sum_R = tl.sum(sum_RB, 1)
    else:
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        # fmt: off
        sum_R = _shrink_plane(x_ptr_T, x_stride_i, slot_ptr, low, scale, zero, direction_R, live_R,
                              start, stop, size, GROUP, LOW, False, DIRECTIONS)
        if BITS == 3:
            sum_R += _shrink_plane(x_ptr_T, x_stride_i, slot_ptr, high, scale, zero, direction_R,
                                   live_R, start, stop, size, GROUP, 1, True, DIRECTIONS)
        # fmt: on
    return sum_R[None, :]


@triton.jit
def _t(t_ptr_TR, live_TR, SPLITS: tl.constexpr):
    """t of some rows and directions, float32 (T, R): the sum of its splits, which lie side by side."""
    if SPLITS == 1:
        t_TR = tl.load(t_ptr_TR, live_TR, other=0.0)
    else:
        # A sum along an axis: in a loop, the compiler would let each thread load all of t itself.
        t_ptr_TRX = t_ptr_TR[:, :, None] + tl.arange(0, SPLITS)[None, None, :]
        t_TR = tl.sum(tl.load(t_ptr_TRX, live_TR[:, :, None], other=0.0), 2)
    return t_TR


@triton.jit
def _t_row(t_ptr_T, direction_R, live_R, SPLITS: tl.constexpr):
    """t of one row, float32 (R,)."""
    t_ptr_TR = t_ptr_T[:, None] + direction_R[None, :] * SPLITS
    return tl.reshape(_t(t_ptr_TR, live_R[None, :], SPLITS), (direction_R.shape[0],))


@triton.jit
def _expand_plane(
    t_ptr_T,
    slot_ptr,
    offset,
    scale,
    zero,
    first,
    count,
    block_B,
    size,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    HIGH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 (B, K): `Σ_r t · scale · (code − zero)` of one plane; HIGH: `Σ_r t · scale · 4 code`."""
    BLOCKS: tl.constexpr = block_B.shape[0]
    # An accumulator for each code, so all sums but the last stay within a thread.
    sum_RBJW = tl.full((DIRECTIONS, BLOCKS, 32 // PLANE, 2 * PLANE), 0.0, tl.float32)
    ones_RB = tl.full((DIRECTIONS, BLOCKS), 0.0, tl.float32)
    zeros_RB = tl.full((DIRECTIONS, BLOCKS), 0.0, tl.float32)
    for start in range(0, count, DIRECTIONS):
        direction_R = start + tl.arange(0, DIRECTIONS)
        live_R = direction_R < count
        words_RBW = _words(slot_ptr, offset, direction_R, live_R, block_B, size, PLANE)
        digits, _ = _digits(words_RBW, PLANE)
        scale_RB, zero_RB = _grid(slot_ptr, scale, zero, direction_R, live_R, block_B, size, GROUP)
        t_R = _t_row(t_ptr_T, first + direction_R, live_R, SPLITS)
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
    slot_ptr,
    band_ptr,
    count,
    chunk,
    size,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """float32 (1, K): `t Û` of one row and band, for one chunk of the outputs."""
    low, high = tl.load(band_ptr + SIDE), tl.load(band_ptr + SIDE + 1)
    scale, zero = tl.load(band_ptr + SIDE + 2), tl.load(band_ptr + SIDE + 3)
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    if BITS == 16:
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        sum_RK = tl.full((DIRECTIONS, CHUNK), 0.0, tl.float32)
        for start in range(0, count, DIRECTIONS):
            direction_R = start + tl.arange(0, DIRECTIONS)
            live_R = direction_R < count
            live_RK = live_R[:, None] & (column_K < size)[None, :]
            u_ptr_RK = values_ptr + direction_R[:, None] * size + column_K[None, :]
            t_R = _t_row(t_ptr_T, first + direction_R, live_R, SPLITS)
            sum_RK += tl.load(u_ptr_RK, live_RK, other=0.0).to(tl.float32) * t_R[:, None]
        sum_K = tl.sum(sum_RK, 0)
    else:
        block_B = chunk * (CHUNK // _BLOCK) + tl.arange(0, CHUNK // _BLOCK)
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        # fmt: off
        sum_BK = _expand_plane(t_ptr_T, slot_ptr, low, scale, zero, first, count,
                               block_B, size, GROUP, LOW, False, DIRECTIONS, SPLITS)
        if BITS == 3:
            sum_BK += _expand_plane(t_ptr_T, slot_ptr, high, scale, zero, first, count,
                                    block_B, size, GROUP, 1, True, DIRECTIONS, SPLITS)
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
    size,
    PLANE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """int32 (R, K): the codes of one plane, in their order."""
    blocks = (size + _BLOCK - 1) // _BLOCK
    WORDS: tl.constexpr = 2 * PLANE
    TAKEN: tl.constexpr = CHUNK // _BLOCK
    words_ptr = (slot_ptr + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.int32))
    word_W = chunk * (TAKEN * WORDS) + tl.arange(0, TAKEN * WORDS)
    # A chunk may reach past the end of a direction.
    live_RW = live_R[:, None] & (word_W < blocks * WORDS)[None, :]
    words_RW = tl.load(
        words_ptr + direction_R[:, None] * (blocks * WORDS) + word_W[None, :], live_RW, other=0
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
    size,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """Entries of a chunk, float32 (R, K), and the scale (R,) still to be applied to them."""
    if BITS == 16:
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        live_RK = live_R[:, None] & (column_K < size)[None, :]
        values_RK = tl.load(
            values_ptr + direction_R[:, None] * size + column_K[None, :], live_RK, other=0.0
        )
        entries_RK = values_RK.to(tl.float32)
        scale_R = tl.full((DIRECTIONS,), 1.0, tl.float32)
    else:
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        codes_RK = _codes(slot_ptr, low, direction_R, live_R, chunk, size, PLANE, CHUNK, DIRECTIONS)
        if BITS == 3:
            high_RK = _codes(slot_ptr, high, direction_R, live_R, chunk, size, 1, CHUNK, DIRECTIONS)
            codes_RK = codes_RK | (high_RK << 2)
        groups = (size + GROUP - 1) // GROUP
        group_R = direction_R * groups + chunk * CHUNK // GROUP
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
    size,
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
    chunks = (size + CHUNK - 1) // CHUNK
    part = (chunks + SPLITS - 1) // SPLITS
    sum_TR = tl.full((TILE, DIRECTIONS), 0.0, tl.float32)
    for chunk in range(split * part, tl.minimum(split * part + part, chunks)):
        entries_RK, scale_R = _entries(
            slot_ptr,
            low,
            high,
            scale,
            zero,
            direction_R,
            live_R,
            chunk,
            size,
            GROUP,
            BITS,
            CHUNK,
            DIRECTIONS,
        )
        column_K = chunk * CHUNK + tl.arange(0, CHUNK)
        live_TK = live_T[:, None] & (column_K < size)[None, :]
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
    size,
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
                             size, GROUP, BITS, DIRECTIONS, SPLITS)
    else:
        sum_TR = _shrink_dot(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                             split, size, GROUP, BITS, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    # fmt: on
    return sum_TR


@triton.jit
def _band_of(block, bands_ptr, BANDS: tl.constexpr, DIRECTIONS: tl.constexpr):
    """(band, its block of directions) of a program; band −1 if there is none.

    Blocks do not span bands. BANDS counts those of all parts: bands fill a part from the front, and
    those left over have no directions.
    """
    band = -1
    for candidate in tl.static_range(BANDS):
        count = tl.load(bands_ptr + candidate * _FIELDS + _COUNT).to(tl.int32)
        blocks = (count + DIRECTIONS - 1) // DIRECTIONS
        found = (band < 0) & (block < blocks)
        block = tl.where((band < 0) & (block >= blocks), block - blocks, block)
        band = tl.where(found, candidate, band)
    return band, block


@triton.jit
def _part_of(chunk, OUTS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """(part, its chunk, its size, its first column of y) of a program."""
    part, size, column, end = 0, OUTS[0], 0, (OUTS[0] + CHUNK - 1) // CHUNK
    for candidate in tl.static_range(1, PARTS):
        behind = chunk >= end
        column = tl.where(behind, column + size, column)
        chunk = tl.where(behind, chunk - end, chunk)
        part = tl.where(behind, candidate, part)
        size = tl.where(behind, OUTS[candidate], size)
        end = tl.where(behind, (OUTS[candidate] + CHUNK - 1) // CHUNK, end)
    return part, chunk, size, column


@triton.jit
def shrink(
    t_ptr,
    x_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    table_ptr,
    t_stride_t,
    x_stride_t,
    x_stride_i,
    slot_bytes,
    size,
    BANDS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t (T, R, splits), rows in sorted order: one program for (tile, block, split)."""
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes
    bands_ptr = table_ptr + slot * (BANDS * _FIELDS)

    band, block = _band_of(tl.program_id(1), bands_ptr, BANDS, DIRECTIONS)
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
                              split, size, GROUP, 1, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 2:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, size, GROUP, 2, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 3:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, size, GROUP, 3, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 4:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, size, GROUP, 4, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    elif bits == 8:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, size, GROUP, 8, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    else:
        sum_TR = _shrink_band(x_ptr_T, x_stride_i, live_T, slot_ptr, band_ptr, direction_R, live_R,
                              split, size, GROUP, 16, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION)
    # fmt: on
    s_ptr = (slot_ptr + tl.load(band_ptr + _S)).to(tl.pointer_type(tl.float32))
    sum_TR *= tl.load(s_ptr + direction_R, live_R, other=0.0)[None, :]
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    t_ptr_T = t_ptr + (start + row_T).to(tl.int64) * t_stride_t + split
    t_ptr_TR = t_ptr_T[:, None] + (first + direction_R)[None, :] * SPLITS
    tl.store(t_ptr_TR, sum_TR, live_T[:, None] & live_R[None, :])


@triton.jit
def _expand_dot(
    sum_TO,
    t_ptr_T,
    live_T,
    slot_ptr,
    band_ptr,
    count,
    chunk,
    size,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):
    """`sum += t Û` of one band, for one chunk of the outputs."""
    low, high = tl.load(band_ptr + SIDE), tl.load(band_ptr + SIDE + 1)
    scale, zero = tl.load(band_ptr + SIDE + 2), tl.load(band_ptr + SIDE + 3)
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
            size,
            GROUP,
            BITS,
            CHUNK,
            DIRECTIONS,
        )
        t_ptr_TR = t_ptr_T[:, None] + (first + direction_R)[None, :] * SPLITS
        t_TR = _t(t_ptr_TR, live_T[:, None] & live_R[None, :], SPLITS) * scale_R[None, :]
        if PRECISION == "tf32":
            # The tensor cores would cut off the lower 13 bits: round, half away from zero.
            # A GPU's NaN has all bits set but the sign, which the sum would carry into.
            bits_TR = tl.minimum(t_TR.to(tl.int32, bitcast=True), 0x7FC00000)
            bits_TR = (bits_TR + 0x1000) & -0x2000
            t_TR = bits_TR.to(tl.float32, bitcast=True)
        sum_TO = tl.dot(t_TR, entries_RO, sum_TO, input_precision=PRECISION)
    return sum_TO


@triton.jit
def _expand_band(
    sum_TO,
    t_ptr_T,
    live_T,
    slot_ptr,
    band_ptr,
    count,
    chunk,
    size,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):
    # fmt: off
    if TILE == 1:
        sum_TO += _expand_row(t_ptr_T, slot_ptr, band_ptr, count, chunk,
                              size, GROUP, BITS, DIRECTIONS, CHUNK, SPLITS, SIDE)
    else:
        sum_TO = _expand_dot(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                             size, GROUP, BITS, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
    # fmt: on
    return sum_TO


@triton.jit
def expand(
    y_ptr,
    t_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    table_ptr,
    t_stride_t,
    y_stride_t,
    y_stride_o,
    slot_bytes,
    OUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BANDS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):
    """y (T, O) += t Û (or V̂): one program for (tile, chunk of a part's outputs), over its bands."""
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    part, chunk, size, column = _part_of(tl.program_id(1), OUTS, PARTS, CHUNK)
    bands_ptr = table_ptr + (slot * PARTS + part) * (BANDS * _FIELDS)
    if tl.load(bands_ptr + _COUNT) == 0:  # bands fill a part from the front, so it has none
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes

    row_T = tl.arange(0, TILE)
    live_T = row_T < rows
    token_T = tl.load(order_ptr + start + row_T, live_T, other=0)
    t_ptr_T = t_ptr + (start + row_T).to(tl.int64) * t_stride_t
    sum_TO = tl.full((TILE, CHUNK), 0.0, tl.float32)
    for band in range(BANDS):
        band_ptr = bands_ptr + band * _FIELDS
        bits = tl.load(band_ptr + _BITS)
        count = tl.load(band_ptr + _COUNT).to(tl.int32)
        # fmt: off
        if bits == 1:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 1, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        elif bits == 2:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 2, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        elif bits == 3:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 3, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        elif bits == 4:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 4, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        elif bits == 8:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 8, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        elif bits == 16:
            sum_TO = _expand_band(sum_TO, t_ptr_T, live_T, slot_ptr, band_ptr, count, chunk,
                                  size, GROUP, 16, TILE, DIRECTIONS, CHUNK, SPLITS, PRECISION, SIDE)
        # fmt: on
    out_O = chunk * CHUNK + tl.arange(0, CHUNK)
    y_ptr_T = y_ptr + token_T.to(tl.int64) * y_stride_t
    y_ptr_TO = y_ptr_T[:, None] + (column + out_O)[None, :] * y_stride_o
    live_TO = live_T[:, None] & (out_O < size)[None, :]
    y_TO = tl.load(y_ptr_TO, live_TO, other=0.0).to(tl.float32) + sum_TO
    tl.store(y_ptr_TO, y_TO.to(y_ptr.dtype.element_ty), live_TO)


@triton.jit
def gather(
    t_ptr,
    ids_ptr,
    order_ptr,
    tiles_ptr,
    blobs_ptr,
    table_ptr,
    t_stride_t,
    slot_bytes,
    out,
    output_scale,
    BANDS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """t (T, R) = scale · Û[:, ids] · s: one program for (tile, block of directions).

    One code is read for each row and direction, so widths are run-time numbers here, not constants.
    """
    slot = tl.load(tiles_ptr + 3 * tl.program_id(0))
    if slot < 0:
        return
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    rows = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    slot_ptr = blobs_ptr + slot.to(tl.int64) * slot_bytes
    bands_ptr = table_ptr + slot * (BANDS * _FIELDS)
    band, block = _band_of(tl.program_id(1), bands_ptr, BANDS, DIRECTIONS)
    if band < 0:
        return
    band_ptr = bands_ptr + band * _FIELDS
    bits = tl.load(band_ptr + _BITS).to(tl.int32)
    direction_R = block * DIRECTIONS + tl.arange(0, DIRECTIONS)
    live_R = direction_R < tl.load(band_ptr + _COUNT).to(tl.int32)
    row_T = tl.arange(0, TILE)
    live_T = row_T < rows
    token_T = tl.load(order_ptr + start + row_T, live_T, other=0)
    id_T = tl.load(ids_ptr + token_T, live_T, other=0).to(tl.int32)
    live_T &= (id_T >= 0) & (id_T < out)  # other ids were reported; nothing is read for them
    live_TR = live_T[:, None] & live_R[None, :]

    low, high = tl.load(band_ptr + _U), tl.load(band_ptr + _U + 1)
    if bits == 16:
        values_ptr = (slot_ptr + tl.multiple_of(low, 16)).to(tl.pointer_type(tl.float16))
        value_ptr_TR = values_ptr + direction_R[None, :] * out + id_T[:, None]
        value_TR = tl.load(value_ptr_TR, live_TR, other=0.0).to(tl.float32)
    else:
        plane = tl.where(bits == 3, 2, bits)
        code_TR = _digit(slot_ptr, low, direction_R, id_T, live_TR, out, plane)
        if bits == 3:
            code_TR |= _digit(slot_ptr, high, direction_R, id_T, live_TR, out, 1) << 2
        group_TR = direction_R[None, :] * ((out + GROUP - 1) // GROUP) + (id_T // GROUP)[:, None]
        scale_ptr = (slot_ptr + tl.load(band_ptr + _U + 2)).to(tl.pointer_type(tl.float16))
        scale_TR = tl.load(scale_ptr + group_TR, live_TR, other=0.0).to(tl.float32)
        zero_ptr = slot_ptr + tl.load(band_ptr + _U + 3)
        zero_TR = tl.load(zero_ptr + group_TR, live_TR, other=0).to(tl.int32)
        value_TR = (code_TR - zero_TR).to(tl.float32) * scale_TR
    s_ptr = (slot_ptr + tl.load(band_ptr + _S)).to(tl.pointer_type(tl.float32))
    value_TR *= output_scale * tl.load(s_ptr + direction_R, live_R, other=0.0)[None, :]
    first = tl.load(band_ptr + _FIRST).to(tl.int32)
    t_ptr_T = t_ptr + (start + row_T).to(tl.int64) * t_stride_t
    live_store = (row_T < rows)[:, None] & live_R[None, :]
    tl.store(t_ptr_T[:, None] + (first + direction_R)[None, :], value_TR, live_store)


@triton.jit
def _digit(slot_ptr, offset, direction_R, id_T, live_TR, size, plane):
    """int32 (T, R): digits of one plane, one for each row and direction."""
    words_ptr = (slot_ptr + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.int32))
    blocks = (size + _BLOCK - 1) // _BLOCK
    place_T = id_T % _BLOCK
    word_T = id_T // _BLOCK * (2 * plane) + place_T % (2 * plane)
    word_TR = direction_R[None, :] * (blocks * 2 * plane) + word_T[:, None]
    words_TR = tl.load(words_ptr + word_TR, live_TR, other=0)
    shift_T = plane * (place_T // (2 * plane))
    return (words_TR >> shift_T[:, None]) & ((1 << plane) - 1)
