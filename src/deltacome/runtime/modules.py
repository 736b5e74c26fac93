"""The forward of a layer whose weight has deltas: one tenant's, or several tenants' side by side.

A module gets another `forward` on the instance, not a forward hook: code that torch.compile made
before the delta was attached does not look at hooks again and would silently serve the base, while
an instance's `forward` is guarded. Other people's hooks also see the tuned output this way. The cost:
a deep copy of an attached model would call the original's modules, so it is refused.

Legend: T tokens, I in, O out, N added rows, S slots, H size of a norm.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.errors import UnsupportedError
from deltacome.ops.bands import band_rows, bands
from deltacome.ops.norm import norm
from deltacome.ops.signs import sign_rows, signs
from deltacome.ops.slots import BandTable, SignTable
from deltacome.runtime.choice import Choice

Forward = Callable[[Tensor], Tensor]
HOOKED = "_old_forward"
"""Where accelerate's hooks keep the forward that they wrap."""


@dataclass(frozen=True)
class Tables:
    """What the tenants change in a matrix, as the ops read it."""

    bands: BandTable | None
    signs: SignTable | None

    def add(self, y: Tensor, x: Tensor, choice: Choice, impl: str) -> Tensor:
        """`y` with the deltas of its rows added, in place where `y` can be viewed as a matrix."""
        y_TO, x_TI = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = choice.rows(x, x_TI.shape[0])
        if self.bands is not None:
            bands(y_TO, x_TI, rows, self.bands, impl=impl)
        if self.signs is not None:
            signs(y_TO, x_TI, rows, self.signs, impl=impl)
        return y_TO.view(y.shape)

    def add_rows(self, y: Tensor, ids: Tensor, choice: Choice, scale: float, impl: str) -> Tensor:
        """`y`, rows of an embedding, with `scale` times the rows' deltas added, in place likewise."""
        y_TI, ids_T = y.reshape(-1, y.shape[-1]), ids.reshape(-1)
        rows = choice.rows(ids, ids_T.shape[0])
        if self.bands is not None:
            band_rows(y_TI, ids_T, rows, self.bands, scale=scale, impl=impl)
        if self.signs is not None:
            sign_rows(y_TI, ids_T, rows, self.signs, scale=scale)
        return y_TI.view(y.shape)


def own_forward(module: Any) -> Forward:
    """The forward of a module, without what an accelerate hook does before and after it."""
    return vars(module).get(HOOKED, module.forward)


def set_forward(stack: contextlib.ExitStack, module: Any, forward: Any) -> None:
    """Gives a module another forward on the instance, until the stack unwinds.

    An accelerate hook calls the forward that it found, and puts it back when it is removed. So where
    there is a hook, that forward is the one to replace.
    """
    attr = HOOKED if HOOKED in vars(module) else "forward"
    before = vars(module).get(attr)
    setattr(module, attr, forward)
    stack.callback(_unset_forward, module, forward, before)


def _unset_forward(module: Any, forward: Any, before: Any) -> None:
    for attr in (HOOKED, "forward"):  # wherever hooks added or removed since have put it
        if vars(module).get(attr) is not forward:
            continue
        if before is None and attr == "forward":
            delattr(module, attr)
        else:
            setattr(module, attr, before or type(module).forward.__get__(module))


