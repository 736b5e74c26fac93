"""The forward of a linear layer or an embedding whose weight has a delta.

A module gets another `forward` on the instance, not a forward hook: code that torch.compile made
before the delta was attached does not look at hooks again and would serve the base in silence,
while an instance's `forward` is guarded. Hooks of other people also see the tuned output this way.
What it costs: a deep copy of an attached model still calls the original's modules.

Legend: T tokens, I in, O out, N added rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacome.errors import UnsupportedError
from deltacome.format.spec import Plan
from deltacome.ops.bands import band_rows, bands

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """A bands term in memory, as the ops read it."""

    blob: Tensor
    """uint8 (nbytes,)."""
    shape: tuple[int, int]
    """(out, in)."""
    plan: Plan
    group_size: int


def tuned_linear(
    base: Forward, packed: Packed | None, added_NI: Tensor | None, impl: str
) -> Forward:
    """`x Wᵀ` + the bands of the rows that base and tuned share, + columns for rows that were added.

    Args:
        base: the module's own forward.
        packed: the bands, or None.
        added_NI: rows below those of the base, in the module's dtype, or None.
        impl: implementation of the op.
    """

    def forward(input: Tensor) -> Tensor:
        y = base(input)
        if packed is not None:
            y_TO = y.reshape(-1, y.shape[-1])
            x_TI = input.reshape(-1, input.shape[-1])
            bands(y_TO, x_TI, packed.blob, packed.plan, packed.group_size, impl=impl)
            y = y_TO.view(y.shape)
        if added_NI is not None:
            y = torch.cat([y, nn.functional.linear(input, added_NI)], -1)
        return y

    return forward


def tuned_embedding(
    base: Forward,
    packed: Packed | None,
    added_NI: Tensor | None,
    rows: int,
    scale: float,
    impl: str,
) -> Forward:
    """Rows of the base + rows of the bands; ids from `rows` on are rows that were added.

    Args:
        base: the module's own forward.
        packed: the bands, or None.
        added_NI: rows below those of the base, in the module's dtype, or None.
        rows: rows of the base.
        scale: what the module multiplies its rows by.
        impl: implementation of the op.
    """
    if added_NI is not None:
        added_NI = (added_NI.float() * scale).to(added_NI.dtype)

    def forward(input: Tensor) -> Tensor:
        # The base's table ends before the added ids: they look up row 0 and are replaced below.
        ids = input if added_NI is None else torch.where(input < rows, input, 0)
        y = base(ids)
        if packed is not None:
            y_TI = y.reshape(-1, y.shape[-1])
            band_rows(
                *(y_TI, ids.reshape(-1), packed.blob, packed.shape[0], packed.plan),
                packed.group_size,
                scale=scale,
                impl=impl,
            )
            y = y_TI.view(y.shape)
        if added_NI is not None:
            added = nn.functional.embedding((input - rows).clamp(min=0), added_NI)
            y = torch.where((input < rows)[..., None], y, added.to(y.dtype))
        return y

    return forward


@torch.no_grad()
def embedding_scale(name: str, module: nn.Embedding) -> float:
    """The factor between an embedding's output and its rows, found by asking for some of them.

    Some models multiply in the module (Gemma: the square root of the hidden size), under a name
    that each chooses.

    Raises:
        UnsupportedError: the output is no multiple of the row.
    """
    weight = module.weight
    ids = torch.linspace(0, len(weight) - 1, min(len(weight), 64)).long().to(weight.device)
    got, row = module(ids), weight[ids]
    if torch.equal(got, row):
        return 1.0
    if got.shape == row.shape:
        got, row = got.double(), row.double()
        scale = float((got * row).sum() / (row * row).sum())
        # Each entry is rounded once or twice to the weight's dtype.
        error = (got - scale * row).abs() - 4 * torch.finfo(weight.dtype).eps * (scale * row).abs()
        if (error <= 1e-5 * abs(scale) * row.abs().max()).all():  # false for NaN
            return scale
    kind = type(module)
    raise UnsupportedError(
        f"{name}: expected the output of {kind.__module__}.{kind.__qualname__} to be a multiple of "
        "the weight's row, got something else"
    )
