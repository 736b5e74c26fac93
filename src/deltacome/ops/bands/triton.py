"""The ops on NVIDIA GPUs (Ampere and newer): shrink `t = (x V̂ᵀ) · s`, expand `y += t Û`.

One launch of each does all tenants, all bands and all parts of a layer: a program takes a tile of rows of
one slot and a block of directions (shrink) or of a part's outputs (expand), and looks up in the table
what lies there. For rows of an embedding, gather reads t from U and expand goes over V. The
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

What is not known: no GPU has run this. It is checked in Triton's interpreter and compiled ahead of time
for sm_80 and sm_90, its registers and shared memory read from the compiler's report. By its instructions
(about 4.5 for a 2-bit code at a tile of one row) decoding will be limited by them and not by bandwidth.

Legend: T tokens, I in, O out, S slots, N bytes of a slot, P parts, B bands, F fields, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.spec import BLOCK
from deltacome.ops.bands.triton_kernels import ROW_BLOCKS, expand, gather, shrink
from deltacome.ops.slots import U, V
from deltacome.ops.triton_launch import bucket, check_gpu, tuned

PROGRAMS = 512
"""Shrink splits its sums while it has fewer programs: about four for each multiprocessor."""
MAX_SPLITS = 8
DIRECTIONS = 32
"""Directions of a block: with more, some width does not fit into the registers."""


class Config(NamedTuple):
    """How a kernel is compiled."""

    warps: int
    stages: int
    """Iterations whose loads are in flight, where a loop has dots."""
    registers: int | None
    """Limit of a thread's; without one ptxas spills some to fit one more program."""


SHRINKS = {
    1: (Config(4, 1, 224), Config(8, 1, None)),
    16: (Config(4, 2, 224), Config(8, 2, None)),
    64: (Config(8, 1, 240),),
}
EXPANDS = {
    1: (Config(4, 1, 224), Config(8, 1, None)),
    16: (Config(8, 2, 240),),
    64: (Config(8, 1, 240),),
}
"""By rows of a tile; those that spill no registers. The first is used until they have been timed."""


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    order_T: Tensor,
    tiles_M3: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    outs: list[int],
    tile: int,
    max_rank: int,
    group_size: int,
) -> None:
    """See `api.bands`; launches two kernels and allocates t, splits × T × max_rank floats.

    Raises:
        UnsupportedError: the device, a dtype, the group size or the tile is not covered.
    """
    _check(y_TO, x_TI, tile, group_size)
    tokens, in_size = x_TI.shape
    if tokens == 0:
        return
    _, parts, max_bands, _ = fields_SPBF.shape
    tiles, blocks = len(tiles_M3), _blocks(max_rank, parts * max_bands)
    chunk = chunk_size(tile, group_size)
    steps = triton.cdiv(in_size, ROW_BLOCKS * BLOCK if tile == 1 else chunk)
    splits = split_count(tiles * blocks, steps)
    t_XTR = torch.empty(splits, tokens, max_rank, dtype=torch.float32, device=x_TI.device)
    common = _constants(max_rank, group_size, tile) | {
        "CHUNK": chunk,
        "SPLITS": splits,
        "PRECISION": "ieee" if x_TI.dtype == torch.float32 else "tf32",
    }

    def run_shrink(config: Config) -> None:
        shrink[(tiles, blocks, splits)](
            *(t_XTR, x_TI, order_T, tiles_M3, blobs_SN, fields_SPBF, tokens),
            *(*x_TI.stride(), blobs_SN.shape[1], in_size),
            BANDS=parts * max_bands,
            **common,
            **_options(config, x_TI.dtype),
        )

    key = ("shrink", x_TI.dtype, in_size, bucket(tiles * blocks), tile)
    with torch.cuda.device_of(x_TI):
        tuned(key, SHRINKS[tile], run_shrink)
    _expand(y_TO, t_XTR, x_TI.dtype, order_T, tiles_M3, blobs_SN, fields_SPBF, outs, U, common)


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    slot_T: Tensor,
    order_T: Tensor,
    tiles_M3: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    out: int,
    tile: int,
    max_rank: int,
    group_size: int,
    scale: float,
) -> None:
    """See `api.band_rows`; launches two kernels and allocates t, T × max_rank floats.

    Raises:
        UnsupportedError: as `bands`.
    """
    _check(y_TI, y_TI, tile, group_size)
    tokens, in_size = y_TI.shape
    if tokens == 0:
        return
    known = ((slot_T < 0) | ((ids_T >= 0) & (ids_T < out))).all()
    torch.ops.aten._assert_async.msg(known, f"band_rows: ids: expected each in [0, {out})")
    max_bands = fields_SPBF.shape[2]
    t_XTR = torch.empty(1, tokens, max_rank, dtype=torch.float32, device=y_TI.device)
    common = _constants(max_rank, group_size, tile)
    with torch.cuda.device_of(y_TI):
        gather[(len(tiles_M3), _blocks(max_rank, max_bands))](
            *(t_XTR, ids_T.contiguous(), order_T, tiles_M3, blobs_SN, fields_SPBF, tokens),
            *(blobs_SN.shape[1], out, float(scale)),
            BANDS=max_bands,
            **common,
        )
    common |= {
        "CHUNK": chunk_size(tile, group_size),
        "SPLITS": 1,
        "PRECISION": "ieee" if y_TI.dtype == torch.float32 else "tf32",
    }
    outs = [in_size]
    _expand(y_TI, t_XTR, y_TI.dtype, order_T, tiles_M3, blobs_SN, fields_SPBF, outs, V, common)


