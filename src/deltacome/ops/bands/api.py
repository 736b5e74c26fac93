"""Two custom ops, `deltacome::bands` and `deltacome::band_rows`: the entry to every implementation.

Rows of a batch belong to different tenants, or to none; one call serves them all. The ops read packed
bytes as they lie in the artifact and add in place to an output that the caller owns: the base's output
is already there, and a second one of the same size would be written and read again for nothing.
Everything that an implementation needs comes in through the arguments, and what a slot holds is data on
the device. Passing a layer's number instead of its tensors would be smaller, but the op would then
depend on state that neither a compiler nor a CUDA graph can see. (One thing does not come in this way:
whether a batch is known to be of the base alone, `rows.set_unused`.)

The ops are defined by `torch.library.Library`, not by the decorator `custom_op`, whose handling of views
and derivatives takes as long in each call as a small layer.

There is no gradient: tensors that require one are refused.

Legend: T tokens, I in, O out (all parts), S slots, N bytes of a slot, P parts, B bands, F fields,
M tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.errors import MismatchError
from deltacome.ops import native
from deltacome.ops.bands import cpu, many, reference
from deltacome.ops.impls import (
    check_devices,
    check_floats,
    check_ids,
    check_impl,
    full_precision,
    refuse_gradients,
)
from deltacome.ops.rows import Rows, chosen, nobody
from deltacome.ops.slots import BandTable


def bands(
    y_TO: Tensor, x_TI: Tensor, rows: Rows, table: BandTable, *, impl: str = "reference"
) -> None:
    """Adds each row's own bands term to the output of a linear layer, in place.

    `y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g` (Delta-CoMe, equation 5) with the bands of row t's slot, for
    each part into its own columns of y. Rows without a slot, and rows of an empty slot, keep every bit.
    Sums are float32 and rounded to y's dtype once. (`cpu` rounds factors too where a tenant has many
    rows of bfloat16: `bands/many.py`.)

    Args:
        y_TO: (T, O), float32, float16 or bfloat16 (the reference: any float dtype), any strides; O is
            the sum of `table.outs`.
        x_TI: (T, I), likewise.
        rows: the slots of the rows, from `group_rows`.
        table: what the slots hold.
        impl: `reference`, which waits for the device; `cpu`; or `triton`, which needs a CUDA device of
            compute capability 8.0 or newer (or Triton's interpreter), and scale groups that are
            multiples of 64. With 16-bit activations and tiles of more than one row, `triton` rounds
            the intermediate between the two products to TF32, the 11 significant bits of float16.

    Raises:
        UnsupportedError: an implementation that is unknown or cannot run here, or a tensor that
            requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
    """
    refuse_gradients(y_TO, x_TI)
    if (y_TO.shape[1:], x_TI.shape[1:]) != ((sum(table.outs),), (table.in_size,)):
        raise MismatchError(
            f"bands: expected y (T, {sum(table.outs)}) and x (T, {table.in_size}), "
            f"got {tuple(y_TO.shape)} and {tuple(x_TI.shape)}"
        )
    native.run(
        "bands",
        *(y_TO, x_TI, rows.slot_T, rows.order_T, rows.tiles_M3),
        *(table.pool.blobs_SN, table.fields_SPBF, table.outs),
        *(rows.tile, table.max_rank, table.group_size, impl),
    )


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    rows: Rows,
    table: BandTable,
    *,
    scale: float = 1.0,
    impl: str = "reference",
) -> None:
    """Adds to each row of an embedding's output its row of its own tenant's bands term, in place.

    `y[t] += scale · Σ_g Û_g[:, ids[t]]ᵀ diag(s_g) V̂_g` with the bands of row t's slot. Rows without a
    slot, and rows of an empty slot, keep every bit, and their ids are not looked at. Sums are float32
    and rounded to y's dtype once.

    Args:
        y_TI: (T, I), dtypes as for `bands`, any strides; I is the size of an embedding.
        ids_T: int64 or int32 (T,), each in [0, `table.outs[0]`).
        rows: the slots of the rows, from `group_rows`.
        table: of one part, the embedding's matrix.
        scale: what the module multiplies its rows by.
        impl: as for `bands`.

    Raises:
        UnsupportedError, MismatchError: as `bands`.
        IndexError: an id is out of range (`triton`: the device asserts).
    """
    refuse_gradients(y_TI)
    if y_TI.shape[1:] != (table.in_size,) or len(table.outs) != 1:
        raise MismatchError(
            f"band_rows: expected y (T, {table.in_size}) and a table of one part, "
            f"got {tuple(y_TI.shape)} and parts {table.outs}"
        )
    torch.ops.deltacome.band_rows(
        *(y_TI, ids_T, rows.slot_T, rows.order_T, rows.tiles_M3),
        *(table.pool.blobs_SN, table.fields_SPBF, table.outs[0]),
        *(rows.tile, table.max_rank, table.group_size, scale, impl),
    )


_library = torch.library.Library("deltacome", "FRAGMENT")
for name in ("bands", "bands_python"):  # the native library may take over the first
    _library.define(
        f"{name}(Tensor(a!) y, Tensor x, Tensor slot, Tensor order, Tensor tiles, Tensor blobs, "
        "Tensor fields, int[] outs, int tile, int max_rank, int group_size, str impl) -> ()"
    )
_library.define(
    "band_rows(Tensor(a!) y, Tensor ids, Tensor slot, Tensor order, Tensor tiles, Tensor blobs, "
    "Tensor fields, int out, int tile, int max_rank, int group_size, float scale, str impl) -> ()"
)


@torch.library.impl(_library, "bands_python", "CompositeExplicitAutograd")
@torch.library.impl(_library, "bands", "CompositeExplicitAutograd")
@native.noting
def _bands(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    fields: Tensor,
    outs: list[int],
    tile: int,
    max_rank: int,
    group_size: int,
    impl: str,
) -> None:
    if nobody(slot):
        return
    check_impl("bands", impl)
    _check(y, x, slot, blobs, fields)
    if impl == "cpu":
        with full_precision(y):
            cpu.bands(y, x, slot, blobs, fields, outs, group_size)
    elif impl == "triton":
        from deltacome.ops.bands import triton

        tiles, tile = chosen(tiles, tile, x.shape[0], blobs.shape[0])
        triton.bands(
            *(y, x, order, tiles, blobs, fields, outs),
            *(tile, max_rank, group_size),
        )
    else:
        with full_precision(y):
            reference.bands(y, x, slot, blobs, fields, outs, group_size)


@torch.library.register_fake("deltacome::bands", lib=_library)
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
    max_rank: int,
    group_size: int,
    impl: str,
) -> None:
    check_impl("bands", impl)
    _check(y, x, slot, blobs, fields)


@torch.library.impl(_library, "band_rows", "CompositeExplicitAutograd")
def _band_rows(
    y: Tensor,
    ids: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    fields: Tensor,
    out: int,
    tile: int,
    max_rank: int,
    group_size: int,
    scale: float,
    impl: str,
) -> None:
    if nobody(slot):
        return
    check_impl("band_rows", impl)
    check_ids("band_rows", y, ids, slot, blobs, fields)
    if impl == "cpu":
        cpu.band_rows(y, ids, slot, blobs, fields, out, group_size, scale)
    elif impl == "triton":
        from deltacome.ops.bands import triton

        tiles, tile = chosen(tiles, tile, y.shape[0], blobs.shape[0])
        triton.band_rows(
            *(y, ids, slot, order, tiles, blobs, fields, out),
            *(tile, max_rank, group_size, scale),
        )
    else:
        with full_precision(y):
            reference.band_rows(y, ids, slot, blobs, fields, out, group_size, scale)


@torch.library.register_fake("deltacome::band_rows", lib=_library)
def _(
    y: Tensor,
    ids: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    fields: Tensor,
    out: int,
    tile: int,
    max_rank: int,
    group_size: int,
    scale: float,
    impl: str,
) -> None:
    check_impl("band_rows", impl)
    check_ids("band_rows", y, ids, slot, blobs, fields)


def _check(y: Tensor, x: Tensor, slot: Tensor, blobs: Tensor, fields: Tensor) -> None:
    check_floats("bands", y=y, x=x)
    check_devices("bands", y, x, slot, blobs, fields)
    if slot.shape != y.shape[:1]:
        raise MismatchError(f"bands: expected {len(y)} slots, got {tuple(slot.shape)}")


# From here on torch calls the library directly for batches in which no tenant can have many rows.
native.few_rows(many.MANY)
