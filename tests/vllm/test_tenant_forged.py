"""What a stranger's artifact may claim: refused by name, before it costs memory or is served."""

import asyncio
import re
import resource
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from artifact_helpers import PLAN, random_artifact, random_bands, random_signs, write_artifact
from tiny_pairs import SMALL, make_base
from torch import nn
from transformers import AutoConfig, Qwen2Config

from deltacome.arch.checkpoint import Checkpoint, full_digest, sample_digest
from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.artifact import MAX_JSON_BYTES, Artifact
from deltacome.format.canary import CANARY_FILE, MAX_NBYTES, Canary
from deltacome.format.codec import SignTensors, read_signs, write_bands, write_signs
from deltacome.runtime.base import Base
from deltacome.vllm import canary
from deltacome.vllm.places import Part, Place
from deltacome.vllm.request import content_path, is_artifact
from deltacome.vllm.settings import Settings
from deltacome.vllm.shard import shard_signs
from deltacome.vllm.tenant import load_tenant

LAYER = "model.layers.1"
QUERY, OUTPUT, UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose layers have biases, and square matrices."""
    folder = tmp_path_factory.mktemp("base")
    make_base("biased", folder, torch.float32, {"biased": lambda: Qwen2Config(**SMALL)})
    return folder


def loaded(base, artifact):
    """The tenant that a worker makes from it; each matrix and norm of the base has its own module."""
    model = nn.Module()
    model.config = AutoConfig.from_pretrained(base)
    places = []
    for tensor, info in Checkpoint(base).tensors.items():
        name, _, attribute = tensor.rpartition(".")
        rows, *columns = info.shape
        kind = "linear" if columns else "norm"
        kind = {"lm_head": "head", "model.embed_tokens": "embedding"}.get(name, kind)
        if attribute == "weight":
            part = Part(name, ((0, rows),), (0, *(columns or [1])))
            places.append(Place(name, nn.Module(), kind, (part,)))
    settings = Settings(group_size=32, signs=True)
    return load_tenant(1, str(artifact.path), model, places, Base(base), settings)


def forged(base, folder, name=None, entries=(), **changes):
    """An artifact of random terms, except for what it says of one tensor and holds in some entries."""
    honest = random_artifact(base, folder / "honest")
    records, stored = dict(honest.manifest.records), {}
    for record in records.values():
        for kind in record.packed_nbytes(32):
            stored[f"{record.name}.{kind}"] = honest.blob(record.name, kind)
        if record.exact_rows:
            stored[f"{record.name}.exact"] = honest.exact(record.name)
    if name is not None:
        records[name] = replace(records[name], **changes)
    config = honest.json_file("tuned_config.json")
    return write_artifact(
        folder / "forged", records.values(), stored | dict(entries), config=config
    )


def of_base(base, name):
    """What a record says of a tensor of the base."""
    tensor = Checkpoint(base).read(name)
    return {
        "base_name": name,
        "base_shape": tuple(tensor.shape),
        "base_sample": sample_digest(tensor),
        "base_digest": full_digest(tensor),
    }


def test_the_honest_one_is_loaded(base, tmp_path):
    tenant = loaded(base, forged(base, tmp_path))
    assert tenant.biases[QUERY].any()
    matrices = [name for name, info in Checkpoint(base).tensors.items() if len(info.shape) == 2]
    assert len(tenant.bands) == len(matrices)


# --- shapes --------------------------------------------------------------------------------------


def test_a_bias_is_no_difference_to_another_tensor(base, tmp_path, monkeypatch):
    """The difference of 64 values and an embedding would have 64 times the embedding's size."""
    name, read = f"{QUERY}.bias", Base.read

    def others(self, tensor):
        assert tensor not in (name, "model.embed_tokens.weight"), "the base was read"
        return read(self, tensor)

    monkeypatch.setattr(Base, "read", others)
    entries = {f"{name}.exact": torch.ones(64, 1, 1)}
    claim = of_base(base, "model.embed_tokens.weight")
    artifact = forged(base, tmp_path / "a", name, entries, shape=(64, 1, 1), **claim)
    with pytest.raises(MismatchError, match=r"q_proj\.bias: .* got one of model\.embed_tokens"):
        loaded(base, artifact)
    artifact = forged(base, tmp_path / "b", name, entries, shape=(64, 1, 1), **of_base(base, name))
    with pytest.raises(MismatchError, match=r"expected .*\(64,\).*, got \(64, 1, 1\)"):
        loaded(base, artifact)


@pytest.mark.parametrize("shape", [(32, 64), (96, 64, 1), (1 << 20, 1 << 20)])
def test_a_shape_that_is_not_the_base_s(base, tmp_path, shape):
    """Even for a tensor that stays as it is and has the right fingerprint."""
    name = f"{UP}.weight"
    artifact = random_artifact(base, tmp_path / "a", same=(name,))
    record = replace(artifact.manifest.records[name], shape=shape, base_shape=shape)
    artifact.manifest = replace(artifact.manifest, records={name: record})
    why = rf"wrong base: expected {name} of shape {re.escape(str(shape))}, got \(96, 64\)"
    with pytest.raises(MismatchError, match=why):
        Base(base).check(artifact)


