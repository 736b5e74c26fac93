"""Hostile folders are refused with our own errors, soon and in little memory, or read as they were."""

import json
import os
import resource
import struct
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "format"))
import fuzz
import mutate
import originals

from deltacome.errors import ArtifactError
from deltacome.format.artifact import MAX_JSON_BYTES, Artifact
from deltacome.runtime import verify
from deltacome.skeleton import make_skeleton, parse_config

SHARD = "delta-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path):
    files = originals.make(tmp_path)[1][0]
    (tmp_path / "delta").mkdir()
    for name, content in files.items():
        (tmp_path / "delta" / name).write_bytes(content)
    return tmp_path / "delta"


def test_a_thousand_mutants(tmp_path):
    fuzzer = fuzz.Fuzzer(tmp_path, seed=1)
    counts, findings = fuzzer.many(range(1000))
    assert findings == []
    assert sum(counts.values()) == 1000
    # The mutations bite, and what they leave whole is read.
    assert counts["refused: ArtifactError"] > 700
    assert counts["exactly the original"] > 20
    assert counts["forged: what its own checksums say"] > 5


def test_a_mutant_can_be_made_again(tmp_path):
    files = originals.make(tmp_path)[1][1]
    spoiled = []
    for _ in range(2):
        copy, draw = dict(files), Random("0:7")
        mutate.mutate(copy, draw)
        mutate.mend(copy)
        spoiled.append(copy)
    assert spoiled[0] == spoiled[1] != files


def test_the_fuzzer_finds_what_a_careless_reader_lets_through(tmp_path, monkeypatch):
    fuzzer = fuzz.Fuzzer(tmp_path, seed=1)

    def flip_codes(files, draw):
        name = next(name for name in files if name.endswith(".safetensors"))
        content = bytearray(files[name])
        content[draw.randrange(len(content) - 60, len(content))] ^= 1
        files[name] = bytes(content)
        return ["flip_codes"]

    monkeypatch.setattr(fuzz, "mutate", flip_codes)
    assert fuzzer.many(range(40))[1] == []
    monkeypatch.setattr(Artifact, "verify_bytes", lambda self: None)
    _, findings = fuzzer.many(range(40))
    assert "other values in silence" in {finding["finding"] for finding in findings}
    monkeypatch.undo()
    monkeypatch.setattr("deltacome.format.manifest._check_record", lambda *args: None)
    _, findings = fuzzer.many(range(600))
    assert any(finding["finding"].startswith("crash") for finding in findings)


def test_json_beyond_the_limit_is_not_read(folder):
    with (folder / "delta_config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="expected at most"):
        Artifact.open(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", ".", "delta_config.json", "nowhere"])
def test_links_in_place_of_the_manifest(folder, target):
    (folder / "delta_config.json").unlink()
    (folder / "delta_config.json").symlink_to(target)
    with pytest.raises(ArtifactError, match=r"expected a file delta_config\.json"):
        Artifact.open(folder)


def test_a_pipe_is_not_waited_for(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=f"{SHARD} is missing"):
        Artifact.open(folder)
    assert time.monotonic() - start < 5


def test_a_cache_of_links_is_read(folder, tmp_path):
    """The Hub's cache holds links to content-addressed files."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    Artifact.open(linked).verify_bytes()


def test_a_shard_that_declares_more_than_it_holds(folder):
    header = {"x": {"dtype": "F64", "shape": [1 << 31, 1 << 20], "data_offsets": [0, 1 << 54]}}
    text = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    mutate.mend(files)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        Artifact.open(folder)


def test_reading_imports_no_code_of_the_artifact(folder, tmp_path, monkeypatch):
    """Files that would be code are not even listed, though the configuration names them."""
    marker = tmp_path / "ran"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    asks = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config = json.loads(files["tuned_config.json"]) | {"auto_map": asks, "num_attention_heads": 7}
    files["tuned_config.json"] = json.dumps(config).encode()
    mutate.mend(files)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    verify(folder)
    tuned = parse_config(json.loads(Artifact.open(folder).file("tuned_config.json")))
    make_skeleton(tuned, torch.float32, folder)
    assert not marker.exists()
