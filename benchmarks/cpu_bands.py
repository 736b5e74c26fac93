"""What a delta costs at decode on a CPU: packed bands against their reference and the base's layer.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_bands.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_bands.py --shape 576x1536 --tokens 1 --seconds 2

Before anything is timed, `cpu` is held against the dense delta in float64; a wrong result ends the
run. Base, `cpu` and `reference` then take turns, so that another job on the machine slows all of them,
and the ratios are medians of the ratios of each turn. Weights and blobs come out of a pool larger
than the last-level cache, as the layers of a model do.

GB/s counts the packed bytes of the delta once; the limit is a copy measured in the same run, which
reads and writes. Decoding is bound by instructions well below it, and more so for more tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltacome.errors import DeltaError
from deltacome.format.codec import BandTensors, Factor, dense, read_bands, write_bands
from deltacome.format.spec import GROUP, Band, Plan, format_plan
from deltacome.ops import native
from deltacome.ops.bands import bands
from deltacome.ops.rows import group_rows
from deltacome.ops.slots import BandTable, PlacedBands, Pool

SHAPES = ("4096x4096", "11008x4096", "576x1536")
POOL = 128 << 20
"""Bytes that a pass over all copies of an operand touches at least."""


def paper_plan(out: int, inputs: int) -> Plan:
    """8 bit × 2, 3 bit × in / 128, the rest 2 bit, codes at a sixteenth of 16 bits."""
    three = inputs // 128
    two = (out * inputs // (out + inputs) - 8 * 2 - 3 * three) // 2
    return (Band(8, 2), Band(3, three), Band(2, two))


def random_blob(out: int, inputs: int, plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def factor(band: Band, size: int) -> Factor:
        groups = -(-size // GROUP)
        high = 1 << band.bits
        codes = torch.randint(0, high, (band.count, size), generator=generator)
        zero = torch.randint(0, high, (band.count, groups), generator=generator)
        scale = (torch.rand(band.count, groups, generator=generator) + 0.5) / high
        return Factor.from_codes(
            codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), band.bits
        )

    return write_bands(
        [
            BandTensors(factor(band, inputs), factor(band, out), torch.rand(band.count) / inputs)
            for band in plan
        ]
    )


def pool(a: Tensor) -> list[Tensor]:
    return [a.clone() for _ in range(max(2, POOL // (a.numel() * a.element_size())))]


def tables_of(
    out: int, inputs: int, blob: Tensor, plan: Plan, tenants: int, copies: int
) -> list[BandTable]:
    """Tables whose tenants' bytes lie apart, though they are the same."""
    tables = []
    for _ in range(copies):
        where = Pool(tenants, blob.numel())
        table = BandTable(where, inputs, [out], max_bands=len(plan))
        for slot in range(tenants):
            where.load(slot, 0, blob)
            table.load(slot, [PlacedBands(0, plan)])
        tables.append(table)
    return tables


def check(out: int, inputs: int, blob: Tensor, plan: Plan, delta_OI: Tensor) -> None:
    """Ends the run unless `cpu` gives the dense delta."""
    (table,) = tables_of(out, inputs, blob, plan, 2, 1)
    for tokens in (1, 8):
        rows = group_rows(torch.arange(tokens) % 2, 2)
        x_TI, y_TO = torch.randn(tokens, inputs), torch.zeros(tokens, out)
        bands(y_TO, x_TI, rows, table, impl="cpu")
        expected = x_TI.double() @ delta_OI.T
        error = float((y_TO - expected).norm() / expected.norm())
        if not error < 1e-5:
            raise DeltaError(f"{out}x{inputs}, {tokens} tokens: relative error {error:.1e}")


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """GB/s that a copy out of the caches reads and writes, the median of some."""
    source = torch.ones(POOL, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times = [seconds_of(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * POOL / statistics.median(times) / 1e9


def measure(
    out: int, inputs: int, tokens: int, tenants: int, dtype: torch.dtype, tables: list[BandTable]
) -> Callable[[float], dict[str, list[float]]]:
    """A function that takes turns for some seconds and gives the seconds of each turn."""
    weights = pool(torch.randn(out, inputs, dtype=dtype))
    x_TI, y_TO = torch.randn(tokens, inputs, dtype=dtype), torch.zeros(tokens, out, dtype=dtype)
    rows = group_rows(torch.arange(tokens) % tenants, tenants)
    turn = 0

    def linear() -> None:
        nn.functional.linear(x_TI, weights[turn % len(weights)])

    def packed(impl: str) -> Callable[[], None]:
        return lambda: bands(y_TO, x_TI, rows, tables[turn % len(tables)], impl=impl)

    calls = {"base": linear, "cpu": packed("cpu"), "reference": packed("reference")}

    def run(seconds: float) -> dict[str, list[float]]:
        nonlocal turn
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["base"]) < 5:
            turn += 1
            for name, call in calls.items():
                # The reference takes as long as all the rest; some turns of it are enough.
                if name != "reference" or turn % 8 == 1 or len(times["reference"]) < 5:
                    times[name].append(seconds_of(call))
                else:
                    times[name].append(float("nan"))
        return times

    return run


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs if a == a and b == b)


def milliseconds(times: list[float]) -> float:
    return 1e3 * statistics.median(t for t in times if t == t)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", help="OUTxIN; may be repeated")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["1/1", "8/1", "64/1", "16/4", "16/16"],
        help="rows of the batch / tenants that they belong to",
    )
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row of the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limit = copy_bandwidth()
    print(f"torch {torch.__version__}, {args.threads} threads, {native.default_isa()}")
    print(f"copy: {limit:.1f} GB/s read and written\n")
    print("| out × in | dtype | rows / tenants | base ms | cpu ms | reference ms | reference ÷ cpu | "
          "cpu ÷ base | GB/s | of the copy |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in args.shape or SHAPES:
        out, inputs = map(int, shape.split("x"))
        plan = paper_plan(out, inputs)
        blob = random_blob(out, inputs, plan)
        check(out, inputs, blob, plan, dense(read_bands(blob, (out, inputs), plan)).double())
        for name in args.dtype:
            for batch in args.rows:
                tokens, tenants = map(int, batch.split("/"))
                copies = max(2, POOL // (tenants * blob.numel()))
                tables = tables_of(out, inputs, blob, plan, tenants, copies)
                dtype = getattr(torch, name)
                times = measure(out, inputs, tokens, tenants, dtype, tables)(args.seconds)
                ms = {key: milliseconds(value) for key, value in times.items()}
                rate = tenants * blob.numel() / ms["cpu"] / 1e6
                print(
                    f"| {out} × {inputs} | {name} | {batch} | {ms['base']:.3f} | {ms['cpu']:.3f} | "
                    f"{ms['reference']:.1f} | {ratio(times, 'reference', 'cpu'):.1f} | "
                    f"{100 * ratio(times, 'cpu', 'base'):.0f} % | {rate:.1f} | "
                    f"{100 * rate / limit:.0f} % |",
                    flush=True,
                )
        print(f"  plan {format_plan(plan)}, {blob.numel():,} bytes", flush=True)


if __name__ == "__main__":
    main()
