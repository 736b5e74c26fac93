"""Atomic, resumable writing of an artifact.

It goes to `OUT.partial`. Finished units (one decoder block each) are complete files there, so a crash
loses only the unit in progress; the artifact itself is assembled last and renamed into place. An
artifact is therefore whole or absent. Assembling copies the bytes once more; appending to growing
shards would save that copy but lose the guarantee.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacome.errors import ArtifactError, OutputError
from deltacome.format.artifact import CARD_FILE, INDEX_FILE, Artifact, file_sha256
from deltacome.format.folder import (
    RUN_FILE,
    atomic,
    claim,
    disk_errors,
    partial_of,
    publish,
    release,
    write_atomic,
)
from deltacome.format.manifest import (
    MANIFEST_FILE,
    FileInfo,
    Manifest,
    Record,
    record_from_json,
    record_to_json,
)
from deltacome.format.tensors import entry_nbytes

T = TypeVar("T")

STAYS = "; finished work is kept for --resume"
MAX_SHARD_BYTES = 1 << 30
"""Limit for a shard when it is written; assembling one holds it in memory."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """The result of one step of compression: the records of some tensors and their stored entries."""

    records: tuple[Record, ...]
    entries: dict[str, Tensor]


class ArtifactWriter:
    """Writes an artifact unit by unit, so that a run can be interrupted and continued.

    Args:
        output: the artifact's folder; must not exist yet.
        identity: what the result depends on (inputs, options). A resumed run must have the same.
        resume: continue `OUT.partial` if there is one.

    Raises:
        OutputError: the output exists; an unfinished run exists and `resume` is off, or it has
            another identity; another process is writing here.
    """

    def __init__(self, output: str | Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.output = Path(output)
        self._lock = claim(self.output, resume=resume)
        self.partial = partial_of(self.output)
        file = self.partial / RUN_FILE
        try:
            if file.exists():
                _check_identity(file, identity)
            with disk_errors(self.partial):
                write_atomic(file, json.dumps(identity, indent=1, sort_keys=True))
        except BaseException:
            self.close()
            raise

    def has(self, name: str) -> bool:
        """Whether a unit is finished, in this run or in an earlier one."""
        return (self.partial / f"{name}.json").exists()

    def load(self, name: str) -> Unit:
        """A finished unit.

        Raises:
            ArtifactError: it is not there, or cannot be read.
        """
        try:
            values = json.loads((self.partial / f"{name}.json").read_text())
            records = tuple(record_from_json(key, value) for key, value in values.items())
            entries = load_file(self.partial / f"{name}.safetensors")
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.partial}: {name} cannot be read: {error}; remove the folder to start anew"
            ) from error
        return Unit(records, entries)

    def save(self, name: str, unit: Unit) -> None:
        """Stores a finished unit."""
        save_unit(self.partial, name, unit)

    def finish(
        self,
        names: list[str],
        manifest: Manifest,
        files: Mapping[str, bytes] = MappingProxyType({}),
        card: Callable[[Artifact], bytes] | None = None,
    ) -> Path:
        """Assembles the artifact from its units and moves it into place.

        Args:
            names: the units, in the order in which they are stored.
            manifest: without shards, records and files.
            files: of the tuned model, to be carried along (name → content).
            card: returns the `README.md` of the artifact.
        """
        final = self.partial / "final"
        with disk_errors(self.partial, STAYS):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            records, shards, weight_map = self._write_shards(final, names)
            for name, content in files.items():
                (final / name).write_bytes(content)
            manifest = dataclasses.replace(
                manifest, records=records, shards=shards, files=file_infos(files)
            )
            text = manifest.to_json()
            write_atomic(final / MANIFEST_FILE, text)
            _write_index(final, weight_map, hashlib.sha256(text.encode()).hexdigest())
            artifact = Artifact.open(final)  # what is about to be published must be readable
            if card is not None:
                (final / CARD_FILE).write_bytes(card(artifact))
            publish(final, self.output)
        release(self.output, self._lock)
        return self.output

    def close(self) -> None:
        """Lets another process continue this run."""
        self._lock.close()

    def _write_shards(
        self, final: Path, names: list[str]
    ) -> tuple[dict[str, Record], dict[str, FileInfo], dict[str, str]]:
        """Returns the records, the shards' sizes and checksums, and which shard has which entry."""
        files = ((name, self.partial / f"{name}.safetensors") for name in names)
        groups = list(grouped(((name, f.stat().st_size) for name, f in files), MAX_SHARD_BYTES))
        records, shards, weight_map = {}, {}, {}
        for number, group in enumerate(groups, 1):
            shard = f"delta-{number:05}-of-{len(groups):05}.safetensors"
            entries: dict[str, Tensor] = {}
            for name in group:
                unit = self.load(name)
                records |= {record.name: record for record in unit.records}
                entries |= unit.entries
            save_file(entries, final / shard, metadata={"format": "deltacome"})
            weight_map |= dict.fromkeys(sorted(entries), shard)
            file = final / shard
            shards[shard] = FileInfo(file.stat().st_size, file_sha256(file))
        return records, shards, weight_map


def save_unit(partial: Path, name: str, unit: Unit) -> None:
    """Stores a finished unit: first its tensors, then its records, which mark it as finished.

    Args:
        partial: the folder of the run, which this process or its parent has locked.
        name: the unit's name.
        unit: what was finished.

    Raises:
        OutputError: it cannot be written.
    """
    with disk_errors(partial, STAYS):
        with atomic(partial / f"{name}.safetensors") as file:
            save_file({key: t.contiguous() for key, t in unit.entries.items()}, file)
        text = json.dumps({record.name: record_to_json(record) for record in unit.records})
        write_atomic(partial / f"{name}.json", text)


def file_infos(files: Mapping[str, bytes]) -> dict[str, FileInfo]:
    """Sizes and checksums of contents by name, as the manifest lists them."""
    return {
        name: FileInfo(len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }


def grouped(sizes: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Splits items, in order, into runs of a total size within `limit`; a single item may exceed it."""
    group: list[T] = []
    total = 0
    for item, size in sizes:
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    yield group


def overhead_nbytes(manifest: Manifest) -> int:
    """Bytes on disk besides the terms (headers, index, manifest) of an artifact with these records.

    Exact for one shard, up to the digits of errors and the alignment of the header; a plan that must
    meet a ratio needs it before anything is written.
    """
    header, index = 64, 64 + 76  # with the manifest's checksum
    for record in manifest.records.values():
        for key, (dtype, shape) in record.entries(manifest.group_size).items():
            span = entry_nbytes(dtype, shape)
            entry = {
                key: {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**8, 10**8 + span]}
            }
            header += len(json.dumps(entry, separators=(",", ":"))) - 1
            index += len(key) + len('"":"delta-00001-of-00001.safetensors",')
    return header + index + len(manifest.to_json())


def _write_index(folder: Path, weight_map: dict[str, str], digest: str) -> None:
    index = {"metadata": {"sha256": digest}, "weight_map": weight_map}
    write_atomic(folder / INDEX_FILE, json.dumps(index, separators=(",", ":")) + "\n")


def _check_identity(file: Path, identity: dict[str, Any]) -> None:
    before = json.loads(file.read_text())
    now = json.loads(json.dumps(identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise OutputError(
                f"{file.parent}: cannot be resumed: {key} was {before.get(key)!r}, "
                f"is now {now.get(key)!r}; remove the folder to start anew"
            )
