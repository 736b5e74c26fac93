"""The one meaning of stored bytes: codes ↔ packed words ↔ values.

GPTQ measures its error with `dequantize` and kernels are tested against it, so both mean the same
number. All functions are pure: inputs are left unchanged.

Layout of codes (see `docs/format.md`). A plane of p bits (p ∈ {1, 2, 4, 8}) stores a block of 64
codes in 2p little-endian 32-bit words: code k sits in word `k mod 2p` at bit `p · (k div 2p)`. One
shift of a run of words thus gives codes that are neighbours in memory order, which is what SIMD
lanes and Triton tiles want. A plain bit stream is simpler to describe, but neighbouring lanes would
get codes that are 32/p apart, and every load of an activation would become a gather. Three bits are
stored as a 2-bit plane and a 1-bit plane, so no code straddles a word.

Legend: R directions, N entries of a direction, T selected entries, W words, G groups, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.errors import ArtifactError
from deltacome.format.spec import BLOCK, GROUP, PLANES, Band, Plan, band_sections, sign_sections


def pack(codes_RN: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Packs codes into words.

    Args:
        codes_RN: uint8 (R, N), each below 2**bits.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        One int32 tensor (R, 2p · ceil(N / 64)) for each plane of p bits, low bits first.
    """
    if int(codes_RN.max()) >> bits:
        raise ValueError(f"codes must be below {1 << bits}, got {int(codes_RN.max())}")
    rows, size = codes_RN.shape
    padded_RN = torch.nn.functional.pad(codes_RN, (0, -size % BLOCK)).to(torch.int64)
    planes = []
    low = 0
    for plane in PLANES[bits]:
        digits = (padded_RN >> low & ((1 << plane) - 1)).view(rows, -1, 32 // plane, 2 * plane)
        shifts = torch.arange(0, 32, plane, device=digits.device).view(1, 1, -1, 1)
        words = (digits << shifts).sum(2).reshape(rows, -1)
        # int64 sums lie in [0, 2**32): fold them onto the same bits of an int32.
        planes.append(torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32))
        low += plane
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int, size: int) -> Tensor:
    """Inverse of `pack`: uint8 codes (R, size)."""
    rows = planes[0].shape[0]
    codes_RN = torch.zeros(rows, size, dtype=torch.uint8, device=planes[0].device)
    low = 0
    for plane, words_RW in zip(PLANES[bits], planes, strict=True):
        shifts = torch.arange(0, 32, plane, dtype=torch.int32, device=words_RW.device)
        words = words_RW.view(rows, -1, 1, 2 * plane) >> shifts.view(1, 1, -1, 1)
        digits = (words & ((1 << plane) - 1)).to(torch.uint8).view(rows, -1)
        codes_RN |= digits[:, :size] << low
        low += plane
    return codes_RN


