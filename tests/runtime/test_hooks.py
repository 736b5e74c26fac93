"""Hooks of accelerate that come and go while an artifact is attached."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from artifact_helpers import random_artifact
from runtime_helpers import assert_close, load, logits, some_ids

from deltacome.runtime import attach, merge


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def hooked(model):
    hook = Counting()
    for module in model.modules():
        if next(module.children(), None) is None:
            add_hook_to_module(module, hook)
    return hook


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_they_keep_the_delta_and_leave_the_base(bases, tmp_path, before, several):
    base, ids = bases["qwen2"], some_ids()
    artifact = random_artifact(base, tmp_path / "delta")
    wanted = logits(load(merge(base, artifact, tmp_path / "merged")), ids)
    model = load(base)
    of_base = logits(model, ids)
    if before:
        hooked(model)
    with attach(model, {"a": artifact} if several else artifact) as attached:
        if several:
            attached._choice._set(0)
        hook = hooked(model)  # replaces those that were there
        assert_close(logits(model, ids), wanted)
        assert hook.calls
        remove_hook_from_submodules(model)
        assert_close(logits(model, ids), wanted)
        hooked(model)
        assert_close(logits(model, ids), wanted)
    assert torch.equal(logits(model, ids), of_base)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, ids), of_base)


def test_hooks_that_are_there_still_run_around_the_delta(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    hook = hooked(model)
    with attach(model, artifact):
        hook.calls = 0
        logits(model, some_ids())
        during = hook.calls
    logits(model, some_ids())
    assert hook.calls == 2 * during > 0
