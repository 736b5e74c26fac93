"""What the deltas of many tenants cost beside the base's matmul, at decode on a GPU.

    python benchmarks/grouped.py                        # every shape, 1 … 64 tenants in 64 rows
    python benchmarks/grouped.py --shape 4096x4096 --tenants 1 64 --tile 1 16

No figure of this benchmark is committed yet: the kernels were checked in Triton's interpreter and
compiled ahead of time, and have not been timed on a GPU.

The shapes are those of Llama-2-7B with the paper's plans at 1/16. Before anything is timed, each
configuration must agree with the dense deltas in float64. Kernels and matmul run from CUDA graphs over
enough copies of their weights that the L2 cache cannot hold them; the reference, which waits for the
device, runs without a graph. The limit is a device copy, timed in the same run. GB/s count the packed
bytes of the tenants in the batch once, with x and y: a tile of one row may read them more often, which
then shows as a lower figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from deltacome.format.codec import BandTensors, Factor, dense, write_bands
from deltacome.format.spec import GROUP, Band, Plan, bands_nbytes, format_plan, rank
from deltacome.ops.grouped import Rows, SlotPool, group_rows, grouped_bands

ATTENTION = (Band(8, 2), Band(3, 32), Band(2, 968))
MLP = (Band(8, 2), Band(3, 32), Band(2, 1428))
SHAPES = {"4096x4096": ATTENTION, "11008x4096": MLP, "4096x11008": MLP}
DISTINCT = 2
"""Tenants whose codes differ; more would only take longer to make, as bytes are read all the same."""
BEYOND_CACHE = 512 * 2**20
"""Bytes to go through before a weight is read again: ten times the L2 cache of an H100."""
TOLERANCE = 2**-9
"""Of a row's norm: t is rounded to 11 bits, y not at all (it is float32 in the check)."""


