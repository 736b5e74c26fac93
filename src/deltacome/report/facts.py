"""What an artifact holds, as numbers to be drawn: bytes by kind, matrices by their place, spectra.

All of it is read from the artifact alone. A tensor's place in the model is read off its name: the first
number in `model.layers.7.mlp.up_proj.weight` is the depth, `model.layers.*.mlp.up_proj` the projection.
Further numbers are left out, so that the experts of a block share one place. A model's class would say
more, but would need transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltacome.errors import ArtifactError
from deltacome.format.artifact import INDEX_FILE, Artifact
from deltacome.format.manifest import MANIFEST_FILE, Record
from deltacome.format.spec import band_sections
from deltacome.format.tensors import entry_nbytes

CODES = ("16", "8", "4", "3", "2", "1", "signs")
"""Kinds of bytes that are codes: the width of a band, or the signs of a matrix."""
KINDS = (*CODES, "scales", "singular", "padding", "exact", "headers", "manifest")
"""All kinds of bytes; their sum is what lies on disk."""


@dataclass(frozen=True)
class Place:
    """The matrices of one projection at one depth: one of them, or all experts of a block."""

    projection: str
    depth: int | None
    """None outside of blocks."""
    matrices: int
    dropped: int
    """How many of these the fine-tune changed and the plan left as in the base."""
    weights: int
    """Entries that packed terms cover, or would cover."""
    nbytes: Counter[str]
    """Of packed terms, by kind."""
    directions: Counter[str]
    """By width; the sum over the matrices."""
    error: float | None
    """Mean of the relative squared errors that the manifest gives; None if it gives none."""
    worst: float | None
    """The largest of these errors: a mean over experts would hide it."""
    spectrum: np.ndarray
    """float64 (directions,), largest first: ‖s u vᵀ‖ of each direction; the mean over the matrices.

    Where directions are orthogonal these are the singular values of what is stored."""

    @property
    def bits(self) -> float:
        """Bits on disk per weight."""
        return 8 * self.nbytes.total() / self.weights


@dataclass(frozen=True)
class Facts:
    """An artifact in numbers."""

    digest: str
    """SHA-256 of the manifest, which an evaluation names too."""
    method: dict[str, Any]
    base: str
    nbytes: Counter[str]
    """Of all weight files, index and manifest, by kind."""
    tuned_nbytes: int
    nominal_ratio: float | None
    beside_nbytes: int
    """Of files that no ratio counts: tokenizer, configuration and so on."""
    tensors: Counter[str]
    """By kind of record."""
    places: list[Place]

    @property
    def bytes_on_disk(self) -> int:
        """All that the ratio divides by."""
        return self.nbytes.total()

    @property
    def ratio(self) -> float:
        """Bytes of the tuned weights at 16 bit ÷ bytes on disk."""
        return self.tuned_nbytes / self.bytes_on_disk

    @property
    def codes(self) -> list[str]:
        """The kinds of codes present, widest first."""
        return [kind for kind in CODES if any(place.nbytes[kind] for place in self.places)]

    @property
    def depths(self) -> list[int]:
        """All depths at which there are matrices."""
        return sorted({place.depth for place in self.places if place.depth is not None})

    @property
    def dropped(self) -> int:
        """Matrices that the plan left as in the base."""
        return sum(place.dropped for place in self.places)

    @property
    def mean_error(self) -> float | None:
        """Mean over the matrices, not over the places; dropped matrices count too."""
        known = [(p.error, p.matrices) for p in self.places if p.error is not None]
        count = sum(matrices for _, matrices in known)
        return sum(error * matrices for error, matrices in known) / count if known else None

    @property
    def projections(self) -> list[str]:
        """The projections within blocks."""
        inside = (place.projection for place in self.places if place.depth is not None)
        return list(dict.fromkeys(inside))

    @property
    def outside(self) -> list[Place]:
        """Embedding, head, and anything else outside blocks; those with the most bytes first."""
        places = [place for place in self.places if place.depth is None]
        return sorted(places, key=lambda place: -place.nbytes.total())

    def of(self, projection: str) -> list[Place]:
        """The places of a projection, by depth."""
        return [place for place in self.places if place.projection == projection]


def gather(artifact: Artifact) -> Facts:
    """Reads all of an artifact.

    Raises:
        ArtifactError: a file is not what the manifest says, or holds numbers that are not finite.
    """
    artifact.check_bytes()
    manifest = artifact.manifest
    members: dict[tuple[str, int | None], list[Record]] = {}
    for record in manifest.records.values():
        if record.packed or (record.error is not None and covered(record)):
            members.setdefault(place_of(record.name), []).append(record)
    order = sorted(members, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    places = [_place(artifact, key, members[key]) for key in order]
    total: Counter[str] = sum((place.nbytes for place in places), Counter())
    exact = [record for record in manifest.records.values() if record.exact_rows]
    total["exact"] = sum(entry_nbytes(record.dtype, record.exact_shape) for record in exact)
    total["headers"] = sum(shard.nbytes for shard in manifest.shards.values()) - total.total()
    names = (MANIFEST_FILE, INDEX_FILE)
    total["manifest"] = sum((artifact.path / name).stat().st_size for name in names)
    return Facts(
        digest=artifact.digest,
        method=manifest.method,
        base=manifest.base_name_or_path,
        nbytes=total,
        tuned_nbytes=manifest.tuned_nbytes(),
        nominal_ratio=manifest.nominal_ratio(),
        beside_nbytes=sum(file.nbytes for file in manifest.files.values()),
        tensors=Counter(record.held for record in manifest.records.values()),
        places=places,
    )


def place_of(name: str) -> tuple[str, int | None]:
    """Projection and depth of a tensor, by its name."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if not numbers or len(parts[numbers[0]]) > 6:
        return ".".join(parts), None
    first, *others = numbers
    kept = ["*" if i == first else part for i, part in enumerate(parts) if i not in others]
    return ".".join(kept), int(parts[first])


