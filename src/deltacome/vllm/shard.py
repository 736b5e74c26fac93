"""A worker's part of a packed term, under tensor parallelism: slices of the same bytes.

A factor is stored direction by direction, so a shard of a matrix's rows is a run of every direction of
U, and one of its columns a run of every direction of V. Runs begin where a scale group begins: to cut
a group in two, its codes would have to be packed anew around another scale, and no two workers would
hold what the artifact holds. Shards of real models are multiples of the group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.codec import (
    BandTensors,
    Factor,
    SignTensors,
    read_bands,
    read_signs,
    write_bands,
    write_signs,
)
from deltacome.format.spec import BLOCK, PLANES, Plan

Range = tuple[int, int]


def shard_bands(
    name: str,
    blob: Tensor,
    shape: tuple[int, int],
    plan: Plan,
    group_size: int,
    rows: Sequence[Range],
    columns: Range,
) -> Tensor:
    """The blob of some rows and columns of a bands term; the blob itself if these are all.

    Args:
        name: of the tensor, for errors.
        blob: uint8 (nbytes,), of the whole matrix.
        shape: (out, in) of the whole matrix.
        plan: its bands.
        group_size: entries of a direction that share a scale.
        rows: runs of rows, which follow each other in the shard.
        columns: a run of columns.

    Raises:
        UnsupportedError: a run does not begin and end where a scale group does.
    """
    if list(rows) == [(0, shape[0])] and columns == (0, shape[1]):
        return blob
    bands = [
        BandTensors(_runs(name, band.v, [columns]), _runs(name, band.u, rows), band.s)
        for band in read_bands(blob, shape, plan, group_size)
    ]
    return write_bands(bands)


def shard_signs(
    name: str,
    blob: Tensor,
    shape: tuple[int, int],
    scales: int,
    rows: Sequence[Range],
    columns: Range,
) -> Tensor:
    """The blob of some rows and columns of a signs term; arguments and errors as `shard_bands`."""
    if list(rows) == [(0, shape[0])] and columns == (0, shape[1]):
        return blob
    signs = read_signs(blob, shape, scales)
    positive_OI = signs.dense() * signs.scale.sign()[:, None] > 0
    scale = signs.scale
    if len(scale) > 1:
        scale = torch.cat([scale[start:stop] for start, stop in rows])
    picked = torch.cat([positive_OI[start:stop] for start, stop in rows])
    return write_signs(SignTensors.from_signs(picked[:, columns[0] : columns[1]], scale))


def _runs(name: str, factor: Factor, runs: Sequence[Range]) -> Factor:
    """Runs of entries of every direction, one behind the other."""
    size = sum(stop - start for start, stop in runs)
    if factor.values is not None:
        values = torch.cat([factor.values[:, start:stop] for start, stop in runs], 1)
        return dataclasses.replace(factor, size=size, values=values)
    group = factor.group_size
    for i, (start, stop) in enumerate(runs):
        last = i == len(runs) - 1
        if start % group or group % BLOCK or (stop % group and not (last and stop == factor.size)):
            raise UnsupportedError(
                f"{name}: tensor parallelism cuts it at {start} and {stop} of {factor.size}, expected "
                f"multiples of the scale group of {group}: serve with fewer workers, or compress with "
                "a smaller group size"
            )
    assert factor.scale is not None
    assert factor.zero is not None
    planes = tuple(
        torch.cat([words[:, _words(start, p) : _words(stop, p)] for start, stop in runs], 1)
        for p, words in zip(PLANES[factor.bits], factor.planes, strict=True)
    )
    groups = [slice(start // group, -(-stop // group)) for start, stop in runs]
    return dataclasses.replace(
        factor,
        size=size,
        planes=planes,
        scale=torch.cat([factor.scale[:, run] for run in groups], 1),
        zero=torch.cat([factor.zero[:, run] for run in groups], 1),
    )


def _words(entry: int, plane: int) -> int:
    return -(-entry // BLOCK) * 2 * plane
