"""What the bytes of a delta look like: widths, plans, and the layout of one packed term.

Everything here is arithmetic on shapes, so that a plan can be costed to the byte before a single
weight is read, and a reader knows every offset from the manifest alone. `docs/format.md` states the
same layout for other languages; `codec` gives the bytes their meaning.

One parameter's bands are one blob, not one safetensors entry per section. A tensor's entry in a
safetensors header costs about 110 bytes: seven sections × three bands × two hundred layers would
cost a 135M model 3 % of its artifact, and an engine wants to copy one contiguous piece anyway. The
price is that other safetensors tools see only `U8` blobs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from deltacome.errors import PlanError

BLOCK = 64
"""Codes in one packed block; rows of codes are padded to whole blocks with zero codes."""
GROUP = 128
"""Entries of one direction that share a scale and a zero point."""
ALIGN = 16
"""Every section of a blob starts at a multiple of this many bytes, for 16-byte loads."""
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""A width is stored as planes whose widths divide a word, low bits first: 3 bits are 2 + 1."""
WIDTHS = (*PLANES, 16)
"""Bits per entry that a band can have; 16 is float16 without a grid."""


@dataclass(frozen=True)
class Band:
    """A run of `count` singular directions whose vectors are stored at `bits` bits an entry."""

    bits: int
    count: int

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise PlanError(f"band width: expected one of {WIDTHS} bits, got {self.bits}")
        if self.count < 1:
            raise PlanError(
                f"band of {self.bits} bits: expected at least 1 direction, got {self.count}"
            )


Plan = tuple[Band, ...]
"""The bands of one parameter, largest singular values first."""


def rank(plan: Plan) -> int:
    """Number of singular directions that a plan keeps."""
    return sum(band.count for band in plan)


def format_plan(plan: Plan) -> str:
    """`8:2,3:32,2:968`, the notation of the command line."""
    return ",".join(f"{band.bits}:{band.count}" for band in plan)


@dataclass(frozen=True)
class Section:
    """A typed array inside a blob: `shape` entries of `dtype` (torch's name) from byte `offset`."""

    name: str
    dtype: str
    shape: tuple[int, int]
    offset: int
    nbytes: int


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


_ITEM_BYTES = {"int32": 4, "float32": 4, "float16": 2, "uint8": 1}


def _factor_sections(side: str, bits: int, count: int, size: int, group: int) -> Iterable[tuple]:
    """(name, dtype, shape) of one factor of a band: `count` directions of `size` entries."""
    if bits == 16:
        yield f"{side}.values", "float16", (count, size)
        return
    blocks = math.ceil(size / BLOCK)
    for plane in PLANES[bits]:
        yield f"{side}.codes{plane}", "int32", (count, blocks * BLOCK * plane // 32)
    groups = math.ceil(size / group)
    yield f"{side}.scale", "float16", (count, groups)
    yield f"{side}.zero", "uint8", (count, groups)


def band_sections(
    shape: tuple[int, int], plan: Plan, group: int = GROUP
) -> tuple[list[list[Section]], int]:
    """Layout of the blob of a bands term.

    Args:
        shape: (out, in) of the weight.
        plan: its bands.
        group: entries of a direction that share a scale.

    Returns:
        The sections of each band in order of their offsets, and the size of the blob in bytes
        (a multiple of `ALIGN`).
    """
    out_size, in_size = shape
    offset = 0
    bands = []
    for band in plan:
        specs = [
            *_factor_sections("v", band.bits, band.count, in_size, group),
            *_factor_sections("u", band.bits, band.count, out_size, group),
            ("s", "float32", (band.count, 1)),
        ]
        sections = []
        for name, dtype, section_shape in specs:
            nbytes = math.prod(section_shape) * _ITEM_BYTES[dtype]
            sections.append(Section(name, dtype, section_shape, offset, nbytes))
            offset += aligned(nbytes)
        bands.append(sections)
    return bands, offset


def bands_nbytes(shape: tuple[int, int], plan: Plan, group: int = GROUP) -> int:
    """Bytes on disk of a bands term, everything counted (codes, scales, zero points, padding).

    A multiple of `ALIGN`, as for a signs term, so terms need no padding between them.
    """
    return sum(_band_nbytes(*shape, band, group) for band in plan)


@lru_cache(1 << 16)
def _band_nbytes(out_size: int, in_size: int, band: Band, group: int) -> int:
    """Bytes of one band; sections are aligned, so bands add up. Cached, as searches ask repeatedly."""
    return band_sections((out_size, in_size), (band,), group)[1]


def codes_nbytes(shape: tuple[int, int], plan: Plan) -> float:
    """Bytes of the codes alone, as papers count them: no scales, no singular values, no padding."""
    return sum(band.bits * band.count for band in plan) * sum(shape) / 8


def sign_sections(shape: tuple[int, int], scales: int) -> tuple[int, int, int]:
    """Layout of the blob of a signs term: `value = scale · (2 · code − 1)` for each entry.

    Words come first, int32 (out, 2 · ⌈in / 64⌉): a 1-bit plane, with rows in place of directions.
    Then the scales, float32 (scales,).

    Args:
        shape: (out, in) of the weight.
        scales: 1, or one for each row.

    Returns:
        Byte offsets of words and scales, and the size of the blob (a multiple of `ALIGN`).

    Raises:
        PlanError: another number of scales.
    """
    out_size, in_size = shape
    if scales not in (1, out_size):
        raise PlanError(f"signs of shape {shape}: expected 1 or {out_size} scales, got {scales}")
    at = aligned(out_size * math.ceil(in_size / BLOCK) * BLOCK // 8)
    return 0, at, at + aligned(4 * scales)


def signs_nbytes(shape: tuple[int, int], scales: int | None) -> int:
    """Bytes on disk of a signs term, everything counted; 0 without scales, as there is no term then."""
    return sign_sections(shape, scales)[2] if scales else 0
