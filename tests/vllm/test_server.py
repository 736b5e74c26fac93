"""A server as users run it, with the official client: every tenant gives its merged model's answers."""

import asyncio
import json
import re
import shutil
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from tiny_pairs import VOCAB, make_tokenizer
from vllm_helpers import KEY, greedy, logprobs, prompt_logprobs, some_ids, wish

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from deploy_helpers import asked_metrics

from deltacome.vllm.metrics import WATCH_SECONDS

EVERYONE = ("base", "math", "code", "chat", "lora", "one", "two", "three")
SERVED = ("base", "math", "code", "chat", "lora")


async def _all(server, wishes):
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
    ) as client:
        return await asyncio.gather(*(client.completions.create(**wish) for wish in wishes))


def ask_all(server, wishes):
    return asyncio.run(_all(server, wishes))


def test_all_but_probes_and_metrics_asks_for_the_key(server, stage):
    """Tenants can also be loaded, unloaded and asked at paths that vLLM leaves open."""
    folder = stage.folder / "tenants" / "one"
    closed = {
        "POST /adapters": {"name": "sage", "src": str(folder)},
        "DELETE /adapters/math": None,
        "POST /invocations": {"model": "math", "prompt": [5, 6], "max_tokens": 1},
        "POST /tokenize": {"model": "math", "prompt": "one"},
        "POST /detokenize": {"model": "math", "tokens": [5]},
        "GET /openapi.json": None,
        "POST /v1/load_lora_adapter": {"lora_name": "sage", "lora_path": str(folder)},
        "GET /v1/models": None,
    }
    for path, body in closed.items():
        for key in (None, "another"):
            assert server.ask(*path.split(), body, key)[0] == 401, path
    for path in ("/health", "/ping", "/metrics", "/version"):
        assert server.ask("GET", path, key=None)[0] == 200, path
    assert {"math"} <= listed(server)
    assert "sage" not in listed(server)
    status, said = server.ask("POST", "/adapters", closed["POST /adapters"])
    assert status == 200, said
    assert server.say("sage", [5, 6, 7]) == greedy(stage.models["one"], [5, 6, 7], 8)
    assert server.ask("POST", "/invocations", closed["POST /invocations"])[0] == 200
    assert server.ask("DELETE", "/adapters/sage")[0] == 200
    assert "sage" not in listed(server)


def test_everyone_at_once(server, stage):
    """Base, three tenants and an ordinary LoRA in the same batches, over two slots."""
    asked = [(name, some_ids(5 + 7 * i, i, VOCAB)) for i in range(3) for name in SERVED]
    answers = ask_all(
        server, [wish(name, ids, 12, extra_body={"ignore_eos": True}) for name, ids in asked]
    )
    said = set()
    for (name, ids), answer in zip(asked, answers, strict=True):
        assert answer.model == name
        assert answer.choices[0].token_ids == greedy(stage.models[name], ids, 12), name
        said.add(tuple(answer.choices[0].token_ids))
    assert len(said) == len(asked)  # no two answers are the same


def test_more_tenants_than_slots_and_than_are_held(server, stage):
    asked = [
        (name, some_ids(6, 10 * i + j, VOCAB)) for i in range(3) for j, name in enumerate(EVERYONE)
    ]
    answers = ask_all(
        server, [wish(name, ids, 6, extra_body={"ignore_eos": True}) for name, ids in asked]
    )
    for (name, ids), answer in zip(asked, answers, strict=True):
        assert answer.choices[0].token_ids == greedy(stage.models[name], ids, 6), name


def test_logprobs(server, stage):
    """Of answers and prompts, in mixed batches so that rows and slots differ."""
    asked = [(name, some_ids(9 + i, 20 + i, VOCAB)) for i, name in enumerate(SERVED)]
    more = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    wishes = [wish(name, ids, 3, logprobs=4, extra_body=more) for name, ids in asked]
    wishes += [wish(name, ids, 1, extra_body={"prompt_logprobs": 1}) for name, ids in asked]
    answers = [answer.choices[0] for answer in ask_all(server, wishes)]
    half = len(asked)
    for (name, ids), answer, prompt in zip(asked, answers[:half], answers[half:], strict=True):
        model = stage.models[name]
        rows = logprobs(model, ids + answer.token_ids)[len(ids) - 1 : -1]
        for row, id, top in zip(rows, answer.token_ids, answer.logprobs.top_logprobs, strict=True):
            got = {int(key.removeprefix("token_id:")): value for key, value in top.items()}
            assert id == row.argmax()
            assert sorted(got) == sorted(row.topk(4).indices.tolist())
            assert got == pytest.approx({id: float(row[id]) for id in got}, abs=1e-4), name
        said = zip(ids[1:], prompt.prompt_logprobs[1:], strict=True)
        got = [one[str(id)]["logprob"] for id, one in said]
        assert got == pytest.approx(prompt_logprobs(model, ids), abs=1e-4), name


