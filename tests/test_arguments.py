"""Arguments in every form that users give: names or torch objects, paths or strings; else a refusal."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "compression"))
from tiny_pairs import make_pair, text_lines, tree

import deltacome
from deltacome.compression.search import find_template
from deltacome.device import pick_device, pick_dtype
from deltacome.errors import DeltaError, DeviceError

HOW = {"ratio": 4, "samples": 4, "seq_len": 12}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("small", tmp_path_factory.mktemp("arguments"))


def test_compress_takes_both(pair, tmp_path):
    text = tmp_path / "c.txt"
    text.write_text("\n".join(text_lines(8)))
    deltacome.compress(
        *pair, tmp_path / "a", calibration=str(text), device="cpu", dtype="float32", **HOW
    )
    more = {"device": torch.device("cpu"), "dtype": torch.float32}
    deltacome.compress(*pair, tmp_path / "b", calibration=text, **more, **HOW)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        (
            "method",
            "adaptive",
            r"method: expected one such as deltacome\.DeltaCome\(\), got 'adaptive'",
        ),
        ("method", deltacome.DeltaCome, "method: expected one such as"),
        ("dtype", torch.int8, "dtype: expected auto, float32"),
        ("dtype", 16, "dtype: expected auto, float32"),
        ("device", torch.device("meta"), "device: expected .* got 'meta'"),
        ("device", 7.5, "device: expected .* got '7.5'"),
    ],
)
def test_what_compress_cannot_take_leaves_nothing(pair, tmp_path, option, value, why):
    with pytest.raises(DeltaError, match=why):
        deltacome.compress(*pair, tmp_path / "a", calibration="none", **HOW | {option: value})
    assert not list(tmp_path.iterdir())


def test_a_device_without_float64_is_refused(pair, tmp_path, monkeypatch):
    zeros = torch.zeros

    def of_apple(*shape, dtype=None, **more):
        if dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return zeros(*shape, dtype=dtype, **more)

    monkeypatch.setattr(torch, "zeros", of_apple)
    assert pick_device("cpu") == "cpu"
    with pytest.raises(DeviceError, match=r"with torch\.float64, got 'cpu': the MPS framework"):
        pick_device("cpu", doubles=True)
    with pytest.raises(DeviceError, match=r"torch\.float64"):
        deltacome.compress(*pair, tmp_path / "a", device="cpu", calibration="none", **HOW)
    with pytest.raises(DeviceError, match=r"torch\.float64"):
        find_template(*pair, 4, device="cpu")


def test_dtypes():
    assert pick_dtype("bfloat16") == pick_dtype(torch.bfloat16) == torch.bfloat16
    for wrong in ("float99", "nn", 16, None):
        with pytest.raises(DeltaError, match="dtype: expected the name of a torch dtype, got"):
            pick_dtype(wrong)


def test_what_takes_a_dtype_takes_its_name(pair, tmp_path):
    artifact = deltacome.compress(*pair, tmp_path / "a", calibration="none", **HOW)
    for dtype in ("float16", torch.float16):
        assert deltacome.base_for(pair[0], artifact, dtype=dtype).dtype == torch.float16
        said = deltacome.export_lora(artifact, tmp_path / f"{dtype}", dtype=dtype, lora_only=True)
        assert said.ranks
    with pytest.raises(DeltaError, match="float99"):
        deltacome.base_for(pair[0], artifact, dtype="float99")
    with pytest.raises(DeltaError, match="float99"):
        deltacome.export_lora(artifact, tmp_path / "c", dtype="float99")


def test_the_sources_alone_have_no_number(pair, tmp_path, monkeypatch, cli):
    """As when the sources are on the path and no distribution is installed."""
    ask = deltacome.importlib.metadata.version

    def version(name):
        if name == "deltacome":
            raise deltacome.importlib.metadata.PackageNotFoundError(name)
        return ask(name)

    monkeypatch.setattr(deltacome.importlib.metadata, "version", version)
    artifact = deltacome.compress(*pair, tmp_path / "a", calibration="none", **HOW)
    said = json.loads((artifact.path / "delta_config.json").read_text())["provenance"]["versions"]
    assert said["deltacome"] == deltacome.__version__
    assert cli("--version") == (0, f"{deltacome.__version__}\n", "")
