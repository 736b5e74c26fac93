"""Servers for benchmarks: tenants of random codes, processes, and clients that keep them busy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import torch
from cpu_bands import factor, paper_plan

from deltacome.arch.checkpoint import Checkpoint, full_digest, sample_digest
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.canary import Canary, canary_ids
from deltacome.format.codec import BandTensors, dense, write_bands
from deltacome.format.manifest import Manifest, Record
from deltacome.format.tensors import dtype_name
from deltacome.format.writer import ArtifactWriter, Unit

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
}
START_SECONDS = 300


# --- tenants -------------------------------------------------------------------------------------


def random_tenant(
    base: Path, folder: Path, seed: int, like: Artifact | None = None, size: float = 0.1
) -> Path:
    """An artifact of random codes that changes every tensor of a base.

    Args:
        like: an artifact whose plans to use; by default those of Delta-CoMe at 1/16.
        size: norm of a delta, relative to the matrix it changes.
    """
    torch.manual_seed(seed)
    checkpoint = Checkpoint(base)
    writer = ArtifactWriter(folder, {}, resume=False)
    records, entries = [], {}
    for name in checkpoint.tensors:
        value = checkpoint.read(name)
        plan, exact_rows = (), None
        if value.dim() == 2:
            plan = (
                like.manifest.records[name].plan
                if like
                else paper_plan(len(value), value.shape[1], 16)
            )
            bands = [
                BandTensors(
                    factor(b, value.shape[1]), factor(b, value.shape[0]), torch.rand(b.count)
                )
                for b in plan
            ]
            # Random factors are nearly orthogonal, so squares add up.
            square = sum(
                float(
                    (b.v.dequantize().square().sum(1) * b.u.dequantize().square().sum(1)) @ b.s**2
                )
                for b in bands
            )
            scale = size * float(value.float().norm()) / square**0.5
            bands = [BandTensors(b.v, b.u, scale * b.s) for b in bands]
            entries[f"{name}.bands"] = write_bands(bands)
        else:
            exact_rows = (0, len(value))
            changed = value.float() * (1 + 0.05 * torch.randn(value.shape))
            entries[f"{name}.exact"] = changed.to(value.dtype)
        records.append(
            Record(
                name,
                tuple(value.shape),
                dtype_name(value.dtype),
                base_name=name,
                base_shape=tuple(value.shape),
                base_sample=sample_digest(value),
                base_digest=full_digest(value),
                plan=plan,
                exact_rows=exact_rows,
            )
        )
    writer.save("all", Unit(tuple(records), entries))
    manifest = Manifest(str(base), None, {"name": "random"}, {}, {})
    config = json.dumps(checkpoint.config).encode()
    return writer.finish(["all"], manifest, {TUNED_CONFIG_FILE: config})


def tenants(
    base: Path, folder: Path, count: int, prefix: str = "tenant", like: Artifact | None = None
) -> dict[str, Path]:
    """Name → artifact; those of an earlier run are reused.

    A few random directions disturb a model more than many of the same total size do, and bfloat16 then
    rounds away what a check of logprobs looks at. So deltas made like another artifact are smaller.
    """
    made = {}
    for i in range(count):
        name = f"{prefix}-{i:02}"
        made[name] = folder / name
        if not made[name].is_dir():
            random_tenant(base, made[name], i, like, size=0.05 if like else 0.1)
    return made


def random_lora(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """An ordinary adapter for every linear layer."""
    from safetensors.torch import save_file

    if folder.is_dir():
        return folder
    torch.manual_seed(seed)
    tensors, targets = {}, set()
    for name, info in Checkpoint(base).tensors.items():
        if len(info.shape) == 2 and "embed" not in name and "lm_head" not in name:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            targets.add(place.rpartition(".")[2])
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, info.shape[1]).bfloat16() / rank
            tensors[f"{place}.lora_B.weight"] = torch.randn(info.shape[0], rank).bfloat16() / rank
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 1,
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def expected_logprobs(base: Path, artifact: Path) -> Canary:
    """The logprobs of transformers on base + terms, all in float32.

    A merged checkpoint would not do: it is rounded to the tuned model's dtype, which shows with random
    weights.
    """
    from transformers import AutoModelForCausalLM

    delta = Artifact.open(artifact)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, record in delta.manifest.records.items():
        weight = model.get_parameter(name)
        if record.plan:
            weight.add_(dense(delta.bands(name)))
        else:
            weight.copy_(delta.exact(name))
    ids = canary_ids(model.config.vocab_size)
    said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return Canary(tuple(ids), tuple(float(said[i, id]) for i, id in enumerate(ids[1:])))


# --- processes -----------------------------------------------------------------------------------


class Server:
    """A server running in its own processes."""

    def __init__(self, arguments: Sequence[object], log: Path, *, stock: bool = False) -> None:
        """Prepares a server; `with` starts and stops it.

        Args:
            arguments: those of `deltacome serve`, or of vLLM's own server if `stock`.
            log: file for its output.
            stock: run vLLM without the plugin.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        module = ["-m", "vllm.entrypoints.openai.api_server", "--port", str(self.port)]
        front = ["-c", "from deltacome.cli import main; main()", "serve", "--port", str(self.port)]
        self.command = [sys.executable, *(module if stock else front), *map(str, arguments)]
        self.environment = os.environ | ENVIRONMENT | ({"VLLM_PLUGINS": ""} if stock else {})
        self.seconds = 0.0

    def __enter__(self) -> Server:
        start = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        while time.perf_counter() - start < START_SECONDS and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                self.seconds = time.perf_counter() - start
                return self
            time.sleep(0.1)
        self.__exit__()
        raise SystemExit(f"the server did not start: {self.log}\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def memory(self, kind: str = "Pss") -> dict[str, int]:
        """Process → bytes of memory; pages that processes share are divided among them (Pss).

        `Pss_Anon` is what they allocated: libraries count for less while other processes use them too.
        """
        root = psutil.Process(self.process.pid)
        found = {}
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                (size,) = [line.split()[1] for line in lines if line.startswith(f"{kind}:")]
                found[f"{process.name()} {process.pid}"] = 1024 * int(size)
        return found

    def resident(self, kind: str = "Pss") -> int:
        """Bytes of memory of all its processes."""
        return sum(self.memory(kind).values())

    def post(self, path: str, **body: object) -> dict:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else {"said": text}

    def logprobs(self, name: str, ids: Sequence[int]) -> list[float]:
        """The model's logprob of each token but the first."""
        body = {"model": name, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
        said = self.post("/v1/completions", **body)["choices"][0]["prompt_logprobs"]
        return [one[str(id)]["logprob"] for id, one in zip(ids, said, strict=True) if one]

    def check(self, name: str, expected: Canary, tolerance: float) -> float:
        """Ends the run unless a tenant's logprobs are as expected; returns their distance in nats."""
        distance = expected.distance(self.logprobs(name, expected.ids))
        if not distance <= tolerance:
            raise SystemExit(
                f"{name}: its logprobs are {distance:.3g} nats from the expected ones, {tolerance:.3g} "
                "at most are rounding"
            )
        return distance


# --- clients -------------------------------------------------------------------------------------


@dataclass
class Load:
    """Requests from a fixed number of clients, each sending its next when its last is answered."""

    clients: int = 16
    requests: int = 64
    prompt: int = 64
    answer: int = 64
    vocabulary: int = 40_000


@dataclass
class Measured:
    """The figures of one load."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    """Seconds to the first token of each request."""
    between: list[float] = field(default_factory=list)
    """Seconds between two tokens."""

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.first + other.first,
            self.between + other.between,
        )


def quantile(values: Sequence[float], q: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * q) - 1]


def run(url: str, names: Sequence[str], load: Load, seed: int = 0) -> Measured:
    """Sends a load to one server, asking for the given models in turn."""
    return asyncio.run(_run(lambda i: url, names, load, seed))


def run_many(urls: Sequence[str], names: Sequence[str], load: Load, seed: int = 0) -> Measured:
    """As `run`, over several servers with one model each."""
    return asyncio.run(_run(lambda i: urls[i % len(urls)], names, load, seed))


async def _run(url: Callable[[int], str], names: Sequence[str], load: Load, seed: int) -> Measured:
    draw, measured = random.Random(seed), Measured()
    prompts = [
        [draw.randrange(3, load.vocabulary) for _ in range(load.prompt)]
        for _ in range(load.requests)
    ]
    todo: Iterator[int] = iter(range(load.requests))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def client() -> None:
            for i in todo:
                body = {
                    "model": names[i % len(names)],
                    "prompt": prompts[i],
                    "max_tokens": load.answer,
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                }
                last, first = time.perf_counter(), True
                async with session.post(f"{url(i)}/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        raise SystemExit(f"{answer.status}: {await answer.text()}")
                    async for line in answer.content:
                        if not line.startswith(b"data: {"):
                            continue
                        now = time.perf_counter()
                        (measured.first if first else measured.between).append(now - last)
                        last, first = now, False
                        measured.tokens += 1

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.clients)))
        measured.seconds = time.perf_counter() - start
    return measured
