"""What packed deltas cost on a GPU, beside everything that they should be compared with.

    python benchmarks/gpu.py -o docs/results/gpu      # writes gpu.md and gpu.png, some minutes
    python benchmarks/gpu.py --only tenants prefill
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check   # no GPU: the results alone, on small shapes

No figure of this benchmark is committed yet: the kernels were checked in Triton's interpreter and
compiled ahead of time, and have not been timed on a GPU.

The parts, each a table:

- `figure3`, as in the Delta-CoMe paper: Triton ÷ plain PyTorch, batches of 1 … 64 rows of one tenant,
  square matrices of 2048 … 8192, with the paper's plan at 1/16; also drawn.
- `decode`: shapes of Llama-2-7B, 1, 16 and 64 rows of one tenant, beside a 1-bit delta (BitDelta's way,
  the op `signs`), a bfloat16 LoRA of equal bytes, one of rank 64, and the base's matmul.
- `tenants`: 64 rows of 1 … 64 tenants; LoRAs are batched products of gathered pairs.
- `prefill`: 2048 and 8192 rows of one tenant against the arithmetic floor, r · (in + out) products a row
  at the speed of the base's matmul.

Before anything is timed it must agree with the dense deltas in float64. Kernels and matmuls run from
CUDA graphs over enough copies of their weights that the L2 cache cannot hold them; PyTorch's
implementation, which waits for the device, runs without a graph. The limits, a device copy and a square
matmul, are timed in the same run. GB/s count the packed bytes of the tenants in the batch once, with x
and y. The last column is the time of the bands, in their faster tiles, over that of the row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from origin import origin
from torch import Tensor

from deltacome.format.codec import (
    BandTensors,
    Factor,
    SignTensors,
    dense,
    write_bands,
    write_signs,
)
from deltacome.format.spec import GROUP, Band, Plan, bands_nbytes, format_plan, rank
from deltacome.ops.bands import bands
from deltacome.ops.rows import Rows, group_rows
from deltacome.ops.signs import signs
from deltacome.ops.slots import BandTable, PlacedBands, PlacedSigns, Pool, SignTable

Shape = tuple[int, int]
LLAMA: dict[Shape, Plan] = {
    (4096, 4096): (Band(8, 2), Band(3, 32), Band(2, 968)),
    (11008, 4096): (Band(8, 2), Band(3, 32), Band(2, 1428)),
    (4096, 11008): (Band(8, 2), Band(3, 32), Band(2, 1428)),
}
"""(out, in) → the paper's plan at 1/16."""
SIZES = (2048, 4096, 6144, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Hidden sizes and batches of figure 3."""
TENANTS = (1, 2, 4, 8, 16, 32, 64)
PREFILL = (2048, 8192)
"""Tenants in a batch of 64 rows; rows of a prompt."""
DISTINCT = 2
"""Tenants whose codes differ; more would only take longer to make, as bytes are read all the same."""
BEYOND_CACHE = 512 * 2**20
"""Bytes to go through before a weight is read again: ten times the L2 cache of an H100."""
TOLERANCE = 2**-9
"""Of a row's norm: t is rounded to 11 bits, y not at all (it is float32 in the check)."""
DTYPE = torch.bfloat16
DEVICE = "cuda"


class Deltas:
    """Tenants of one matrix in enough pools that no cache holds them, with their dense values."""

    def __init__(self, shape: Shape, plan: Plan, tenants: int, device: str, *, one: bool) -> None:
        out, size = shape
        self.shape, self.plan, self.tenants = shape, plan, tenants
        distinct = [random_bands(shape, plan) for _ in range(min(DISTINCT, tenants))]
        positive = [torch.rand(out, size) > 0.5 for _ in distinct]
        blobs = [write_bands(b).to(device) for b in distinct]
        scale = torch.full((1,), 0.02)
        sign_blobs = [write_signs(SignTensors.from_signs(p, scale)).to(device) for p in positive]
        self.dense = [dense(b) for b in distinct]
        self.dense_signs = [0.02 * (2.0 * p - 1) for p in positive]
        self.nbytes, self.sign_nbytes = len(blobs[0]), len(sign_blobs[0])
        self.band_tables, self.sign_tables = [], []
        for nbytes, kind, target in (
            (self.nbytes, "bands", self.band_tables),
            (self.sign_nbytes, "signs", self.sign_tables),
        ):
            copies = 1 if one else max(1, BEYOND_CACHE // (tenants * nbytes))
            for _ in range(copies):
                pool = Pool(tenants, nbytes, device=device)
                table = (
                    BandTable(pool, size, [out], max_rank=rank(plan), max_bands=len(plan))
                    if kind == "bands"
                    else SignTable(pool, size, [out])
                )
                for slot in range(tenants):
                    which = (blobs if kind == "bands" else sign_blobs)[slot % len(distinct)]
                    pool.load(slot, 0, which)
                    if isinstance(table, BandTable):
                        table.load(slot, [PlacedBands(0, plan)])
                    else:
                        table.load(slot, [PlacedSigns(0, 1)])
                target.append(table)


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
    """Refuses to go on unless each row is its own tenant's delta applied in float64."""
    for op, table, expected in (
        (bands, deltas.band_tables[0], deltas.dense),
        (signs, deltas.sign_tables[0], deltas.dense_signs),
    ):
        y_TO = torch.zeros(len(x_TI), deltas.shape[0], device=x_TI.device)
        op(y_TO, x_TI, rows, table, impl="triton")  # pyright: ignore[reportArgumentType]
        for which, delta_OI in enumerate(expected):
            mine_T = rows.slot_T % len(expected) == which
            wanted = x_TI[mine_T].double() @ delta_OI.to(x_TI.device).double().T
            error = (y_TO[mine_T].double() - wanted).norm(dim=1)
            worst = float((error / wanted.norm(dim=1)).amax()) if len(error) else 0.0
            if not worst <= TOLERANCE:
                sys.exit(f"{op.__name__}: wrong result: relative error {worst:.2e} of a row")


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
    for shape, plan in LLAMA.items():
        deltas = Deltas(shape, plan, 1, DEVICE, one=False)
        for tokens in (1, 16, 64):
            x_TI = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE)
            slot_T = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
            yield from _peers(limits, deltas, x_TI, slot_T, (1, 16) if tokens == 1 else (16,))


def tenants(limits: Limits, tokens: int = 64) -> Iterator[str]:
    """The same number of rows, of more and more tenants."""
    yield HEAD
    for count in TENANTS:
        for shape, plan in LLAMA.items():
            deltas = Deltas(shape, plan, count, DEVICE, one=False)
            x_TI = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE)
            slot_T = torch.arange(tokens, device=DEVICE) % count
            yield from _peers(limits, deltas, x_TI, slot_T, (1, 16))


