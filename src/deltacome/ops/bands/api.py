"""Two custom ops, `deltacome::bands` and `deltacome::band_rows`: the entry to every implementation.

They read the packed blob as it lies in the artifact and add to an output that the caller owns. In
place, because the base's output is already there and a second one of the same size would be written
and read again for nothing. Everything that an implementation needs comes through the arguments, the
plan as two lists of integers: a layer's number in place of its tensors would be smaller, but then
the op depends on state that neither a compiler nor a CUDA graph can see.

The implementation is named by the caller. An unknown name is an error and never another
implementation: whoever asks for a fast one must not time, or trust, the slow one.

The ops are defined by `torch.library.Library`, not by its decorator `custom_op`: what that does for
views and derivatives takes as long in each call as a small layer.

There is no gradient. An op that writes in place and has no derivative would drop the delta's part
from the gradients in silence, so tensors that ask for one are refused.

Legend: T tokens, I in, O out, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.spec import GROUP, Band, Plan
from deltacome.ops.bands import cpu, reference

IMPLS = ("reference", "cpu")


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    blob: Tensor,
    plan: Plan,
    group_size: int = GROUP,
    *,
    impl: str = "reference",
) -> None:
    """Adds a bands term to the output of a linear layer, in place (Delta-CoMe, equation 5).

    `y += Σ_g ((x V̂_gᵀ) · s_g) Û_g`, with `V̂_g` (R, I) and `Û_g` (R, O) as they are stored: one
    direction after the other. Sums are float32 and rounded to y's dtype once.

    Args:
        y_TO: (T, O), any float dtype and strides.
        x_TI: (T, I), any float dtype.
        blob: uint8 (nbytes,), starting at a multiple of 16 bytes, laid out as
            `band_sections((O, I), plan, group_size)` says.
        plan: the bands.
        group_size: entries of a direction that share a scale.
        impl: one of `IMPLS`.

    Raises:
        UnsupportedError: an unknown `impl`, one that this installation lacks, or a tensor that
            requires a gradient.
        MismatchError: shapes, dtypes or devices do not fit together.
        ArtifactError: the blob's size is not what the plan asks for.
    """
    _refuse_gradients(y_TO, x_TI)
    bits, counts = [band.bits for band in plan], [band.count for band in plan]
    torch.ops.deltacome.bands(y_TO, x_TI, blob, bits, counts, group_size, impl)


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    blob: Tensor,
    rows: int,
    plan: Plan,
    group_size: int = GROUP,
    *,
    scale: float = 1.0,
    impl: str = "reference",
) -> None:
    """Adds rows of a bands term to the output of an embedding, in place.

    `y += scale · Σ_g Û_g[:, ids]ᵀ diag(s_g) V̂_g`. Sums are float32 and rounded to y's dtype once.

    Args:
        y_TI: (T, I), any float dtype and strides; I is the size of an embedding.
        ids_T: int64 or int32 (T,), each in [0, rows).
        blob: uint8 (nbytes,), laid out as `band_sections((rows, I), plan, group_size)` says.
        rows: rows of the matrix.
        plan: the bands.
        group_size: entries of a direction that share a scale.
        scale: what the module multiplies its rows by.
        impl: one of `IMPLS`.

    Raises:
        UnsupportedError, MismatchError, ArtifactError: as `bands`.
        IndexError: an id is out of range.
    """
    _refuse_gradients(y_TI)
    bits, counts = [band.bits for band in plan], [band.count for band in plan]
    torch.ops.deltacome.band_rows(y_TI, ids_T, blob, rows, bits, counts, group_size, scale, impl)


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(
            "packed deltas are for inference: expected tensors without gradients, got one that "
            "requires a gradient; run under torch.no_grad()"
        )


_library = torch.library.Library("deltacome", "FRAGMENT")
_library.define(
    "bands(Tensor(a!) y, Tensor x, Tensor blob, int[] bits, int[] counts, int group_size, str impl)"
    " -> ()"
)
_library.define(
    "band_rows(Tensor(a!) y, Tensor ids, Tensor blob, int rows, int[] bits, int[] counts, "
    "int group_size, float scale, str impl) -> ()"
)


@torch.library.impl(_library, "bands", "CompositeExplicitAutograd")
def _bands(
    y: Tensor,
    x: Tensor,
    blob: Tensor,
    bits: list[int],
    counts: list[int],
    group_size: int,
    impl: str,
) -> None:
    _check_bands(y, x, blob, impl)
    if impl == "cpu":
        cpu.bands(y, x, blob, bits, counts, group_size)
    else:
        reference.bands(y, x, blob, _plan(bits, counts), group_size)


@torch.library.register_fake("deltacome::bands", lib=_library)
def _(
    y: Tensor,
    x: Tensor,
    blob: Tensor,
    bits: list[int],
    counts: list[int],
    group_size: int,
    impl: str,
) -> None:
    _check_bands(y, x, blob, impl)


@torch.library.impl(_library, "band_rows", "CompositeExplicitAutograd")
def _band_rows(
    y: Tensor,
    ids: Tensor,
    blob: Tensor,
    rows: int,
    bits: list[int],
    counts: list[int],
    group_size: int,
    scale: float,
    impl: str,
) -> None:
    _check_rows(y, ids, blob, impl)
    if impl == "cpu":
        cpu.band_rows(y, ids, blob, rows, bits, counts, group_size, scale)
    else:
        reference.band_rows(y, ids, blob, rows, _plan(bits, counts), group_size, scale)


@torch.library.register_fake("deltacome::band_rows", lib=_library)
def _(
    y: Tensor,
    ids: Tensor,
    blob: Tensor,
    rows: int,
    bits: list[int],
    counts: list[int],
    group_size: int,
    scale: float,
    impl: str,
) -> None:
    _check_rows(y, ids, blob, impl)


def _plan(bits: list[int], counts: list[int]) -> Plan:
    return tuple(Band(b, count) for b, count in zip(bits, counts, strict=True))


def _check_bands(y: Tensor, x: Tensor, blob: Tensor, impl: str) -> None:
    _check_impl(impl)
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0]:
        raise MismatchError(
            f"bands: expected y (T, O) and x (T, I), got {tuple(y.shape)} and {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise MismatchError(f"bands: expected x of a float dtype, got {x.dtype}")
    _check_output(y, x, blob)


def _check_rows(y: Tensor, ids: Tensor, blob: Tensor, impl: str) -> None:
    _check_impl(impl)
    if y.dim() != 2 or ids.dim() != 1 or y.shape[0] != ids.shape[0]:
        raise MismatchError(
            f"band_rows: expected y (T, I) and ids (T,), got {tuple(y.shape)} and "
            f"{tuple(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise MismatchError(f"band_rows: expected ids of int64 or int32, got {ids.dtype}")
    _check_output(y, ids, blob)


def _check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise UnsupportedError(f"bands: expected an implementation of {IMPLS}, got {impl!r}")


def _check_output(y: Tensor, x: Tensor, blob: Tensor) -> None:
    if not y.is_floating_point() or blob.dtype != torch.uint8:
        raise MismatchError(
            f"bands: expected y of a float dtype and a blob of uint8, got {y.dtype} and "
            f"{blob.dtype}"
        )
    if not y.device == x.device == blob.device:
        raise MismatchError(
            f"bands: expected one device, got y on {y.device}, x on {x.device}, "
            f"packed bands on {blob.device}"
        )
