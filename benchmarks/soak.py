"""Thousands of requests over tenants that come and go: every token right, memory flat, no error.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/soak.py BASE -o docs/results/soak.md

Forty tenants of random codes with Zipf popularity, twelve slots, twenty held on the host. Clients ask for
short greedy answers, some of them from the base and some streamed. Meanwhile others load tenants under
new names, replace the weights of running ones, unload them, and ask for names that do not exist. Each
answer is compared with the engine's own first answer to that prompt and those weights. Beforehand, some
tenants (`--checked`) are compared with transformers on base + terms in float32, where the base is small.
A request whose name gets other weights while it is running must have the whole answer of either the old
weights or the new. The server runs in float32: in bfloat16 a tie between two tokens may fall either way
from one batch to the next.

Memory is what all of the server's processes have allocated, as the mean while the second fifth of the
requests was answered and while the last was. vLLM keeps a oneDNN primitive of some 20 kB for each number
of tokens that a layer has seen, 128 at most, so it grows until none is new. As a control, stock vLLM
without adapters then answers the same prompts from as many clients. The soak may grow by two percent
more.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from origin import command, origin
from server import Server, expected_logprobs, tenants

TENANTS, SLOTS, HELD = 40, 12, 20
PROMPTS = 6
"""Different prompts, so that answers repeat and can be compared."""
MOVERS = 4
"""Names whose weights change while clients ask for them."""
GROWTH = 0.02
"""Growth of memory beyond that of stock vLLM that still counts as flat."""


@dataclass
class Soak:
    """What the clients share."""

    url: str
    made: dict[str, Path]
    prompts: list[list[int]]
    tokens: int
    answers: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """(weights, prompt) → the first answer."""
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    movers: dict[str, list[str]] = field(default_factory=dict)
    """Name of a mover → the tenants whose weights it has had; the last is its current or its next."""
    ready: set[str] = field(default_factory=set)
    """Movers that are loaded."""
    doubtful: list[tuple[str, list[str], int, list[int]]] = field(default_factory=list)
    """(name, weights, prompt, answer) of requests during which the name had these weights in turn."""
    turns: collections.Counter[str] = field(default_factory=collections.Counter)
    """How often each name was unloaded; a request running at that time may rightly be refused."""

    async def ask(self, http: aiohttp.ClientSession, name: str, prompt: int) -> None:
        """Sends one request, streamed or not, whose tokens must be those of the first answer."""
        before = len(self.movers.get(name, ())) - 1
        stream = prompt % 2 == 1
        body = {"model": name, "prompt": self.prompts[prompt], "max_tokens": self.tokens}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": stream}
        said: list[int] = []
        turn = self.turns[name]
        async with http.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status == 404 and self.turns[name] > turn:
                self.counts["requests refused that came after their tenant was unloaded"] += 1
                return
            if answer.status != 200:
                self.wrong.append(f"{name}: {answer.status} {(await answer.text())[:200]}")
                return
            if stream:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[6:])
                        if chunk.get("error", {}).get("code") == 404 and self.turns[name] > turn:
                            self.counts["streams refused that came after it was unloaded"] += 1
                            return
                        if "choices" not in chunk:
                            self.wrong.append(f"{name}: {chunk}")
                            return
                        said += chunk["choices"][0]["token_ids"] or []
            else:
                said = (await answer.json())["choices"][0]["token_ids"]
        self.counts["requests"] += 1
        self.counts["tokens"] += len(said)
        weights = self.movers[name][before:] if name in self.movers else [name]
        if len(weights) > 1:
            self.counts["answers while their name got other weights"] += 1
            self.doubtful.append((name, weights, prompt, said))
            return
        first = self.answers.setdefault((weights[0], prompt), tuple(said))
        if tuple(said) != first or len(said) != self.tokens:
            self.wrong.append(
                f"{name} ({weights[0]}), prompt {prompt}: {said} is not {list(first)}"
            )

    async def settle(self, http: aiohttp.ClientSession) -> None:
        """Checks each doubtful answer against those of all the weights that may have given it."""
        doubtful, self.doubtful = self.doubtful, []
        for name, weights, prompt, said in doubtful:
            for one in weights:
                if (one, prompt) not in self.answers:
                    await self.ask(http, one, prompt)
            if tuple(said) not in {self.answers.get((one, prompt)) for one in weights}:
                self.wrong.append(
                    f"{name}, prompt {prompt}: {said} is the answer of none of {weights}"
                )

    async def post(self, http: aiohttp.ClientSession, path: str, **body: Any) -> int:
        async with http.post(f"{self.url}/v1/{path}", json=body) as answer:
            await answer.read()
            return answer.status


async def client(soak: Soak, http: aiohttp.ClientSession, draw: random.Random, todo: Any) -> None:
    """Asks for tenants by popularity, and now and then for the base, a mover or an unknown name.

    Where there are no tenants, it asks for the base alone.
    """
    names = list(soak.made)
    weights = [1 / (rank + 1) for rank in range(len(names))]
    for _ in todo:
        prompt = draw.randrange(PROMPTS)
        chance = draw.random()
        if chance < 0.1 or not names:
            await soak.ask(http, "base", prompt)
        elif chance < 0.25 and (ready := sorted(soak.ready)):
            await soak.ask(http, draw.choice(ready), prompt)
        elif chance < 0.27:
            body = {"model": "nobody", "prompt": [5], "max_tokens": 1}
            status = await soak.post(http, "completions", **body)
            soak.counts["unknown names refused"] += status == 404
            if status != 404:
                soak.wrong.append(f"nobody: {status}")
        else:
            (name,) = draw.choices(names, weights)
            await soak.ask(http, name, prompt)


async def mover(soak: Soak, http: aiohttp.ClientSession, draw: random.Random, name: str) -> None:
    """Loads a name, reloads it with other weights and unloads it, over and over."""
    while True:
        for turn in range(3):
            weights = draw.choice(list(soak.made))
            soak.ready.discard(name)
            soak.movers[name].append(weights)
            path = str(soak.made[weights])
            body = {"lora_name": name, "lora_path": path, "load_inplace": turn > 0}
            status = await soak.post(http, "load_lora_adapter", **body)
            soak.counts["loads" if turn == 0 else "reloads"] += 1
            if status != 200:
                soak.wrong.append(f"{name}: load: {status}")
            soak.ready.add(name)
            await asyncio.sleep(draw.uniform(1, 4))
        soak.ready.discard(name)
        soak.turns[name] += 1
        status = await soak.post(http, "unload_lora_adapter", lora_name=name)
        soak.counts["unloads"] += 1
        if status != 200:
            soak.wrong.append(f"{name}: unload: {status}")


async def watch(soak: Soak, server: Server) -> None:
    """Records memory while requests are answered."""
    while True:
        found = await asyncio.to_thread(server.memory, "Pss_Anon")
        soak.memory.append((soak.counts["requests"], sum(found.values())))
        sizes = ", ".join(f"{name} {nbytes / 2**20:.0f} MiB" for name, nbytes in found.items())
        print(dict(soak.counts), sizes, file=sys.stderr)
        await asyncio.sleep(10)


async def run(soak: Soak, server: Server, requests: int, clients: int, seconds: float) -> None:
    """Runs clients and movers until enough requests are answered or time is up."""
    draw = random.Random(0)
    end, todo = time.monotonic() + seconds, iter(range(requests))
    bounded = iter(lambda: next(todo, None) if time.monotonic() < end else None, None)
    timeout = aiohttp.ClientTimeout(total=None)
    # A connection per request: the server closes idle ones, perhaps just as one is to be reused.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        others = [asyncio.create_task(watch(soak, server))]
        for i in range(MOVERS if soak.made else 0):
            soak.movers[f"mover-{i}"] = []
            one = mover(soak, http, random.Random(100 + i), f"mover-{i}")
            others.append(asyncio.create_task(one))
        mine = [client(soak, http, random.Random(draw.random()), bounded) for _ in range(clients)]
        await asyncio.gather(*mine)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await soak.settle(http)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work/soak"))
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8, help="tokens per answer")
    parser.add_argument("--checked", type=int, default=3, help="tenants compared with transformers")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit for new requests")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    where, made = origin(), tenants(options.base, options.work / "tenants", TENANTS)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 250) for _ in range(8 + 4 * i)] for i in range(PROMPTS)]
    front = [options.base, "--tenants", options.work / "tenants", "--slots", SLOTS, "--"]
    front += ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
    front += ["--max-model-len", 256, "--max-num-seqs", options.clients, "--max-cpu-loras", HELD]
    bounds = options.requests, options.clients, options.seconds
    with Server(front, options.work / "server.log") as server:
        for name in [*made][: options.checked]:
            server.check(name, expected_logprobs(options.base, made[name]), 1e-3)
        soak = Soak(server.url, made, prompts, options.tokens)
        start = time.monotonic()
        asyncio.run(run(soak, server, *bounds))
        seconds = time.monotonic() - start
    plain = [*front[: front.index("--max-cpu-loras")]]
    plain = ["--model", options.base, *plain[plain.index("--") + 1 :]]
    with Server(plain, options.work / "stock.log", stock=True) as server:
        control = Soak(server.url, {}, prompts, options.tokens)
        asyncio.run(run(control, server, *bounds))
    answered, tokens = soak.counts.pop("requests"), soak.counts.pop("tokens")
    mib = [_fifths_mib(one.memory, options.requests) for one in (soak, control)]
    grown, of_stock = (last / second - 1 for second, last in mib)
    if not grown <= of_stock + GROWTH:
        soak.wrong.append(f"memory grew by {grown:.1%}, stock vLLM's by {of_stock:.1%}")
    soak.wrong += control.wrong
    lines = [
        "# Soak\n",
        str(__doc__).strip().partition("\n\n")[2].partition("\n\n")[2] + "\n",
        f"{where}\n",
        f"- {answered} requests answered, {tokens} tokens, in {seconds:.0f} s",
        *(f"- {count} {what}" for what, count in soak.counts.items()),
        f"- {len(soak.wrong)} wrong answers or unexpected errors",
        f"- memory, MiB: {mib[0][0]:.0f} in the second fifth, {mib[0][1]:.0f} in the last ({grown:+.1%})",
        f"- stock vLLM's: {mib[1][0]:.0f} and {mib[1][1]:.0f} ({of_stock:+.1%})",
        f"\n```bash\n{command(options.base)}\n```",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    if soak.wrong:
        raise SystemExit("\n".join(soak.wrong[:20]))


def _fifths_mib(memory: list[tuple[int, int]], requests: int) -> tuple[float, float]:
    """Mean MiB while the second fifth of the requests was answered, and while the last was."""

    def mean(fifth: int) -> float:
        seen = [size for count, size in memory if fifth <= 5 * count / requests < fifth + 1]
        return statistics.mean(seen) / 2**20 if seen else float("nan")

    return mean(1), mean(4)


if __name__ == "__main__":
    main()