def unpack_at(planes: Sequence[Tensor], bits: int, index_T: Tensor) -> Tensor:
    """The codes at some entries of every direction: uint8 (R, T), `unpack(…)[:, index_T]`.

    Reads only the words that hold those codes, so looking up rows of an embedding decodes no others.

    Args:
        planes: as `pack` returns them.
        bits: 1, 2, 3, 4 or 8.
        index_T: int64 (T,), entries to read.
    """
    codes_RT = torch.zeros(len(planes[0]), len(index_T), dtype=torch.uint8, device=index_T.device)
    block_T, place_T = index_T // BLOCK, index_T % BLOCK
    low = 0
    for plane, words_RW in zip(PLANES[bits], planes, strict=True):
        words_RT = words_RW[:, block_T * 2 * plane + place_T % (2 * plane)]
        shift_T = (plane * (place_T // (2 * plane))).to(torch.int32)
        codes_RT |= (words_RT >> shift_T & ((1 << plane) - 1)).to(torch.uint8) << low
        low += plane
    return codes_RT


def dequantize(
    codes_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor, group_size: int = GROUP
) -> Tensor:
    """`value = (code − zero) · scale`, with one scale and zero point for each `group_size` entries.

    Args:
        codes_RN: uint8 (R, N).
        scale_RG: float16 (R, G), G = ceil(N / group_size).
        zero_RG: uint8 (R, G).

    Returns:
        float32 (R, N).
    """
    size = codes_RN.shape[1]
    times = min(group_size, size)  # a group may be far larger than a direction
    scale_RN = scale_RG.float().repeat_interleave(times, 1)[:, :size]
    zero_RN = zero_RG.float().repeat_interleave(times, 1)[:, :size]
    return (codes_RN.float() - zero_RN) * scale_RN


@dataclass(frozen=True)
class Factor:
    """One side of a band, direction-major: R vectors of `size` entries.

    Either `planes` (packed codes), `scale` and `zero` are set, or, at 16 bits, `values` alone.
    """

    bits: int
    size: int
    planes: tuple[Tensor, ...] = ()
    scale: Tensor | None = None
    zero: Tensor | None = None
    values: Tensor | None = None
    group_size: int = GROUP

    @classmethod
    def from_codes(
        cls, codes_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor, bits: int, group_size: int = GROUP
    ) -> Factor:
        """Packs codes (uint8), scales (float16) and zero points (uint8) of one factor."""
        planes = pack(codes_RN, bits)
        return cls(bits, codes_RN.shape[1], planes, scale_RG, zero_RG, group_size=group_size)

    @classmethod
    def from_values(cls, values_RN: Tensor) -> Factor:
        """A 16-bit factor: the values rounded to float16."""
        return cls(16, values_RN.shape[1], values=values_RN.to(torch.float16))

    def dequantize(self) -> Tensor:
        """float32 (R, size)."""
        if self.values is not None:
            return self.values.float()
        assert self.scale is not None
        assert self.zero is not None
        codes_RN = unpack(self.planes, self.bits, self.size)
        return dequantize(codes_RN, self.scale, self.zero, self.group_size)

    def dequantize_at(self, index_T: Tensor) -> Tensor:
        """float32 (R, T): `dequantize()[:, index_T]` without decoding the rest."""
        if self.values is not None:
            return self.values[:, index_T].float()
        assert self.scale is not None
        assert self.zero is not None
        codes_RT = unpack_at(self.planes, self.bits, index_T)
        group_T = index_T // self.group_size
        return (codes_RT.float() - self.zero[:, group_T].float()) * self.scale[:, group_T].float()


@dataclass(frozen=True)
class BandTensors:
    """A band's stored tensors; its part of the delta is `U diag(s) Vᵀ` (Delta-CoMe, equation 5)."""

    v: Factor
    u: Factor
    s: Tensor
    """float32 (R,)."""

    def numbers(self) -> list[Tensor]:
        """The floating-point tensors: the scales, or 16-bit values, of V and of U, and s."""
        of_factors = [f.scale if f.values is None else f.values for f in (self.v, self.u)]
        return [*(numbers for numbers in of_factors if numbers is not None), self.s]

    def dense(self) -> Tensor:
        """float32 (O, I): what this band adds to the weight."""
        return self.u.dequantize().T @ (self.s[:, None] * self.v.dequantize())


def dense(bands: Sequence[BandTensors]) -> Tensor:
    """float32 (O, I): the delta that a bands term stands for."""
    return Packed(bands).dense()


def write_bands(bands: Sequence[BandTensors]) -> Tensor:
    """Lays out bands as the blob that goes to disk: uint8 (nbytes,), padding bytes zero."""
    plan = plan_of(bands)
    shape = (bands[0].u.size, bands[0].v.size)
    # 16-bit factors have no groups and do not know the group size of the others.
    groups = {f.group_size for band in bands for f in (band.v, band.u) if f.values is None}
    (group_size,) = groups or {GROUP}
    layouts, nbytes = band_sections(shape, plan, group_size)
    blob = torch.zeros(nbytes, dtype=torch.uint8)
    for band, sections in zip(bands, layouts, strict=True):
        for section, tensor in zip(sections, _stored(band), strict=True):
            assert tensor.numel() == math.prod(section.shape), section.name
            raw = tensor.cpu().contiguous().view(-1).view(torch.uint8)
            blob[section.offset : section.offset + section.nbytes] = raw
    return blob


def read_bands(
    blob: Tensor, shape: tuple[int, int], plan: Plan, group_size: int = GROUP
) -> list[BandTensors]:
    """Views of a blob, no copy: the inverse of `write_bands`.

    Raises:
        ArtifactError: the blob's size is not what shape and plan require.
    """
    layouts, nbytes = band_sections(shape, plan, group_size)
    if blob.dtype != torch.uint8 or blob.shape != (nbytes,):
        raise ArtifactError(
            f"packed bands of shape {shape}: expected {nbytes} bytes of uint8, "
            f"got {tuple(blob.shape)} of {blob.dtype}"
        )
    bands = []
    for band, sections in zip(plan, layouts, strict=True):
        parts: dict[str, list[Tensor]] = {"v": [], "u": [], "s": []}
        for section in sections:
            raw = blob[section.offset : section.offset + section.nbytes]
            parts[section.name[0]].append(
                raw.view(getattr(torch, section.dtype)).view(section.shape)
            )
        v = _factor(band.bits, shape[1], parts["v"], group_size)
        u = _factor(band.bits, shape[0], parts["u"], group_size)
        bands.append(BandTensors(v, u, parts["s"][0].view(-1)))
    return bands


def plan_of(bands: Sequence[BandTensors]) -> Plan:
    """The plan that a list of bands follows."""
    return tuple(Band(band.u.bits, band.s.numel()) for band in bands)


def _stored(band: BandTensors) -> list[Tensor]:
    """A band's tensors in the order of its sections."""
    tensors = []
    for factor in (band.v, band.u):
        if factor.values is not None:
            tensors.append(factor.values)
        else:
            assert factor.scale is not None
            assert factor.zero is not None
            tensors += [*factor.planes, factor.scale, factor.zero]
    return [*tensors, band.s.float()]


def _factor(bits: int, size: int, tensors: list[Tensor], group_size: int) -> Factor:
    if bits == 16:
        return Factor(16, size, values=tensors[0], group_size=group_size)
    *planes, scale, zero = tensors
    return Factor(bits, size, tuple(planes), scale, zero, group_size=group_size)


@dataclass(frozen=True)
class SignTensors:
    """A signs term's stored tensors; the delta is `scale · (2 · code − 1)` (BitDelta, equation 2)."""

    words: Tensor
    """int32 (O, 2 · ⌈I / 64⌉): a 1-bit plane, with rows in place of directions."""
    scale: Tensor
    """float32, (1,) or (O,)."""
    size: int
    """I."""

    @classmethod
    def from_signs(cls, positive_OI: Tensor, scale: Tensor) -> SignTensors:
        """Packs where a delta is positive, bool (O, I), with one scale, (1,), or one per row, (O,)."""
        (words_OW,) = pack(positive_OI.to(torch.uint8), 1)
        return cls(words_OW, scale.float(), positive_OI.shape[1])

    def dense(self) -> Tensor:
        """float32 (O, I)."""
        codes_OI = unpack((self.words,), 1, self.size)
        return (2 * codes_OI.float() - 1) * self.scale[:, None]


def write_signs(signs: SignTensors) -> Tensor:
    """Lays out a signs term as the blob that goes to disk: uint8 (nbytes,), padding bytes zero."""
    shape = (len(signs.words), signs.size)
    words, scales, nbytes = sign_sections(shape, signs.scale.numel())
    blob = torch.zeros(nbytes, dtype=torch.uint8)
    for at, tensor in ((words, signs.words), (scales, signs.scale)):
        raw = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        blob[at : at + len(raw)] = raw
    return blob


def read_signs(blob: Tensor, shape: tuple[int, int], scales: int) -> SignTensors:
    """Views of a blob, no copy: the inverse of `write_signs`.

    Raises:
        ArtifactError: the blob's size is not what shape and scales require.
    """
    words, at, nbytes = sign_sections(shape, scales)
    if blob.dtype != torch.uint8 or blob.shape != (nbytes,):
        raise ArtifactError(
            f"packed signs of shape {shape}: expected {nbytes} bytes of uint8, "
            f"got {tuple(blob.shape)} of {blob.dtype}"
        )
    row_words = 2 * math.ceil(shape[1] / BLOCK)
    words_OW = blob[words : words + 4 * row_words * shape[0]].view(torch.int32)
    scale = blob[at : at + 4 * scales].view(torch.float32)
    return SignTensors(words_OW.view(shape[0], row_words), scale, shape[1])


@dataclass(frozen=True)
class Packed:
    """The packed terms of one matrix; its delta is the sum of those present."""

    bands: Sequence[BandTensors] = ()
    signs: SignTensors | None = None

    def dense(self) -> Tensor:
        """float32 (O, I): the delta that the terms stand for together."""
        first, *rest = self.bands if self.signs is None else (self.signs, *self.bands)
        total_OI = first.dense()
        for term in rest:
            total_OI += term.dense()
        return total_OI

    def blobs(self) -> dict[str, Tensor]:
        """The blobs to store: kind of term → uint8 (nbytes,); entries are called `<name>.<kind>`."""
        blobs = {"bands": write_bands(self.bands)} if self.bands else {}
        return blobs if self.signs is None else blobs | {"signs": write_signs(self.signs)}