def prefill(limits: Limits) -> Iterator[str]:
    """Many rows of one tenant, against what its products cost at the speed of the base's matmul."""
    yield HEAD
    for tokens in PREFILL:
        for shape, plan in LLAMA.items():
            deltas = Deltas(shape, plan, 1, DEVICE, one=False)
            x_TI = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE)
            slot_T = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
            base = time_matmul(x_TI, shape)
            floor = base * rank(plan) * sum(shape) / (shape[0] * shape[1])
            yield from _peers(limits, deltas, x_TI, slot_T, (64,), floor)


def _peers(
    limits: Limits,
    deltas: Deltas,
    x_TI: Tensor,
    slot_T: Tensor,
    tiles: tuple[int, ...],
    floor: float | None = None,
) -> Iterator[str]:
    """Rows of a table: bands, its peers, the base's matmul, and the arithmetic floor if there is one."""
    (out, size), tokens, count = deltas.shape, len(x_TI), deltas.tenants
    moved = x_TI.nbytes + 2 * tokens * out * x_TI.itemsize
    base = time_matmul(x_TI, deltas.shape)
    y_TO = torch.zeros(tokens, out, device=DEVICE, dtype=DTYPE)
    found: list[tuple[str, float, str]] = []
    for tile in tiles:
        rows = group_rows(slot_T, count, tile=tile)
        check(deltas, x_TI, rows)
        for name, op, tables, nbytes, work in (
            ("bands", bands, deltas.band_tables, deltas.nbytes, rank(deltas.plan) * (out + size)),
            ("signs (BitDelta)", signs, deltas.sign_tables, deltas.sign_nbytes, out * size),
        ):

            def calls(op=op, tables=tables, rows=rows) -> None:  # type: ignore[no-untyped-def]
                for table in tables:
                    op(y_TO, x_TI, rows, table, impl="triton")

            us = graph_time(calls) / len(tables)
            cells = limits.speed(moved + count * nbytes, 2 * tokens * work, us)
            found.append((f"{name}, tile {tile}", us, cells))
    ours = min(us for name, us, _ in found if name.startswith("bands"))
    rows = group_rows(slot_T, count)
    slow = event_time(lambda: bands(y_TO, x_TI, rows, deltas.band_tables[0]), 3)
    found.append(("PyTorch", slow, f"{slow:.1f} | – | – | – | –"))
    for r in (round(deltas.nbytes / (2 * (out + size))), 64):
        us = time_lora(x_TI, slot_T, deltas.shape, count, r)
        flops = 2 * tokens * r * (out + size)
        found.append(
            (f"LoRA, rank {r}", us, limits.speed(moved + 2 * count * r * (out + size), flops, us))
        )
    cells = limits.speed(moved + 2 * out * size, 2 * tokens * out * size, base)
    found.append(("base matmul", base, cells))
    if floor is not None:
        found.append(("arithmetic floor", floor, f"{floor:.1f} | – | – | – | –"))
    where = f"{out}×{size} `{format_plan(deltas.plan)}`, {count} of {tokens}"
    for name, us, cells in found:
        yield f"| {where} | {name} | {cells} | {us / base:.2f} | {ours / us:.2f} |"