def main() -> None:
    options = _parse()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/grouped.py: expected a CUDA device, found none; it times GPU kernels")
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    limit = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {options.dtype}, {options.tokens} rows")
    print(f"device copy: {limit / 1e9:.0f} GB/s (read + write)\n")
    print(
        "| out × in, plan | tenants | tile | µs | GB/s | of copy | base matmul µs | + on base "
        "| reference ÷ this |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.shape:
        bench_shape(name, options, dtype, limit)


def bench_shape(name: str, options: argparse.Namespace, dtype: torch.dtype, limit: float) -> None:
    """One row of the table for each number of tenants and tile."""
    shape: tuple[int, int] = tuple(map(int, name.split("x")))  # pyright: ignore[reportAssignmentType]
    plan = SHAPES[name]
    tenants = [random_bands(shape, plan) for _ in range(DISTINCT)]
    blobs = [write_bands(bands).cuda() for bands in tenants]
    x_TI = torch.randn(options.tokens, shape[1], device="cuda", dtype=dtype)
    base_us = time_matmul(x_TI, shape)
    for count in options.tenants:
        nbytes = count * bands_nbytes(shape, plan) + x_TI.nbytes + 2 * options.tokens * shape[0] * 2
        pools = [
            filled_pool(shape, plan, blobs, count)
            for _ in range(max(1, BEYOND_CACHE // (count * bands_nbytes(shape, plan))))
        ]
        slot_T = torch.arange(options.tokens, device="cuda") % count
        for tile in options.tile:
            rows = group_rows(slot_T, count, tile=tile)
            check(x_TI, rows, pools[0], tenants)
            us = time_grouped(x_TI, rows, pools)
            reference_us = time_reference(x_TI, rows, pools[0])
            speed = nbytes / us * 1e6
            print(
                f"| {name}, {format_plan(plan)} | {count} | {tile} | {us:.1f} | {speed / 1e9:.0f} "
                f"| {speed / limit:.0%} | {base_us:.1f} | {us / base_us:+.0%} "
                f"| {reference_us / us:.0f}× |",
                flush=True,
            )


def random_bands(shape: tuple[int, int], plan: Plan) -> list[BandTensors]:
    """Bands of random codes whose directions have a norm of about one."""

    def factor(band: Band, size: int) -> Factor:
        levels, groups = 2**band.bits, -(-size // GROUP)
        codes_RN = torch.randint(0, levels, (band.count, size), dtype=torch.uint8)
        zero_RG = torch.full((band.count, groups), levels // 2, dtype=torch.uint8)
        scale_RG = (torch.rand(band.count, groups) + 0.5) * 3 / (levels * size**0.5)
        return Factor.from_codes(codes_RN, scale_RG.half(), zero_RG, band.bits)

    return [
        BandTensors(factor(band, shape[1]), factor(band, shape[0]), torch.rand(band.count) + 0.5)
        for band in plan
    ]


def filled_pool(shape: tuple[int, int], plan: Plan, blobs: list[Tensor], slots: int) -> SlotPool:
    """A pool whose slots hold the distinct tenants in turn."""
    pool = SlotPool.create(
        shape,
        slots,
        slot_bytes=bands_nbytes(shape, plan),
        max_rank=rank(plan),
        max_bands=len(plan),
        device="cuda",
    )
    for slot in range(slots):
        pool.load(slot, blobs[slot % DISTINCT], plan)
    return pool


def check(x_TI: Tensor, rows: Rows, pool: SlotPool, tenants: list[list[BandTensors]]) -> None:
    """Refuses to go on unless each row is its own tenant's delta applied in float64."""
    y_TO = torch.zeros(len(x_TI), pool.shape[0], device="cuda")
    grouped_bands(y_TO, x_TI, rows, pool, impl="triton")
    for which, bands in enumerate(tenants):
        mine_T = rows.slot_T % DISTINCT == which
        expected = x_TI[mine_T].double() @ dense(bands).cuda().double().T
        error = (y_TO[mine_T].double() - expected).norm(dim=1)
        worst = float((error / expected.norm(dim=1)).amax()) if len(error) else 0.0
        if not worst <= TOLERANCE:
            sys.exit(f"wrong result: relative error {worst:.2e} of a row, limit {TOLERANCE:.2e}")


def time_grouped(x_TI: Tensor, rows: Rows, pools: list[SlotPool]) -> float:
    """Microseconds of one call, from a graph that goes through all copies of the pool."""
    y_TO = torch.zeros(len(x_TI), pools[0].shape[0], device="cuda", dtype=x_TI.dtype)

    def calls() -> None:
        for pool in pools:
            grouped_bands(y_TO, x_TI, rows, pool, impl="triton")

    return graph_time(calls) / len(pools)


def time_matmul(x_TI: Tensor, shape: tuple[int, int]) -> float:
    """Microseconds of the base's matmul alone."""
    copies = max(1, BEYOND_CACHE // (shape[0] * shape[1] * x_TI.itemsize))
    weights = [torch.randn(shape, device="cuda", dtype=x_TI.dtype) for _ in range(copies)]
    y_TO = torch.empty(len(x_TI), shape[0], device="cuda", dtype=x_TI.dtype)

    def calls() -> None:
        for weight_OI in weights:
            torch.mm(x_TI, weight_OI.T, out=y_TO)

    return graph_time(calls) / copies


def time_reference(x_TI: Tensor, rows: Rows, pool: SlotPool) -> float:
    """Microseconds of the plain torch implementation, host waits included."""
    y_TO = torch.zeros(len(x_TI), pool.shape[0], device="cuda", dtype=x_TI.dtype)
    grouped_bands(y_TO, x_TI, rows, pool)
    return event_time(lambda: grouped_bands(y_TO, x_TI, rows, pool), 3)


def copy_bandwidth() -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_time(lambda: target.copy_(source)) * 1e6


def graph_time(calls: Callable[[], object]) -> float:
    """Microseconds of one replay: the median of 20, after 3 to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, which a capture must not
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for _ in range(3):
        graph.replay()
    return sorted(event_time(graph.replay, 1) for _ in range(20))[10]


def event_time(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of one call by CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / repeats


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Deltas of many tenants at decode on a GPU.")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tile", type=int, nargs="+", choices=(1, 16, 64), default=[1, 16])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
