import json
import resource

import pytest
import torch
from artifact_helpers import TERMS, random_artifact
from runtime_helpers import load, logits, make_base, some_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import ArtifactError, MismatchError, OutputError
from deltacome.format.codec import dense
from deltacome.runtime import merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", TERMS)
def test_values_are_base_plus_terms_rounded_once(tmp_path, dtype, terms):
    make_base("qwen2", tmp_path / "base", dtype)
    same = "model.layers.1.mlp.up_proj.weight"
    artifact = random_artifact(
        tmp_path / "base", tmp_path / "delta", vocab=140, same=(same,), terms=terms
    )
    assert merge(tmp_path / "base", artifact.path, tmp_path / "out") == tmp_path / "out"
    before, after = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "out")
    assert after.tensors.keys() == artifact.manifest.records.keys()
    for name, record in artifact.manifest.records.items():
        expected = before.read(name)
        if record.packed:
            deltas = [dense(artifact.bands(name))] if record.plan else []
            deltas += [artifact.signs(name).dense()] if record.sign_scales else []
            expected = sum((delta.double() for delta in deltas), expected.double()).to(dtype)
        if record.replaced:
            expected = artifact.exact(name)
        elif record.exact_rows:
            expected = torch.cat([expected, artifact.exact(name)])
        got = after.read(name)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(after.read(same), before.read(same))


def test_shards(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    whole = merge(bases["llama"], artifact, tmp_path / "whole")
    assert sorted(f.name for f in whole.glob("model*")) == ["model.safetensors"]
    out = merge(bases["llama"], artifact, tmp_path / "sharded", max_shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 44_000 for file in files)
    weights = {name: value for file in files for name, value in load_file(file).items()}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    expected = load_file(whole / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with safe_open(files[0], framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert torch.equal(logits(load(out), some_ids()), logits(load(whole), some_ids()))


def test_files_beside_the_weights(bases, tmp_path):
    base = tmp_path / "base"
    make_base("llama", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (base / name).write_text(f"base {name}")
    carried = ("tokenizer.json", "README.md", "canary.json")
    files = {name: f"tuned {name}".encode() for name in carried}
    artifact = random_artifact(base, tmp_path / "delta", files=files, eos_token_id=9)
    out = merge(base, artifact, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (out / "tokenizer.json").read_text() == "tuned tokenizer.json"
    assert (out / "tokenizer_config.json").read_text() == "base tokenizer_config.json"
    assert (out / "config.json").read_bytes() == (artifact.path / "tuned_config.json").read_bytes()
    assert AutoConfig.from_pretrained(out).eos_token_id == 9
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert out.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_code_is_the_bases_alone(bases, tmp_path):
    """Otherwise whoever serves the folder and trusts the base's code would run an artifact's code."""
    base = tmp_path / "base"
    make_base("llama", base)
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_x.X"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    evil = {"AutoConfig": "evil/code--configuration_x.X"}
    carried = {"auto_map": evil, "processor": {"auto_map": evil, "size": 3}}
    files = {"processor_config.json": json.dumps(carried).encode()}
    artifact = random_artifact(base, tmp_path / "delta", files=files, auto_map=evil, eos_token_id=9)
    with pytest.warns(UserWarning, match=r"names other code than the base's") as warned:
        out = merge(base, artifact, tmp_path / "out")
    assert len([one for one in warned if "names other code" in str(one.message)]) == 2
    assert json.loads((out / "processor_config.json").read_text()) == {"processor": {"size": 3}}
    assert json.loads((out / "config.json").read_text()) == {
        **config,
        "auto_map": own,
        "eos_token_id": 9,
    }


def assert_nothing_left(folder):
    assert {file.name for file in folder.iterdir()} <= {"base", "delta"}


def test_output_exists(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        merge(bases["llama"], artifact, out)
    assert (out / "mine").read_text() == "precious"


def test_wrong_base_leaves_nothing(bases, tmp_path):
    make_base("llama", tmp_path / "base", seed=1)
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    with pytest.raises(MismatchError, match="wrong base: expected fingerprint"):
        merge(tmp_path / "base", artifact, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_base_without_a_tensor(bases, tmp_path):
    make_base("qwen2", tmp_path / "base")
    artifact = random_artifact(tmp_path / "base", tmp_path / "delta")
    entries = load_file(tmp_path / "base" / "model.safetensors")
    del entries["model.layers.1.self_attn.k_proj.bias"]
    save_file(entries, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"no tensor .*layers\.1\.self_attn\.k_proj\.bias"):
        merge(tmp_path / "base", artifact, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_damaged_artifact_leaves_nothing(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    flip_last_byte(next(artifact.path.glob("*.safetensors")))
    with pytest.raises(ArtifactError, match="SHA-256"):
        merge(bases["llama"], artifact, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_artifact_without_a_configuration(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    (artifact.path / "tuned_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"tuned_config\.json"):
        merge(bases["llama"], artifact, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_disk_that_fills_up_leaves_nothing(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            merge(bases["llama"], artifact, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_left(tmp_path)


def flip_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
