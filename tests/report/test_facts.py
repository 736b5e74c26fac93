"""The numbers of a report, against bytes and matrices computed another way."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from artifact_helpers import PLAN
from report_helpers import SHAPE, layers, save

from deltacome.errors import ArtifactError
from deltacome.format.artifact import Artifact
from deltacome.report.facts import gather, place_of


@pytest.mark.parametrize("terms", ["bands", "rows", "one+bands"])
def test_bytes_by_kind_are_all_bytes(tmp_path, terms):
    artifact, _ = save(tmp_path / "a", layers(2), terms=terms)
    facts = gather(artifact)
    files = [f for f in artifact.path.iterdir() if f.name.startswith("delta")]
    assert facts.nbytes.total() == sum(f.stat().st_size for f in files) == facts.bytes_on_disk
    assert facts.ratio == artifact.ratio()
    assert min(facts.nbytes.values()) > 0
    assert facts.nbytes["exact"] == 14
    manifest = ("delta_config.json", "delta.safetensors.index.json")
    assert facts.nbytes["manifest"] == sum((artifact.path / n).stat().st_size for n in manifest)
    # A safetensors header says its own length.
    shards = [f for f in files if f.suffix == ".safetensors"]
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in shards)
    assert facts.nbytes["headers"] == headers
    count, (rows, columns) = len(layers(2)), SHAPE
    if "bands" in terms:
        for band in PLAN:
            expected = sum(
                b.count * b.bits * (rows + columns) // 8 for b in PLAN if b.bits == band.bits
            )
            assert facts.nbytes[str(band.bits)] == count * expected
        assert facts.nbytes["singular"] == count * 4 * sum(b.count for b in PLAN)
    signs = terms != "bands"
    assert facts.nbytes["signs"] == (count * rows * columns // 8 if signs else 0)
    groups = math.ceil(rows / 32) + math.ceil(columns / 32)
    of_bands = 3 * groups * sum(b.count for b in PLAN if b.bits < 16) if "bands" in terms else 0
    of_signs = {"bands": 0, "rows": 4 * rows, "one+bands": 4}[terms]
    assert facts.nbytes["scales"] == count * (of_bands + of_signs)
    assert facts.beside_nbytes == 4  # {} and {}: the configuration and a tokenizer


def test_places_say_what_inspect_says(tmp_path):
    artifact, parts = save(tmp_path / "a", layers(3))
    facts = gather(artifact)
    tensors = {t["name"]: t for t in artifact.describe()["tensors"] if t["kind"] != "exact"}
    assert len(facts.places) == len(tensors) == 10
    assert facts.depths == [0, 1, 2]
    assert len(facts.projections) == 3
    assert [place.projection for place in facts.outside] == ["model.embed_tokens"]
    for name, tensor in tensors.items():
        projection, depth = place_of(name)
        (place,) = (p for p in facts.of(projection) if p.depth == depth)
        assert place.nbytes.total() == tensor["bytes"]
        assert place.error == tensor["error"]
        assert place.bits == 8 * tensor["bytes"] / math.prod(tensor["shape"])
        assert place.directions == Counter({str(b): c for b, c in tensor["plan"]})
        # A direction's size, from the dense matrix that it adds.
        sizes = sorted(
            (float(torch.linalg.matrix_norm(part)) for part in parts[name]), reverse=True
        )
        np.testing.assert_allclose(place.spectrum, sizes, rtol=1e-5)


def test_experts_of_a_block_share_a_place(tmp_path):
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(4)]
    artifact, parts = save(tmp_path / "a", names)
    (place,) = gather(artifact).places
    assert (place.projection, place.depth) == ("model.layers.*.mlp.experts.up_proj", 1)
    assert place.matrices == 4
    assert place.weights == 4 * math.prod(SHAPE)
    assert place.error == pytest.approx(0.0025)
    norms = [sorted((float(part.norm()) for part in parts[name]), reverse=True) for name in names]
    np.testing.assert_allclose(place.spectrum, np.mean(norms, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.mlp.up_proj.weight", ("model.layers.*.mlp.up_proj", 11)),
        ("transformer.h.0.attn.c_attn.weight", ("transformer.h.*.attn.c_attn", 0)),
        (
            "encoder.block.3.layer.0.SelfAttention.q.weight",
            ("encoder.block.*.layer.SelfAttention.q", 3),
        ),
        ("lm_head.weight", ("lm_head", None)),
        ("layers.²", ("layers.²", None)),
        ("layers.99999999999999999999.w", ("layers.99999999999999999999.w", None)),
    ],
)
def test_places_by_name(name, place):
    assert place_of(name) == place


def test_a_damaged_artifact_is_refused(tmp_path):
    artifact, _ = save(tmp_path / "a", layers(1))
    (shard,) = artifact.path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        gather(Artifact.open(artifact.path))


def test_numbers_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    artifact, _ = save(tmp_path / "a", layers(1))
    (shard,) = artifact.path.glob("*.safetensors")
    size = int.from_bytes(shard.read_bytes()[:8], "little")
    content = bytearray(shard.read_bytes())
    header = json.loads(content[8 : 8 + size])
    start, stop = header["model.embed_tokens.weight.bands"]["data_offsets"]
    content[8 + size + start : 8 + size + stop] = b"\xff" * (stop - start)  # makes every float NaN
    shard.write_bytes(content)
    opened = Artifact.open(artifact.path)
    monkeypatch.setattr(opened, "check_bytes", lambda: None)  # as if the checksums fitted
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight: expected finite"):
        gather(opened)