def covered(record: Record) -> int:
    """Entries of a tensor that are not stored exactly: those that a delta covers."""
    return math.prod(record.shape) - (math.prod(record.exact_shape) if record.exact_rows else 0)


def packed_kinds(record: Record, group: int) -> Counter[str]:
    """Bytes of the packed terms of a tensor, by kind.

    Codes are counted as papers count them, rounded up to whole bytes per direction; what fills up blocks
    of 64 codes and sections of 16 bytes is padding.
    """
    kinds: Counter[str] = Counter()
    if not record.packed:
        return kinds
    rows, columns = record.bands_shape
    if record.plan:
        sections, _ = band_sections(record.bands_shape, record.plan, group)
        for band, parts in zip(record.plan, sections, strict=True):
            kinds[str(band.bits)] += sum(
                band.count * math.ceil(band.bits * size / 8) for size in (rows, columns)
            )
            kinds["scales"] += sum(p.nbytes for p in parts if p.name[2:] in ("scale", "zero"))
            kinds["singular"] += sum(p.nbytes for p in parts if p.name == "s")
    if record.sign_scales:
        kinds["signs"] += rows * math.ceil(columns / 8)
        kinds["scales"] += 4 * record.sign_scales
    kinds["padding"] = sum(record.packed_nbytes(group).values()) - kinds.total()
    return kinds


def _place(artifact: Artifact, key: tuple[str, int | None], records: list[Record]) -> Place:
    nbytes: Counter[str] = Counter()
    directions: Counter[str] = Counter()
    for record in records:
        nbytes += packed_kinds(record, artifact.manifest.group_size)
        for band in record.plan:
            directions[str(band.bits)] += band.count
    errors = [record.error for record in records if record.error is not None]
    return Place(
        projection=key[0],
        depth=key[1],
        matrices=len(records),
        dropped=sum(not record.packed for record in records),
        weights=sum(covered(record) for record in records),
        nbytes=nbytes,
        directions=directions,
        error=sum(errors) / len(errors) if errors else None,
        worst=max(errors, default=None),
        spectrum=_mean(spectrum(artifact, r.name) for r in records if r.plan),
    )


def spectrum(artifact: Artifact, name: str) -> np.ndarray:
    """‖s u vᵀ‖ of every direction of a tensor's bands: float64 (directions,), largest first.

    Raises:
        ArtifactError: one of them is not finite.
    """
    norms = [
        band.s.abs() * band.u.dequantize().norm(dim=1) * band.v.dequantize().norm(dim=1)
        for band in artifact.bands(name)
    ]
    values = np.sort(np.concatenate([norm.double().numpy() for norm in norms]))[::-1]
    if not np.isfinite(values).all():
        raise ArtifactError(
            f"{name}: expected finite singular values, scales and codes, got others"
        )
    return values


def _mean(spectra: Iterable[np.ndarray]) -> np.ndarray:
    """The mean for each direction, over the spectra that reach that far."""
    total = count = np.zeros(0)
    for values in spectra:
        size = max(len(total), len(values))
        total, count = (np.pad(a, (0, size - len(a))) for a in (total, count))
        total[: len(values)] += values
        count[: len(values)] += 1
    return total / count
