"""An artifact as a worker holds it on the host: its shards of the packed terms, and where they go.

A tenant has everything that activation needs, so that making one resident is copying and nothing else. To
vLLM it is an adapter without low-rank pairs.

Loading checks everything: the configuration; the fingerprints of the base; that each tensor that the
artifact changes has its place in the model, and the shape of the base's tensor there; that numbers are
finite; that the tenant fits into a slot. What does not fit is refused with the list of tensors or the
figure to set.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.codec import read_bands, read_signs
from deltacome.format.manifest import Record
from deltacome.format.spec import bands_nbytes, signs_nbytes
from deltacome.ops.slots import PlacedBands, PlacedSigns
from deltacome.runtime.base import Base
from deltacome.runtime.configs import check_config
from deltacome.vllm import compat
from deltacome.vllm.image import new_image
from deltacome.vllm.places import Part, Place, encoder_prefixes, missing_prefixes
from deltacome.vllm.settings import Settings
from deltacome.vllm.shard import shard_bands, shard_signs
from deltacome.vllm.tokenizers import check_tokenizer


@dataclass
class Tenant:
    """What one worker holds of an artifact; by the names of places."""

    id: int
    path: str
    chunks: list[tuple[int, Tensor]] = field(default_factory=list)
    """Offsets in a slot and packed terms as they are read, uint8; empty once gathered."""
    offsets: dict[Hashable, int] = field(default_factory=dict)
    """By tensor and shard."""
    nbytes: int = 0
    image: Tensor | None = None
    """What a slot holds of it, uint8 (nbytes,)."""
    bands: dict[str, list[PlacedBands | None]] = field(default_factory=dict)
    signs: dict[str, list[PlacedSigns | None]] = field(default_factory=dict)
    fields: dict[str, Tensor] = field(default_factory=dict)
    """Contents of the tables of `bands`, from `ModelManager.tables`."""
    norms: dict[str, Tensor] = field(default_factory=dict)
    """float32 (H,), the weight that the norm multiplies by."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """float32 (O,), tuned minus base."""

    # What vLLM asks of an adapter; a tenant has no low-rank pairs.
    loras: dict[str, Any] = field(default_factory=dict)
    modules_to_save: dict[str, Any] = field(default_factory=dict)
    is_3d_lora_weight: bool = False

    def put(self, key: Hashable, blob: Tensor) -> None:
        """Adds a packed term after the others."""
        self.offsets[key] = self.nbytes
        self.chunks.append((self.nbytes, blob))
        self.nbytes += blob.numel()

    def gather(self, device: torch.device) -> None:
        """Copies the packed terms into one piece of memory, from which a slot is filled in one copy.

        Until then each term has memory of its own.
        """
        self.image = new_image(self, self.nbytes, device)
        for offset, chunk in self.chunks:
            self.image[offset : offset + chunk.numel()] = chunk
        self.chunks = []

    def get_lora(self, module_name: str) -> None:
        """No low-rank pair, for any module."""

    def get_module_to_save(self, module_name: str) -> None:
        """No module saved whole."""

    def check_lora_name(self, module_name: str) -> bool:
        """No low-rank pair, for any module."""
        return False


@dataclass(frozen=True)
class Piece:
    """What an artifact has of a tensor, and one place of that tensor in this worker's model."""

    record: Record
    place: Place
    index: int
    """The index of the tensor among the parts of the place."""
    attribute: str
    """`weight` or `bias`."""

    @property
    def part(self) -> Part:
        """The tensor within the place."""
        return self.place.parts[self.index]

    @property
    def packed(self) -> bool:
        """Whether it is a delta of packed terms that a module adds."""
        return self.record.packed and self.attribute == "weight" and self.place.kind != "norm"


def load_tenant(
    id: int, path: str, model: nn.Module, places: Sequence[Place], base: Base, settings: Settings
) -> Tenant:
    """Reads an artifact for this worker's part of the model.

    Raises:
        ArtifactError: the folder is not a whole artifact, a byte of it has changed or changes while it is
            read, or a number is not finite.
        MismatchError: another base, or tensors that the model does not have.
        UnsupportedError: something that cannot be served, with the way out.
    """
    artifact = Artifact.open(path)
    _check_artifact(artifact, model, settings)
    if not settings.base_tokenizer:
        check_tokenizer(artifact, base.path)
    base.check(artifact)
    pieces = _pieces(artifact, model, places, base)
    _check_pieces(artifact, pieces, settings)
    artifact.check_bytes()  # after all that costs less, as other tenants wait
    tenant = Tenant(id, path)
    for piece in pieces:
        _add(tenant, artifact, piece, base)
    artifact.verify_bytes()  # again: if nothing has changed since, what was read is what was checked
    return tenant


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _check_artifact(artifact: Artifact, model: nn.Module, settings: Settings) -> None:
    manifest = artifact.manifest
    if manifest.group_size != settings.group_size:
        raise UnsupportedError(
            f"{artifact.path}: expected scale groups of {settings.group_size}, got "
            f"{manifest.group_size}: set group_size in additional_config's deltacome"
        )
    grown = [r.name for r in manifest.records.values() if r.grown]
    if grown:
        raise UnsupportedError(
            f"{artifact.path}: {grown[0]} has rows that the base lacks (a grown vocabulary), which "
            "cannot be served beside the base: give the base the added tokens before tuning, or merge"
        )
    tuned = check_config(model, artifact.json_file(TUNED_CONFIG_FILE))
    if tuned is not None and compat.ties_head(tuned) and not compat.ties_head(model.config):
        raise UnsupportedError(
            f"{artifact.path}: tie_word_embeddings: the tuned model's head is its embedding, the "
            "base has a head of its own, which would stay: merge the artifact"
        )