def test_a_matrix_of_another_place_is_not_cut_to_fit(base, tmp_path):
    """q_proj as a delta of up_proj, which has more rows."""
    entries = {f"{QUERY}.weight.bands": write_bands(random_bands((96, 64)))}
    claim = of_base(base, f"{UP}.weight")
    artifact = forged(base, tmp_path, f"{QUERY}.weight", entries, shape=(96, 64), **claim)
    with pytest.raises(MismatchError, match=r"q_proj\.weight: .* delta of .* got one of .*up_proj"):
        loaded(base, artifact)


def test_a_square_matrix_is_not_served_as_its_transpose(base, tmp_path):
    artifact = forged(base, tmp_path, f"{OUTPUT}.weight", transposed=True)
    with pytest.raises(UnsupportedError, match=r"o_proj\.weight: has a delta of its transpose"):
        loaded(base, artifact)


@pytest.mark.parametrize("columns", [(0, 320), (64, 192), (70, 200), (128, 320)])
@pytest.mark.parametrize("scales", [1, 256])
def test_a_shard_of_signs_is_not_cut_out_of_the_whole(columns, scales, monkeypatch):
    """A vocabulary as dense floats would take 32 times what its signs take."""
    signs = random_signs((256, 320), scales)
    scale = signs.scale.clone()
    scale[70:71] = 0  # matters where each row has a scale
    blob = write_signs(replace(signs, scale=scale))
    rows = [(64, 128), (130, 256)]
    whole = read_signs(blob, (256, 320), scales).dense()
    expected = torch.cat([whole[a:b] for a, b in rows])[:, slice(*columns)]
    with monkeypatch.context() as patched:
        patched.setattr(SignTensors, "dense", lambda _: pytest.fail("all of it was made dense"))
        shard = shard_signs("w", blob, (256, 320), scales, rows, columns)
    shape = tuple(expected.shape)
    assert read_signs(shard, shape, 1 if scales == 1 else shape[0]).dense().equal(expected)


# --- numbers -------------------------------------------------------------------------------------


def bands(part, number):
    made = random_bands((64, 64), PLAN)
    numbers = {"s": made[2].s, "scale": made[1].u.scale, "values": made[0].v.values}
    numbers[part].view(-1)[-1] = number
    return f"{QUERY}.weight.bands", write_bands(made)


def signs(number):
    made = replace(random_signs((64, 64), 1), scale=torch.tensor([number]))
    return f"{QUERY}.weight.signs", write_signs(made)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["s", "scale", "values", "signs", "bias", "norm"])
def test_numbers_that_are_not_finite(base, tmp_path, part, number):
    """Without a canary nothing else would notice them, and they would stay in the cache's blocks."""
    name, changes = f"{QUERY}.weight", {}
    if part == "signs":
        entry, changes = signs(number), {"sign_scales": 1}
    elif part in ("bias", "norm"):
        name = f"{QUERY}.bias" if part == "bias" else "model.norm.weight"
        entry = (f"{name}.exact", torch.tensor([1.0] * 63 + [number]))
    else:
        entry = bands(part, number)
    artifact = forged(base, tmp_path, name, [entry], **changes)
    with pytest.raises(ArtifactError, match=rf"{name}: expected finite numbers, got NaN or Inf"):
        loaded(base, artifact)


# --- files ---------------------------------------------------------------------------------------


def test_bytes_that_change_while_they_are_read(base, tmp_path, monkeypatch):
    """As when files are being copied into the folder: what is read is then not what was checked."""
    artifact = forged(base, tmp_path)
    (shard,) = artifact.path.glob("*.safetensors")
    exact = Artifact.exact

    def read(self, name):
        value = exact(self, name)
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        return value

    monkeypatch.setattr(Artifact, "exact", read)
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        loaded(base, artifact)


def test_a_manifest_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "delta_config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=f"expected at most {MAX_JSON_BYTES} bytes, got 67"):
        content_path(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800", ""])
def test_paths_that_no_artifact_has(path):
    assert not is_artifact(path)
    with pytest.raises(ArtifactError):
        content_path(path)


# --- canaries ------------------------------------------------------------------------------------


def ask(content):
    threads = []

    def file(name, limit):
        assert (name, limit) == (CANARY_FILE, MAX_NBYTES)
        threads.append(threading.current_thread())
        return content

    async def generate(prompt, parameters, name, lora_request):
        said = [{id: SimpleNamespace(logprob=-1.0)} for id in prompt["prompt_token_ids"]]
        yield SimpleNamespace(prompt_logprobs=[None, *said[1:]])

    artifact = SimpleNamespace(path="folder", file=file)
    try:
        return asyncio.run(canary.check_canary(generate, artifact, None, 0.1, 300))
    finally:
        assert threads
        assert threading.main_thread() not in threads


def test_a_canary_is_read_beside_the_requests():
    assert ask(Canary((7, 299), (-1.0,)).to_json()) == 0
    assert ask(None) is None
    with pytest.raises(MismatchError, match="nats from those recorded"):
        ask(Canary((7, 299), (-2.0,)).to_json())


def test_a_canary_of_tokens_that_the_model_lacks():
    """Otherwise the engine would have to refuse them, where it cannot tell a client why."""
    with pytest.raises(ArtifactError, match=r"canary\.json: expected ids below 300, got 300"):
        ask(Canary((7, 300), (-1.0,)).to_json())


def test_a_canary_that_is_too_long():
    with pytest.raises(ArtifactError, match="expected at most 4096 bytes, got 4097"):
        Canary.from_json(b" " * 4097)
    longest = Canary((2**20,) * 64, (-123.4567,) * 63)
    assert len(longest.to_json()) < 4096 / 2
    assert Canary.from_json(longest.to_json()) == longest
