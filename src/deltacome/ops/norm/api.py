"""The custom op `deltacome::norm`: RMS norms with the weights of each row's own tenant, in place.

A tenant's norm weights are stored exactly, a few kilobytes a layer, so there is nothing to unpack: the
rows of tenants are normalised again with their own weight, and the rows of the base keep, bit for bit,
what the engine's own norm gave them. Multiplying the engine's result by a ratio of weights would be
less work, but wrong where a weight of the base is zero.

Legend: T tokens, H size, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.errors import MismatchError
from deltacome.ops import native
from deltacome.ops.impls import check_devices, check_floats, check_impl, refuse_gradients
from deltacome.ops.norm import cpu, reference
from deltacome.ops.rows import Rows, nobody


def norm(
    y_TH: Tensor,
    x_TH: Tensor,
    rows: Rows,
    weights_SH: Tensor,
    eps: float,
    *,
    impl: str = "reference",
) -> None:
    """Writes the RMS norm of the rows that have a slot: `y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot]`.

    Rows without a slot keep every bit. Sums are float32 and rounded to y's dtype once.

    Args:
        y_TH: (T, H), float32, float16 or bfloat16 (the reference: any float dtype), any strides. Or
            (T, heads, H), each head normalised by itself.
        x_TH: likewise; the input of the norm.
        rows: the slots of the rows, from `group_rows`.
        weights_SH: float32 (S, H), each slot's weight (as it multiplies: Gemma's with the 1 added).
        eps: added to the mean of squares.
        impl: `reference`, `cpu` or `triton`.

    Raises:
        UnsupportedError: an implementation that is unknown or cannot run here, or a tensor that
            requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
    """
    refuse_gradients(y_TH, x_TH)
    native.run("norm", y_TH, x_TH, rows.slot_T, weights_SH, eps, impl)


_library = torch.library.Library("deltacome", "FRAGMENT")
for name in ("norm", "norm_python"):  # the native library may take over the first
    _library.define(
        f"{name}(Tensor(a!) y, Tensor x, Tensor slot, Tensor weights, float eps, str impl) -> ()"
    )


@torch.library.impl(_library, "norm_python", "CompositeExplicitAutograd")
@torch.library.impl(_library, "norm", "CompositeExplicitAutograd")
@native.noting
def _norm(y: Tensor, x: Tensor, slot: Tensor, weights: Tensor, eps: float, impl: str) -> None:
    if nobody(slot):
        return
    y, x, slot = _flat(y, x, slot)
    _check(y, x, slot, weights, impl)
    if impl == "cpu":
        cpu.norm(y, x, slot, weights, eps)
    elif impl == "triton":
        from deltacome.ops.norm import triton

        triton.norm(y, x, slot, weights, eps)
    else:
        reference.norm(y, x, slot, weights, eps)


@torch.library.register_fake("deltacome::norm", lib=_library)
def _(y: Tensor, x: Tensor, slot: Tensor, weights: Tensor, eps: float, impl: str) -> None:
    _check(*_flat(y, x, slot), weights, impl)


def _flat(y: Tensor, x: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as rows. Done within the op, as `nobody` knows a buffer of slots by its address."""
    if y.dim() != 3 or y.shape != x.shape:
        return y, x, slot
    size = y.shape[2]
    return y.view(-1, size), x.reshape(-1, size), slot.repeat_interleave(y.shape[1])


def _check(y: Tensor, x: Tensor, slot: Tensor, weights: Tensor, impl: str) -> None:
    check_impl("norm", impl)
    check_floats("norm", y=y, x=x)
    check_devices("norm", y, x, slot, weights)
    if x.shape != y.shape or slot.shape != y.shape[:1] or weights.shape[1:] != y.shape[1:]:
        raise MismatchError(
            "norm: expected y and x (T, H), T slots and weights (S, H), got "
            f"{tuple(y.shape)}, {tuple(x.shape)}, {tuple(slot.shape)} and {tuple(weights.shape)}"
        )
    if weights.dtype != torch.float32:
        raise MismatchError(f"norm: expected weights of float32, got {weights.dtype}")
