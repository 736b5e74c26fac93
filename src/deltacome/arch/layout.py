"""What a model is made of, read off its module tree: decoder blocks, linears, embedding, head.

No family is named here. The blocks are the longest `ModuleList` of one class; which linears share an
input is seen by running one block and watching what its linears are fed. A table of names per family
would be shorter to run and would be wrong for the next model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltacome.errors import MismatchError, UnsupportedError


@dataclass(frozen=True)
class Layout:
    """Names are those of parameters and modules in the model, e.g. `model.layers.0`."""

    blocks: dict[str, nn.Module]
    """Decoder blocks by name, in the order in which hidden states pass them."""
    embedding: str
    """The input embedding's weight."""
    head: str
    """The output head's weight (the name it has where it is not tied)."""
    linears: tuple[str, ...]
    """Weights of all linears inside of blocks."""
    other_matrices: tuple[str, ...]
    """Embedding, head, and weights of linears and embeddings outside of blocks."""


def find_layout(model: nn.Module) -> Layout:
    """Reads the layout of a causal language model (its weights may be on the meta device).

    Raises:
        UnsupportedError: there is no list of blocks, embedding or head, or a block has a matrix
            that is not the weight of a linear.
    """
    name, blocks = _longest_list(model)
    names = {f"{name}.{i}": block for i, block in enumerate(blocks)}
    linears = []
    for block_name, block in names.items():
        linears += [f"{path}.weight" for path, _ in linears_of(block_name, block)]
        _check_matrices(block_name, block)
    embedding = _module_name(model, "get_input_embeddings")
    head = _module_name(model, "get_output_embeddings")
    inside = set(linears)
    matrices = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and f"{path}.weight" not in inside
    ]
    return Layout(names, f"{embedding}.weight", f"{head}.weight", tuple(linears), tuple(matrices))


def linears_of(name: str, block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears below a block, with their full names."""
    return [
        (f"{name}.{path}", module)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def shared_inputs(
    linears: Iterable[tuple[str, nn.Linear]], run: Callable[[], Any]
) -> list[list[str]]:
    """Groups linears that read the same tensor, in the order in which they are called.

    q, k and v fall into one group, gate and up into another: one gram serves a group, and a group
    is compressed before the next one sees its inputs.

    Args:
        linears: of one block, by name.
        run: calls the block once.

    Raises:
        UnsupportedError: a linear is never called, or called twice.
    """
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable:
        # The inputs are held on to, so that no two of them can share an address.
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


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], head: str) -> None:
    """Every parameter of the model has its tensor in the checkpoint (a tied head may lack one).

    Args:
        shapes: of the checkpoint's tensors, by name.

    Raises:
        MismatchError: lists what is missing or names what has another shape; the model's code or
            configuration and the checkpoint disagree.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - shapes.keys() - {head})
    if missing:
        raise MismatchError(
            f"{len(missing)} parameters of {type(model).__name__} are not in the checkpoint, "
            f"the first is {missing[0]}"
        )
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            raise MismatchError(
                f"{name}: the configuration gives shape {shape}, the checkpoint has {shapes[name]}"
            )


def _longest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UnsupportedError(
            f"{type(model).__name__}: expected a list of decoder blocks, found none"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _check_matrices(name: str, block: nn.Module) -> None:
    for path, module in block.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not isinstance(module, nn.Linear):
                raise UnsupportedError(
                    f"{name}.{path}.{attribute}: expected matrices of nn.Linear only, "
                    f"got shape {tuple(parameter.shape)} in {type(module).__name__}"
                )


def _module_name(model: nn.Module, getter: str) -> str:
    module = getattr(model, getter, lambda: None)()
    for name, candidate in model.named_modules():
        if candidate is module and isinstance(getattr(module, "weight", None), Tensor):
            return name
    raise UnsupportedError(f"{type(model).__name__}.{getter}(): expected a module with a weight")
