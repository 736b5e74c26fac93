"""The worked example of docs/format.md is true, byte by byte."""

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_golden import read_delta

from deltacome.arch.checkpoint import full_digest, sample_digest
from deltacome.format.artifact import Artifact
from deltacome.format.codec import dense, write_bands
from deltacome.format.manifest import Manifest
from deltacome.runtime import merge, verify

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
SHARD = "delta-00001-of-00001.safetensors"
BASE = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.bfloat16)


def fenced(kind):
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return block


def blob():
    return bytes.fromhex("".join(line[:47] for line in fenced("hex").splitlines()))


@pytest.fixture
def folder(tmp_path):
    """The example's artifact, from the page alone."""
    header = fenced("json header").strip().encode()
    header += b" " * (-len(header) % 8)
    data = struct.pack("<Q", len(header)) + header + bytes.fromhex("803f00c0") + blob()
    manifest = json.dumps(json.loads(fenced("json manifest")), separators=(",", ":")) + "\n"
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    weight_map = dict.fromkeys(("norm.exact", "w.bands"), SHARD)
    index = {"metadata": {"sha256": digest}, "weight_map": weight_map}
    path = tmp_path / "delta"
    path.mkdir()
    (path / SHARD).write_bytes(data)
    (path / "delta_config.json").write_text(manifest)
    (path / "delta.safetensors.index.json").write_text(json.dumps(index))
    (path / "tuned_config.json").write_text("{}")
    return path


def test_blob_by_the_page():
    assert read_delta(blob(), (2, 3), [(3, 1)], 128) == json.loads(fenced("json delta"))


def test_artifact_is_one(folder, tmp_path):
    artifact = Artifact.open(folder)
    delta = torch.tensor(json.loads(fenced("json delta")))
    assert torch.equal(dense(artifact.bands("w")), delta)
    assert bytes(write_bands(artifact.bands("w")).tolist()) == blob()
    assert artifact.manifest.to_json() == (folder / "delta_config.json").read_text()
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"w": BASE}, base / "model.safetensors")
    verify(artifact, base)
    merged = merge(base, artifact, tmp_path / "merged")
    tuned = load_file(merged / "model.safetensors")
    assert tuned["w"].tolist() == json.loads(fenced("json tuned"))
    assert tuned["norm"].tolist() == [1, -2]


def test_fingerprints_by_the_page():
    record = Manifest.from_json(fenced("json manifest")).records["w"]
    values = b"".join(struct.pack("<f", value)[2:] for value in range(1, 7))  # bfloat16
    full = hashlib.blake2b(b"torch.bfloat16 (2, 3)" + values, digest_size=16).hexdigest()
    sample = hashlib.blake2b(b"(2, 3)" + values, digest_size=8).hexdigest()
    assert (full, sample) == (record.base_digest, record.base_sample)
    assert (full_digest(BASE), sample_digest(BASE)) == (full, sample)


@pytest.mark.parametrize("shape", [(), (1,), (512,), (513,), (7, 300), (5, 4, 100)])
def test_sample_by_the_page(shape):
    n = torch.Size(shape).numel()
    numbers = [(37 * i) % 1009 - 500 for i in range(n)]
    runs = [range(n)] if n <= 512 else [range(s := i * (n - 64) // 7, s + 64) for i in range(8)]
    text = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    data = b"".join(struct.pack("<i", numbers[i]) for run in runs for i in run)
    expected = hashlib.blake2b(text.encode() + data, digest_size=8).hexdigest()
    assert sample_digest(torch.tensor(numbers, dtype=torch.int32).reshape(shape)) == expected


def test_every_key_is_on_the_page():
    files = list((Path(__file__).parents[1] / "golden").glob("*/delta_config.json"))
    assert len(files) == 2
    documents = [json.loads(file.read_text()) for file in files]
    records = [record for document in documents for record in document["tensors"].values()]
    keys = {key for record in records for key in record} | documents[0].keys()
    assert all(f"`{key}" in TEXT for key in keys)
