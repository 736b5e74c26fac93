"""Weights that a model's code uses directly, without calling the layer that holds them.

Examples are Mamba's `self.dt_proj.weight @ x`, an embedding used as a table, and the `out_proj` of
torch's `MultiheadAttention`: a delta in the layer's forward would never run. They are found by reading
the code, since running it without a picture would not reach a vision tower. A layer that is sometimes
called and sometimes not (CLIP's positions, interpolated on demand for other sizes) counts as called,
and so does the input embedding, which other code calls through its getter (Gemma 4 also reads one row
of it directly). In training mode a layer that is sometimes called may never be: Mamba's fused kernels
read the weights themselves there.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Iterator

from torch import Tensor, nn

ABOUT = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim"}
"""What can be asked of a weight without reading its values."""
NOT_RUN = {"init", "init_weights", "reset_parameters", "tie_weights"}
"""Functions that build a model, by name without the underscores around it."""


def bypassed(model: nn.Module, *, training: bool = False) -> frozenset[str]:
    """Names of parameters used without calling their layers, e.g. `layers.0.mixer.dt_proj.weight`.

    Args:
        model: any module.
        training: include those whose layers are called at other times.
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
    """What a getter of a transformers model returns (an embedding, a head); None if there is none."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


@functools.cache
def _read_by(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Layers below a module, by path, whose weights its class reads: never called, and also called."""
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
    """The functions in a class's own body that are run; none where there is no source."""
    try:
        body = _classes(inspect.getfile(kind))[kind.__qualname__]
    except (OSError, TypeError, KeyError):
        return
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") not in NOT_RUN:
            yield node


@functools.cache
def _classes(file: str) -> dict[str, list[ast.stmt]]:
    """Bodies of the classes in a file (`inspect` would parse the whole file for each of them)."""
    try:
        nodes = [("", node) for node in ast.parse("".join(linecache.getlines(file))).body]
    except (SyntaxError, ValueError):
        return {}
    found = {}
    for path, node in nodes:  # the list grows meanwhile
        if isinstance(node, ast.ClassDef):
            found[path + node.name] = node.body
            nodes += [(f"{path}{node.name}.", inner) for inner in node.body]
    return found


def _path(node: ast.AST) -> str:
    """`mixer.dt_proj` for `self.mixer.dt_proj`; empty for anything not below `self`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _is_question(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "hasattr", "getattr")
