import dataclasses
import hashlib
import json

import pytest
import torch
from artifact_helpers import TERMS, random_artifact
from runtime_helpers import make_base
from safetensors.torch import load_file, save_file

from deltacome.errors import ArtifactError, CheckpointError, MismatchError
from deltacome.format.artifact import Artifact
from deltacome.format.codec import read_bands, read_signs
from deltacome.format.spec import band_sections
from deltacome.runtime import verify

NAME = "model.layers.0.mlp.up_proj.weight"


def rewrite(artifact, change):
    """Changes entries and makes checksums fit again, as a faulty writer would."""
    file = next(artifact.path.glob("*.safetensors"))
    entries = load_file(file)
    change(entries)
    save_file(entries, file, metadata={"format": "deltacome"})
    manifest = artifact.manifest
    info = dataclasses.replace(
        manifest.shards[file.name], sha256=hashlib.sha256(file.read_bytes()).hexdigest()
    )
    manifest = dataclasses.replace(manifest, shards={file.name: info})
    text = manifest.to_json()
    (artifact.path / "delta_config.json").write_text(text)
    index = json.loads((artifact.path / "delta.safetensors.index.json").read_text())
    index["metadata"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (artifact.path / "delta.safetensors.index.json").write_text(json.dumps(index))
    return Artifact.open(artifact.path)


def bands_of(artifact, entries):
    record = artifact.manifest.records[NAME]
    blob = entries[f"{NAME}.bands"]
    return read_bands(blob, record.bands_shape, record.plan, artifact.manifest.group_size)


def test_summary(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    alone = verify(artifact.path)
    assert alone.tensors == len(artifact.manifest.records)
    assert alone.nbytes == artifact.bytes_on_disk()
    assert (alone.base_tensors, alone.base_nbytes) == (0, 0)
    both = verify(artifact, bases["llama"])
    assert both.base_tensors == alone.tensors
    header = 8 + int.from_bytes((bases["llama"] / "model.safetensors").read_bytes()[:8], "little")
    assert both.base_nbytes == (bases["llama"] / "model.safetensors").stat().st_size - header


@pytest.mark.parametrize("terms", TERMS)
def test_grown_and_untied(bases, tmp_path, terms):
    artifact = random_artifact(
        bases["llama-tied"], tmp_path / "delta", vocab=140, tie=False, terms=terms
    )
    result = verify(artifact, bases["llama-tied"])
    assert result.base_tensors == result.tensors - 1  # the embedding is compared once


@pytest.mark.parametrize("name", ["delta-00001-of-00001.safetensors", "tuned_config.json"])
def test_flipped_byte(bases, tmp_path, name):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    content = bytearray((artifact.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact.path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: expected SHA-256"):
        verify(artifact.path)


def test_wrong_base(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    make_base("llama", tmp_path / "base")
    verify(artifact, tmp_path / "base")  # made from the same seed
    file = tmp_path / "base" / "model.safetensors"
    entries = load_file(file)
    entries[NAME][3, 5] += 1e-6
    save_file(entries, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=rf"{NAME}: wrong base"):
        verify(artifact, tmp_path / "base")


def test_base_of_another_shape(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    config = json.loads((bases["llama"] / "config.json").read_text())
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries = load_file(bases["llama"] / "model.safetensors")
    entries[NAME] = entries[NAME].T.contiguous()
    save_file(entries, folder / "model.safetensors")
    with pytest.raises(MismatchError, match=r"expected shape \(80, 48\), got \(48, 80\)"):
        verify(artifact, folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["v.values", "u.values", "v.scale", "u.scale", "s"])
def test_numbers_that_are_not_finite(bases, tmp_path, part, number):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    side, _, field = part.partition(".")

    def change(entries):
        band = bands_of(artifact, entries)[0 if field == "values" else 2]
        numbers = band.s if part == "s" else getattr(getattr(band, side), field)
        numbers.view(-1)[-1] = number

    named = "s" if part == "s" else side.upper()
    with pytest.raises(ArtifactError, match=rf"{NAME}: band \d \(.*\): {named}: .*finite"):
        verify(rewrite(artifact, change))


def test_exact_value_that_is_not_finite(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")

    def change(entries):
        entries["model.norm.weight.exact"][7] = torch.nan

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of the artifact"):
        verify(rewrite(artifact, change))


@pytest.mark.parametrize("band", range(1, 6))
@pytest.mark.parametrize("side", ["v", "u"])
def test_padding_codes_that_are_not_zero(bases, tmp_path, band, side):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")

    def change(entries):
        factor = getattr(bands_of(artifact, entries)[band], side)
        factor.planes[-1][-1, -1] |= -(1 << 31)  # the last code of the last block

    with pytest.raises(ArtifactError, match=rf"{NAME}: band {band} .*{side.upper()}: .*zero codes"):
        verify(rewrite(artifact, change))


def test_gap_that_is_not_zero(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    record = artifact.manifest.records[NAME]
    bands, nbytes = band_sections(record.bands_shape, record.plan, artifact.manifest.group_size)
    last = bands[-1][-1]
    assert last.offset + last.nbytes < nbytes

    def change(entries):
        entries[f"{NAME}.bands"][-1] = 1

    with pytest.raises(
        ArtifactError, match=rf"{NAME}: bands: expected zero bytes between sections"
    ):
        verify(rewrite(artifact, change))


@pytest.fixture
def signed(bases, tmp_path):
    """An artifact, and the name and record of a matrix with signs whose blob has gaps."""
    artifact = random_artifact(bases["llama"], tmp_path / "delta", terms="mixed")
    records = artifact.manifest.records
    name = next(n for n, r in records.items() if r.sign_scales == 1 and r.shape[1] == 80)
    return artifact, name, records[name]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_of_signs_that_are_not_finite(signed, number):
    artifact, name, record = signed

    def change(entries):
        signs = read_signs(entries[f"{name}.signs"], record.bands_shape, record.sign_scales)
        signs.scale[-1] = number

    with pytest.raises(ArtifactError, match=rf"{name}: signs: scales: .*finite"):
        verify(rewrite(artifact, change))


def test_signs_behind_the_last_column(signed):
    artifact, name, record = signed

    def change(entries):
        signs = read_signs(entries[f"{name}.signs"], record.bands_shape, record.sign_scales)
        signs.words[-1, -1] |= -(1 << 31)

    with pytest.raises(ArtifactError, match=rf"{name}: signs: expected zero codes"):
        verify(rewrite(artifact, change))


def test_gap_behind_the_scales_of_signs(signed):
    artifact, name, _ = signed

    def change(entries):
        entries[f"{name}.signs"][-1] = 1

    with pytest.raises(ArtifactError, match=rf"{name}: signs: expected zero bytes"):
        verify(rewrite(artifact, change))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_two_records_that_contradict_each_other(bases, tmp_path, name):
    """Both are of one tensor of the base: one of their fingerprints is not that tensor's."""
    artifact = random_artifact(bases["llama-tied"], tmp_path / "delta", tie=False)
    records = artifact.manifest.records
    assert records[name].base_name == "model.embed_tokens.weight"
    records[name] = dataclasses.replace(records[name], base_digest="0" * 32)
    with pytest.raises(MismatchError, match="wrong base"):
        verify(artifact, bases["llama-tied"])
