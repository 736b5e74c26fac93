"""An artifact as a worker holds it on the host: its shards of the packed terms, and where they go.

A tenant is all that activation needs, so that making one resident is copying and nothing else. To vLLM
it is an adapter without low-rank pairs.

Loading checks everything: the configuration, the fingerprints of the base, that each tensor that the
artifact changes has its place in the model and the shape of the base's there, that numbers are finite,
that it fits into a slot. What does not fit is refused with the list of tensors or the figure to set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.codec import read_bands, read_signs
from deltacome.format.manifest import Record
from deltacome.format.spec import ALIGN, bands_nbytes, sign_sections
from deltacome.ops.slots import PlacedBands, PlacedSigns
from deltacome.runtime.match import check_config
from deltacome.vllm import compat
from deltacome.vllm.image import new_image
from deltacome.vllm.places import Place, encoder_prefixes, missing_prefixes
from deltacome.vllm.settings import Settings
from deltacome.vllm.shard import shard_bands, shard_signs
from deltacome.vllm.tokenizers import check_tokenizer


@dataclass
class Tenant:
    """What one worker holds of an artifact; by the names of places."""

    id: int
    path: str
    chunks: list[tuple[int, Tensor]] = field(default_factory=list)
    """Packed terms as they are read, uint8, and their offsets in a slot; none once gathered."""
    offsets: dict[Hashable, int] = field(default_factory=dict)
    """By tensor and shard."""
    nbytes: int = 0
    image: Tensor | None = None
    """What a slot holds of it, uint8 (nbytes,)."""
    bands: dict[str, list[PlacedBands | None]] = field(default_factory=dict)
    signs: dict[str, list[PlacedSigns | None]] = field(default_factory=dict)
    fields: dict[str, Tensor] = field(default_factory=dict)
    """Tables of `bands`, as `ModelManager.tables` works them out."""
    norms: dict[str, Tensor] = field(default_factory=dict)
    """float32 (H,), the weight that multiplies."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """float32 (O,), tuned minus base."""

    # What vLLM asks of an adapter; a tenant has no low-rank pairs.
    loras: dict[str, Any] = field(default_factory=dict)
    modules_to_save: dict[str, Any] = field(default_factory=dict)
    is_3d_lora_weight: bool = False

    def gather(self, device: torch.device) -> None:
        """Copies the packed terms into one piece of memory, which a device's slot takes in one copy.

        Until then each has memory of its own.
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


class Base:
    """The checkpoint that deltas were taken against, read for its fingerprints."""

    def __init__(self, name_or_path: str, revision: str | None) -> None:
        self.checkpoint = Checkpoint(name_or_path, revision)
        self._samples: dict[str, str] = {}

    def check(self, record: Record) -> None:
        """Raises MismatchError unless the base's tensor is the one the delta was taken against: its shape
        and its fingerprint."""
        name = record.base_name
        if name is None:
            raise UnsupportedError(
                f"{record.name}: the base has no such tensor: merge the artifact"
            )
        if name not in self._samples:
            if name not in self.checkpoint.tensors:
                raise MismatchError(f"{name}: the base {self.checkpoint.path} has no such tensor")
            self._samples[name] = self.checkpoint.sample(name)
        if (shape := self.checkpoint.tensors[name].shape) != record.base_shape:
            raise MismatchError(
                f"{record.name}: wrong base: expected {name} of shape {record.base_shape}, got {shape} "
                f"in {self.checkpoint.path}"
            )
        if self._samples[name] != record.base_sample:
            raise MismatchError(
                f"{record.name}: wrong base: expected {name} of fingerprint {record.base_sample}, got "
                f"{self._samples[name]} in {self.checkpoint.path}"
            )

    def read(self, record: Record) -> Tensor:
        """The base's value of a tensor."""
        assert record.base_name is not None
        return self.checkpoint.read(record.base_name)


