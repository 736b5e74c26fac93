"""Opening folders that are not what they say."""

import json
import os
import shutil

import make_golden as golden
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltacome.errors import ArtifactError
from deltacome.format.artifact import Artifact
from deltacome.format.writer import overhead_nbytes

SHARD = "delta-00001-of-00001.safetensors"
INDEX = "delta.safetensors.index.json"
MANIFEST = "delta_config.json"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(golden.GOLDEN, tmp_path / "delta")


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """An artifact of three shards, one tensor of bands in each."""
    monkeypatch.setattr("deltacome.format.writer.MAX_SHARD_BYTES", 1)
    unit = golden.unit()
    writer = golden.ArtifactWriter(tmp_path / "delta", {}, resume=False)
    names = []
    for record in unit.records[:3]:
        entries = {k: unit.entries[k] for k in record.entries(golden.GROUP)}
        writer.save(record.name, golden.Unit((record,), entries))
        names.append(record.name)
    return writer.finish(names, golden.manifest())


def rename_in_json(folder, old, new):
    for name in (MANIFEST, INDEX):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))


def rewrite(folder, change):
    """Changes a shard's entries, and the manifest's size and the index to fit."""
    entries = load_file(folder / SHARD)
    change(entries)
    save_file(entries, folder / SHARD)
    document = json.loads((folder / MANIFEST).read_text())
    document["shards"][SHARD]["bytes"] = (folder / SHARD).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(document))
    index = {"metadata": {}, "weight_map": dict.fromkeys(entries, SHARD)}
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, message):
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)


def test_whole(folder):
    artifact = Artifact.open(str(folder))
    artifact.verify_bytes()
    sizes = [(folder / name).stat().st_size for name in (SHARD, INDEX, MANIFEST)]
    assert artifact.bytes_on_disk() == sum(sizes)
    assert artifact.ratio() == artifact.manifest.tuned_nbytes() / sum(sizes)
    assert "golden" in repr(artifact)
    assert Artifact.from_pretrained(folder).path == folder


def test_several_shards(sharded):
    artifact = Artifact.open(sharded)
    artifact.verify_bytes()
    assert sorted(artifact.manifest.shards) == [
        f"delta-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert torch.equal(artifact.exact("head.weight"), -golden.added_rows())
    assert len(artifact.bands("layer.weight")) == 3


def test_blobs_are_aligned_wherever_they_lie(tmp_path):
    """Exact tensors of an odd number of bytes come first in the file."""
    unit = golden.unit()
    odd = golden.Record("a", (3,), "uint8", None, None, None, None, exact_rows=(0, 3))
    writer = golden.ArtifactWriter(tmp_path / "delta", {}, resume=False)
    entries = unit.entries | {"a.exact": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    writer.save("all", golden.Unit((*unit.records, odd), entries))
    artifact = Artifact.open(writer.finish(["all"], golden.manifest()))
    for name in ("embed.weight", "head.weight", "layer.weight"):
        assert artifact.blob(name).data_ptr() % 16 == 0
        assert torch.equal(artifact.blob(name), unit.entries[f"{name}.bands"])


def test_overhead_is_known_beforehand(folder):
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    terms = sum(record.nbytes(manifest.group_size) for record in manifest.records.values())
    overhead = artifact.bytes_on_disk() - terms
    assert overhead_nbytes(manifest) == pytest.approx(overhead, rel=0.1)
    assert overhead_nbytes(manifest) >= overhead


@pytest.mark.parametrize("name", [SHARD, INDEX, MANIFEST])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, name.replace(".", r"\."))


def test_no_folder(tmp_path):
    refused(tmp_path / "nothing", "not an artifact")


@pytest.mark.parametrize("name", [INDEX, MANIFEST])
def test_text_that_is_no_text(folder, name):
    (folder / name).write_bytes(b"\xff\xfe{}")
    refused(folder, "not valid UTF-8")


def test_truncated_shard(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])
    refused(folder, f"expected {len(content)} bytes, got {len(content) - 1}")


@pytest.mark.parametrize("size", [0, 5, 100, 3000])
def test_truncated_shard_of_the_size_that_the_manifest_says(folder, size):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:size])
    document = json.loads((folder / MANIFEST).read_text())
    document["shards"][SHARD]["bytes"] = size
    (folder / MANIFEST).write_text(json.dumps(document))
    refused(folder, "not a whole safetensors file")


def test_swapped_shards(sharded):
    first, second = (sharded / f"delta-0000{i}-of-00003.safetensors" for i in (1, 2))
    assert first.stat().st_size == second.stat().st_size
    first.rename(sharded / "x")
    second.rename(first)
    (sharded / "x").rename(second)
    refused(sharded, "disagrees with the shards")


def test_shards_swapped_with_their_index(sharded):
    """The entries are all there, in files of the right size; only the checksum tells."""
    names = [f"delta-0000{i}-of-00003.safetensors" for i in (1, 2)]
    os.rename(sharded / names[0], sharded / "x")
    os.rename(sharded / names[1], sharded / names[0])
    os.rename(sharded / "x", sharded / names[1])
    index = json.loads((sharded / INDEX).read_text())
    for key, name in index["weight_map"].items():
        if name in names:
            index["weight_map"][key] = names[1 - names.index(name)]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="SHA-256"):
        Artifact.open(sharded).verify_bytes()


