"""How many tenants fit: counted, and then allocated."""

import pytest
import torch
from artifact_helpers import random_artifact
from runtime_helpers import load

from deltacome.errors import MismatchError, PlanError
from deltacome.ops.slots import Pool
from deltacome.runtime import attach
from deltacome.runtime.capacity import (
    allocate,
    beside_nbytes,
    capacity,
    kv_token_nbytes,
    slot_nbytes,
)

MIB = 1 << 20


@pytest.fixture
def artifact(bases, tmp_path):
    return random_artifact(bases["llama"], tmp_path / "delta", terms="mixed")


def test_a_slot_is_what_attaching_allocates(bases, artifact, monkeypatch):
    made = []
    init = Pool.__init__

    def note(self, slots, slot_bytes, **options):
        init(self, slots, slot_bytes, **options)
        made.append(tuple(self.blobs_SN.shape))

    monkeypatch.setattr(Pool, "__init__", note)
    with attach(load(bases["llama"]), {"a": artifact, "b": artifact, "c": artifact}):
        pass
    assert made == [(3, slot_nbytes(artifact))]


def test_what_fits(bases, artifact):
    slot, beside = slot_nbytes(artifact), beside_nbytes(artifact)
    weights = sum(p.numel() * 4 for p in load(bases["llama"]).parameters())
    room = int((weights + 1000 + 5 * (slot + beside)) / 0.9) + 2
    found = capacity(bases["llama"], [artifact], device_bytes=room, kv_bytes=1000)
    assert (found.base, found.kv_cache, found.tenants) == (weights, 1000, 5)
    assert found.whole_models == (found.usable - 1000) // weights
    one_less = capacity(bases["llama"], [artifact], device_bytes=room - 10, kv_bytes=1000)
    assert one_less.tenants == 4
    with pytest.raises(PlanError, match="do not fit into"):
        capacity(bases["llama"], [artifact], device_bytes=weights)


def test_the_largest_artifact_counts(bases, artifact, tmp_path):
    small = random_artifact(bases["llama"], tmp_path / "small", same=("lm_head.weight",))
    both = capacity(bases["llama"], [small, artifact.path], device_bytes=MIB)
    assert both.slot == max(slot_nbytes(small), slot_nbytes(artifact))


def test_an_artifact_that_is_yet_to_be_made(bases):
    entries = sum(p.numel() for p in load(bases["llama"]).parameters())
    found = capacity(bases["llama"], [], device_bytes=MIB, ratio=16)
    assert entries / 8 <= found.slot < entries / 8 + 16


def test_a_cache_in_tokens(bases, artifact):
    config = load(bases["llama"]).config
    one = 2 * 2 * 2 * 12 * 2  # keys and values, layers, heads, size, bytes
    assert kv_token_nbytes(config) == one
    config.head_dim = 20  # not the hidden size ÷ heads
    assert kv_token_nbytes(config) == one * 20 / 12
    found = capacity(bases["llama"], [artifact], device_bytes=MIB, kv_bytes=5, kv_tokens=10)
    assert found.kv_cache == 5 + 10 * one


def test_whole_models_need_room_for_the_cache_too(bases, artifact):
    room = {"device_bytes": 2 * sum(4 * p.numel() for p in load(bases["llama"]).parameters())}
    for kv_bytes, models in ((0, 2), (1, 1)):
        found = capacity(bases["llama"], [artifact], **room, utilization=1, kv_bytes=kv_bytes)
        assert found.whole_models == models


def test_what_is_refused(bases, artifact):
    with pytest.raises(MismatchError, match="expected either artifacts or a ratio, got 0"):
        capacity(bases["llama"], [], device_bytes=MIB)
    with pytest.raises(MismatchError, match="expected either artifacts or a ratio, got 1"):
        capacity(bases["llama"], [artifact], device_bytes=MIB, ratio=16)
    for ratio in (0, float("inf"), float("nan")):
        with pytest.raises(PlanError, match="ratio: expected a finite number above 0"):
            capacity(bases["llama"], [], device_bytes=MIB, ratio=ratio)
    for share in (90, 0, -0.5, float("nan")):
        with pytest.raises(PlanError, match="utilization: expected a share above 0, at most 1"):
            capacity(bases["llama"], [artifact], device_bytes=MIB, utilization=share)
    wide = random_artifact(bases["llama"], artifact.path.with_name("b"))
    wide.manifest.records["model.norm.weight"].__dict__["base_shape"] = (49,)
    with pytest.raises(MismatchError, match="expected a base of shape"):
        capacity(bases["llama"], [wide], device_bytes=MIB)
    names = list(wide.manifest.records)
    nothing = random_artifact(bases["llama"], artifact.path.with_name("c"), same=names)
    with pytest.raises(PlanError, match="holds nothing"):
        capacity(bases["llama"], [nothing], device_bytes=MIB)


def test_allocated_for_real(bases, artifact):
    found = capacity(bases["llama"], [artifact], device_bytes=300 * MIB, kv_bytes=40 * MIB)
    assert found.tenants > 100
    with allocate(found, "cpu") as nbytes:
        assert nbytes == pytest.approx(found.usable, rel=0.05)
        assert torch.empty(3).numel() == 3
    huge = capacity(bases["llama"], [artifact], device_bytes=1 << 60)
    with pytest.raises(PlanError, match="the memory of"), allocate(huge, "cpu"):
        pass


def test_what_was_freed_before_is_not_taken_for_free_room(bases, artifact):
    found = capacity(bases["llama"], [artifact], device_bytes=300 * MIB, kv_bytes=40 * MIB)
    torch.ones(31 * MIB, dtype=torch.uint8)  # from now on glibc keeps freed blocks below this size
    freed = [torch.ones(30 * MIB, dtype=torch.uint8) for _ in range(4)]
    behind_them = torch.ones(1000)
    freed.clear()
    with allocate(found, "cpu") as nbytes:
        assert nbytes == pytest.approx(found.usable, rel=0.05)
    assert behind_them.numel() == 1000
