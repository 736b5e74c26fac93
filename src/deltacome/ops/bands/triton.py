"""The ops on NVIDIA GPUs (Ampere and newer): shrink `t = (x V̂ᵀ) · s`, expand `y += t Û`.

One launch of each serves all tenants, all bands and all parts of a layer: a program takes a tile of rows
of one slot and a block of directions (shrink) or of a part's outputs (expand), and looks up in the table
what lies there. For rows of an embedding, gather reads t from U and expand goes over V. The packed bytes
are read once for a tile and decoded in registers; dense weights are never written to memory. There are
two ways to multiply, and the caller's tile picks one:

*Tiles of one row* are for a batch of many tenants. Apart from bandwidth, the instructions per code limit
them. A thread unpacks the words that it has loaded and needs no other thread's. A mask and the bits of 1
turn a code into a float: `1 + code · 2ᵏ` is the code within the mantissa of 1. One shift serves several
codes, at the price of at most four bits of accuracy. The ones and the zero points are subtracted from
sums, not from codes. A 3-bit code is the sum of a 2-bit plane and four times a 1-bit plane. All
arithmetic is float32.

*Tiles of 16 rows and more* use the tensor cores, in TF32: every float16, every bfloat16 and every
`code − zero` is exact in its 11 bits, so one path serves both 16-bit dtypes. Products in bfloat16 have
twice the peak throughput, which would help prefill, but 16-bit bands do not fit into its precision. Only
t loses anything, as it is rounded to 11 bits between the two products. With float32 activations products
are float32, without tensor cores. Scales stay outside the products (a scaled entry would need 19 bits):
a chunk of the long axis lies within one group, shrink scales its partial sums and expand scales t.

*Splits.* Few rows make few programs, so shrink can cut its sum over `in` into several parts, which
expand adds in a fixed order: unlike those of atomic additions, results do not depend on timing. The
parts of a number lie side by side, so that a thread reads them at once.

*Variants.* Each set of a kernel's constants takes seconds to compile, so there are few: a sum has either
one part or `SPLITS`, and the number of directions is not a constant.

What is not known: no GPU has run this. It is checked in Triton's interpreter and compiled ahead of time
for sm_80 and sm_90, with registers and shared memory read from the compiler's report. Judging by the
number of instructions (about 4.5 for a 2-bit code at a tile of one row), they will limit decoding, not
bandwidth.

Legend: T tokens, I in, O out, R directions, X splits, S slots, N bytes of a slot, P parts, B bands,
F fields, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.spec import BLOCK, Band, bands_nbytes
from deltacome.ops.bands.triton_kernels import ROW_BLOCKS, expand, gather, shrink
from deltacome.ops.slots import COUNT, BandTable, PlacedBands, Pool, U, V, arrange
from deltacome.ops.triton_launch import Tensors, bucket, check_gpu, full_batch, tuned

PROGRAMS = 512
"""Shrink splits its sums where it has fewer programs than this, about four for each multiprocessor."""
SPLITS = 8
"""Parts of a sum that is split."""
TIMED = 1024
"""Directions of the tenant made up for timings, about as many as a 4096 × 4096 matrix has at 1/16."""
DIRECTIONS = 32
"""Directions of a block: with more, some width does not fit into the registers."""


class Config(NamedTuple):
    """How a kernel is compiled."""

    warps: int
    stages: int
    """Iterations whose loads are in flight, where a loop has dots."""
    registers: int | None
    """Limit per thread; without one, ptxas spills some to fit one more program."""


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
"""By rows of a tile: those that spill no registers. The first is used until they have been timed."""


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
    """See `api.bands`; launches two kernels and allocates t, T × max_rank × splits floats.

    It is allocated in each call, not once for all layers: calls on two streams must not share one, and
    one that grows would have to keep every buffer that a graph was captured with.

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
    splits = split_count(tile, tiles * blocks, steps)
    t_TRX = _workspace(tokens, max_rank, splits, x_TI.device)
    common = _constants(group_size, tile) | {
        "CHUNK": chunk,
        "SPLITS": splits,
        "PRECISION": "ieee" if x_TI.dtype == torch.float32 else "tf32",
    }

    def run(config: Config, tensors: Tensors) -> None:
        shrink[(tiles, blocks, splits)](
            *(*tensors, t_TRX.stride(0), *x_TI.stride(), blobs_SN.shape[1], in_size),
            BANDS=parts * max_bands,
            **common,
            **_options(config, x_TI.dtype),
        )

    def made_up() -> Tensors:
        tenant = _made_up(x_TI.device, in_size, outs, max_rank, max_bands, group_size)
        return t_TRX, x_TI, *full_batch(tokens, tiles, x_TI.device), *tenant

    key = ("shrink", x_TI.dtype, in_size, bucket(tiles * blocks), tile)
    tensors = (t_TRX, x_TI, order_T, tiles_M3, blobs_SN, fields_SPBF)
    with torch.cuda.device_of(x_TI):
        tuned(key, SHRINKS[tile], run, tensors, made_up)
    tensors = (y_TO, t_TRX, order_T, tiles_M3, blobs_SN, fields_SPBF)
    _expand(tensors, x_TI.dtype, outs, U, max_rank, common)


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
    holds_S = fields_SPBF[:, 0, 0, COUNT] > 0
    read_T = (slot_T >= 0) & holds_S[slot_T.clamp(min=0).long()]
    known = (~read_T | ((ids_T >= 0) & (ids_T < out))).all()
    torch.ops.aten._assert_async.msg(known, f"band_rows: ids: expected each in [0, {out})")
    max_bands = fields_SPBF.shape[2]
    t_TRX = _workspace(tokens, max_rank, 1, y_TI.device)
    common = _constants(group_size, tile)
    with torch.cuda.device_of(y_TI):
        gather[(len(tiles_M3), _blocks(max_rank, max_bands))](
            *(t_TRX, ids_T.contiguous(), order_T, tiles_M3, blobs_SN, fields_SPBF),
            *(t_TRX.stride(0), blobs_SN.shape[1], out, float(scale)),
            BANDS=max_bands,
            **common,
        )
    common |= {
        "CHUNK": chunk_size(tile, group_size),
        "SPLITS": 1,
        "PRECISION": "ieee" if y_TI.dtype == torch.float32 else "tf32",
    }
    tensors = (y_TI, t_TRX, order_T, tiles_M3, blobs_SN, fields_SPBF)
    _expand(tensors, y_TI.dtype, [in_size], V, max_rank, common)