def load_tenant(
    id: int, path: str, model: nn.Module, places: Sequence[Place], base: Base, settings: Settings
) -> Tenant:
    """Reads an artifact for this worker's part of the model.

    Raises:
        ArtifactError: the folder is not a whole artifact, a byte of it has changed or changes meanwhile,
            or a number is not finite.
        MismatchError: another base, or tensors that the model does not have.
        UnsupportedError: something that cannot be served, with the way out.
    """
    artifact = Artifact.open(path)
    _check_artifact(artifact, model, settings)
    if not settings.base_tokenizer:
        check_tokenizer(artifact, base.checkpoint.path)
    rename = compat.renamer(model)
    elsewhere = tuple(missing_prefixes(model))
    where: dict[str, list[tuple[Place, int]]] = {}
    for place in places:
        for index, part in enumerate(place.parts):
            where.setdefault(part.name, []).append((place, index))
    accounted = {rename(name) for name in artifact.manifest.records}
    tenant, unknown = Tenant(id, path), []
    mine: list[tuple[Record, Place, int, str]] = []
    for record in artifact.manifest.records.values():
        if record.base_name is not None:
            base.check(record)
        if record.kind == "same" or rename(record.name).startswith(elsewhere or ("\0",)):
            continue
        name, _, attribute = rename(record.name).rpartition(".")
        found = where.get(name, [])
        if not found and (place := _untied_head(name, record, places)):
            found = [(place, 0)]
        # A head that the tuned model no longer ties has a record of its own.
        found = [
            (p, i)
            for p, i in found
            if not (p.tied and name != p.name and f"{p.name}.weight" in accounted)
        ]
        if not found:
            unknown.append(record.name)
        for place, index in found:
            if record.base_name is not None:
                source = rename(record.base_name)
                _check_source(record, source, attribute, {name, place.parts[index].name})
            mine.append((record, place, index, attribute))
    if unknown:
        encoded = any(rename(name).startswith(encoder_prefixes(model)) for name in unknown)
        why = (
            "; images and sound are encoded by the base's towers for all tenants" if encoded else ""
        )
        raise MismatchError(
            f"{path}: {len(unknown)} tensors that this artifact changes have no place in "
            f"{type(model).__name__} as vLLM runs it: {_listed(unknown)}{why}"
        )
    used = [n for n in base.checkpoint.tensors if rename(n).rpartition(".")[0] in where]
    if lost := [name for name in used if rename(name) not in accounted]:
        raise MismatchError(
            f"{path}: the tuned model lacks {len(lost)} of the base's tensors, which would stay: "
            f"{_listed(lost)}: merge the artifact"
        )
    _check_sizes(artifact, mine, settings)
    artifact.check_bytes()  # behind all that costs less: other tenants wait
    for one in mine:
        _add(tenant, artifact, *one, base, settings)
    artifact.verify_bytes()  # again: what was read is what was checked, if that has not changed since
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
    grown = [r.name for r in manifest.records.values() if r.exact_rows and not r.replaced]
    if grown:
        raise UnsupportedError(
            f"{artifact.path}: {grown[0]} has rows that the base lacks (a grown vocabulary), which "
            "cannot be served beside the base: give the base the added tokens before tuning, or merge"
        )
    config = artifact.json_file(TUNED_CONFIG_FILE)
    tuned: Any = SimpleNamespace()
    tuned.config = check_config(SimpleNamespace(config=model.config), config)  # pyright: ignore
    if tuned.config is not None and compat.ties_head(tuned) and not compat.ties_head(model):
        raise UnsupportedError(
            f"{artifact.path}: tie_word_embeddings: the tuned model's head is its embedding, the "
            "base has a head of its own, which would stay: merge the artifact"
        )


