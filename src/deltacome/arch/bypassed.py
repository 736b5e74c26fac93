"""Weights that a model's code multiplies by itself, without calling the layer that holds them.

Mamba's `self.dt_proj.weight @ x`, an embedding that is used as a table, the `out_proj` of torch's
`MultiheadAttention`: a delta that runs in the layer's forward would never be asked. Code is read for
that rather than run, as a tower is passed by where no picture comes. What is sometimes called and
sometimes not (CLIP's positions, interpolated for other sizes on demand) is taken for called, and so is
the input embedding, which others call by its getter (Gemma 4 reads one row of its own besides). In
training mode it may never be called: Mamba's fused kernels read the weights themselves there.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Iterator

from torch import Tensor, nn

ABOUT = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim"}
"""Asked of a weight without reading its values."""
NOT_RUN = {"init", "init_weights", "reset_parameters", "tie_weights"}
"""Functions that make a model, by name without underscores around it."""


def bypassed(model: nn.Module, *, training: bool = False) -> frozenset[str]:
    """Names of parameters that are read past their layers, `layers.0.mixer.dt_proj.weight`.

    Args:
        model: any module.
        training: also those whose layers are called at other times.
    """
    found, embedding = set(), part_of(model, "get_input_embeddings")
    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            continue
        never, sometimes = _read_by(type(module))
        for child in never | sometimes if training else never:
            name = f"{path}.{child}" if path else child
            try:
                holder = model.get_submodule(name)
            except AttributeError:
                continue
            if holder is not embedding and isinstance(getattr(holder, "weight", None), Tensor):
                found.add(f"{name}.weight")
    return frozenset(found)


def part_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What a getter of transformers' models gives: an embedding, a head; None if there is none."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


@functools.cache
def _read_by(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Paths below a module of a class whose weight its code reads: that it never calls, and others."""
    read: set[str] = set()
    called: set[str] = set()
    for one in kind.__mro__:
        if one is nn.Module:
            break
        if not issubclass(one, nn.Module):
            continue
        for function in _functions(one):
            nodes = list(ast.walk(function))
            calls = [node for node in nodes if isinstance(node, ast.Call)]
            called |= {_path(call.func) for call in calls}
            asked = {
                id(node.value)
                for node in nodes
                if isinstance(node, ast.Attribute) and node.attr in ABOUT
            }
            asked |= {id(arg) for call in calls if _is_question(call) for arg in call.args}
            weights = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == "weight"]
            read |= {
                _path(weight.value)
                for weight in weights
                if isinstance(weight.ctx, ast.Load) and id(weight) not in asked
            }
    read -= {""}
    return frozenset(read - called), frozenset(read & called)


def _functions(kind: type) -> Iterator[ast.FunctionDef]:
    """What a class's own body defines; nothing where there is no source."""
    try:
        body = _classes(inspect.getfile(kind))[kind.__qualname__]
    except (OSError, TypeError, KeyError):
        return
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") not in NOT_RUN:
            yield node


@functools.cache
def _classes(file: str) -> dict[str, list[ast.stmt]]:
    """Bodies of the classes of a file (`inspect` would parse all of it for each of them)."""
    try:
        nodes = [("", node) for node in ast.parse("".join(linecache.getlines(file))).body]
    except (SyntaxError, ValueError):
        return {}
    found = {}
    for path, node in nodes:  # which grows
        if isinstance(node, ast.ClassDef):
            found[path + node.name] = node.body
            nodes += [(f"{path}{node.name}.", inner) for inner in node.body]
    return found


def _path(node: ast.AST) -> str:
    """`mixer.dt_proj` of `self.mixer.dt_proj`; empty for what is not below `self`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _is_question(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "hasattr", "getattr")
