"""Checks an artifact, and the base that it is for, to the last byte.

`Artifact.open` reads headers only, and `attach` compares samples of the base. This reads everything, for
use after a download and before a fleet relies on it. It stops at the first fault, since nothing that a
damaged artifact says after that can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltacome.arch.checkpoint import Checkpoint, check_finite
from deltacome.errors import ArtifactError
from deltacome.format.artifact import Artifact, opened
from deltacome.format.codec import read_bands, read_signs, unpack
from deltacome.format.manifest import Record
from deltacome.format.spec import BLOCK, PLANES, band_sections, sign_sections
from deltacome.runtime.merge import base_tensor


@dataclass(frozen=True)
class Verified:
    """What was read and found correct."""

    tensors: int
    """Tensors of the tuned model that the artifact accounts for."""
    nbytes: int
    """Bytes of the artifact (weight files, index, manifest)."""
    base_tensors: int
    """Tensors of the base that were compared; 0 if no base was given."""
    base_nbytes: int
    """Their bytes."""


def verify(artifact: Artifact | str | Path, base: str | Path | None = None) -> Verified:
    """Checks checksums, every stored number, and every byte of the base.

    Args:
        artifact: opened, or its folder or name on the Hub.
        base: the base's folder or repository on the Hub; None to check the artifact alone.

    Raises:
        ArtifactError: names the file or tensor: a wrong checksum, NaN or Inf among scales, singular
            values or 16-bit values, padding that is not zero.
        CheckpointError: NaN or Inf in an exact tensor, or the base cannot be read.
        MismatchError: a tensor of the base is not the one that the delta was taken against.
    """
    artifact = opened(artifact)
    artifact.verify_bytes()
    records = artifact.manifest.records.values()
    for record in records:
        if record.plan:
            _check_bands(record, artifact.blob(record.name), artifact.manifest.group_size)
        if record.sign_scales:
            _check_signs(record, record.sign_scales, artifact.blob(record.name, "signs"))
        if record.exact_rows:
            check_finite(record.name, artifact.exact(record.name), "artifact")
    base_nbytes = count = 0
    if base is not None:
        checkpoint = Checkpoint(base)
        of_base = [record for record in records if record.base_name is not None]
        # Of two records that contradict each other about one tensor, one is refused.
        seen = {
            (record.base_name, record.base_digest, record.base_shape): record for record in of_base
        }
        for record in seen.values():
            base_nbytes += base_tensor(checkpoint, record).nbytes
        count = len(seen)
    return Verified(len(records), artifact.bytes_on_disk(), count, base_nbytes)


def _check_bands(record: Record, blob: Tensor, group_size: int) -> None:
    bands = read_bands(blob, record.bands_shape, record.plan, group_size)
    for number, band in enumerate(bands):
        where = f"{record.name}: band {number} ({band.v.bits} bits)"
        for side, factor in (("V", band.v), ("U", band.u)):
            numbers = factor.scale if factor.values is None else factor.values
            assert numbers is not None
            _check_finite(f"{where}: {side}", numbers)
            if factor.planes:
                _check_padding(f"{where}: {side}", factor.planes, factor.bits, factor.size)
        _check_finite(f"{where}: s", band.s)
    layouts, _ = band_sections(record.bands_shape, record.plan, group_size)
    used = [(section.offset, section.nbytes) for sections in layouts for section in sections]
    _check_gaps(f"{record.name}: bands", blob, used)


def _check_signs(record: Record, scales: int, blob: Tensor) -> None:
    signs, where = read_signs(blob, record.bands_shape, scales), f"{record.name}: signs"
    _check_finite(f"{where}: scales", signs.scale)
    _check_padding(where, (signs.words,), 1, signs.size)
    words, at, _ = sign_sections(record.bands_shape, scales)
    _check_gaps(where, blob, [(words, signs.words.nbytes), (at, signs.scale.nbytes)])


def _check_finite(where: str, numbers: Tensor) -> None:
    bad = ~torch.isfinite(numbers)
    if bad.any():
        raise ArtifactError(f"{where}: expected finite values, got {int(bad.sum())} that are not")


def _check_padding(where: str, planes: Sequence[Tensor], bits: int, size: int) -> None:
    padded = planes[0].shape[1] * BLOCK // (2 * PLANES[bits][0])
    if unpack(planes, bits, padded)[:, size:].any():
        raise ArtifactError(f"{where}: expected zero codes after the last entry, got others")


def _check_gaps(where: str, blob: Tensor, used: Iterable[tuple[int, int]]) -> None:
    gaps = torch.ones_like(blob, dtype=torch.bool)
    for offset, nbytes in used:
        gaps[offset : offset + nbytes] = False
    if blob[gaps].any():
        raise ArtifactError(f"{where}: expected zero bytes between sections, got others")
