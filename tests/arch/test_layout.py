"""Layouts are read off module trees, without family names and with nothing skipped silently."""

import pytest
import torch
from torch import nn

from deltacome.arch.bypassed import bypassed
from deltacome.arch.layout import find_layout, inputs_of, linears_of, shared_inputs
from deltacome.errors import UnsupportedError


class Block(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.o = nn.Linear(size, size, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(size, 9), "down": nn.Linear(9, size)})

    def forward(self, x):
        h = self.norm(x)
        x = x + self.o(self.q(h) + self.v(h) * self.k(h))
        return x + self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    def __init__(self, blocks=None, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.project = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Block(), Block(), Block()] if blocks is None else blocks)
        self.small = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_s_parts(tied):
    layout = find_layout(Model(tied=tied))
    assert list(layout.blocks) == ["layers.0", "layers.1", "layers.2"]
    assert (layout.embedding, layout.head) == ("embed.weight", "head.weight")
    outside = {"embed.weight", "project.weight", "small.0.weight", "head.weight"}
    assert layout.matrices == outside | {
        f"layers.{i}.{name}.weight"
        for i in range(3)
        for name in ("q", "k", "v", "o", "mlp.up", "mlp.down")
    }
    assert not layout.transposed
    assert not layout.side_blocks  # a list of single linears is no list of blocks


def test_other_lists_of_blocks():
    model = Model()
    model.tower = nn.Module()
    model.tower.stages = nn.ModuleList([Block(2), Block(2)])
    model.tower.stages[0].inner = nn.ModuleList([Block(2)])  # within a block: part of it
    layout = find_layout(model)
    assert list(layout.blocks) == ["layers.0", "layers.1", "layers.2"]
    assert list(layout.side_blocks) == ["tower.stages.0", "tower.stages.1"]
    assert "tower.stages.0.inner.0.q.weight" in layout.matrices


def test_linears_that_hold_their_weight_transposed():
    class Conv1D(nn.Module):  # as transformers has it
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))

    block = Block()
    block.c = Conv1D(9, 4)
    layout = find_layout(Model([block]))
    assert layout.transposed == {"layers.0.c.weight"}
    assert "layers.0.c.weight" in layout.matrices
    assert inputs_of(block.c) == inputs_of(block.q) == 4
    assert ("b.c", block.c) in linears_of("b", block)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        assert len(find_layout(Model()).matrices) == 22


def test_a_model_without_blocks():
    model = Model()
    del model.layers, model.small
    with pytest.raises(UnsupportedError, match="Model: expected a list of blocks"):
        find_layout(model)


@pytest.mark.parametrize("getter", ["get_input_embeddings", "get_output_embeddings"])
def test_a_model_without_embedding_or_head(getter):
    model = Model()
    setattr(model, getter, lambda: None)
    layout = find_layout(model)
    assert (layout.embedding is None) == (getter == "get_input_embeddings")
    assert (layout.head is None) == (getter == "get_output_embeddings")


def test_a_matrix_that_is_no_linear_is_not_one_to_compress():
    block = Block()
    block.experts = nn.Parameter(torch.zeros(2, 4, 4))
    block.router = nn.Parameter(torch.zeros(2, 4))
    matrices = find_layout(Model([block])).matrices
    assert not any("experts" in name or "router" in name for name in matrices)


def test_linears_that_read_one_tensor_are_one_group():
    block = Block()
    groups = shared_inputs(linears_of("b", block), lambda: block(torch.randn(2, 3, 4)))
    assert groups == [["b.q", "b.v", "b.k"], ["b.o"], ["b.mlp.up"], ["b.mlp.down"]]
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_equal_inputs_that_are_not_one_tensor_are_two_groups():
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def run():
        for linear in block:
            linear(torch.zeros(1, 4))  # freed at once: the next one may lie at its address

    assert shared_inputs(linears_of("b", block), run) == [["b.0"], ["b.1"]]


@pytest.mark.parametrize(("calls", "times"), [(0, 0), (2, 2)])
def test_a_linear_that_is_not_called_once(calls, times):
    block = nn.Sequential(nn.Linear(4, 4))

    def run():
        for _ in range(calls):
            block(torch.zeros(1, 4))

    with pytest.raises(
        UnsupportedError, match=rf"b\.0: expected to be called once.* {times} times"
    ):
        shared_inputs(linears_of("b", block), run)
    assert not block[0]._forward_pre_hooks


def test_hooks_are_gone_after_an_error():
    block = Block()

    def run():
        block.q(torch.zeros(1, 4))
        raise KeyError("x")

    with pytest.raises(KeyError):
        shared_inputs(linears_of("b", block), run)
    assert not any(module._forward_pre_hooks for module in block.modules())


class Table(nn.Module):
    """Reads some of its layers' weights without calling them."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both, self.asked = (nn.Linear(4, 4) for _ in range(4))
        self.inner = Block()
        self.attention = nn.MultiheadAttention(4, 2)
        with torch.no_grad():
            self.called.weight.zero_()

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor):
            x = self.asked(x.to(self.asked.weight.dtype))
        x = self.called(x) @ self.read.weight
        return self.both(x) if x.ndim > 2 else x @ self.both.weight + self.inner.o.weight

    def reset_parameters(self):
        nn.init.normal_(self.called.weight)


class Derived(Table):
    def extra(self, x):
        return x @ self.called.weight


def test_weights_that_are_read_past_their_layers():
    passed_by = {"read.weight", "inner.o.weight", "attention.out_proj.weight"}
    assert bypassed(Table()) == passed_by
    assert bypassed(Derived()) == passed_by  # `called` is called too, by the code it inherits
    assert bypassed(Table(), training=True) == passed_by | {"both.weight"}
    assert bypassed(Derived(), training=True) == passed_by | {"both.weight", "called.weight"}
    model = Model([Table(), Table()])
    packed = find_layout(model).matrices
    assert {f"layers.0.{name}" for name in passed_by}.isdisjoint(packed)
    assert {"layers.0.called.weight", "layers.0.both.weight", "layers.1.asked.weight"} <= packed
    assert "blocks.0.read" not in dict(linears_of("blocks.0", Table()))


class Padded(Model):
    def forward(self, ids):
        return self.get_input_embeddings()(ids) + self.embed.weight[0] @ self.project.weight


def test_an_input_embedding_is_called_by_its_getter():
    assert bypassed(Padded()) == {"project.weight"}
    packed = find_layout(Padded()).matrices
    assert "embed.weight" in packed
    assert "project.weight" not in packed


def test_a_class_without_source_reads_nothing():
    kind = type("Made", (nn.Linear,), {})
    assert bypassed(nn.ModuleDict({"one": kind(2, 2)})) == frozenset()
