"""Throughput, latency and memory of a server with many tenants, beside the alternatives.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/serving.py BASE --stage mix -o work/mix.json
    OMP_WAIT_POLICY=PASSIVE python benchmarks/serving.py BASE --stage apart -o work/apart.json
    python benchmarks/serving.py BASE --stage mix --no-adapters --rounds 6 -o work/turns.json
    python benchmarks/serving.py --page work/mix.json work/turns.json work/apart.json -o page.md BASE

`mix`: stock vLLM without the plugin, vLLM with the plugin and its tenants, and stock vLLM with ordinary
LoRA adapters. All run side by side and are measured in turn, several times, while the others idle, so
that another job on the machine slows all of them. `apart`: what is done today with full fine-tunes, which
is a process for each, or one process that is stopped and restarted with the next model.

Before anything is timed, the logprobs of some tenants are compared with transformers on base + terms in
float32; a wrong one ends the run. Tenants are random codes under the plans of
Delta-CoMe (8+3+2 bits) at 1/16, or under those of another artifact (`--like`), with every tensor changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from origin import command, origin
from server import (
    Load,
    Measured,
    Server,
    expected_logprobs,
    quantile,
    random_lora,
    run,
    run_many,
    tenants,
)

from deltacome.format.artifact import Artifact
from deltacome.runtime import merge

MIXES = (1, 4, 16, 64)
ADAPTERS = (1, 4, 16)
RANK = 64
SMALL = 16
"""Tenants with the plans of another artifact."""
APART = 4
"""Models of the second stage."""
CHECKED = 3
ROUNDING = 0.25
"""How far a tenant's logprobs may be from the expected ones, as a share of the base's distance from them:
bfloat16 rounds those of random weights a lot."""


def mix(options: argparse.Namespace, load: Load, engine: list[str]) -> dict:
    """Rows of the first stage."""
    base, work, adapters = options.base, options.work, () if options.no_adapters else ADAPTERS
    folder, like = work / "tenants", options.like
    made = tenants(base, folder, max(MIXES))
    small = {of.name: tenants(base, folder, SMALL, of.name, Artifact.open(of)) for of in like}
    count = max(adapters, default=0)
    loras = [random_lora(base, work / "loras" / f"lora-{i:02}", RANK, i) for i in range(count)]
    names = list(made)
    all_of_them = [*made.items(), *(item for some in small.values() for item in some.items())]
    named = [f"--tenant={name}={folder}" for name, folder in all_of_them]
    modules = [f"{folder.name}={folder}" for folder in loras]
    common = ["--served-model-name", "base", *engine]
    room = ["--enable-lora", "--max-loras", count, "--max-lora-rank", RANK]
    with contextlib.ExitStack() as stack:
        stock = stack.enter_context(
            Server(["--model", base, *common], work / "stock.log", stock=True)
        )
        ours = stack.enter_context(
            Server([base, *named, "--slots", max(MIXES), "--", *common], work / "ours.log")
        )
        lora = Server(
            ["--model", base, *common, *room, "--lora-modules", *modules],
            work / "lora.log",
            stock=True,
        )
        if adapters:
            stack.enter_context(lora)
        first = [next(iter(some.items())) for some in small.values()]
        for name, folder in [*made.items()][:CHECKED] + first:
            expected = expected_logprobs(base, folder)
            away = expected.distance(stock.logprobs("base", expected.ids))
            distance = ours.check(name, expected, ROUNDING * away)
            print(f"{name}: {distance:.3f} nats off, the base {away:.1f}", file=sys.stderr)
        rows: dict[str, Callable[[int], Measured]] = {
            "stock vLLM, base only": lambda seed: run(stock.url, ["base"], load, seed),
            "plugin, base only": lambda seed: run(ours.url, ["base"], load, seed),
        }
        for count in MIXES:
            rows[f"plugin, {count} tenants"] = lambda seed, count=count: run(
                ours.url, names[:count], load, seed
            )
        rows[f"plugin, {MIXES[1]} tenants while others load"] = lambda seed: while_loading(
            ours, list(made.values()), lambda: run(ours.url, names[: MIXES[1]], load, seed)
        )
        for of, some in small.items():
            row = f"plugin, {SMALL} tenants with the plans of {of}"
            rows[row] = lambda seed, some=some: run(ours.url, list(some), load, seed)
        for count in adapters:
            rows[f"stock vLLM, {count} LoRA of rank {RANK}"] = lambda seed, count=count: run(
                lora.url, [folder.name for folder in loras[:count]], load, seed
            )
        found = take_turns(rows, options.rounds)
        memory = {"stock vLLM, base only": stock.resident()}
        memory |= {row: ours.resident() for row in rows if row.startswith("plugin")}
        memory |= {row: lora.resident() for row in rows if "LoRA" in row}
    return table(found, memory)


def apart(options: argparse.Namespace, load: Load, engine: list[str]) -> dict:
    """Rows of the second stage."""
    base, work = options.base, options.work
    made = tenants(base, work / "tenants", APART)
    merged = {}
    for name, folder in made.items():
        merged[name] = work / f"{name}-merged"
        if not merged[name].is_dir():
            merge(base, Artifact.open(folder), merged[name])

    def alone(name: str) -> Server:
        log = work / f"{name}.log"
        return Server(
            ["--model", merged[name], "--served-model-name", "m", *engine], log, stock=True
        )

    found: dict[str, list[Measured]] = {}
    memory = {}
    each = dataclasses.replace(load, requests=load.requests // APART)
    row, start = f"one process, models swapped, {APART} models", time.perf_counter()
    swapped = Measured()
    for seed, name in enumerate(made):
        with alone(name) as server:
            swapped += run(server.url, ["m"], each, seed)
            memory[row] = server.resident()
    swapped.seconds = time.perf_counter() - start
    found[row] = [swapped]
    named = [f"--tenant={name}={folder}" for name, folder in made.items()]
    with contextlib.ExitStack() as stack:
        front = [base, *named, "--", "--served-model-name", "base", *engine]
        ours = stack.enter_context(Server(front, work / "ours.log"))
        servers = [stack.enter_context(alone(name)) for name in made]
        urls = [server.url for server in servers]
        rows = {
            f"plugin, {APART} tenants": lambda seed: run(ours.url, list(made), load, seed),
            f"a process each, {APART} models": lambda seed: run_many(urls, ["m"], load, seed),
        }
        found |= take_turns(rows, options.rounds)
        memory[f"plugin, {APART} tenants"] = ours.resident()
        memory[f"a process each, {APART} models"] = sum(s.resident() for s in servers)
    return table(found, memory)


def while_loading(
    server: Server, folders: Sequence[Path], measure: Callable[[], Measured]
) -> Measured:
    """A measurement made while tenants are loaded under another name, one after the other."""
    done = threading.Event()

    def load() -> None:
        for folder in itertools.cycle(folders):
            if done.is_set():
                return
            server.post("/v1/load_lora_adapter", lora_name="guest", lora_path=str(folder))
            server.post("/v1/unload_lora_adapter", lora_name="guest")

    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        try:
            measured = measure()
        finally:
            done.set()
        loading.result()
    return measured


def take_turns(
    rows: dict[str, Callable[[int], Measured]], rounds: int
) -> dict[str, list[Measured]]:
    """Measures each row once a round; a round before the first is not counted."""
    found: dict[str, list[Measured]] = {row: [] for row in rows}
    for turn in range(rounds + 1):
        for row, measure in rows.items():
            measured = measure(turn)
            print(f"{turn} {row}: {measured.throughput:.1f} tokens/s", file=sys.stderr)
            if turn:
                found[row].append(measured)
    return found


def table(found: dict[str, list[Measured]], memory: dict[str, int]) -> dict:
    """The figures that are kept of each row."""
    first, *_ = found
    said = {}
    for row, turns in found.items():
        ratios = [
            one.throughput / base.throughput for one, base in zip(turns, found[first], strict=False)
        ]
        total = sum(turns, Measured())
        said[row] = {
            "tokens_per_second": total.throughput,
            "of_first": statistics.median(ratios),
            "first_token": [quantile(total.first, 0.5), quantile(total.first, 0.99)],
            "between_tokens": [quantile(total.between, 0.5), quantile(total.between, 0.99)],
            "resident": memory[row],
        }
    return said


def page(results: list[dict]) -> Iterator[str]:
    """The page in Markdown."""
    yield "# Serving\n"
    yield str(__doc__).strip().partition("\n\n")[2].partition("\n\n")[2] + "\n"
    commands = " ".join(result["command"] for result in results)
    if missing := [stage for stage in ("mix", "apart") if f"--stage {stage}" not in commands]:
        yield f"Not measured yet: `{', '.join(missing)}`.\n"
    for result in results:
        yield f"{result['origin']} {result['load']}\n"
        columns = (
            "",
            "tokens/s",
            "of the first row",
            "first token, ms",
            "between tokens, ms",
            "MiB",
        )
        yield f"| {' | '.join(columns)} |\n|---|---|---|---|---|---|"
        for row, said in result["rows"].items():
            times = [
                " / ".join(f"{1e3 * seconds:.0f}" for seconds in said[key])
                for key in ("first_token", "between_tokens")
            ]
            speed = f"{said['tokens_per_second']:.1f} | {said['of_first']:.2f}"
            yield f"| {row} | {speed} | {' | '.join(times)} | {said['resident'] / 2**20:,.0f} |"
        yield (
            "\nTimes: median / 99th percentile. Of the first row: median over turns of the ratio within "
            "a turn, not the quotient of the two rates. Memory: of all processes of a row's servers."
        )
        yield f"\n```bash\n{result['command']}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--stage", choices=("mix", "apart"))
    parser.add_argument("--page", type=Path, nargs="+", help="results to write a page of")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work/serving"))
    parser.add_argument(
        "--like", type=Path, nargs="+", default=[], help="artifacts whose plans some tenants have"
    )
    parser.add_argument(
        "--no-adapters",
        action="store_true",
        help="leave out the LoRA rows, which take minutes a turn",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="tokens per prompt, and per answer")
    parser.add_argument("--engine", nargs=argparse.REMAINDER, default=[], help="arguments of vLLM")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.page:
        results = [json.loads(file.read_text()) for file in options.page]
        options.output.write_text("\n".join(page(results)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    load = Load(options.clients, options.requests, options.tokens, options.tokens)
    engine = options.engine or ["--max-model-len", "1024", "--max-num-seqs", str(options.clients)]
    where = origin()
    rows = {"mix": mix, "apart": apart}[options.stage](options, load, engine)
    said = (
        f"{load.clients} clients, {load.requests} requests a turn of {load.prompt} tokens, answers of "
        f"{load.answer}, {options.rounds} turns; vLLM: `{' '.join(engine)}`."
    )
    result = {"origin": where, "load": said, "command": command(options.base), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