def _expand(
    tensors: Tensors,
    dtype: torch.dtype,
    outs: list[int],
    side: int,
    max_rank: int,
    common: dict[str, Any],
) -> None:
    y_TO, t_TRX, _, tiles_M3, blobs_SN, fields_SPBF = tensors
    chunk, tile, group_size = common["CHUNK"], common["TILE"], common["GROUP"]
    tokens, tiles, device = len(y_TO), len(tiles_M3), y_TO.device
    chunks = sum(triton.cdiv(out, chunk) for out in outs)
    _, parts, max_bands, _ = fields_SPBF.shape

    def run(config: Config, tensors: Tensors) -> None:
        expand[(tiles, chunks)](
            *(*tensors, t_TRX.stride(0), *tensors[0].stride(), blobs_SN.shape[1]),
            OUTS=tuple(outs),
            PARTS=parts,
            BANDS=max_bands,
            SIDE=side,
            **common,
            **_options(config, dtype),
        )

    def made_up() -> Tensors:
        # Only one side is read, of sizes `outs`: with the longest as input size, either side has room.
        tenant = _made_up(device, max(outs), outs, max_rank, max_bands, group_size)
        return torch.empty_like(y_TO), t_TRX, *full_batch(tokens, tiles, device), *tenant

    key = ("expand", dtype, tuple(outs), bucket(tiles), max_rank, tile, side)
    with torch.cuda.device_of(y_TO):
        tuned(key, EXPANDS[tile], run, tensors, made_up)


def _made_up(
    device: torch.device,
    in_size: int,
    outs: list[int],
    max_rank: int,
    max_bands: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Blobs and fields of a pool with one tenant: zero 2-bit directions, equally many in each part."""
    plan = (Band(2, max(1, min(TIMED, max_rank) // len(outs))),)
    sizes = {part: bands_nbytes((out, in_size), plan, group_size) for part, out in enumerate(outs)}
    offsets, nbytes = arrange(sizes)
    pool = Pool(1, nbytes, device=device)
    table = BandTable(
        *(pool, in_size, outs), max_rank=max_rank, max_bands=max_bands, group_size=group_size
    )
    # Where there are fewer directions than parts, the last have none.
    placed = [PlacedBands(offset, plan) for offset in offsets.values()][:max_rank]
    table.load(0, [*placed, *[None] * (len(outs) - len(placed))])
    return pool.blobs_SN, table.fields_SPBF


def _workspace(tokens: int, max_rank: int, splits: int, device: torch.device) -> Tensor:
    """t, its rows padded to a multiple of 16, for which the kernels are compiled whatever the rank."""
    row = triton.cdiv(max_rank, 16) * 16
    return torch.empty(tokens, row, splits, dtype=torch.float32, device=device)


def _constants(group_size: int, tile: int) -> dict[str, Any]:
    return {"GROUP": group_size, "TILE": tile, "DIRECTIONS": DIRECTIONS}


def _options(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_warps": config.warps,
        "num_stages": 1 if dtype == torch.float32 else config.stages,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }


def _blocks(max_rank: int, bands: int) -> int:
    """As many blocks of directions as any plan needs: each band may leave its last one partly empty."""
    return (max_rank + bands * (DIRECTIONS - 1)) // DIRECTIONS


def chunk_size(tile: int, group_size: int) -> int:
    """Entries of the long axis that a program takes at a time; for dots, within one scale group."""
    return 2 * BLOCK if tile == 1 or group_size % (2 * BLOCK) == 0 else BLOCK


def split_count(tile: int, programs: int, steps: int) -> int:
    """Parts that shrink cuts its sums into: 1, or `SPLITS` if at least half of them have a step.

    The largest tiles are for so many rows that there are enough programs, and t in parts would not fit
    into their registers.
    """
    few = programs < PROGRAMS and tile < max(SHRINKS)
    return SPLITS if few and 2 * steps >= SPLITS else 1


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
