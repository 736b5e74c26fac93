"""A worker's part of a packed term, under tensor parallelism: slices of the same bytes.

A factor is stored direction by direction, so a shard of a matrix's rows is a run of entries of every
direction of U, and a shard of its columns a run of entries of every direction of V. Where a run begins
within a scale group, the shard has smaller groups, which repeat that group's scale; its codes stay as
they are. Codes lie in blocks, so a run begins where a block begins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.codec import (
    BandTensors,
    Factor,
    SignTensors,
    read_bands,
    read_signs,
    unpack,
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
    shard_group: int | None = None,
) -> Tensor:
    """The blob of some rows and columns of a bands term; the blob itself if these are all of them.

    Args:
        name: of the tensor, for errors.
        blob: uint8 (nbytes,), of the whole matrix.
        shape: (out, in) of the whole matrix.
        plan: its bands.
        group_size: entries of a direction that share a scale.
        rows: runs of rows, which follow each other in the shard.
        columns: a run of columns.
        shard_group: entries that share a scale in the shard (`common_group`); by default `group_size`.

    Raises:
        UnsupportedError: a run begins or, before the end of the matrix, ends within a block of codes.
    """
    shard_group = shard_group or group_size
    if list(rows) == [(0, shape[0])] and columns == (0, shape[1]) and shard_group == group_size:
        return blob
    bands = [
        BandTensors(
            _runs(name, band.v, [columns], shard_group),
            _runs(name, band.u, rows, shard_group),
            band.s,
        )
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
    scale = signs.scale
    if len(scale) > 1:
        scale = torch.cat([scale[start:stop] for start, stop in rows])
    first, last = columns[0] // BLOCK, -(-columns[1] // BLOCK)  # blocks around the columns
    words = torch.cat([signs.words[start:stop] for start, stop in rows])[:, 2 * first : 2 * last]
    codes = unpack((words,), 1, columns[1] - first * BLOCK)  # of this shard alone
    return write_signs(SignTensors.from_signs(codes[:, columns[0] - first * BLOCK :], scale))


def common_group(group_size: int, runs: Iterable[Sequence[Range]]) -> int:
    """The number of entries that share a scale in shards of several tensors, each given as runs.

    Runs that begin within a block of codes are refused where there are codes. In other runs, and in
    tensors that are whole, groups then have a size that all kernels take: whole blocks, or a common
    divisor of group and block.
    """
    cuts = [
        cut for one in runs for cut in (*(start for start, _ in one), *(b for _, b in one[:-1]))
    ]
    group = math.gcd(group_size, *cuts)
    return group if group == group_size or group % BLOCK == 0 else math.gcd(group_size, BLOCK)


def _runs(name: str, factor: Factor, runs: Sequence[Range], group: int) -> Factor:
    """Runs of entries of every direction, one after the other."""
    size = sum(stop - start for start, stop in runs)
    if factor.values is not None:
        values = torch.cat([factor.values[:, start:stop] for start, stop in runs], 1)
        return dataclasses.replace(factor, size=size, values=values)
    for start, stop in runs:
        if start % BLOCK or (stop % BLOCK and stop != factor.size):
            raise UnsupportedError(
                f"{name}: tensor parallelism cuts it at {start} and {stop} of {factor.size}, and its "
                f"codes come in blocks of {BLOCK}: serve with fewer workers, or merge the artifact"
            )
    assert factor.scale is not None
    assert factor.zero is not None
    times = factor.group_size // group
    scale, zero = (t.repeat_interleave(times, 1) for t in (factor.scale, factor.zero))
    planes = tuple(
        torch.cat([words[:, _words(start, p) : _words(stop, p)] for start, stop in runs], 1)
        for p, words in zip(PLANES[factor.bits], factor.planes, strict=True)
    )
    groups = [slice(start // group, -(-stop // group)) for start, stop in runs]
    return dataclasses.replace(
        factor,
        size=size,
        planes=planes,
        scale=torch.cat([scale[:, run] for run in groups], 1),
        zero=torch.cat([zero[:, run] for run in groups], 1),
        group_size=group,
    )


def _words(entry: int, plane: int) -> int:
    return -(-entry // BLOCK) * 2 * plane
