"""Experts whose matrices lie stacked in one parameter, each run with its own delta from packed codes.

transformers stacks what checkpoints store matrix by matrix. Its plain implementation takes the matrix of
one expert after another, `linear(x, self.gate_up_proj[expert])`, so a list stands in for the parameter,
whose elements answer to `linear` and to nothing else. The grouped products that transformers prefers
would need all tuned experts dense in memory; they come back on detach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.runtime.choice import Choice
from deltacome.runtime.match import Place
from deltacome.runtime.modules import Tables, set_forward
from deltacome.runtime.terms import Terms


@dataclass(frozen=True)
class Expert:
    """A matrix of an expert: the base's rows in runs, each run with the delta of a stored matrix."""

    parts: Sequence[tuple[Tensor, Tables | None]]
    choice: Choice
    impl: str

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if func is not nn.functional.linear or kwargs or len(args) != 2:
            raise UnsupportedError(
                f"experts: expected a plain linear with each, got {func.__name__}"
            )
        x, expert = args
        outputs = []
        for weight_OI, tables in expert.parts:
            y = nn.functional.linear(x, weight_OI)
            outputs.append(y if tables is None else tables.add(y, x, expert.choice, expert.impl))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def install_experts(
    stack: contextlib.ExitStack, places: Sequence[Place], terms: Terms, choice: Choice, impl: str
) -> None:
    """Makes a module of experts run with deltas until the stack unwinds.

    Args:
        stack: undoes each change.
        places: those of all stored matrices of the module.
        terms: those of the artifact.
        choice: the tenants of the rows.
        impl: implementation of the ops.

    Raises:
        UnsupportedError: a matrix is stored exactly.
        MismatchError: some expert's matrix is missing.
    """
    module = places[0].module
    found: dict[str, dict[tuple[int, int], Place]] = {}
    for place in places:
        if place.record.exact_rows:
            raise UnsupportedError(f"{place.record.name}: one expert stored exactly: merge instead")
        assert place.target.expert is not None
        found.setdefault(place.attr, {})[place.target.expert, place.target.part] = place
    for attr, matrices in found.items():
        parts, count = next(iter(matrices.values())).target.parts, len(getattr(module, attr))
        if len(matrices) != parts * count:
            raise MismatchError(
                f"{places[0].record.name}: expected {parts} matrices for each of {count} experts, got "
                f"{len(matrices)}"
            )
        stored = [[matrices[expert, part] for part in range(parts)] for expert in range(count)]
        rows = [
            Expert([(place.live, terms.packed([place])) for place in mine], choice, impl)
            for mine in stored
        ]
        # An attribute of the instance hides the parameter, which stays where it is.
        vars(module)[attr] = rows
        stack.callback(vars(module).pop, attr)
    kind = type(module)
    forward = getattr(kind.forward, "__wrapped__", kind.forward)
    set_forward(stack, module, forward.__get__(module))