def _pieces(
    artifact: Artifact, model: nn.Module, places: Sequence[Place], base: Base
) -> list[Piece]:
    """All that the artifact changes in this worker's model.

    Raises:
        MismatchError: a tensor that it changes has no place, or is a delta of another place's tensor; or
            a tensor of the base would stay that the tuned model lacks.
    """
    rename, elsewhere = compat.renamer(model), tuple(missing_prefixes(model))
    accounted = {rename(name) for name in artifact.manifest.records}
    where: dict[str, list[tuple[Place, int]]] = {}
    for place in places:
        for index, part in enumerate(place.parts):
            where.setdefault(part.name, []).append((place, index))
    pieces, unknown = [], []
    for record in artifact.manifest.records.values():
        if record.kind == "same" or rename(record.name).startswith(elsewhere):
            continue
        name, _, attribute = rename(record.name).rpartition(".")
        found = [
            Piece(record, place, index, attribute)
            for place, index in where.get(name) or _untied_heads(name, record, places)
            # A head that the tuned model no longer ties has a record of its own.
            if not (place.tied and name != place.name and f"{place.name}.weight" in accounted)
        ]
        if not found:
            unknown.append(record.name)
        if record.base_name is not None:
            for piece in found:
                _check_source(piece, name, rename(record.base_name))
        pieces += found
    if unknown:
        encoded = any(rename(name).startswith(encoder_prefixes(model)) for name in unknown)
        why = (
            "; images and sound are encoded by the base's towers for all tenants" if encoded else ""
        )
        raise MismatchError(
            f"{artifact.path}: {len(unknown)} tensors that this artifact changes have no place in "
            f"{type(model).__name__} as vLLM runs it: {_listed(unknown)}{why}"
        )
    used = [name for name in base.tensors if rename(name).rpartition(".")[0] in where]
    if lost := [name for name in used if rename(name) not in accounted]:
        raise MismatchError(
            f"{artifact.path}: the tuned model lacks {len(lost)} of the base's tensors, which would "
            f"stay: {_listed(lost)}: merge the artifact"
        )
    return pieces


def _untied_heads(name: str, record: Record, places: Sequence[Place]) -> list[tuple[Place, int]]:
    """The head that only in the tuned model has its own tensor; its base is the embedding."""
    heads = [place for place in places if place.kind == "head" and place.tied]
    return [(head, 0) for head in heads if head.name == name and record.base_name]


def _check_source(piece: Piece, name: str, source: str) -> None:
    """Checks that a delta was taken against the tensor that it is added to, the base's in its place.

    Args:
        piece: the tensor's.
        name: vLLM's name of the tensor's module; for an untied head the place has the embedding's.
        source: vLLM's name of the base's tensor that the record names, give or take a prefix.
    """
    ends = [f".{one}.{piece.attribute}" for one in (name, piece.part.name)]
    if not any(end.endswith(f".{source}") or f".{source}".endswith(end) for end in ends):
        raise MismatchError(
            f"{piece.record.name}: expected a delta of the base's tensor of that place, got one of "
            f"{piece.record.base_name}"
        )


def _check_pieces(artifact: Artifact, pieces: Sequence[Piece], settings: Settings) -> None:
    """Refuses, from the manifest alone, what cannot be served.

    That is an exact tensor of another shape than the base's, a packed one that cannot be added where it
    belongs, or more bytes than a slot has.
    """
    for record in artifact.manifest.records.values():
        if record.exact_rows and record.shape != record.base_shape:
            raise MismatchError(
                f"{artifact.path}: {record.name}: expected the base's shape, {record.base_shape}, got "
                f"{record.shape}: merge the artifact"
            )
    nbytes: dict[Hashable, int] = {}
    for piece in pieces:
        if piece.packed:
            _check_packed(piece, settings)
            record, part = piece.record, piece.part
            shape = part.size, part.columns[1] - part.columns[0]
            group = piece.place.group(artifact.manifest.group_size)
            scales = record.sign_scales and min(record.sign_scales, part.size)
            of_signs = signs_nbytes(shape, scales)
            nbytes[record.name, part] = bands_nbytes(shape, record.plan, group) + of_signs
    if settings.slot_bytes is not None:
        check_room(str(artifact.path), sum(nbytes.values()), settings.slot_bytes)


