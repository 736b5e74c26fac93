"""What a model is made of, read off its module tree: blocks, matrices, embedding, head.

No family is named here. The blocks that hidden states pass are the largest `ModuleList` of one class;
which linears share an input is found by running one block and watching what its linears are fed. A
table of names per family would run faster but would be wrong for the next model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltacome.arch.bypassed import bypassed, part_of
from deltacome.errors import UnsupportedError


@dataclass(frozen=True)
class Layout:
    """Names are those of parameters and modules in the model, e.g. `model.layers.0`."""

    blocks: dict[str, nn.Module]
    """Blocks of the largest list by name, in the order in which hidden states pass them."""
    side_blocks: dict[str, nn.Module]
    """Blocks of other lists: a vision tower's, an encoder's beside a decoder."""
    embedding: str | None
    """The input embedding's weight."""
    head: str | None
    """The output head's weight (under the name it has when it is not tied)."""
    matrices: frozenset[str]
    """Weights of all linears and embeddings that are called: what is worth compressing. Any other
    parameter, whatever its shape, is stored exactly."""
    transposed: frozenset[str]
    """Those of them that are (in, out), since their layer computes `x @ weight`: GPT-2's `Conv1D`."""


def find_layout(model: nn.Module) -> Layout:
    """Reads the layout of a model (its weights may be on the meta device).

    Raises:
        UnsupportedError: there is no list of blocks.
    """
    (longest, first), *others = _lists(model)
    matrices = {
        f"{path}.weight": module for path, module in model.named_modules() if _is_matrix(module)
    }
    for name in bypassed(model):
        matrices.pop(name, None)
    return Layout(
        {f"{longest}.{i}": block for i, block in enumerate(first)},
        {f"{name}.{i}": block for name, blocks in others for i, block in enumerate(blocks)},
        _weight_of(model, "get_input_embeddings"),
        _weight_of(model, "get_output_embeddings"),
        frozenset(matrices),
        frozenset(name for name, module in matrices.items() if _is_conv1d(module)),
    )


def linears_of(name: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linears below a block that are called, with their full names."""
    passed_by = bypassed(block)
    return [
        (f"{name}.{path}", module)
        for path, module in block.named_modules()
        if (isinstance(module, nn.Linear) or _is_conv1d(module))
        and f"{path}.weight" not in passed_by
    ]


def inputs_of(linear: nn.Module) -> int:
    """Number of input features of a linear."""
    weight: Any = linear.weight
    return weight.shape[0] if _is_conv1d(linear) else weight.shape[1]


def shared_inputs(
    linears: Iterable[tuple[str, nn.Module]], run: Callable[[], Any]
) -> list[list[str]]:
    """Groups linears that read the same tensor, in the order in which they are called.

    q, k and v form one group, gate and up another: one gram serves a group, and a group is compressed
    before the next one sees its inputs.

    Args:
        linears: those of one block, by name.
        run: calls the block once.

    Raises:
        UnsupportedError: a linear is never called, or called twice.
    """
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable:
        # The inputs are kept alive, so that no two of them can share an address.
        return lambda module, args: calls.append((name, args[0]))

    linears = list(linears)
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    called = [name for name, _ in calls]
    for name, _ in linears:
        if called.count(name) != 1:
            raise UnsupportedError(
                f"{name}: expected to be called once in its block, was called {called.count(name)} "
                "times: the order of compression is unknown"
            )
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in calls:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Outermost lists of blocks of one class, the one with the most parameters first."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if inside or not isinstance(module, nn.ModuleList):
            continue
        if len({type(block) for block in module}) == 1 and list(module[0].children()):
            lists.append((name, module))
    if not lists:
        raise UnsupportedError(f"{type(model).__name__}: expected a list of blocks, found none")
    return sorted(lists, key=lambda item: -sum(p.numel() for p in item[1].parameters()))


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear with an (in, out) weight, told by its class's name in transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight_of(model: nn.Module, getter: str) -> str | None:
    module = part_of(model, getter)
    for name, candidate in model.named_modules():
        if candidate is module and isinstance(getattr(module, "weight", None), Tensor):
            return f"{name}.weight"
    return None
