"""An artifact as a worker holds it on the host: its shards of the packed terms, and where they go.

A tenant is all that activation needs, so that making one resident is copying and nothing else. To vLLM
it is an adapter without low-rank pairs.

Loading checks everything: the configuration, the fingerprints of the base, that each tensor that the
artifact changes has its place in the model, that it fits into a slot. What does not fit is refused
with the list of tensors or the figure to set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.manifest import Record
from deltacome.format.spec import ALIGN
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

        Until then they are views of files: who writes into those would change what is served.
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
        """Raises MismatchError unless the base's tensor is the one the delta was taken against."""
        name = record.base_name
        if name is None:
            raise UnsupportedError(
                f"{record.name}: the base has no such tensor: merge the artifact"
            )
        if name not in self._samples:
            if name not in self.checkpoint.tensors:
                raise MismatchError(f"{name}: the base {self.checkpoint.path} has no such tensor")
            self._samples[name] = self.checkpoint.sample(name)
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
        ArtifactError: the folder is not a whole artifact, or a byte of it has changed.
        MismatchError: another base, or tensors that the model does not have.
        UnsupportedError: something that cannot be served, with the way out.
    """
    artifact = Artifact.open(path)
    artifact.check_bytes()
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
            _add(tenant, artifact, record, place, index, attribute, base, settings)
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
    check_config(SimpleNamespace(config=model.config), config)  # pyright: ignore
    if config is not None and not compat.ties_head(model):
        tuned: Any = SimpleNamespace(config=type(model.config).from_dict(config))  # pyright: ignore
        if compat.ties_head(tuned):
            raise UnsupportedError(
                f"{artifact.path}: tie_word_embeddings: the tuned model's head is its embedding, the "
                "base has a head of its own, which would stay: merge the artifact"
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
        and not isinstance(place.module, compat.NORMS[2])
    ):
        value = artifact.exact(record.name).float()
        if value.shape != (part.size,):
            raise MismatchError(f"{record.name}: expected {part.size} values, got {value.shape}")
        gemma = isinstance(place.module, compat.GemmaRMSNorm)
        tenant.norms[place.name] = value + 1 if gemma else value
    elif attribute == "bias" and place.kind == "linear" and record.base_name is not None:
        change = artifact.exact(record.name).float() - base.read(record).float()
        sizes = [p.size for p in place.parts]
        whole = tenant.biases.setdefault(place.name, torch.zeros(sum(sizes)))
        rows = torch.cat([change[start:stop] for start, stop in part.rows])
        torch.split(whole, sizes)[index].copy_(rows)
    else:
        raise UnsupportedError(
            f"{record.name}: {record.kind} {attribute} of {type(place.module).__name__} cannot be "
            "served beside the base: merge the artifact"
        )


def _add_packed(
    tenant: Tenant,
    artifact: Artifact,
    record: Record,
    place: Place,
    index: int,
    settings: Settings,
) -> None:
    part, shape, name = place.parts[index], record.bands_shape, record.name
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
            return shard_bands(name, artifact.blob(name), *cut)

        placed = PlacedBands(_placed(tenant, (name, cut), bands), record.plan)
        tenant.bands.setdefault(place.name, [None] * parts)[index] = placed
    if scales := record.sign_scales:
        if not settings.signs:
            raise UnsupportedError(
                f"{name}: has a dense 1-bit term: set signs to true in additional_config's deltacome"
            )
        cuts = (shape, scales, part.rows, part.columns)

        def signs() -> Tensor:
            return shard_signs(name, artifact.blob(name, "signs"), *cuts)

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