def _check_packed(piece: Piece, settings: Settings) -> None:
    record, part, shape = piece.record, piece.part, piece.record.bands_shape
    if record.transposed:
        raise UnsupportedError(
            f"{record.name}: has a delta of its transpose, which cannot be served beside the base: merge "
            "the artifact"
        )
    if part.rows[-1][1] > shape[0] or part.columns[1] > shape[1] or record.shape != shape:
        raise UnsupportedError(
            f"{record.name}: the model has {part.rows} × {part.columns} of it, the artifact "
            f"{record.shape}: a vocabulary of another size cannot be served beside the base: merge the "
            "artifact"
        )
    if record.sign_scales and not settings.signs:
        raise UnsupportedError(
            f"{record.name}: has a dense 1-bit term: set signs to true in additional_config's deltacome"
        )


def check_room(path: str, nbytes: int, slot: int) -> None:
    """Refuses an artifact that has more bytes of packed terms than a slot; says what to set."""
    if nbytes > slot:
        raise ArtifactError(
            f"{path}: has {nbytes} bytes of packed terms, a slot {slot}: set slot_bytes to {nbytes} in "
            "additional_config's deltacome"
        )


def _add(tenant: Tenant, artifact: Artifact, piece: Piece, base: Base) -> None:
    record, place, part = piece.record, piece.place, piece.part
    what = piece.attribute, place.kind
    if piece.packed:
        if record.plan:
            _add_bands(tenant, artifact, piece)
        if record.sign_scales:
            _add_signs(tenant, artifact, piece, record.sign_scales)
    elif (
        what == ("weight", "norm")
        and record.replaced
        and not isinstance(place.module, compat.LayerNorm)
    ):
        value = _values(artifact, record, (part.size,))
        gemma = isinstance(place.module, compat.GemmaRMSNorm)
        tenant.norms[place.name] = value + 1 if gemma else value
    elif what == ("bias", "linear") and record.replaced and record.base_name and record.base_shape:
        value_O = _values(artifact, record, record.base_shape)
        change_O = value_O - base.read(record.base_name).float()
        sizes = [p.size for p in place.parts]
        whole = tenant.biases.setdefault(place.name, torch.zeros(sum(sizes)))
        rows = torch.cat([change_O[start:stop] for start, stop in part.rows])
        torch.split(whole, sizes)[piece.index].copy_(rows)
    else:
        raise UnsupportedError(
            f"{record.name}: {record.kind} {piece.attribute} of {type(place.module).__name__} cannot be "
            "served beside the base: merge the artifact"
        )


def _values(artifact: Artifact, record: Record, shape: tuple[int, ...]) -> Tensor:
    """The tuned value of a vector, float32, read only if it has that shape."""
    if record.shape != shape or len(shape) != 1:
        raise MismatchError(f"{record.name}: expected {shape} values, got {record.shape}")
    value = artifact.exact(record.name).float()
    _check_finite(record.name, value)
    return value


def _check_finite(name: str, *numbers: Tensor) -> None:
    """Refuses numbers that are not finite.

    A NaN would outlive its request: it stays in a block of the cache that is freed and taken by another
    request, where what is masked is multiplied by zero.
    """
    if not all(bool(some.isfinite().all()) for some in numbers):
        raise ArtifactError(f"{name}: expected finite numbers, got NaN or Inf")


def _add_bands(tenant: Tenant, artifact: Artifact, piece: Piece) -> None:
    record, place, part = piece.record, piece.place, piece.part
    shape, plan, group = record.bands_shape, record.plan, artifact.manifest.group_size
    cut = (shape, plan, group, part.rows, part.columns, place.group(group))
    if (key := (record.name, cut)) not in tenant.offsets:  # a tied weight's is, the second time
        blob = artifact.blob(record.name)
        for band in read_bands(blob, shape, plan, group):
            _check_finite(record.name, *band.numbers())
        tenant.put(key, shard_bands(record.name, blob, *cut))
    parts = tenant.bands.setdefault(place.name, [None] * len(place.parts))
    parts[piece.index] = PlacedBands(tenant.offsets[key], plan)


def _add_signs(tenant: Tenant, artifact: Artifact, piece: Piece, scales: int) -> None:
    record, place, part = piece.record, piece.place, piece.part
    cut = (record.bands_shape, scales, part.rows, part.columns)
    if (key := (record.name, cut)) not in tenant.offsets:
        blob = artifact.blob(record.name, "signs")
        _check_finite(record.name, read_signs(blob, record.bands_shape, scales).scale)
        tenant.put(key, shard_signs(record.name, blob, *cut))
    parts = tenant.signs.setdefault(place.name, [None] * len(place.parts))
    parts[piece.index] = PlacedSigns(tenant.offsets[key], 1 if scales == 1 else part.size)
