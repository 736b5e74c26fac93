"""Many rows of one tenant on a CPU, in bfloat16: factors decoded in pieces, multiplied by torch.

The kernels of `native.cpp` decode a direction again for every four rows. That suits decoding, where a
tenant has few rows. A prompt has hundreds, and all its time goes into products; the library that torch
brings along (oneDNN) uses what the CPU has for products of bfloat16, pairs (AVX-512) or tiles (AMX). It
takes a while to get started, so few rows stay with the kernels.

A delta's factors, and the intermediate between its two products, then have 8 significant bits, like the
base's weights and activations. Sums are still float32.

Legend: T tokens, I in, O out, R directions, N entries of a direction (of a pool: bytes of a slot),
S slots, P parts, B bands, F fields.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltacome.format.spec import BLOCK
from deltacome.ops import native
from deltacome.ops.slots import COUNT, FIRST

MANY = 96
"""Rows of a tenant from which on this is faster; `benchmarks/cpu_bands.py --rows 96/1 --many 97` measures
the kernels instead."""
PIECE = 1 << 19
"""Entries that are decoded at once: as many as a core's cache holds."""

Rows = slice | Tensor


def tenants(y_TO: Tensor, x_TI: Tensor, slot_T: Tensor, slots: int) -> list[tuple[int, Rows]]:
    """The slots that have many rows, and which rows: a slice where they are contiguous.

    Empty unless the batch is in bfloat16 and the CPU has instructions for it; and empty where a row names
    a slot outside [-1, slots), which is left for the kernel to refuse.
    """
    if len(slot_T) < MANY or {y_TO.dtype, x_TI.dtype} != {torch.bfloat16} or not _has_bfloat16():
        return []
    named, counts = slot_T.unique(return_counts=True)
    if int(named[0]) < -1 or int(named[-1]) >= slots:
        return []
    found = []
    for slot in named[(counts >= MANY) & (named >= 0)].tolist():
        rows = (slot_T == slot).nonzero().view(-1)
        first, last = int(rows[0]), int(rows[-1])
        found.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return found


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    slot: int,
    rows: Rows,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    outs: list[int],
    group_size: int,
) -> None:
    """`y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g` for the rows of one slot."""
    x_TI, size = x_TI[rows], x_TI.shape[1]
    decode = functools.partial(
        _decode, slot, blobs_SN, fields_SPBF, native.sizes(tuple(outs)), size, group_size
    )
    places = _places(fields_SPBF[slot].tolist())
    t_TR = x_TI.new_empty(len(x_TI), max(last for _, last in places))
    for r, r1 in _pieces(0, t_TR.shape[1], PIECE // size):
        torch.mm(x_TI, decode(False, r, r1, 0, size).T, out=t_TR[:, r:r1])
    column = 0
    for (r, r1), out in zip(places, outs, strict=True):
        for n, n1 in _pieces(0, out if r1 > r else 0, PIECE // max(1, r1 - r)):
            here = y_TO[:, column + n : column + n1]
            y_TN = here[rows]  # a view of y if rows are a slice
            y_TN.addmm_(t_TR[:, r:r1], decode(True, r, r1, n, n1))
            if isinstance(rows, Tensor):
                here[rows] = y_TN
        column += out


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, and torch may use them."""
    if not native.default_isa().startswith("avx512"):
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _places(fields_PBF: Sequence[Sequence[Sequence[int]]]) -> list[tuple[int, int]]:
    """First direction of each part, and the one after its last, among those of the slot."""
    places = []
    for fields_BF in fields_PBF:
        used = [fields_F for fields_F in fields_BF if fields_F[COUNT]]
        first = used[0][FIRST] if used else 0
        places.append((first, first + sum(fields_F[COUNT] for fields_F in used)))
    return places


def _pieces(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Spans of about `size` entries, in whole blocks."""
    step = max(BLOCK, size // BLOCK * BLOCK)
    for start in range(first, last, step):
        yield start, min(last, start + step)


def _decode(
    slot: int, blobs_SN: Tensor, fields_SPBF: Tensor, outs: object, size: int, group_size: int,
    of_u: bool, r: int, r1: int, n: int, n1: int,
) -> Tensor:  # fmt: skip
    """Directions r … r1 of a slot, entries n … n1: of U, or of V times the singular values."""
    piece_RN = blobs_SN.new_empty((r1 - r, n1 - n), dtype=torch.bfloat16)
    slots, parts, max_bands, _ = fields_SPBF.shape
    native.library(native.default_isa()).deltacome_factor(
        *(piece_RN.data_ptr(), of_u, r, r1, n, n1, slot, blobs_SN.data_ptr(), blobs_SN.stride(0)),
        *(fields_SPBF.data_ptr(), slots, parts, max_bands, outs, size, group_size),
        torch.get_num_threads(),
    )
    return piece_RN
