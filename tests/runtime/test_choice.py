"""Overlapping `using` blocks are refused: a model has one choice."""

import asyncio
import threading

import pytest
import torch
from artifact_helpers import random_artifact
from runtime_helpers import load, logits, some_ids

from deltacome.errors import UnsupportedError
from deltacome.runtime import attach
from deltacome.runtime.choice import KEPT, Choice


def test_a_block_of_another_thread_is_refused():
    choice, said = Choice(["a", "b"], -1), []

    def other():
        try:
            with choice.using("b"):
                said.append("entered")
        except UnsupportedError as error:
            said.append(str(error))

    with choice.using("a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert choice.slots == 0
        with choice.using("b"):  # one thread's own blocks may be nested
            assert choice.slots == 1
        assert choice.slots == 0
    assert choice.idle
    assert "one thread or task at a time" in said[0]
    other()
    assert said[1:] == ["entered"]


def test_a_block_of_another_task_is_refused():
    choice = Choice(["a", "b"], -1)

    async def step(name):
        with choice.using(name):
            await asyncio.sleep(0)
            return choice.slots

    async def both():
        return await asyncio.gather(step("a"), step("b"), return_exceptions=True)

    slots, error = asyncio.run(both())
    assert slots == 0
    assert isinstance(error, UnsupportedError)
    assert choice.idle


def test_blocks_that_are_left_in_another_order(bases, tmp_path):
    tenants = {
        name: random_artifact(bases["llama"], tmp_path / name, seed=seed)
        for seed, name in enumerate("ab")
    }
    model = load(bases["llama"])
    before = logits(model, some_ids())
    with attach(model, tenants) as attached:
        first, second = attached.using("a"), attached.using("b")
        first.__enter__()
        second.__enter__()
        expected = logits(model, some_ids())
        with pytest.raises(UnsupportedError, match="the block entered last"):
            first.__exit__(None, None, None)
        assert torch.equal(logits(model, some_ids()), expected)  # the later block stays in force
        second.__exit__(None, None, None)
        assert torch.equal(logits(model, some_ids()), before)  # and the model is the base again


def test_groupings_are_forgotten_while_another_thread_forgets_them():
    class Racing(dict):
        """Another thread removes the oldest while this one goes through them."""

        def __iter__(self):
            keys = super().__iter__()
            self.pop(next(super().__iter__()))
            return keys

    choice = Choice(["a"], 0)
    choice._rows = Racing()
    for rows in range(1, 2 * KEPT + 3):
        assert choice.rows(torch.zeros(rows, 4), rows).slot_T.tolist() == rows * [0]
        assert len(choice._rows) <= KEPT