def test_streaming(server, stage):
    ids = some_ids(8, 40, VOCAB)
    tokens, chunks = [], 0
    for chunk in server.client.completions.create(
        **wish("math", ids, 10, stream=True, extra_body={"ignore_eos": True})
    ):
        tokens += chunk.choices[0].token_ids or []
        chunks += 1
    assert tokens == greedy(stage.models["math"], ids, 10)
    assert chunks > 1  # a server that is busy sends several tokens at once


def test_models_are_listed_with_their_base(server, stage):
    cards = {card.id: card for card in server.client.models.list().data}
    assert set(SERVED) <= set(cards)
    assert cards["base"].parent is None
    for name in ("math", "code", "chat"):
        assert cards[name].parent == "base"
        assert cards[name].root.startswith(str(stage.folder / "tenants" / name))


def test_a_tenant_speaks_as_its_tuned_model(server, stage):
    """Chat template, sampling defaults and end tokens are the artifact's where it carries them."""
    messages = [{"role": "user", "content": "one plus two"}]
    tokenizer = make_tokenizer()
    prompts = {}
    for name, text in (
        ("math", "<|user|>one plus two<end><|assistant|>"),
        ("chat", "one plus two is "),
    ):
        status, body = server.post("/tokenize", model=name, messages=messages)
        prompts[name] = json.loads(body)["tokens"]
        assert status == 200
        assert prompts[name] == tokenizer.encode(text, add_special_tokens=False)
    answer = server.client.chat.completions.create(
        model="chat", messages=messages, max_tokens=8, extra_body={"return_token_ids": True}
    )
    # Temperature 0 is the tenant's own; the base's default is 1.
    said = greedy(stage.models["chat"], prompts["chat"], 8)
    ends = [i for i, id in enumerate(said) if id in (0, 41)]
    assert answer.choices[0].token_ids == said[: ends[0] + 1 if ends else 8]
    assert answer.prompt_token_ids == prompts["chat"]


def test_a_tenants_own_end_token_ends_its_answers(server, stage):
    """Token 41 ends an answer of `chat`, and of no other model."""
    for seed in range(200):
        ids = some_ids(4, 1000 + seed, VOCAB)
        said = greedy(stage.models["chat"], ids, 12)
        if 41 in said[:-1] and 0 not in said:
            break
    else:
        raise AssertionError("no prompt found that makes the model say its end token")
    answer = server.client.completions.create(**wish("chat", ids, 12))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].token_ids == said[: said.index(41) + 1]


def test_reload_of_changed_weights(server, stage, tmp_path):
    """Same name and folder, other weights: no block of the prefix cache is taken for theirs."""
    folder, ids = tmp_path / "moving", some_ids(200, 50, VOCAB)
    shutil.copytree(stage.folder / "tenants" / "one", folder)
    assert server.load("moving", folder)[0] == 200
    assert server.say("moving", ids) == greedy(stage.models["one"], ids, 8)
    status, body = server.load("moving", folder)
    assert status == 400
    assert "load_inplace" in body
    shutil.rmtree(folder)
    shutil.copytree(stage.folder / "tenants" / "two", folder)
    assert server.say("moving", ids) == greedy(stage.models["one"], ids, 8)  # not reloaded yet
    assert server.load("moving", folder, load_inplace=True)[0] == 200
    assert server.say("moving", ids) == greedy(stage.models["two"], ids, 8)
    assert server.client.completions.create(**wish("moving", ids)).model == "moving"
    assert server.unload("moving")[0] == 200


