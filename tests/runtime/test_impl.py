"""Which implementation an attached model runs on."""

import pytest
import torch
from artifact_helpers import random_artifact
from runtime_helpers import load, logits, some_ids

from deltacome.errors import UnsupportedError
from deltacome.ops import native
from deltacome.runtime import attach

MISSING = UnsupportedError("impl 'cpu' was not built")


def test_auto_is_the_fastest_that_is_there(bases, tmp_path, monkeypatch):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    fastest = "reference" if native.missing() else "cpu"
    with attach(load(bases["llama"]), artifact) as attached:
        assert attached.impl == fastest
    monkeypatch.setattr(native, "missing", lambda: MISSING)
    with (
        pytest.warns(UserWarning, match="slow reference implementation: .* not built") as said,
        attach(load(bases["llama"]), artifact) as attached,
    ):
        assert attached.impl == "reference"
    assert [one.filename for one in said] == [__file__]


def test_a_named_implementation_never_falls_back(bases, tmp_path, monkeypatch):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    with attach(model, artifact, impl="reference") as attached:
        assert attached.impl == "reference"
    monkeypatch.setattr(native, "missing", lambda: MISSING)
    with pytest.raises(UnsupportedError, match="was not built"):
        attach(model, artifact, impl="cpu")
    with pytest.warns(UserWarning, match="not built"):
        attach(model, artifact).detach()  # the refusal left nothing behind


@pytest.mark.skipif(
    native.missing() is not None, reason="tests/ops/test_native.py asks for the library"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_give_the_same_model(bases, tmp_path, dtype):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"]).to(dtype)
    found = {}
    for impl in ("reference", "cpu"):
        with attach(model, artifact, impl=impl):
            found[impl] = logits(model, some_ids()).float()
    bound = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=bound, atol=bound)
