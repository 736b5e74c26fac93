"""The custom op `deltacome::grouped_bands`: rows of several tenants, one call, in place.

Like `deltacome::bands` it reads packed bytes as they lie in the artifact, adds to an output that the
caller owns, takes all it needs as arguments, and runs exactly the implementation that was named. What
is new is that the plans are data: a table on the device says what each slot holds, so neither a
compiled graph nor a captured one depends on which tenants are loaded.

Legend: T tokens, I in, O out, S slots, N bytes of a slot, B bands, F fields, M tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops.grouped import reference
from deltacome.ops.grouped.pool import SlotPool
from deltacome.ops.grouped.rows import Rows

IMPLS = ("reference", "triton")


def grouped_bands(
    y_TO: Tensor, x_TI: Tensor, rows: Rows, pool: SlotPool, *, impl: str = "reference"
) -> None:
    """Adds each row's own bands term to the output of a linear layer, in place.

    `y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g` (Delta-CoMe, equation 5) with the bands of row t's slot. Rows
    without a slot, and rows of an empty slot, keep every bit. Sums are float32 and rounded to y's
    dtype once.

    Args:
        y_TO: (T, O), float32, float16 or bfloat16 (the reference: any float dtype), any strides.
        x_TI: (T, I), likewise.
        rows: the slots of the rows, from `group_rows`.
        pool: the packed bands of all slots, of a matrix (O, I).
        impl: one of `IMPLS`. `reference` waits for the device; `triton` needs a CUDA device of
            compute capability 8.0 or newer (or Triton's interpreter), and scale groups that are
            multiples of 64. With 16-bit activations and tiles of more than one row it rounds what lies
            between the two products to TF32, the 11 significant bits of float16.

    Raises:
        UnsupportedError: an implementation that is unknown or cannot run here, or a tensor that
            requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
    """
    if torch.is_grad_enabled() and (y_TO.requires_grad or x_TI.requires_grad):
        raise UnsupportedError(
            "packed deltas are for inference: expected tensors without gradients, got one that "
            "requires a gradient; run under torch.no_grad()"
        )
    if (y_TO.shape[1:], x_TI.shape[1:]) != (pool.shape[:1], pool.shape[1:]):
        raise MismatchError(
            f"grouped_bands: expected y (T, O) and x (T, I) for a matrix {pool.shape}, "
            f"got {tuple(y_TO.shape)} and {tuple(x_TI.shape)}"
        )
    torch.ops.deltacome.grouped_bands(
        y_TO,
        x_TI,
        rows.slot_T,
        rows.order_T,
        rows.tiles_M3,
        pool.blobs_SN,
        pool.table_SBF,
        rows.tile,
        pool.max_rank,
        pool.group_size,
        impl,
    )


@torch.library.custom_op("deltacome::grouped_bands", mutates_args=("y",))
def _grouped_bands(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    table: Tensor,
    tile: int,
    max_rank: int,
    group_size: int,
    impl: str,
) -> None:
    _check(y, x, slot, order, tiles, blobs, table, impl)
    if impl == "reference":
        reference.grouped_bands(y, x, slot, blobs, table, group_size)
        return
    try:
        from deltacome.ops.grouped import triton
    except ImportError as error:
        raise UnsupportedError(f"grouped_bands: impl='triton' needs Triton: {error}") from error
    triton.grouped_bands(y, x, order, tiles, blobs, table, tile, max_rank, group_size)


@_grouped_bands.register_fake
def _(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    table: Tensor,
    tile: int,
    max_rank: int,
    group_size: int,
    impl: str,
) -> None:
    _check(y, x, slot, order, tiles, blobs, table, impl)


def _check(
    y: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    tiles: Tensor,
    blobs: Tensor,
    table: Tensor,
    impl: str,
) -> None:
    if impl not in IMPLS:
        raise UnsupportedError(
            f"grouped_bands: expected an implementation of {IMPLS}, got {impl!r}"
        )
    if y.dim() != 2 or x.dim() != 2 or not y.shape[0] == x.shape[0] == slot.shape[0]:
        raise MismatchError(
            "grouped_bands: expected y (T, O), x (T, I) and T slots, got "
            f"{tuple(y.shape)}, {tuple(x.shape)} and {tuple(slot.shape)}"
        )
    if not y.is_floating_point() or not x.is_floating_point():
        raise MismatchError(
            f"grouped_bands: expected y and x of float dtypes, got {y.dtype} and {x.dtype}"
        )
    devices = {tensor.device for tensor in (y, x, slot, order, tiles, blobs, table)}
    if len(devices) > 1:
        raise MismatchError(f"grouped_bands: expected one device, got {sorted(map(str, devices))}")
