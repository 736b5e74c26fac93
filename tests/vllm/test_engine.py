"""Every kind of engine that two cores can run: families, shards, stages, compiled, and stock vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pairs import FAMILIES, SIZES, VOCAB, make_base
from transformers import LlamaConfig, MixtralConfig
from vllm_helpers import ENVIRONMENT, PLANS, Stage, greedy, load, prompt_logprobs, some_ids

WIDE = {
    **SIZES,
    "vocab_size": 320,  # 160 on each of two workers: blocks of 64 and half of another
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
KINDS = {
    "llama-tied": FAMILIES["llama-tied"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": FAMILIES["qwen3"],
    "gemma3": FAMILIES["gemma3"],
    "phi3": FAMILIES["phi3"],
    "wide": lambda: LlamaConfig(
        **WIDE | {"max_position_embeddings": 4096}, tie_word_embeddings=False
    ),
}
"""Ties, biases, norms over heads, norms that add 1 and windows, matrices fused in the checkpoint."""
ALONE = [kind for kind in KINDS if kind != "wide"]
"""Kinds that are run one way; the wide one is run in all the others."""
SIGNS = {"terms": "mixed"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """For each kind a base and two tenants, one with signs; for the tied one also one that unties."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        stage = made[kind] = Stage(folder, folder / "base")
        make_base(kind, stage.base, torch.float32, KINDS)
        stage.models["base"] = load(stage.base)
        group = 128 if kind == "wide" else 32
        stage.tenant("math", canary=False, group_size=group, plan=PLANS[0])
        stage.tenant("code", canary=False, group_size=group, plan=PLANS[1], **SIGNS)
        if kind == "llama-tied":
            stage.tenant("untied", canary=False, tie=False)
    made["wide"].lora("lora")
    return made


def job(stage, names=None, **options):
    names = names or [*stage.models]
    settings = {"signs": True, "lora": "lora" in names, "slot_bytes": 400_000}
    settings["group_size"] = 128 if "wide" in stage.folder.name else 32
    ask = []
    for i, name in enumerate(names):
        folder = {"base": None, "lora": str(stage.folder / "lora")}.get(
            name, str(stage.folder / "tenants" / name)
        )
        ask.append([name, folder, some_ids(6 + 3 * i, i, VOCAB)])
    more = {"additional_config": {"deltacome": settings}, "max_loras": 4}
    return {"model": str(stage.base), "options": more | options, "ask": ask}


def run(folder, jobs, **environment):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [Path(__file__).with_name("engine.py"), folder / "jobs.json", folder / "said.json"]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def jobs(stages, tmp_path_factory):
    wide, several = stages["wide"], {"distributed_executor_backend": "mp"}
    made = {}  # those with workers first, as they must be forked before there are threads
    made["sharded"] = job(wide, ["base", "math", "code"], tensor_parallel_size=2, **several)
    made["staged"] = job(wide, ["base", "math", "code"], pipeline_parallel_size=2, **several)
    made |= {kind: job(stages[kind], [*stages[kind].models]) for kind in ALONE}
    made["mixed"] = job(wide)
    made["beside"] = job(wide, ["base", "lora"])
    made["compiled"] = job(wide, ["base", "math", "code"], enforce_eager=False)
    experts = tmp_path_factory.mktemp("experts")
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    make_base("experts", experts, torch.float32, {"experts": lambda: MixtralConfig(**sizes)})
    made["experts"] = {**job(wide, ["base"]), "model": str(experts)}
    return made


@pytest.fixture(scope="module")
def said(jobs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("said"), jobs)


def check(stage, job, said):
    assert isinstance(said, dict), said
    compiled = not job["options"].get("enforce_eager", True)
    assert said["mode"] == ("DYNAMO_TRACE_ONCE" if compiled else "NONE")
    seen = set()
    for (name, _, ids), (tokens, got) in zip(job["ask"], said["said"], strict=True):
        assert tokens == greedy(stage.models[name], ids, len(tokens)), name
        assert got == pytest.approx(prompt_logprobs(stage.models[name], ids), abs=2e-4), name
        seen.add(tuple(tokens))
    assert len(seen) == len(said["said"])


@pytest.mark.parametrize("kind", ALONE)
def test_families(kind, stages, jobs, said):
    check(stages[kind], jobs[kind], said[kind])


@pytest.mark.parametrize("how", ["mixed", "sharded", "staged", "compiled"])
def test_ways_to_run(how, stages, jobs, said):
    """Beside an ordinary adapter; with two workers' shards or layers; as a compiled graph."""
    check(stages["wide"], jobs[how], said[how])


def test_experts_are_refused_by_name(said):
    assert "experts: not covered yet" in said["experts"]


def test_ordinary_adapters_as_without_the_plugin(stages, said, tmp_path):
    """Stock vLLM without the plugin gives the same for the base and an ordinary adapter, bit for bit."""
    asked = job(stages["wide"], ["base", "lora"])
    del asked["options"]["additional_config"]
    # Without it, prompt logprobs beside an adapter end the engine on a CPU, so they go one by one.
    stock = {name: {**asked, "ask": [one]} for name, one in zip("ab", asked["ask"], strict=True)}
    found = run(tmp_path, stock, VLLM_PLUGINS="")
    assert [one for name in "ab" for one in found[name]["said"]] == said["beside"]["said"]
