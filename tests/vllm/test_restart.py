"""A server on two workers is killed, and started again as two engines that share the requests.

Its tenants are found by name in a remote place.
"""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from test_engine import KINDS
from tiny_pairs import VOCAB, make_base
from vllm_helpers import Server, Stage, greedy, load, some_ids, wish

ENDLESS = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    stage = Stage(folder, folder / "base")
    make_base("wide", stage.base, torch.float32, KINDS)
    stage.models["base"] = load(stage.base)
    for name in ("one", "two", "three"):
        stage.tenant(name, group_size=128)
    return stage


@pytest.fixture
def server(wide, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # where remote artifacts are kept
    running = Server(
        tmp_path / "log",
        [
            *(wide.base, "--tenants", f"file://{wide.folder / 'tenants'}"),
            *("--slots", 2, "--slot-bytes", 400_000),
        ],
        [
            *("--served-model-name", "base", "--max-model-len", "4096"),
            *("--tensor-parallel-size", "2"),
        ],
    )
    yield running.start()
    running.kill()


def answered_by_engine(server):
    """Requests that each engine has finished, by vLLM's own count."""
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    found = {}
    for engine, count in re.findall(r'success_total\{engine="(\d)".* ([\d.]+)\n', text):
        found[engine] = found.get(engine, 0) + float(count)
    return found


def test_found_on_two_workers_and_after_a_restart_on_two_engines(wide, server):
    ids = some_ids(7, 1, VOCAB)
    for name in ("base", "one", "two"):
        assert server.say(name, ids, **ENDLESS) == greedy(wide.models[name], ids, 8), name
    stream = server.client.completions.create(**wish("two", ids, 4000, stream=True, **ENDLESS))
    next(iter(stream))
    server.kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)  # it was killed in the middle of an answer
    server.command[server.command.index("--tensor-parallel-size")] = "--data-parallel-size"
    server.command += ["--distributed-executor-backend", "uni"]
    server.start()
    names = ("two", "three", "one", "base") * 4
    with ThreadPoolExecutor(4) as threads:  # at once, so that both engines get some
        said = list(threads.map(lambda name: server.say(name, ids, **ENDLESS), names))
    for name, tokens in zip(names, said, strict=True):
        assert tokens == greedy(wide.models[name], ids, 8), name
    counts = answered_by_engine(server)
    assert len(counts) == 2
    assert min(counts.values()) > 3  # more than each tenant's canary