def _expand(
    y_TO: Tensor,
    t_XTR: Tensor,
    dtype: torch.dtype,
    order_T: Tensor,
    tiles_M3: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    outs: list[int],
    side: int,
    common: dict[str, Any],
) -> None:
    chunk, tile = common["CHUNK"], common["TILE"]
    chunks = sum(triton.cdiv(out, chunk) for out in outs)
    _, parts, max_bands, _ = fields_SPBF.shape

    def run(config: Config) -> None:
        expand[(len(tiles_M3), chunks)](
            *(y_TO, t_XTR, order_T, tiles_M3, blobs_SN, fields_SPBF, t_XTR.shape[1]),
            *(*y_TO.stride(), blobs_SN.shape[1]),
            OUTS=tuple(outs),
            PARTS=parts,
            BANDS=max_bands,
            SIDE=side,
            **common,
            **_options(config, dtype),
        )

    key = ("expand", dtype, tuple(outs), bucket(len(tiles_M3)), common["MAX_RANK"], tile, side)
    with torch.cuda.device_of(y_TO):
        tuned(key, EXPANDS[tile], run, restore=y_TO)


def _constants(max_rank: int, group_size: int, tile: int) -> dict[str, Any]:
    return {"MAX_RANK": max_rank, "GROUP": group_size, "TILE": tile, "DIRECTIONS": DIRECTIONS}


def _options(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_warps": config.warps,
        "num_stages": 1 if dtype == torch.float32 else config.stages,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }


def _blocks(max_rank: int, bands: int) -> int:
    """As many blocks of directions as any plan needs: each band may fill its last one in part."""
    return (max_rank + bands * (DIRECTIONS - 1)) // DIRECTIONS


def chunk_size(tile: int, group_size: int) -> int:
    """Entries of the long axis that a program takes at a time; for dots within one scale group."""
    return 2 * BLOCK if tile == 1 or group_size % (2 * BLOCK) == 0 else BLOCK


def split_count(programs: int, steps: int) -> int:
    """Parts that shrink cuts its sums into, a power of two: no more than there are steps."""
    splits = 1
    while 2 * splits <= min(MAX_SPLITS, steps) and programs * splits < PROGRAMS:
        splits *= 2
    return splits


def _check(y: Tensor, x: Tensor, tile: int, group_size: int) -> None:
    check_gpu("bands", y, x)
    if group_size % BLOCK:
        raise UnsupportedError(
            f"bands: impl='triton' expects scale groups of a multiple of {BLOCK} entries, "
            f"got {group_size}"
        )
    if tile not in SHRINKS:
        raise UnsupportedError(
            f"bands: impl='triton' expects tiles of {tuple(SHRINKS)} rows, got {tile}"
        )
