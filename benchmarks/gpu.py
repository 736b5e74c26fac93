"""What packed deltas cost on a GPU, beside everything they should be compared with.

    python benchmarks/gpu.py -o docs/results/gpu      # writes gpu.md and gpu.png, some minutes
    python benchmarks/gpu.py --only tenants prefill
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check   # no GPU: the results alone, on small shapes

No figure of this benchmark is committed yet: the kernels were checked in Triton's interpreter and
compiled ahead of time, and have not been timed on a GPU. It needs torch, numpy and Triton. The page is
written line by line, so that an interrupted run loses nothing, and a part that fails does not stop the
others.

The parts, each a table:

- `figure3`, as in the Delta-CoMe paper: Triton ÷ plain PyTorch, batches of 1 … 64 rows of one tenant,
  square matrices of 2048 … 8192, with the paper's plan at 1/16; also drawn.
- `decode`: shapes of Llama-2-7B, 1, 16 and 64 rows of one tenant, beside a 1-bit delta (BitDelta's way,
  the op `signs`), a bfloat16 LoRA of equal bytes, one of rank 64, and the base's matmul.
- `tenants`: 64 rows of 1 … 64 tenants; LoRAs are batched products of gathered pairs.
- `prefill`: 2048 and 8192 rows of one tenant against the arithmetic floor, r · (in + out) products a row
  at the speed of the base's matmul.

Before anything is timed, the results must agree with the dense deltas in float64. Kernels and matmuls run
from CUDA graphs over enough copies of their weights that the L2 cache cannot hold them; PyTorch's
implementation, which waits for the device, runs without a graph. The limits, which are a device copy and
a square matmul, are timed in the same run. GB/s count the packed bytes of the tenants in the batch once,
with x and y. The last column is the time of the bands, in their faster tiles, over that of the row.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from origin import command, device, origin
from torch import Tensor

from deltacome.format.codec import (
    BandTensors,
    Factor,
    SignTensors,
    dense,
    write_bands,
    write_signs,
)
from deltacome.format.spec import (
    GROUP,
    Band,
    Plan,
    bands_nbytes,
    format_plan,
    rank,
    signs_nbytes,
)
from deltacome.ops.bands import bands
from deltacome.ops.rows import Rows, group_rows, tile_for
from deltacome.ops.signs import signs
from deltacome.ops.slots import BandTable, PlacedBands, PlacedSigns, Pool, SignTable

Shape = tuple[int, int]
LLAMA: dict[Shape, Plan] = {
    (4096, 4096): (Band(8, 2), Band(3, 32), Band(2, 968)),
    (11008, 4096): (Band(8, 2), Band(3, 32), Band(2, 1428)),
    (4096, 11008): (Band(8, 2), Band(3, 32), Band(2, 1428)),
}
"""(out, in) → the plan at 1/16 in the paper's own code."""
SIZES = (2048, 4096, 6144, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Hidden sizes and batches of figure 3."""
DECODE = (1, 16, 64)
"""Rows of one tenant."""
BATCH = 64
TENANTS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a batch, and how many tenants share them."""
PREFILL = (2048, 8192)
"""Rows of a prompt."""
DISTINCT = 2
"""Tenants with different codes; more would only take longer to make, as the same bytes are read."""
BEYOND_CACHE = 512 * 2**20
"""Bytes read before a weight is read again: ten times the L2 cache of an H100."""
ENOUGH = 2e5
"""Microseconds of replays that are enough for a median, given at least three."""
TOLERANCE = 2**-8
"""Relative to a row's norm: y is rounded to 8 bits, which may cost half of this, and t to 11."""
PARTS = ("figure3", "decode", "tenants", "prefill")
DTYPE = torch.bfloat16
DEVICE = "cuda"


@dataclass
class Deltas:
    """Tenants of one matrix, packed in one way, in more pools than a cache can hold."""

    name: str
    op: Callable[..., None]
    tables: Sequence[BandTable | SignTable]
    dense: list[Tensor]
    """Dense deltas of the tenants that differ, which take turns in the slots."""
    nbytes: int
    """Packed bytes of a tenant."""
    products: int
    """Products per row."""


@functools.cache
def tenant_of_bands(shape: Shape, plan: Plan, which: int) -> tuple[Tensor, Tensor]:
    """A tenant's blob and its dense delta; `which` tells tenants apart."""
    packed = random_bands(shape, plan)
    return write_bands(packed), dense(packed)


@functools.cache
def tenant_of_signs(shape: Shape, which: int) -> tuple[Tensor, Tensor]:
    """A tenant's blob and its dense delta; `which` tells tenants apart."""
    packed = SignTensors.from_signs(torch.rand(shape) > 0.5, torch.full((1,), 0.02))
    return write_signs(packed), packed.dense()


def of_bands(shape: Shape, plan: Plan, tenants: int, copies: int, device: str) -> Deltas:
    made = [tenant_of_bands(shape, plan, which) for which in range(min(DISTINCT, tenants))]
    tables = []
    for pool in _pools([blob for blob, _ in made], tenants, copies, device):
        table = BandTable(pool, shape[1], shape[:1], max_rank=rank(plan), max_bands=len(plan))
        for slot in range(tenants):
            table.load(slot, [PlacedBands(0, plan)])
        tables.append(table)
    whole, nbytes = [delta_OI for _, delta_OI in made], len(made[0][0])
    return Deltas("bands", bands, tables, whole, nbytes, rank(plan) * sum(shape))


def of_signs(shape: Shape, tenants: int, copies: int, device: str) -> Deltas:
    made = [tenant_of_signs(shape, which) for which in range(min(DISTINCT, tenants))]
    tables = []
    for pool in _pools([blob for blob, _ in made], tenants, copies, device):
        table = SignTable(pool, shape[1], shape[:1])
        for slot in range(tenants):
            table.load(slot, [PlacedSigns(0, 1)])
        tables.append(table)
    whole, nbytes = [delta_OI for _, delta_OI in made], len(made[0][0])
    return Deltas("signs (BitDelta)", signs, tables, whole, nbytes, shape[0] * shape[1])


def _pools(blobs: list[Tensor], tenants: int, copies: int, device: str) -> Iterator[Pool]:
    blobs = [blob.to(device) for blob in blobs]
    for _ in range(copies):
        pool = Pool(tenants, len(blobs[0]), device=device)
        for slot in range(tenants):
            pool.load(slot, 0, blobs[slot % len(blobs)])
        yield pool


def copies_of(nbytes: int) -> int:
    """How many copies of such weights exceed any cache, with what else is read and written beside one."""
    return max(1, BEYOND_CACHE // nbytes)


def random_bands(shape: Shape, plan: Plan) -> list[BandTensors]:
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


def check(deltas: Deltas, x_TI: Tensor, rows: Rows) -> None:
    """Exits unless each row is its own tenant's delta, as applied in float64."""
    y_TO = _zeros(x_TI, len(deltas.dense[0]))
    deltas.op(y_TO, x_TI, rows, deltas.tables[0], impl="triton")
    for which, delta_OI in enumerate(deltas.dense):
        mine_T = rows.slot_T % len(deltas.dense) == which
        wanted = x_TI[mine_T].double() @ delta_OI.to(x_TI.device).double().T
        error = (y_TO[mine_T].double() - wanted).norm(dim=1)
        worst = float((error / wanted.norm(dim=1)).amax()) if len(error) else 0.0
        if not worst <= TOLERANCE:
            sys.exit(f"{deltas.name}: wrong result: relative error {worst:.2e} of a row")


def _zeros(x_TI: Tensor, out: int) -> Tensor:
    return torch.zeros(len(x_TI), out, dtype=x_TI.dtype, device=x_TI.device)


class Limits:
    """What the device can do, timed in this run."""

    def __init__(self) -> None:
        source = torch.zeros(2**30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / graph_time(lambda: target.copy_(source)) * 1e6
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
        c = torch.empty_like(a)
        self.matmul = 2 * 8192**3 / graph_time(lambda: torch.mm(a, b, out=c)) * 1e6

    def speed(self, nbytes: float, flops: float, us: float) -> str:
        """Cells of a table: µs, GB/s and of the copy, TFLOP/s and of the matmul."""
        bandwidth, rate = nbytes / us * 1e6, flops / us * 1e6
        return (
            f"{us:.1f} | {bandwidth / 1e9:.0f} | {bandwidth / self.copy:.0%} | {rate / 1e12:.1f} | "
            f"{rate / self.matmul:.0%}"
        )


SPEED = "µs | GB/s | of copy | TFLOP/s | of matmul"
HEAD = (
    f"| matrix, tenants of rows | what | {SPEED} | ÷ base | bands ÷ it |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def decode(limits: Limits) -> Iterator[str]:
    """One tenant at Llama's shapes, beside its peers."""
    yield HEAD
    for shape in LLAMA:
        for tokens in DECODE:
            yield from _peers(limits, shape, 1, tokens, (1, 16) if tokens == 1 else (16,))


def tenants(limits: Limits) -> Iterator[str]:
    """The same number of rows, shared by more and more tenants."""
    yield HEAD
    for count in TENANTS:
        for shape in LLAMA:
            yield from _peers(limits, shape, count, BATCH, (1, 16))


def prefill(limits: Limits) -> Iterator[str]:
    """Many rows of one tenant, against what its products cost at the speed of the base's matmul."""
    yield HEAD
    for tokens in PREFILL:
        for shape in LLAMA:
            yield from _peers(limits, shape, 1, tokens, (64,), floor=True)


def _peers(
    limits: Limits,
    shape: Shape,
    count: int,
    tokens: int,
    tiles: tuple[int, ...],
    *,
    floor: bool = False,
) -> Iterator[str]:
    """Rows of a table: bands, its peers, the base's matmul, and the arithmetic floor if asked for."""
    (out, size), plan = shape, LLAMA[shape]
    x_TI = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
    slot_T = torch.arange(tokens, device=DEVICE) % count
    moved = x_TI.nbytes + 2 * tokens * out * x_TI.itemsize
    nbytes = bands_nbytes(shape, plan)
    ours = of_bands(shape, plan, count, copies_of(moved + count * nbytes), DEVICE)
    copies = copies_of(moved + count * signs_nbytes(shape, 1))
    peer = of_signs(shape, count, copies, DEVICE)

    found: list[tuple[str, float, str]] = []
    for deltas, tile in (*((ours, tile) for tile in tiles), (peer, max(tiles))):
        us = time_deltas(deltas, x_TI, group_rows(slot_T, count, tile=tile))
        cells = limits.speed(moved + count * deltas.nbytes, 2 * tokens * deltas.products, us)
        found.append((f"{deltas.name}, tile {tile}", us, cells))
    fastest = min(us for name, us, _ in found if name.startswith("bands"))
    slow = time_reference(ours, x_TI, group_rows(slot_T, count))
    found.append(("PyTorch", slow, f"{slow:.1f} | – | – | – | –"))
    for r in (round(nbytes / (2 * sum(shape))), 64):
        us, pairs = time_lora(x_TI, slot_T, shape, count, r), r * sum(shape)
        cells = limits.speed(moved + 2 * count * pairs, 2 * tokens * pairs, us)
        found.append((f"LoRA, rank {r}", us, cells))
    base = time_matmul(x_TI, shape)
    cells = limits.speed(moved + 2 * out * size, 2 * tokens * out * size, base)
    found.append(("base matmul", base, cells))
    if floor:
        us = base * ours.products / (out * size)
        found.append(("arithmetic floor", us, f"{us:.1f} | – | – | – | –"))
    where = f"{out}×{size} `{format_plan(plan)}`, {count} of {tokens}"
    for name, us, cells in found:
        yield f"| {where} | {name} | {cells} | {us / base:.2f} | {fastest / us:.2f} |"


def figure3(limits: Limits, ratios: dict[int, list[tuple[int, float]]]) -> Iterator[str]:
    """Triton ÷ PyTorch over batches and sizes; fills `ratios`, by size, for the drawing."""
    yield f"| size | rows | {SPEED} | PyTorch µs | ratio |\n|---|---|---|---|---|---|---|---|---|"
    for size in SIZES:
        shape, plan = (size, size), figure3_plan(size)
        deltas = of_bands(shape, plan, 1, copies_of(bands_nbytes(shape, plan)), DEVICE)
        for tokens in ROWS:
            x_TI = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
            slot_T = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
            rows = group_rows(slot_T, 1, tile=tile_for(tokens, 1))
            fast = time_deltas(deltas, x_TI, rows)
            slow = time_reference(deltas, x_TI, rows)
            ratios.setdefault(size, []).append((tokens, slow / fast))
            moved = 3 * x_TI.nbytes + deltas.nbytes
            cells = limits.speed(moved, 2 * tokens * deltas.products, fast)
            yield f"| {size} | {tokens} | {cells} | {slow:.1f} | {slow / fast:.1f} |"


def figure3_plan(size: int) -> Plan:
    """The paper's at 1/16 for a square matrix: codes of one bit an entry.

    As many bits would be size / 4 directions of 2 bits, of which those of 8 and of 3 cost 56.
    """
    return (Band(8, 2), Band(3, 32), Band(2, size // 4 - 56))


def draw(ratios: dict[int, list[tuple[int, float]]], file: Path) -> None:
    """The paper's figure 3: speed against batch size, a line for each hidden size."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for size, points in ratios.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"hidden size {size}")
    axes.set(xscale="log", xlabel="rows", ylabel="PyTorch time ÷ Triton time", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def time_deltas(deltas: Deltas, x_TI: Tensor, rows: Rows) -> float:
    """Microseconds of the kernels, after their result was checked."""
    check(deltas, x_TI, rows)
    y_TO = _zeros(x_TI, len(deltas.dense[0]))

    def calls() -> None:
        for table in deltas.tables:
            deltas.op(y_TO, x_TI, rows, table, impl="triton")

    return graph_time(calls) / len(deltas.tables)


def time_reference(deltas: Deltas, x_TI: Tensor, rows: Rows) -> float:
    """Microseconds of the same in plain torch."""
    y_TO = _zeros(x_TI, len(deltas.dense[0]))
    return event_time(lambda: deltas.op(y_TO, x_TI, rows, deltas.tables[0]), 3)


def time_matmul(x_TI: Tensor, shape: Shape) -> float:
    """Microseconds of the base's matmul alone."""
    y_TO = _zeros(x_TI, shape[0])
    copies = copies_of(shape[0] * shape[1] * x_TI.itemsize + x_TI.nbytes + y_TO.nbytes)
    weights = [torch.randn(shape, device=DEVICE, dtype=x_TI.dtype) for _ in range(copies)]

    def calls() -> None:
        for weight_OI in weights:
            torch.mm(x_TI, weight_OI.T, out=y_TO)

    return graph_time(calls) / copies


def time_lora(x_TI: Tensor, slot_T: Tensor, shape: Shape, count: int, r: int) -> float:
    """Microseconds of `x A B`: two matmuls for one pair, batched products for several of equal share."""
    written = len(x_TI) * shape[0] * x_TI.itemsize
    copies = copies_of(count * r * sum(shape) * x_TI.itemsize + x_TI.nbytes + written)
    options = {"device": DEVICE, "dtype": x_TI.dtype}
    pairs = [
        (torch.randn(count, shape[1], r, **options), torch.randn(count, r, shape[0], **options))
        for _ in range(copies)
    ]
    x_CTI = x_TI[torch.argsort(slot_T)].view(count, -1, shape[1])

    def calls() -> None:
        for a_CIR, b_CRO in pairs:
            torch.bmm(torch.bmm(x_CTI, a_CIR), b_CRO)

    return graph_time(calls) / copies


def graph_time(calls: Callable[[], object]) -> float:
    """Microseconds of one replay: the median of 20, or of fewer where they take long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and tunes kernels, which a capture must not do
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    repeats = ENOUGH / event_time(graph.replay, 2)
    repeats = max(3, min(20, round(repeats)))
    return statistics.median(event_time(graph.replay, 1) for _ in range(repeats))


def event_time(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of one call by CUDA events; one before keeps the device busy until all are queued."""
    call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / repeats


def check_small() -> None:
    """Checks the results alone, on shapes small enough for the interpreter."""
    shape, plan = (192, 256), (Band(8, 2), Band(3, 4), Band(2, 9))
    for count in (1, 3):
        x_TI = torch.randn(3, 256, dtype=torch.float16)  # bfloat16 is wrong in the interpreter
        for deltas in (of_bands(shape, plan, count, 1, "cpu"), of_signs(shape, count, 1, "cpu")):
            for tile in (1, 16, 64):
                check(deltas, x_TI, group_rows(torch.arange(3) % count, count, tile=tile))
    print(f"checked: {bands_nbytes(shape, plan)} bytes a tenant")


class Page:
    """Lines that are printed and, with a file, written at once, since a run may be interrupted."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as page:
                page.write(f"{line}\n")


def measure(only: Sequence[str], output: Path | None, limits: Limits) -> bool:
    """Prints, writes and draws the tables; returns whether all of them are complete."""
    page = Page(None if output is None else output.with_suffix(".md"))
    page.say(f"# Kernels on {device()}\n")
    page.say(f"`{command()}`\n")
    page.say(
        f"{origin('triton')} {DTYPE}; device copy {limits.copy / 1e9:.0f} GB/s (read + write), "
        f"matmul {limits.matmul / 1e12:.0f} TFLOP/s, both timed in this run."
    )
    whole, ratios = True, {}
    parts = {
        "figure3": lambda: figure3(limits, ratios),
        "decode": lambda: decode(limits),
        "tenants": lambda: tenants(limits),
        "prefill": lambda: prefill(limits),
    }
    for name in only:
        page.say(f"\n## {name}\n")
        try:
            for line in parts[name]():
                page.say(line)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            page.say(f"\nIt ends here: {type(error).__name__}: {error}")
            whole = False
    if output is not None and ratios:
        try:
            draw(ratios, output.with_suffix(".png"))
        except ImportError as error:
            page.say(f"\nFigure 3 was not drawn: {error}")
    return whole


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    if options.check:
        return check_small()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, found none; --check needs none")
    if not measure(options.only, options.output, Limits()):
        sys.exit("benchmarks/gpu.py: a part failed: see above")
    return None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed deltas on a GPU, beside their peers.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--check", action="store_true", help="check the results only; needs no GPU")
    parser.add_argument("-o", "--output", type=Path, help="writes OUTPUT.md and OUTPUT.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