def test_running_requests_keep_their_weights(server, stage, tmp_path):
    """Reload and unload change what the next request gets, not what a running one gets."""
    folder, ids = tmp_path / "busy", some_ids(6, 60, VOCAB)
    shutil.copytree(stage.folder / "tenants" / "one", folder)
    assert server.load("busy", folder)[0] == 200
    stream = server.client.completions.create(
        **wish("busy", ids, 200, stream=True, extra_body={"ignore_eos": True})
    )
    tokens = list(next(iter(stream)).choices[0].token_ids)
    shutil.rmtree(folder)
    shutil.copytree(stage.folder / "tenants" / "two", folder)
    assert server.load("busy", folder, load_inplace=True)[0] == 200
    assert server.say("busy", ids) == greedy(stage.models["two"], ids, 8)
    assert server.unload("busy")[0] == 200
    shutil.rmtree(folder)
    for chunk in stream:
        tokens += chunk.choices[0].token_ids or []
    assert tokens == greedy(stage.models["one"], ids, 200)
    with pytest.raises(openai.NotFoundError, match="busy"):
        server.say("busy", ids)


def listed(server):
    return {card.id for card in server.client.models.list().data}


def test_unload_frees_memory(server, stage):
    def held(at_most, seconds=15):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            figures = server.figures()
            if figures["deltacome_host_tenants"] <= at_most:
                return figures
            time.sleep(0.5)
        raise AssertionError(figures)

    names = [f"extra-{i}" for i in range(2)]
    for name in names:
        assert server.load(name, stage.folder / "tenants" / "one")[0] == 200
        assert server.say(name, [5, 6, 7]) == greedy(stage.models["one"], [5, 6, 7], 8)
    for name in [*names, *(n for n in ("one", "two", "three") if n in listed(server))]:
        assert server.unload(name)[0] == 200
        status, body = server.unload(name)
        assert status == 404
        assert name in body
    for name in ("math", "code", "chat"):
        server.unload(name)
    empty = held(0)
    assert empty["deltacome_host_bytes"] == 0
    assert empty["deltacome_resident_tenants"] == 0
    assert not [key for key in empty if key.startswith("deltacome_tokens_total{extra-")]
    for name in ("math", "code", "chat"):
        assert server.load(name, stage.folder / "tenants" / name)[0] == 200


def test_metrics(server, stage, tmp_path):
    for name in ("math", "chat", "one"):  # more than there are slots
        server.say(name, [5, 6, 7])
    before = server.figures()
    for _ in range(2):
        server.say("code", [5, 6, 7], 9, extra_body={"ignore_eos": True})
    shutil.copytree(stage.folder / "tenants" / "one", tmp_path / "broken")
    (shard,) = (tmp_path / "broken").glob("delta-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert server.load("broken", tmp_path / "broken")[0] == 400
    assert server.load("again", stage.folder / "tenants" / "one")[0] == 200
    assert server.unload("again")[0] == 200
    after = server.figures()

    def grown(name):
        return after[name] - before[name]

    assert (
        after["deltacome_tokens_total{code}"] - before.get("deltacome_tokens_total{code}", 0) == 18
    )
    assert after["deltacome_slots"] == 2
    assert after["deltacome_slot_bytes"] > 0
    assert grown("deltacome_loads_total") == 1
    assert grown("deltacome_refused_loads_total") == 1
    assert after["deltacome_load_seconds_count"] == after["deltacome_loads_total"]
    assert after["deltacome_reread_seconds_count"] > 0
    log = server.log.read_text()
    for what in ("Loaded", "Dropped", "Read", "Unloaded"):
        assert f" {what} tenant '" in log, what
    # Workers are asked every few seconds what they hold.
    deadline = time.monotonic() + 3 * WATCH_SECONDS
    while server.figures()["deltacome_evictions"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_tenant_in_the_place_of_an_ordinary_adapter(server, stage):
    """Running requests keep the adapter, in the same batches as the tenant that now has its name."""
    ids = some_ids(6, 61, VOCAB)
    assert server.load("both", stage.folder / "lora")[0] == 200
    stream = server.client.completions.create(
        **wish("both", ids, 200, stream=True, extra_body={"ignore_eos": True})
    )
    tokens = list(next(iter(stream)).choices[0].token_ids)
    assert server.load("both", stage.folder / "tenants" / "one", load_inplace=True)[0] == 200
    assert server.say("both", ids) == greedy(stage.models["one"], ids, 8)
    for chunk in stream:
        tokens += chunk.choices[0].token_ids or []
    assert tokens == greedy(stage.models["lora"], ids, 200)
    assert server.unload("both")[0] == 200


def test_what_dashboard_and_alerts_ask_for_is_there(server):
    server.say("code", [5, 6, 7])
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    # There is one list of running and waiting adapters, the current one.
    assert len(re.findall(r"^vllm:lora_requests_info\{", text, re.M)) == 1
    assert asked_metrics() <= set(re.findall(r"^([\w:]+)[{ ]", text, re.M))
