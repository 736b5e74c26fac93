"""What a delta costs at decode on a CPU: packed codes against their reference and the base's layer.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_bands.py -o docs/results/cpu_bands.md
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_bands.py --shape 576x1536 --rows 1/1 --seconds 2

Before anything is timed, `cpu` is compared with the dense delta in float64; a wrong result ends the
run. Base, `cpu` and `reference` then take turns, so that another job on the machine slows all of them,
and the ratios are medians of the ratios of each turn. Weights and blobs come from a pool larger
than a core's caches, as the layers of a model do.

GB/s counts the packed bytes of the batch's tenants once; the limit is a sum over memory that is not in
a cache, measured in the same run, since decoding reads much and writes little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from origin import command, origin
from torch import Tensor, nn

from deltacome.errors import DeltaError
from deltacome.format.codec import (
    BandTensors,
    Factor,
    SignTensors,
    dense,
    write_bands,
    write_signs,
)
from deltacome.format.spec import GROUP, Band, Plan, format_plan
from deltacome.ops import native
from deltacome.ops.bands import bands, many
from deltacome.ops.rows import Rows, group_rows
from deltacome.ops.signs import signs
from deltacome.ops.slots import BandTable, PlacedBands, PlacedSigns, Pool, SignTable

SHAPES = ("4096x4096", "11008x4096", "576x576", "1536x576", "576x1536", "49152x576")
"""Llama-2-7B's attention and half of its MLP; all of SmolLM2-135M, its head last."""
POOL = 128 << 20
MANY_ROWS = (2 * many.MANY, torch.bfloat16, 2**-7)
"""Rows (enough that both tenants have many), their dtype, and the error that bfloat16 may have."""
COPIES = 256
"""Copies of an operand that take turns: `POOL` bytes of them, but no more than a model has matrices."""
TERMS = {"bands 1/16": 16, "bands 1/64": 64, "signs": 0}
"""What the tenants hold: the plan of the Delta-CoMe paper, the same with a quarter of its directions, or
BitDelta's signs."""


@dataclass
class Delta:
    """A term of one matrix: its blob, its plan (None for signs), and the dense value in float64."""

    blob: Tensor
    plan: Plan | None
    dense_OI: Tensor

    @classmethod
    def random(cls, out: int, inputs: int, ratio: int) -> Delta:
        """Bands of a sixteenth (or less) of the bytes, or signs for ratio 0."""
        if not ratio:
            term = SignTensors.from_signs(torch.rand(out, inputs) > 0.5, torch.rand(out) / inputs)
            return cls(write_signs(term), None, term.dense().double())
        plan = paper_plan(out, inputs, ratio)
        terms = [
            BandTensors(factor(band, inputs), factor(band, out), torch.rand(band.count) / inputs)
            for band in plan
        ]
        return cls(write_bands(terms), plan, dense(terms).double())

    def table(self, tenants: int) -> BandTable | SignTable:
        """A table whose tenants have equal bytes at separate addresses."""
        out, inputs = self.dense_OI.shape
        pool = Pool(tenants, self.blob.numel())
        if self.plan is None:
            table = SignTable(pool, inputs, [out])
            placed = PlacedSigns(0, out)
        else:
            table = BandTable(pool, inputs, [out], max_bands=len(self.plan))
            placed = PlacedBands(0, self.plan)
        for slot in range(tenants):
            pool.load(slot, 0, self.blob)
            table.load(slot, [placed])  # pyright: ignore[reportArgumentType]
        return table