def test_missing_shard(sharded):
    (sharded / "delta-00002-of-00003.safetensors").unlink()
    refused(sharded, r"delta-00002-of-00003\.safetensors is missing")


@pytest.mark.parametrize("name", ["delta-00004-of-00003.safetensors", "model.safetensors"])
def test_extra_shard(sharded, name):
    shutil.copy(sharded / "delta-00002-of-00003.safetensors", sharded / name)
    refused(sharded, f"{name} is not in")


def test_renamed_shard(folder):
    (folder / SHARD).rename(folder / "delta-00001-of-00002.safetensors")
    refused(folder, f"{SHARD} is missing")


@pytest.mark.parametrize(
    "name",
    [
        "../delta-00001-of-00001.safetensors",
        "sub/delta-00001-of-00001.safetensors",
        "/etc/delta-00001-of-00001.safetensors",
        "delta-00001-of-00001.safetensors\\n",
        "weights.safetensors",
    ],
)
def test_shard_names_that_leave_the_folder(folder, name):
    shutil.copy(folder / SHARD, folder.parent / SHARD)
    rename_in_json(folder, SHARD, name)
    refused(folder, "expected a name like")


def test_entry_in_two_shards(sharded):
    first, second = (f"delta-0000{i}-of-00003.safetensors" for i in (1, 2))
    shutil.copy(sharded / first, sharded / second)
    document = json.loads((sharded / MANIFEST).read_text())
    document["shards"][second]["bytes"] = document["shards"][first]["bytes"]
    (sharded / MANIFEST).write_text(json.dumps(document))
    refused(sharded, f"is in both {first} and {second}")


def test_missing_entry(folder):
    rewrite(folder, lambda entries: entries.pop("norm.weight.exact"))
    refused(folder, r"1 entries are missing, the first is norm\.weight\.exact")


def test_unknown_entry(folder):
    rewrite(folder, lambda entries: entries.update(extra=torch.zeros(1)))
    refused(folder, "extra: expected None")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(1, 3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(3, dtype=torch.complex64),
    ],
)
def test_entry_of_another_type_or_shape(folder, value):
    rewrite(folder, lambda entries: entries.update({"norm.weight.exact": value}))
    refused(folder, r"norm\.weight\.exact: expected \('bfloat16', \(3,\)\)")


def test_blob_of_another_plan(folder):
    rewrite(
        folder, lambda e: e.update({"layer.weight.bands": e["layer.weight.bands"][:-16].clone()})
    )
    refused(folder, r"layer\.weight\.bands: expected")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map":5}',
        '{"weight_map":["embed.weight.bands"]}',
        '{"weight_map":{}}',
        '{"weight_map":{"embed.weight.bands":7}}',
    ],
)
def test_wrong_index(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_index_that_names_another_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["layer.weight.bands"] = "delta-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, r"disagrees with the shards on layer\.weight\.bands")


def test_flipped_bit(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[-100] ^= 4
    (folder / SHARD).write_bytes(content)
    artifact = Artifact.open(folder)  # headers are intact
    with pytest.raises(ArtifactError, match=f"{SHARD}: expected SHA-256"):
        artifact.verify_bytes()


def test_file_that_goes_away_after_opening(folder):
    artifact = Artifact.open(folder)
    (folder / SHARD).unlink()
    with pytest.raises(ArtifactError, match=r"norm\.weight\.exact cannot be read"):
        artifact.exact("norm.weight")


def test_what_was_read_does_not_change_with_the_file(folder):
    """A file that is truncated meanwhile does not end the process either, as a mapped one would."""
    artifact = Artifact.open(folder)
    blob, exact = artifact.blob("layer.weight"), artifact.exact("norm.weight")
    with (folder / SHARD).open("r+b") as file:  # in place
        file.write(b"\xff" * (folder / SHARD).stat().st_size)
    unit = golden.unit()
    assert torch.equal(blob, unit.entries["layer.weight.bands"])
    assert torch.equal(exact, unit.entries["norm.weight.exact"])


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800"])
def test_a_path_that_no_folder_has(path):
    with pytest.raises(ArtifactError):
        Artifact.open(path)


def carrying(tmp_path, name, content):
    writer = golden.ArtifactWriter(tmp_path / "delta", {}, resume=False)
    writer.save("all", golden.unit())
    return Artifact.open(writer.finish(["all"], golden.manifest(), {name: content}))


def test_a_carried_file_that_is_too_large_to_be_parsed(tmp_path):
    """A megabyte of brackets takes thirty megabytes once it is parsed."""
    content = b'{"a": [' + b"[]," * (1 << 19) + b"0]}"
    artifact = carrying(tmp_path, "generation_config.json", content)
    artifact.verify_bytes()
    assert artifact.file("generation_config.json") == content
    with pytest.raises(
        ArtifactError, match=r"generation_config\.json: expected at most 1048576 bytes"
    ):
        artifact.json_file("generation_config.json")
    with pytest.raises(ArtifactError, match="expected at most 5 bytes, got"):
        artifact.file("generation_config.json", 5)
    (tmp_path / "other").mkdir()
    allowed = carrying(tmp_path / "other", "tokenizer.json", content)
    assert len(allowed.json_file("tokenizer.json")["a"]) == (1 << 19) + 1
