"""Bases whose linears hold their weights as another library's codes; the delta changes some of them."""

import pytest
import torch
from artifact_helpers import random_artifact, write_artifact
from runtime_helpers import assert_close, load, logits, some_ids
from torch import nn

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.runtime import attach, merge

SAME = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight")


class Codes(nn.Module):
    """A linear that holds its weight as codes, named `weight` (bitsandbytes) or otherwise (GPTQ)."""

    def __init__(self, linear, name):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name, self.bias = name, linear.bias
        codes = linear.weight.detach().contiguous().view(torch.uint8).view(-1, 1)
        if name == "weight":
            self.weight = nn.Parameter(codes.clone(), requires_grad=False)
        else:
            self.register_buffer(name, codes.clone())

    def forward(self, x):
        codes = getattr(self, self.name)
        weight = codes.view(-1).view(torch.float32).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight, self.bias)


def quantized(folder, name):
    model = load(folder)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            model.set_submodule(path, Codes(module, name))
    return model


@pytest.mark.parametrize(
    ("name", "refusal", "words"),
    [
        ("weight", UnsupportedError, "say quantized_base=True"),
        ("qweight", MismatchError, "the model lacks"),
    ],
)
def test_matrices_that_stay_the_bases(bases, tmp_path, name, refusal, words):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", same=SAME)
    merged = load(merge(bases["llama"], artifact, tmp_path / "merged"))
    model = quantized(bases["llama"], name)
    before = logits(model, some_ids())
    with attach(model, artifact, quantized_base=True):
        assert_close(logits(model, some_ids()), logits(merged, some_ids()))
    with attach(model, {"a": artifact}, quantized_base=True) as attached, attached.using("a"):
        assert_close(logits(model, some_ids()), logits(merged, some_ids()))
    assert torch.equal(logits(model, some_ids()), before)
    with pytest.raises(refusal, match=words):
        attach(model, artifact)


def test_a_base_without_a_tensor_to_know_it_by(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    record = artifact.manifest.records["lm_head.weight"]
    entries = {key: artifact._read(key) for key in record.entries(artifact.manifest.group_size)}
    head = write_artifact(tmp_path / "head", [record], entries)
    model = nn.Module()
    model.lm_head = Codes(load(bases["llama"]).lm_head, "qweight")
    with pytest.raises(MismatchError, match="nothing says which base it is"):
        attach(model, head, quantized_base=True)
