"""A running server, tiny tenants for it, and what transformers gives for the merged weights."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import openai
import torch
from artifact_helpers import PLAN, random_artifact
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltacome.format.canary import CANARY_FILE, Canary, canary_ids
from deltacome.format.spec import Band
from deltacome.runtime import merge

PLANS = (PLAN, (Band(4, 3), Band(2, 9)), (Band(8, 1),), (Band(3, 20),))
SLOTS, HELD = 2, 3
"""The shared server's tenants in a batch, and on the host; it serves more than that."""
KEY = "none"
"""The key of all servers; everything but probes and metrics asks for it."""
START_SECONDS = 240
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else an engine with one worker uses a separate process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads would fight over two cores
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
}
QUICK = [
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "512", "--no-enable-log-requests"),
]


@dataclass
class Stage:
    """A base, artifacts of it, and the models that they stand for."""

    folder: Path
    base: Path
    models: dict = field(default_factory=dict)
    """Name → dense model, float32; the base's is `base`."""

    def tenant(self, name, *, canary=True, **options):
        """Makes an artifact `name` of random terms, and the merged model; returns its folder."""
        path = self.folder / "tenants" / name
        number = sum(file.is_dir() for file in path.parent.glob("*"))
        options = {"seed": number, "plan": PLANS[number % len(PLANS)], **options}
        files = options.pop("files", {})
        artifact = random_artifact(self.base, path, files=files, **options)
        model = load(merge(self.base, artifact, self.folder / f"{name}-merged"))
        if canary:
            ids = canary_ids(model.config.vocab_size)
            content = Canary(tuple(ids), tuple(prompt_logprobs(model, ids))).to_json()
            remove(path)
            random_artifact(self.base, path, files={**files, CANARY_FILE: content}, **options)
        self.models[name] = model
        return path

    def lora(self, name, rank=4):
        """Makes an ordinary adapter for some linears, and the merged model."""
        generator = torch.Generator().manual_seed(7)
        weights = load_file(self.base / "model.safetensors")
        tensors = {}
        for key, weight in weights.items():
            if "q_proj" in key or "down_proj" in key:
                a = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
                b = torch.randn(weight.shape[0], rank, generator=generator) / rank
                weights[key] = weight + 2 * b @ a
                place = f"base_model.model.{key.removesuffix('.weight')}"
                tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        path = self.folder / name
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj", "down_proj"],
            "bias": "none",
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        model = load(self.base)
        model.load_state_dict(weights, strict=False)
        self.models[name] = model
        return path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def remove(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@torch.no_grad()
def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@torch.no_grad()
def logprobs(model, ids):
    """Log-probabilities of what follows each token, (tokens, vocabulary)."""
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def prompt_logprobs(model, ids):
    """The log-probability of each token but the first."""
    all_of_them = logprobs(model, ids)
    return [float(all_of_them[i, id]) for i, id in enumerate(ids[1:])]


def some_ids(length, seed, vocab):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()


def vllm_parser():
    """vLLM's own parser of a server's arguments."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


class Server:
    """`deltacome serve` in processes of its own."""

    def __init__(self, log, arguments, more=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.command = [sys.executable, "-c", "from deltacome.cli import main; main()", "serve"]
        self.command += [*map(str, arguments), "--port", str(self.port), "--", *QUICK, *more]
        self.command += ["--api-key", KEY]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200:
                    return self
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-8000:]}")

    def kill(self):
        """Kills all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path, **body):
        """(status, body) of a request that the client has no method for."""
        return self.ask("POST", path, body)

    def ask(self, method, path, body=None, key=KEY):
        """(status, body) of a request, with a key or without."""
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name, path, **more):
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)

    def unload(self, name):
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def say(self, name, ids, count=8, **more):
        """The tokens of a greedy answer."""
        answer = self.client.completions.create(**wish(name, ids, count, **more))
        return answer.choices[0].token_ids

    def figures(self):
        """Our metrics: name → value, those by tenant as `name{tenant}`."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        found = {}
        for line in text.splitlines():
            if line.startswith("deltacome_"):
                key, _, value = line.rpartition(" ")
                found[key.replace('{tenant="', "{").replace('"}', "}")] = float(value)
        return found


def wish(name, ids, count=8, **more):
    extra = {"return_token_ids": True, **more.pop("extra_body", {})}
    asked = {"model": name, "prompt": list(ids), "max_tokens": count, "temperature": 0}
    return {**asked, "extra_body": extra, **more}