def paper_plan(out: int, inputs: int, ratio: int) -> Plan:
    """8 bit × 2, 3 bit × in / 128, the rest 2 bit: codes at 1/16; 1/64 has a quarter of the bits."""
    three = max(1, inputs // 128 * 16 // ratio)
    two = (out * inputs * 16 // ratio // (out + inputs) - 8 * 2 - 3 * three) // 2
    return (Band(8, 2), Band(3, three), Band(2, max(1, two)))


def factor(band: Band, size: int) -> Factor:
    """Random codes, scales and zero points."""
    groups, high = -(-size // GROUP), 1 << band.bits
    codes = torch.randint(0, high, (band.count, size), dtype=torch.uint8)
    zero = torch.randint(0, high, (band.count, groups), dtype=torch.uint8)
    scale = (torch.rand(band.count, groups) + 0.5) / high
    return Factor.from_codes(codes, scale.half(), zero, band.bits)


def add(y_TO: Tensor, x_TI: Tensor, rows: Rows, table: BandTable | SignTable, impl: str) -> None:
    """Runs the op of a table."""
    if isinstance(table, BandTable):
        bands(y_TO, x_TI, rows, table, impl=impl)
    else:
        signs(y_TO, x_TI, rows, table, impl=impl)


def check(delta: Delta) -> None:
    """Ends the run unless `cpu` gives the dense delta, for few rows and for many."""
    out, inputs = delta.dense_OI.shape
    table = delta.table(2)
    for tokens, dtype, bound in ((1, torch.float32, 1e-5), (8, torch.float32, 1e-5), MANY_ROWS):
        rows = group_rows(torch.arange(tokens) % 2, 2)
        x_TI, y_TO = torch.randn(tokens, inputs).to(dtype), torch.zeros(tokens, out, dtype=dtype)
        add(y_TO, x_TI, rows, table, "cpu")
        expected = x_TI.double() @ delta.dense_OI.T
        error = float((y_TO - expected).norm() / expected.norm())
        if not error < bound:
            raise DeltaError(f"{out}x{inputs}, {tokens} tokens: relative error {error:.1e}")


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_bandwidth() -> float:
    """GB/s of a sum over memory outside the caches, the best of nine."""
    source = torch.ones(4 * POOL // 4)
    return source.nbytes / min(seconds_of(source.sum) for _ in range(9)) / 1e9


def copies(nbytes: int) -> int:
    return max(2, min(COPIES, POOL // nbytes))


def measure(
    delta: Delta, tokens: int, tenants: int, dtype: torch.dtype, seconds: float
) -> dict[str, list[float]]:
    """Takes turns for some seconds; returns those of each turn, NaN where the reference was left out."""
    out, inputs = delta.dense_OI.shape
    weight_OI = torch.randn(out, inputs, dtype=dtype)
    weights = [weight_OI.clone() for _ in range(copies(weight_OI.nbytes))]
    tables = [delta.table(tenants) for _ in range(copies(tenants * delta.blob.numel()))]
    x_TI, y_TO = torch.randn(tokens, inputs, dtype=dtype), torch.zeros(tokens, out, dtype=dtype)
    rows = group_rows(torch.arange(tokens) % tenants, tenants)
    turn = 0
    calls = {
        "base": lambda: nn.functional.linear(x_TI, weights[turn % len(weights)]),
        "cpu": lambda: add(y_TO, x_TI, rows, tables[turn % len(tables)], "cpu"),
        "reference": lambda: add(y_TO, x_TI, rows, tables[turn % len(tables)], "reference"),
    }
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["base"]) < 5:
        turn += 1
        for name, call in calls.items():
            # The reference takes as long as all the rest, so only some turns include it.
            left_out = name == "reference" and turn % 8 != 1 and len(times["base"]) > 4
            times[name].append(float("nan") if left_out else seconds_of(call))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs if a == a and b == b)


def table(options: argparse.Namespace, limit: float) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    yield (
        "| out × in | delta | dtype | rows / tenants | base ms | cpu ms | reference ms | "
        "reference ÷ cpu | cpu ÷ base | GB/s | of the read |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    plans = []
    for shape in options.shape or SHAPES:
        out, inputs = map(int, shape.split("x"))
        for term in options.terms:
            delta = Delta.random(out, inputs, TERMS[term])
            check(delta)
            if delta.plan:
                plans.append(f"{out} × {inputs}, {term}: `{format_plan(delta.plan)}`")
            for name in options.dtype:
                for batch in options.rows:
                    tokens, tenants = map(int, batch.split("/"))
                    dtype = getattr(torch, name)
                    times = measure(delta, tokens, tenants, dtype, options.seconds)
                    ms = {
                        key: 1e3 * statistics.median(t for t in value if t == t)
                        for key, value in times.items()
                    }
                    rate = tenants * delta.blob.numel() / ms["cpu"] / 1e6
                    yield (
                        f"| {out} × {inputs} | {term} | {name} | {batch} | {ms['base']:.3f} | "
                        f"{ms['cpu']:.3f} | {ms['reference']:.1f} | "
                        f"{ratio(times, 'reference', 'cpu'):.1f} | "
                        f"{100 * ratio(times, 'cpu', 'base'):.0f} % | {rate:.1f} | "
                        f"{100 * rate / limit:.0f} % |"
                    )
    yield ""
    yield f"Plans: {'; '.join(plans)}."


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    many.MANY = options.many
    torch.manual_seed(0)
    limit = read_bandwidth()
    lines = [
        "# What a delta adds to a layer on a CPU",
        "",
        f"`{command()}`",
        "",
        f"{origin()} {options.threads} threads, kernels for {native.default_isa()}; a sum over memory "
        f"reads {limit:.1f} GB/s. Times are medians; ratios are medians of the ratios of each turn. "
        "`base` is the layer itself, `reference` the op in plain torch. Results were checked first.",
        "",
    ]
    print("\n".join(lines))
    for line in table(options, limit):
        lines.append(line)
        print(line, flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", help="OUTxIN; may be repeated")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=list(TERMS))
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["1/1", "8/1", "16/16"],
        help="rows of the batch / tenants that share them",
    )
    parser.add_argument(
        "--many",
        type=int,
        default=many.MANY,
        help="rows per tenant from which torch does the products",
    )
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="seconds for each row of the table"
    )
    parser.add_argument("-o", "--output", type=Path, help="writes the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
