"""Devices that are not here: another default device, and GPUs without float64."""

import pytest
import torch
from artifact_helpers import random_artifact
from runtime_helpers import CONFIGS, load, logits, some_ids

from deltacome.runtime import attach, verify
from deltacome.runtime.modules import embedding_scale, norm_of


@pytest.mark.parametrize("several", [False, True])
def test_a_default_device_of_others_changes_nothing(bases, tmp_path, several):
    artifact = random_artifact(bases["qwen2"], tmp_path / "delta", terms="mixed")
    model = load(bases["qwen2"])
    tenants = {"a": artifact} if several else artifact
    with attach(model, tenants) as attached:
        attached._choice._set(0)
        expected = logits(model, some_ids())
    with torch.device("meta"):  # stands in for a GPU
        attached = attach(model, tenants)
        verify(artifact, bases["qwen2"])
    attached._choice._set(0)
    assert torch.equal(logits(model, some_ids()), expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_gpu_is_asked_for_float64(bases, family, monkeypatch):
    double = torch.Tensor.double

    def to_cpu(tensor):
        moved = tensor.clone()
        moved.is_there = True
        return moved

    def to_double(tensor):
        assert hasattr(tensor, "is_there")
        return double(tensor)

    model = load(bases[family])
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", to_double)
    assert norm_of("norm", model.model.norm)[1] == ("gemma" in family)
    assert embedding_scale("embedding", model.model.embed_tokens) > 0