def _check_sizes(
    artifact: Artifact, mine: Sequence[tuple[Record, Place, int, str]], settings: Settings
) -> None:
    """Refuses by the manifest what does not fit into a slot, or is exact and not of the base's shape."""
    group = artifact.manifest.group_size
    nbytes: dict[Hashable, int] = {}
    for record in artifact.manifest.records.values():
        if record.exact_rows and record.shape != record.base_shape:
            raise MismatchError(
                f"{artifact.path}: {record.name}: expected the base's shape, {record.base_shape}, got "
                f"{record.shape}: merge the artifact"
            )
    for record, place, index, _ in mine:
        part = place.parts[index]
        shape = part.size, part.columns[1] - part.columns[0]
        if record.plan:
            blob = bands_nbytes(shape, record.plan, place.group(group))
            nbytes[record.name, part, "bands"] = -(-blob // ALIGN) * ALIGN
        if scales := record.sign_scales:
            blob = sign_sections(shape, min(scales, part.size))[2]
            nbytes[record.name, part, "signs"] = -(-blob // ALIGN) * ALIGN
    if settings.slot_bytes is not None:
        check_room(str(artifact.path), sum(nbytes.values()), settings.slot_bytes)


def check_room(path: str, nbytes: int, slot: int) -> None:
    """Refuses an artifact that has more bytes of packed terms than a slot; says what to set."""
    if nbytes > slot:
        raise ArtifactError(
            f"{path}: has {nbytes} bytes of packed terms, a slot {slot}: set slot_bytes to {nbytes} in "
            "additional_config's deltacome"
        )


def _check_source(record: Record, source: str, attribute: str, names: set[str]) -> None:
    """A delta is added to the base's tensor of its place, so it must have been taken against that one.

    Args:
        record: of the tensor.
        source: vLLM's name of the base's tensor that the record names.
        attribute: `weight` or `bias`.
        names: of the place, with a prefix more or less; of an untied head the embedding's too.
    """
    ends = [f".{name}.{attribute}" for name in names]
    if not any(end.endswith(f".{source}") or f".{source}".endswith(end) for end in ends):
        raise MismatchError(
            f"{record.name}: expected a delta of the base's tensor of that place, got one of "
            f"{record.base_name}"
        )


def _untied_head(name: str, record: Record, places: Sequence[Place]) -> Place | None:
    """The head whose own tensor only the tuned model has; its base is the embedding."""
    return next(
        (p for p in places if p.kind == "head" and p.tied and p.name == name and record.base_name),
        None,
    )


def _add(
    tenant: Tenant,
    artifact: Artifact,
    record: Record,
    place: Place,
    index: int,
    attribute: str,
    base: Base,
    settings: Settings,
) -> None:
    part = place.parts[index]
    if attribute == "weight" and place.kind != "norm" and not record.replaced:
        _add_packed(tenant, artifact, record, place, index, settings)
    elif (
        attribute == "weight"
        and place.kind == "norm"
        and record.replaced
        and not isinstance(place.module, compat.NORMS[2])
    ):
        value = _values(artifact, record, (part.size,))
        gemma = isinstance(place.module, compat.GemmaRMSNorm)
        tenant.norms[place.name] = value + 1 if gemma else value
    elif attribute == "bias" and place.kind == "linear" and record.replaced and record.base_shape:
        change = _values(artifact, record, record.base_shape) - base.read(record).float()
        sizes = [p.size for p in place.parts]
        whole = tenant.biases.setdefault(place.name, torch.zeros(sum(sizes)))
        rows = torch.cat([change[start:stop] for start, stop in part.rows])
        torch.split(whole, sizes)[index].copy_(rows)
    else:
        raise UnsupportedError(
            f"{record.name}: {record.kind} {attribute} of {type(place.module).__name__} cannot be "
            "served beside the base: merge the artifact"
        )


def _values(artifact: Artifact, record: Record, shape: tuple[int, ...]) -> Tensor:
    """The tuned value of a vector, float32, read only if it is one of that shape."""
    if record.shape != shape or len(shape) != 1:
        raise MismatchError(f"{record.name}: expected {shape} values, got {record.shape}")
    value = artifact.exact(record.name).float()
    _check_finite(record.name, value)
    return value


def _check_finite(name: str, *numbers: Tensor) -> None:
    """A NaN outlives its request: in a block of the cache that is freed and taken by another one, where
    what is masked is multiplied by zero."""
    if not all(bool(some.isfinite().all()) for some in numbers):
        raise ArtifactError(f"{name}: expected finite numbers, got NaN or Inf")


def _add_packed(
    tenant: Tenant,
    artifact: Artifact,
    record: Record,
    place: Place,
    index: int,
    settings: Settings,
) -> None:
    part, shape, name = place.parts[index], record.bands_shape, record.name
    if record.transposed:
        raise UnsupportedError(
            f"{name}: has a delta of its transpose, which cannot be served beside the base: merge the "
            "artifact"
        )
    if part.rows[-1][1] > shape[0] or part.columns[1] > shape[1] or record.shape != shape:
        raise UnsupportedError(
            f"{name}: the model has {part.rows} × {part.columns} of it, the artifact {record.shape}: a "
            "vocabulary of another size cannot be served beside the base: merge the artifact"
        )
    parts = len(place.parts)
    if record.plan:
        group = artifact.manifest.group_size
        cut = (shape, record.plan, group, part.rows, part.columns, place.group(group))

        def bands() -> Tensor:
            blob = artifact.blob(name)
            for band in read_bands(blob, shape, record.plan, group):
                _check_finite(name, *band.numbers())
            return shard_bands(name, blob, *cut)

        placed = PlacedBands(_placed(tenant, (name, cut), bands), record.plan)
        tenant.bands.setdefault(place.name, [None] * parts)[index] = placed
    if scales := record.sign_scales:
        if not settings.signs:
            raise UnsupportedError(
                f"{name}: has a dense 1-bit term: set signs to true in additional_config's deltacome"
            )
        cuts = (shape, scales, part.rows, part.columns)

        def signs() -> Tensor:
            blob = artifact.blob(name, "signs")
            _check_finite(name, read_signs(blob, shape, scales).scale)
            return shard_signs(name, blob, *cuts)

        mine = 1 if scales == 1 else part.size
        signed = PlacedSigns(_placed(tenant, (name, cuts), signs), mine)
        tenant.signs.setdefault(place.name, [None] * parts)[index] = signed


def _placed(tenant: Tenant, key: Hashable, read: Callable[[], Tensor]) -> int:
    """The offset of a blob, behind the others; one that is there already (a tied weight's) is shared."""
    if key not in tenant.offsets:
        blob = read()
        tenant.offsets[key] = tenant.nbytes
        tenant.chunks.append((tenant.nbytes, blob))
        tenant.nbytes += -(-blob.numel() // ALIGN) * ALIGN
    return tenant.offsets[key]
