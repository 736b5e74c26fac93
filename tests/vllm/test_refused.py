"""What cannot be served gets an HTTP 4xx that says what was expected and got, and the server goes on."""

import json
import re
import shutil

import openai
import pytest
import torch
from artifact_helpers import random_artifact, random_term, write_artifact
from tiny_pairs import VOCAB, make_base, rewrite, weights_of
from vllm_helpers import greedy, some_ids

from deltacome.arch.checkpoint import Checkpoint
from deltacome.format.canary import CANARY_FILE, Canary, canary_ids
from deltacome.format.spec import Band


def wrong_base(stage, folder):
    other = folder / "other-base"
    make_base("llama", other, torch.float32)
    weights = weights_of(other)
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    rewrite(other, weights, dtype=None)
    random_artifact(other, folder / "a")


def truncated(stage, folder):
    random_artifact(stage.base, folder / "a")
    shard = next((folder / "a").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def one_bit(stage, folder):
    random_artifact(stage.base, folder / "a")
    shard = next((folder / "a").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def not_json(stage, folder):
    random_artifact(stage.base, folder / "a")
    (folder / "a" / "delta_config.json").write_text("{")


def oversized(stage, folder):
    random_artifact(stage.base, folder / "a", plan=(Band(8, 60),))


def many_bands(stage, folder):
    random_artifact(stage.base, folder / "a", plan=(Band(1, 1),) * 9)


def grown(stage, folder):
    random_artifact(stage.base, folder / "a", vocab=VOCAB + 8)


def other_tokenizer(stage, folder):
    tokenizer = json.loads((stage.base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    files = {"tokenizer.json": json.dumps(tokenizer).encode()}
    random_artifact(stage.base, folder / "a", files=files)


def wrong_manners(stage, folder):
    files = {"generation_config.json": b'{"temperature": true}'}
    random_artifact(stage.base, folder / "a", files=files)


def other_code(stage, folder):
    random_artifact(stage.base, folder / "a", rms_norm_eps=0.1)


def tied_head(stage, folder):
    random_artifact(stage.base, folder / "a", tie=True)


def dead_canary(stage, folder):
    ids = canary_ids(VOCAB)
    content = Canary(tuple(ids), (-5.0,) * (len(ids) - 1)).to_json()
    random_artifact(stage.base, folder / "a", files={CANARY_FILE: content})


def other_groups(stage, folder):
    random_artifact(stage.base, folder / "a", group_size=64)


def no_place(stage, folder):
    base = Checkpoint(stage.base)
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.extra.weight"
    rows = base.tensors["model.norm.weight"].shape[0]
    source = "model.norm.weight"
    record, entries = random_term(name, base, source, rows, 32, generator, (), ("bands",))
    write_artifact(folder / "a", [record], entries, config=dict(base.config))


REFUSALS = {
    wrong_base: r"up_proj\.weight: wrong base: expected .* of fingerprint \w+, got \w+",
    truncated: r"expected \d+ bytes, got \d+",
    one_bit: r"expected SHA-256 \w+, got \w+",
    not_json: "not valid JSON",
    oversized: r"has \d+ bytes of packed terms, a slot \d+: set slot_bytes to \d+",
    many_bands: r"expected at most 6 bands a matrix",
    grown: "rows that the base lacks.*merge",
    other_tokenizer: "another model than the base's.*base_tokenizer",
    wrong_manners: r"generation_config\.json: temperature: expected a finite number, got True",
    other_code: "rms_norm_eps",
    tied_head: "tie_word_embeddings: the tuned model's head is its embedding",
    dead_canary: r"canary: the engine's logprobs are [\d.]+ nats from those recorded",
    other_groups: "expected scale groups of 32, got 64",
    no_place: r"1 tensors that this artifact changes have no place.*mlp\.extra\.weight",
}


@pytest.mark.parametrize("make", REFUSALS, ids=lambda make: make.__name__)
def test_refused_at_load(make, server, stage, tmp_path):
    make(stage, tmp_path)
    refused = server.figures()["deltacome_refused_loads_total"]
    status, body = server.load("a", tmp_path / "a")
    assert status == 400
    error = json.loads(body)["error"]
    assert error["type"] == "BadRequestError"
    assert error["param"] == "lora_path"
    assert re.search(REFUSALS[make], error["message"]), error["message"]
    assert server.figures()["deltacome_refused_loads_total"] == refused + 1
    with pytest.raises(openai.NotFoundError, match="`a` does not exist"):
        server.say("a", [5, 6])
    assert_alive(server, stage)


def assert_alive(server, stage):
    ids = some_ids(5, 3, VOCAB)
    for name in ("base", "math"):
        assert server.say(name, ids) == greedy(stage.models[name], ids, 8)


def test_refused_when_a_request_finds_it(server, stage, tmp_path):
    """A folder of tenants may hold anything; whoever asks for a tenant is told what is wrong with it."""
    truncated(stage, tmp_path)
    shutil.move(tmp_path / "a", stage.folder / "tenants" / "damaged")
    with pytest.raises(openai.BadRequestError, match=r"expected \d+ bytes, got \d+"):
        server.say("damaged", [5, 6])
    shutil.rmtree(stage.folder / "tenants" / "damaged")
    with pytest.raises(openai.NotFoundError):
        server.say("damaged", [5, 6])
    assert_alive(server, stage)


@pytest.mark.parametrize(
    "name", ["nobody", "../base", "..", ".hidden", "a/b", "one\n", "math#1", ""]
)
def test_names_that_nobody_has(name, server, stage):
    if name:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            server.say(name, [5, 6])
    else:  # to vLLM, an empty name is the base
        assert server.say(name, [5, 6]) == greedy(stage.models["base"], [5, 6], 8)


def test_a_folder_that_is_none(server, stage):
    status, body = server.load("a", "/nowhere/at/all")
    assert status == 404
    assert "/nowhere/at/all" in body
    assert_alive(server, stage)


@pytest.mark.parametrize("path", ["/srv/typo/does-not-exist", "lora"])
def test_a_tenants_name_for_what_is_no_artifact(path, server, stage):
    """A mistyped folder, or an ordinary adapter's: `Success` would leave the old weights being served."""
    path = stage.folder / path
    status, body = server.load("math", path, load_inplace=True)
    assert status == 400
    error = json.loads(body)["error"]
    assert error["param"] == "lora_path"
    assert (
        "expected an artifact (delta_config.json), found none: math is a tenant" in error["message"]
    )
    assert f"Refused tenant 'math': {path}: expected" in server.log.read_text()
    cards = {card.id: card for card in server.client.models.list().data}
    assert cards["math"].root.startswith(str(stage.folder / "tenants" / "math"))
    assert_alive(server, stage)


def test_names_with_what_divides_name_and_number(server, stage):
    status, body = server.load("math#1", stage.folder / "lora")
    assert status == 400
    assert "expected a name without '#'" in body
    assert_alive(server, stage)


def test_weights_that_change_while_they_are_not_held(server, stage, tmp_path):
    """A tenant that was dropped for others is read again, and must still hold what was loaded."""
    folder = tmp_path / "swapped"
    shutil.copytree(stage.folder / "tenants" / "one", folder)
    assert server.load("swapped", folder)[0] == 200
    shutil.rmtree(folder)
    shutil.copytree(stage.folder / "tenants" / "two", folder)
    for name in ("math", "code", "chat", "one", "two", "three") * 2:
        server.say(name, [5, 6, 7])
    with pytest.raises(
        openai.BadRequestError, match="holds other weights than those that were loaded"
    ):
        server.say("swapped", [5, 6, 7])
    assert server.unload("swapped")[0] == 200
    assert_alive(server, stage)


def test_found_weights_that_change_are_taken(server, stage, tmp_path):
    """A tenant found by a request, not loaded by a command, is what its folder holds when it is read."""
    folder = stage.folder / "tenants" / "fresh"
    shutil.copytree(stage.folder / "tenants" / "one", folder)
    ids = some_ids(150, 4, VOCAB)
    assert server.say("fresh", ids) == greedy(stage.models["one"], ids, 8)
    shutil.rmtree(folder)
    shutil.copytree(stage.folder / "tenants" / "two", folder)
    for name in ("math", "code", "chat", "one", "two", "three") * 2:
        server.say(name, [5, 6, 7])
    assert server.say("fresh", ids) == greedy(stage.models["two"], ids, 8)
    assert server.unload("fresh")[0] == 200
    shutil.rmtree(folder)