def tuned_linear(
    base: Forward,
    packed: Tables | None,
    added_NI: Tensor | None,
    bias_SO: Tensor | None,
    choice: Choice,
    impl: str,
) -> Forward:
    """`x Wᵀ` + the packed terms of each row's tenant, + columns for rows that were added.

    Args:
        base: the module's own forward.
        packed: the packed terms, or None.
        added_NI: rows appended to those of the base, in the module's dtype, or None.
        bias_SO: tuned bias minus the base's for each slot, and a last row for no slot; or None. It is
            added to an output that has already been rounded with the base's bias.
        choice: the tenants of the rows.
        impl: implementation of the ops.
    """

    def forward(input: Tensor) -> Tensor:
        y = base(input)
        if choice.idle:
            return y
        input = input.to(y.device)  # `base` may have been given it on another GPU
        if packed is not None:
            y = packed.add(y, input, choice, impl)
        if bias_SO is not None:
            slot_T = choice.rows(input, input.numel() // input.shape[-1]).slot_T
            # Slot −1 finds the last row, which is zero.
            y = y + bias_SO[slot_T.long()].view(y.shape).to(y.dtype)
        if added_NI is not None:
            y = torch.cat([y, nn.functional.linear(input, added_NI)], -1)
        return y

    return forward


def tuned_embedding(
    base: Forward,
    packed: Tables | None,
    added_NI: Tensor | None,
    rows: int,
    scale: float,
    choice: Choice,
    impl: str,
) -> Forward:
    """Rows of the base + rows of the packed terms; ids from `rows` on are rows that were added.

    Args:
        base: the module's own forward.
        packed: the packed terms, or None.
        added_NI: rows appended to those of the base, in the module's dtype, or None.
        rows: rows of the base.
        scale: what the module multiplies its rows by.
        choice: the tenants of the rows.
        impl: implementation of the ops.
    """
    if added_NI is not None:
        added_NI = (added_NI.float() * scale).to(added_NI.dtype)

    def forward(input: Tensor) -> Tensor:
        if choice.idle:
            return base(input)
        # The base's table ends before the added ids: they look up row 0 and are replaced below.
        ids = input if added_NI is None else torch.where(input < rows, input, 0)
        y = base(ids)
        input, ids = input.to(y.device), ids.to(y.device)
        if packed is not None:
            y = packed.add_rows(y, ids, choice, scale, impl)
        if added_NI is not None:
            added = nn.functional.embedding((input - rows).clamp(min=0), added_NI)
            y = torch.where((input < rows)[..., None], y, added.to(y.dtype))
        return y

    return forward


def tuned_norm(base: Forward, weights_SH: Tensor, eps: float, choice: Choice, impl: str) -> Forward:
    """The RMS norm of each row with its own tenant's weight.

    Args:
        base: the module's own forward.
        weights_SH: float32, each slot's weight as it multiplies, with any offset added.
        eps: of the norm.
        choice: the tenants of the rows.
        impl: implementation of the ops.
    """

    def forward(input: Tensor) -> Tensor:
        y = base(input)
        if choice.idle:
            return y
        x_TH, y_TH = input.reshape(-1, input.shape[-1]), y.reshape(-1, y.shape[-1])
        norm(y_TH, x_TH, choice.rows(input, len(x_TH)), weights_SH, eps, impl=impl)
        return y_TH.view(y.shape)

    return forward


@torch.no_grad()
def embedding_scale(name: str, module: nn.Embedding) -> float:
    """The factor between an embedding's output and its rows, found by looking some of them up.

    Some models multiply in the module (Gemma: by the square root of the hidden size), each by an
    attribute of another name.

    Raises:
        UnsupportedError: the output is not a multiple of the row.
    """
    weight = module.weight
    count = min(len(weight), 64)
    ids = torch.linspace(0, len(weight) - 1, count, device="cpu").long().to(weight.device)
    row = weight[ids]
    try:
        got = module(ids)
    except Exception:  # a model's own code: BART's and OPT's tables of positions take no ids
        got = ids
    if torch.equal(got, row):
        return 1.0
    if got.shape == row.shape:
        got, row = _in_double(got), _in_double(row)
        scale = float((got * row).sum() / (row * row).sum())
        # Each entry is rounded once or twice to the weight's dtype.
        error = (got - scale * row).abs() - 4 * torch.finfo(weight.dtype).eps * (scale * row).abs()
        if (error <= 1e-5 * abs(scale) * row.abs().max()).all():  # false for NaN
            return scale
    kind = type(module)
    raise UnsupportedError(
        f"{name}: expected the output of {kind.__module__}.{kind.__qualname__} to be a multiple of "
        "the weight's row, got something else: merge this artifact"
    )


@torch.no_grad()
def norm_of(name: str, module: nn.Module) -> tuple[float, float]:
    """(eps, offset) of a module that computes `x / √(mean(x²) + eps) · (w + offset)`, found by trial.

    Model families name their norms as they like, and Gemma's adds 1 to its weight.

    Raises:
        UnsupportedError: the module computes something else.
    """
    weight: Any = module.weight
    weight_H = _in_double(weight.detach())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # One that takes a gate too (Mamba 2's) is an RMS norm only without it.
    alone = len(inspect.signature(type(module).forward).parameters) == 2
    if alone and isinstance(eps, float) and weight_H.dim() == 1:
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(8, len(weight_H), generator=generator, device="cpu").to(weight.dtype)
        got, x = _in_double(module(x.to(weight.device))), _in_double(x)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            expected = normed * (weight_H + offset)
            bound = 4 * torch.finfo(weight.dtype).eps * expected.abs() + 1e-6 * expected.abs().max()
            if got.shape == expected.shape and ((got - expected).abs() <= bound).all():
                return eps, offset
    kind = type(module)
    raise UnsupportedError(
        f"{name}: with several tenants, expected an RMS norm, got "
        f"{kind.__module__}.{kind.__qualname__}: attach this artifact alone, or merge it"
    )


def _in_double(values: Tensor) -> Tensor:
    """In float64, on the CPU: not every GPU has that dtype."""
    return values.cpu().double()
