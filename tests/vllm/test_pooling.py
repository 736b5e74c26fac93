"""A server of embeddings: a tenant's are those of its merged model, in its own chat template."""

import json

import pytest
import torch
from tiny_pairs import VOCAB, make_base
from vllm_helpers import Server, Stage, load, some_ids

HEAD = ("lm_head.weight",)
"""Embedders have none, so a tenant that changes it would be refused."""
CHAT = {"chat_template.jinja": b"{% for m in messages %}{{ m['content'] }} is {% endfor %}"}


@pytest.fixture(scope="module")
def embedders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedders")
    made = Stage(folder, folder / "base")
    make_base("llama", made.base, torch.float32)
    made.models["base"] = load(made.base)
    made.tenant("math", same=HEAD)
    made.tenant("chat", same=HEAD, files=CHAT)
    made.tenant("headed")
    return made


@pytest.fixture(scope="module")
def server(embedders, tmp_path_factory):
    tenants = embedders.folder / "tenants"
    running = Server(
        tmp_path_factory.mktemp("log") / "pooling.log",
        [embedders.base, f"--tenant=math={tenants / 'math'}", "--tenants", tenants, "--slots", 2],
        [
            *("--served-model-name", "base", "--max-model-len", "256"),
            *("--runner", "pooling", "--convert", "embed"),
            *("--distributed-executor-backend", "uni"),
        ],
    )
    yield running.start()
    running.kill()


@torch.no_grad()
def embedding(model, ids):
    """The last token's hidden state, of length 1."""
    return torch.nn.functional.normalize(
        model.model(torch.tensor([ids])).last_hidden_state[0, -1], dim=0
    )


def said(server, name, **body):
    status, answer = server.post("/v1/embeddings", model=name, **body)
    assert status == 200, answer
    return [torch.tensor(one["embedding"]) for one in json.loads(answer)["data"]]


def test_embeddings_of_base_and_tenants(server, embedders):
    """Tenants have canaries, which an engine without logprobs cannot compare."""
    for name in ("base", "math", "chat"):
        rows = [some_ids(5 + i, i, VOCAB) for i in range(3)]
        for ids, got in zip(rows, said(server, name, input=rows), strict=True):
            wanted = embedding(embedders.models[name], ids)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_chats_are_embedded_in_the_tenants_template(server, embedders):
    messages = [{"role": "user", "content": "one plus two"}]
    prompts = {}
    for name in ("base", "chat"):
        asked = {"model": name, "messages": messages, "add_generation_prompt": False}
        status, answer = server.post("/tokenize", **asked)
        assert status == 200, answer
        prompts[name] = json.loads(answer)["tokens"]
        (got,) = said(server, name, messages=messages)
        wanted = embedding(embedders.models[name], prompts[name])
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert prompts["base"] != prompts["chat"]


def test_a_tenant_whose_head_has_no_place(server):
    status, answer = server.post("/v1/embeddings", model="headed", input=[5, 6, 7])
    assert status == 400
    assert "have no place in LlamaForEmbedding as vLLM runs it: lm_head.weight" in answer
