"""Two custom ops, `deltacome::signs` and `deltacome::sign_rows`: dense 1-bit deltas, in place.

They are to BitDelta's deltas (Liu et al. 2024, equation 2: `α · sign(Δ)`) what `deltacome::bands` is to
Delta-CoMe's, and built the same way: one call for all tenants, plans as data on the device, the
implementation named by the caller, no gradient.

Legend: T tokens, I in, O out (all parts), S slots, N bytes of a slot, P parts, F fields, M tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.errors import MismatchError
from deltacome.ops import native
from deltacome.ops.impls import (
    check_devices,
    check_floats,
    check_ids,
    check_impl,
    full_precision,
    refuse_gradients,
)
from deltacome.ops.rows import Rows, chosen, nobody
from deltacome.ops.signs import cpu, reference
from deltacome.ops.signs import rows as plain
from deltacome.ops.slots import SignTable


def signs(
    y_TO: Tensor, x_TI: Tensor, rows: Rows, table: SignTable, *, impl: str = "reference"
) -> None:
    """Adds each row's own signs term to the output of a linear layer, in place.

    `y[t, o] += α[o] · Σ_i (2 · code[o, i] − 1) · x[t, i]` with the signs of row t's slot. Rows without a
    slot, and rows of an empty slot, keep every bit. Sums are float32 and rounded to y's dtype once.

    Args:
        y_TO: (T, O), float32, float16 or bfloat16 (the reference: any float dtype), any strides; O is
            the sum of `table.outs`.
        x_TI: (T, I), likewise.
        rows: the slots of the rows, from `group_rows`.
        table: what the slots hold.
        impl: `reference`, `cpu` or `triton`.

    Raises:
        UnsupportedError: an implementation that is unknown or cannot run here, or a tensor that
            requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
    """
    refuse_gradients(y_TO, x_TI)
    if (y_TO.shape[1:], x_TI.shape[1:]) != ((sum(table.outs),), (table.in_size,)):
        raise MismatchError(
            f"signs: expected y (T, {sum(table.outs)}) and x (T, {table.in_size}), "
            f"got {tuple(y_TO.shape)} and {tuple(x_TI.shape)}"
        )
    native.run(
        "signs",
        *(y_TO, x_TI, rows.slot_T, rows.order_T, rows.tiles_M3),
        *(table.pool.blobs_SN, table.fields_SPF, table.outs, rows.tile, impl),
    )


def sign_rows(
    y_TI: Tensor, ids_T: Tensor, rows: Rows, table: SignTable, *, scale: float = 1.0
) -> None:
    """Adds to each row of an embedding's output its row of its own tenant's signs term, in place.

    `y[t] += scale · α[ids[t]] · (2 · code[ids[t]] − 1)` with the signs of row t's slot. Rows without a
    slot, and rows of an empty slot, keep every bit, and their ids are not looked at. Sums are float32
    and rounded to y's dtype once. There is only one implementation.

    Args:
        y_TI: (T, I), any float dtype, any strides; I is the size of an embedding.
        ids_T: int64 or int32 (T,), each in [0, `table.outs[0]`).
        rows: the slots of the rows, from `group_rows`.
        table: of one part, the embedding's matrix.
        scale: what the module multiplies its rows by.

    Raises:
        UnsupportedError: a tensor that requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
        RuntimeError: an id is out of range (a GPU asserts).
    """
    refuse_gradients(y_TI)
    if y_TI.shape[1:] != (table.in_size,) or len(table.outs) != 1:
        raise MismatchError(
            f"sign_rows: expected y (T, {table.in_size}) and a table of one part, "
            f"got {tuple(y_TI.shape)} and parts {table.outs}"
        )
    torch.ops.deltacome.sign_rows(
        *(y_TI, ids_T, rows.slot_T, table.pool.blobs_SN, table.fields_SPF),
        *(table.outs[0], scale),
    )


_library = torch.library.Library("deltacome", "FRAGMENT")
for name in ("signs", "signs_python"):  # the native library may take over the first
    _library.define(
        f"{name}(Tensor(a!) y, Tensor x, Tensor slot, Tensor order, Tensor tiles, Tensor blobs, "
        "Tensor fields, int[] outs, int tile, str impl) -> ()"
    )
_library.define(
    "sign_rows(Tensor(a!) y, Tensor ids, Tensor slot, Tensor blobs, Tensor fields, int out, "
    "float scale) -> ()"
)


@torch.library.impl(_library, "signs_python", "CompositeExplicitAutograd")
@torch.library.impl(_library, "signs", "CompositeExplicitAutograd")
@native.noting
def _signs(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    fields: Tensor,
    outs: list[int],
    tile: int,
    impl: str,
) -> None:
    if nobody(slot):
        return
    _check(y, x, slot, blobs, fields, impl)
    if impl == "cpu":
        cpu.signs(y, x, slot, blobs, fields, outs)
    elif impl == "triton":
        from deltacome.ops.signs import triton

        tiles, tile = chosen(tiles, tile, x.shape[0], blobs.shape[0], least=triton.LEAST)
        triton.signs(y, x, order, tiles, blobs, fields, outs, tile)
    else:
        with full_precision(y):
            reference.signs(y, x, slot, blobs, fields, outs)


@torch.library.register_fake("deltacome::signs", lib=_library)
def _(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    fields: Tensor,
    outs: list[int],
    tile: int,
    impl: str,
) -> None:
    _check(y, x, slot, blobs, fields, impl)


def _check(y: Tensor, x: Tensor, slot: Tensor, blobs: Tensor, fields: Tensor, impl: str) -> None:
    check_impl("signs", impl)
    check_floats("signs", y=y, x=x)
    check_devices("signs", y, x, slot, blobs, fields)
    if slot.shape != y.shape[:1]:
        raise MismatchError(f"signs: expected {len(y)} slots, got {tuple(slot.shape)}")


@torch.library.impl(_library, "sign_rows", "CompositeExplicitAutograd")
def _sign_rows(
    y: Tensor,
    ids: Tensor,
    slot: Tensor,
    blobs: Tensor,
    fields: Tensor,
    out: int,
    scale: float,
) -> None:
    if nobody(slot):
        return
    check_ids("sign_rows", y, ids, slot, blobs, fields)
    plain.sign_rows(y, ids, slot, blobs, fields, out, scale)


@torch.library.register_fake("deltacome::sign_rows", lib=_library)
def _(
    y: Tensor,
    ids: Tensor,
    slot: Tensor,
    blobs: Tensor,
    fields: Tensor,
    out: int,
    scale: float,
) -> None:
    check_ids("sign_rows", y, ids, slot, blobs, fields)