def figure3(limits: Limits, output: Path | None) -> Iterator[str]:
    """Triton ÷ PyTorch over batches and sizes; also drawn."""
    yield f"| size | rows | {SPEED} | PyTorch µs | ratio |\n|---|---|---|---|---|---|---|---|---|"
    ratios: dict[int, list[tuple[int, float]]] = {}
    for size in SIZES:
        directions = size * size // 16 * 16 // (2 * 2 * size)  # 2-bit codes of 1/16 of the bytes
        plan = (Band(8, 2), Band(3, 32), Band(2, directions - 22))
        deltas = Deltas((size, size), plan, 1, DEVICE, one=False)
        for tokens in ROWS:
            x_TI = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
            rows = group_rows(torch.zeros(tokens, dtype=torch.int64, device=DEVICE), 1)
            check(deltas, x_TI, rows)
            y_TO = torch.zeros(tokens, size, device=DEVICE, dtype=DTYPE)

            def calls(y_TO=y_TO, x_TI=x_TI, rows=rows, tables=deltas.band_tables) -> None:
                for table in tables:
                    bands(y_TO, x_TI, rows, table, impl="triton")

            fast = graph_time(calls) / len(deltas.band_tables)
            table = deltas.band_tables[0]
            slow = event_time(lambda y=y_TO, x=x_TI, r=rows, t=table: bands(y, x, r, t), 3)
            ratios.setdefault(size, []).append((tokens, slow / fast))
            moved = x_TI.nbytes + 2 * y_TO.nbytes + deltas.nbytes
            cells = limits.speed(moved, 4 * tokens * rank(plan) * size, fast)
            yield f"| {size} | {tokens} | {cells} | {slow:.1f} | {slow / fast:.1f} |"
    if output is not None:
        draw(ratios, output.with_suffix(".png"))


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


def time_matmul(x_TI: Tensor, shape: Shape) -> float:
    """Microseconds of the base's matmul alone."""
    copies = max(1, BEYOND_CACHE // (shape[0] * shape[1] * x_TI.itemsize))
    weights = [torch.randn(shape, device=DEVICE, dtype=x_TI.dtype) for _ in range(copies)]
    y_TO = torch.empty(len(x_TI), shape[0], device=DEVICE, dtype=x_TI.dtype)

    def calls() -> None:
        for weight_OI in weights:
            torch.mm(x_TI, weight_OI.T, out=y_TO)

    return graph_time(calls) / copies


def time_lora(x_TI: Tensor, slot_T: Tensor, shape: Shape, count: int, r: int) -> float:
    """Microseconds of `x A B`: two matmuls for one pair, batched products for several of equal share."""
    nbytes = 2 * count * r * sum(shape)
    copies = max(1, BEYOND_CACHE // nbytes)
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
    """Microseconds of one replay: the median of 20, after 3 to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and tunes kernels, which a capture must not
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
    call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / repeats


def check_small() -> None:
    """The results alone, on shapes that an interpreter can do."""
    plan = (Band(8, 2), Band(3, 4), Band(2, 9))
    for count in (1, 3):
        deltas = Deltas((192, 256), plan, count, "cpu", one=True)
        x_TI = torch.randn(6, 256, dtype=torch.float16)  # bfloat16 is wrong in the interpreter
        for tile in (1, 16, 64):
            check(deltas, x_TI, group_rows(torch.arange(6) % count, count, tile=tile))
    print(f"checked: {bands_nbytes((192, 256), plan)} bytes a tenant")


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    if options.check:
        return check_small()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, found none; --check needs none")
    limits = Limits()
    parts = {
        "figure3": lambda: figure3(limits, options.output),
        "decode": lambda: decode(limits),
        "tenants": lambda: tenants(limits),
        "prefill": lambda: prefill(limits),
    }
    lines = [
        f"# Kernels on {torch.cuda.get_device_name()}\n",
        f"`python benchmarks/gpu.py {shlex.join(sys.argv[1:])}`\n",
        f"{origin()} {DTYPE}; device copy {limits.copy / 1e9:.0f} GB/s (read + write), "
        f"matmul {limits.matmul / 1e12:.0f} TFLOP/s, both timed in this run.",
    ]
    print("\n".join(lines))
    for name in options.only:
        lines.append(f"\n## {name}\n")
        print(lines[-1])
        for line in parts[name]():
            lines.append(line)
            print(line, flush=True)
    if options.output is not None:
        options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed deltas on a GPU, beside their peers.")
    parts = ["figure3", "decode", "tenants", "prefill"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--check", action="store_true", help="results alone; needs no GPU")
    parser.add_argument("-o", "--output", type=Path, help="writes OUTPUT.md and OUTPUT.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
