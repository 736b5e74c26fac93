"""The artifact folder: strict, lazy reading; atomic, resumable writing.

Reading trusts nothing: the manifest decides which safetensors entries there must be, of which type
and shape, and the folder must hold exactly those. `Artifact.open` costs header reads only; the
checksums of all bytes are for `Artifact.verify_bytes`, as a 7B artifact is most of a gigabyte.

Writing goes to `OUT.partial`. Finished units (a decoder block each) lie there as complete files, so
that a crash loses the unit in work and nothing else; the artifact itself is assembled last and
renamed into place. An artifact is therefore whole or absent. Assembling copies the bytes once more;
appending to growing shards would save that copy and cost the guarantee.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltacome.errors import ArtifactError, OutputError
from deltacome.format.canary import CANARY_FILE
from deltacome.format.card import MARK, model_card
from deltacome.format.codec import BandTensors, Packed, SignTensors, read_bands, read_signs
from deltacome.format.folder import (
    RUN_FILE,
    claim,
    disk_errors,
    new_folder,
    partial_of,
    publish,
    release,
    sync,
    write_atomic,
)
from deltacome.format.hub import FILES, fetch_folder, hub_errors
from deltacome.format.manifest import (
    MANIFEST_FILE,
    SAFETENSORS_DTYPES,
    FileInfo,
    Manifest,
    Record,
    entry_nbytes,
    parse_json,
    record_from_json,
    record_to_json,
)
from deltacome.format.spec import ALIGN

T = TypeVar("T")

INDEX_FILE = "delta.safetensors.index.json"
CARD_FILE = "README.md"
TUNED_CONFIG_FILE = "tuned_config.json"
STAYS = "; what was finished stays for --resume"
MAX_SHARD_BYTES = 1 << 30
"""Of a shard as it is written; assembling one holds it in memory."""
MAX_JSON_BYTES = 64 << 20
"""Of manifest and index; a mixture with 70,000 expert matrices needs a third of it."""


class Artifact(ModelHubMixin):
    """An opened artifact. Tensors are read when asked for.

    Attributes:
        path: the folder.
        manifest: what the artifact says of itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Artifact:
        """Without the mixin's own, which keeps all arguments, as JSON, for a config.json."""
        return object.__new__(cls)

    def __init__(self, path: Path, manifest: Manifest, where: dict[str, str]) -> None:
        self.path = path
        self.manifest = manifest
        self._where = where
        self._checked = False

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Opens a folder and checks that it holds exactly what its manifest says.

        Args:
            path: an artifact folder.

        Raises:
            ArtifactError: not an artifact, a file missing or of the wrong size, an entry missing,
                unknown, or of another type or shape than the manifest's plan gives.
        """
        path = Path(path)
        text = _read_text(path, MANIFEST_FILE)
        manifest = Manifest.from_json(text)
        for name, info in (manifest.shards | manifest.files).items():
            _check_file(path, name, info)
        for file in sorted(path.glob("*.safetensors")):
            if file.name not in manifest.shards:
                raise ArtifactError(f"{path}: shard {file.name} is not in {MANIFEST_FILE}")
        where = _check_entries(path, manifest, hashlib.sha256(text.encode()).hexdigest())
        return cls(path, manifest, where)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        **download: Any,
    ) -> Artifact:
        """Opens a local folder, or an artifact on the Hub from its cache, where it is fetched to first.

        Args:
            pretrained_model_name_or_path: a folder, `org/name`, or `org/name@revision`.
            revision: a branch, tag or commit of the repository.
            download: `token`, `cache_dir`, `force_download`, `local_files_only`: as snapshot_download.

        Raises:
            ArtifactError: as `open`, or the Hub has no such repository or revision.
        """
        # The mixin's own would ask for a config.json first, which an artifact must not have.
        return cls.open(
            fetch_folder(pretrained_model_name_or_path, revision, ArtifactError, **download)
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Writes a copy, with its model card, to a folder that does not exist yet.

        Args:
            save_directory: the folder.
            model_card_kwargs: of `generate_model_card`.
            kwargs: `push_to_hub`, `repo_id` and more, as `ModelHubMixin` takes them.

        Raises:
            OutputError: the folder exists or cannot be written.
        """
        with new_folder(Path(save_directory)) as folder:
            super().save_pretrained(folder, model_card_kwargs=model_card_kwargs)
        if not kwargs.pop("push_to_hub", False):
            return None
        name = kwargs.pop("repo_id", None) or Path(save_directory).name
        return self.push_to_hub(name, **kwargs)

    def push_to_hub(
        self, repo_id: str, *, scores: Sequence[dict[str, Any]] = (), **kwargs: Any
    ) -> str:
        """Uploads the artifact and its model card; of an artifact that was there before nothing stays.

        It is copied to a temporary folder first. Readers of a large one that is half there refuse it.

        Args:
            repo_id: `org/name`; created if it is not there, and `branch` too.
            scores: results of `evals` for the card, as `deltacome eval --json` prints them.
            kwargs: `private`, `token`, `branch`, `create_pr`, `commit_message`, as `ModelHubMixin` takes
                them.

        Returns:
            Address of the commit.

        Raises:
            ArtifactError: the bytes are not those that were written.
            MismatchError: scores of another artifact.
            OutputError: the Hub refuses it, or cannot be reached.
        """
        self.check_bytes()
        kwargs.setdefault("commit_message", f"Delta, {self.ratio():.1f} times smaller")
        kwargs.setdefault("delete_patterns", list(FILES))
        card = {"name": repo_id, "scores": scores}
        with hub_errors(repo_id, OutputError):
            if branch := kwargs.get("branch"):
                api = HfApi(token=kwargs.get("token"))
                api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(
        self, *, name: str | None = None, scores: Sequence[dict[str, Any]] = ()
    ) -> ModelCard:
        """The model card; somebody's own words in the folder's README.md stay, under our metadata.

        Args:
            name: how readers are to call the artifact; by default it is the folder they are in.
            scores: as `push_to_hub` takes them.
        """
        card = model_card(self, name, scores)
        file = self.path / CARD_FILE
        if file.is_file():
            own = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            if MARK not in own.text:
                said = {key: value for key, value in vars(card.data).items() if value is not None}
                said["tags"] = list(dict.fromkeys([*(own.data.get("tags") or []), *said["tags"]]))
                vars(own.data).update(said)
                return ModelCard(f"---\n{own.data.to_yaml()}\n---\n\n{own.text.lstrip()}")
        return card

    def _save_pretrained(self, save_directory: Path) -> None:
        for name in (MANIFEST_FILE, INDEX_FILE, *self.manifest.shards, *self.manifest.files):
            shutil.copyfile(self.path / name, save_directory / name)

    def blob(self, name: str, kind: str = "bands") -> Tensor:
        """A packed term of a tensor as the run of bytes that an op reads: uint8 (nbytes,).

        A view of the file where it lies aligned there, else a copy (exact tensors of odd size push
        what follows them in a file off its alignment).

        Args:
            name: of the tensor.
            kind: of the term, `bands` or `signs`.
        """
        blob = self._read(f"{name}.{kind}")
        return blob if blob.data_ptr() % ALIGN == 0 else blob.clone()

    def bands(self, name: str) -> list[BandTensors]:
        """The packed bands of a tensor, views of its blob."""
        record = self.manifest.records[name]
        return read_bands(
            self.blob(name), record.bands_shape, record.plan, self.manifest.group_size
        )

    def signs(self, name: str) -> SignTensors:
        """The packed signs of a tensor, views of their blob."""
        record = self.manifest.records[name]
        assert record.sign_scales is not None, name
        return read_signs(self.blob(name, "signs"), record.bands_shape, record.sign_scales)

    def packed(self, name: str) -> Packed:
        """All packed terms of a tensor, views of their blobs."""
        record = self.manifest.records[name]
        bands = self.bands(name) if record.plan else ()
        return Packed(bands, self.signs(name) if record.sign_scales else None)

    def exact(self, name: str) -> Tensor:
        """The exact rows of a tensor, in the tuned model's dtype."""
        return self._read(f"{name}.exact")

    def file(self, name: str) -> bytes | None:
        """A file of the tuned model that the artifact carries, checked; None if it carries none such.

        Raises:
            ArtifactError: the file is missing or not what it was.
        """
        info = self.manifest.files.get(name)
        if info is None:
            return None
        _check_file(self.path, name, info)
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise ArtifactError(f"{self.path / name}: cannot be read: {error}") from error
        got = hashlib.sha256(content).hexdigest()
        if got != info.sha256:
            raise ArtifactError(f"{self.path / name}: expected SHA-256 {info.sha256}, got {got}")
        return content

    def json_file(self, name: str) -> dict[str, Any] | None:
        """`file`, read as a JSON object: `tuned_config.json`, `generation_config.json`.

        Raises:
            ArtifactError: as `file`, or it is not a JSON object.
        """
        content = self.file(name)
        if content is None:
            return None
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.path / name}: not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise ArtifactError(
                f"{self.path / name}: expected an object, got {type(document).__name__}"
            )
        return document

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the manifest, which has the checksums of everything else."""
        return file_sha256(self.path / MANIFEST_FILE)

    def bytes_on_disk(self) -> int:
        """Bytes of the weight files, the index and the manifest: what `ratio` divides by."""
        names = [MANIFEST_FILE, INDEX_FILE, *self.manifest.shards]
        return sum((self.path / name).stat().st_size for name in names)

    def ratio(self) -> float:
        """Bytes of the tuned model's weights (as if at 16 bit) ÷ bytes on disk."""
        return self.manifest.tuned_nbytes() / self.bytes_on_disk()

    def describe(self) -> dict[str, Any]:
        """Sizes and every tensor's account, as `deltacome inspect --json` prints them.

        `ratio` is on disk with everything counted, `nominal_ratio` counts codes only, as papers do.
        """
        manifest = self.manifest
        tensors = [
            {
                "name": record.name,
                "shape": list(record.shape),
                "kind": record.held,
                "plan": [[band.bits, band.count] for band in record.plan],
                "sign_scales": record.sign_scales,
                "bytes": record.nbytes(manifest.group_size),
                "error": record.error,
            }
            for record in manifest.records.values()
        ]
        base = {"name_or_path": manifest.base_name_or_path, "revision": manifest.base_revision}
        return {
            "method": manifest.method["name"],
            "base": base,
            "bytes_on_disk": self.bytes_on_disk(),
            "tuned_bytes": manifest.tuned_nbytes(),
            "ratio": self.ratio(),
            "nominal_ratio": manifest.nominal_ratio(),
            "canary": CANARY_FILE in manifest.files,
            "tensors": tensors,
        }

    def verify_bytes(self) -> None:
        """Reads every byte of the weight files and of what they carry along, and compares checksums.

        Raises:
            ArtifactError: a file's SHA-256 is not the manifest's.
        """
        for name, shard in self.manifest.shards.items():
            got = file_sha256(self.path / name)
            if got != shard.sha256:
                raise ArtifactError(
                    f"{self.path / name}: expected SHA-256 {shard.sha256}, got {got}"
                )
        for name in self.manifest.files:
            self.file(name)
        self._checked = True

    def check_bytes(self) -> None:
        """`verify_bytes`, unless this object has done it: what runs a delta reads all of it anyway."""
        if not self._checked:
            self.verify_bytes()

    def _read(self, key: str) -> Tensor:
        file = self.path / self._where[key]
        try:
            with safe_open(file, framework="pt") as shard:
                return shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: {key} cannot be read: {error}") from error

    def __repr__(self) -> str:
        method = self.manifest.method["name"]
        return f"Artifact({str(self.path)!r}, method={method!r}, ratio={self.ratio():.2f})"


def opened(source: Artifact | str | Path) -> Artifact:
    """An artifact as it is; a folder or a name on the Hub by `Artifact.from_pretrained`."""
    return source if isinstance(source, Artifact) else Artifact.from_pretrained(source)


def _read_text(folder: Path, name: str) -> str:
    file = folder / name
    if not file.is_file():
        raise ArtifactError(f"{folder}: not an artifact: expected a file {name}, found none")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ArtifactError(f"{file}: expected at most {MAX_JSON_BYTES} bytes, got more")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file}: not valid UTF-8: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error}") from error


def _check_file(folder: Path, name: str, info: FileInfo) -> None:
    file = folder / name
    if not file.is_file():
        raise ArtifactError(f"{folder}: {name} is missing")
    if file.stat().st_size != info.nbytes:
        raise ArtifactError(f"{file}: expected {info.nbytes} bytes, got {file.stat().st_size}")


def _check_entries(folder: Path, manifest: Manifest, digest: str) -> dict[str, str]:
    """Compares the shards' headers and the index with the manifest; returns key → shard."""
    expected = {}
    for record in manifest.records.values():
        expected |= record.entries(manifest.group_size)
    where = {}
    for name in manifest.shards:
        for key, got in _header(folder / name):
            if key in where:
                raise ArtifactError(f"{folder}: {key} is in both {where[key]} and {name}")
            if expected.get(key) != got:
                raise ArtifactError(
                    f"{folder / name}: {key}: expected {expected.get(key)}, got {got}"
                )
            where[key] = name
    missing = sorted(expected.keys() - where.keys())
    if missing:
        raise ArtifactError(
            f"{folder}: {len(missing)} entries are missing, the first is {missing[0]}"
        )
    file = folder / INDEX_FILE
    index = parse_json(_read_text(folder, INDEX_FILE), str(file))
    weight_map = index.get("weight_map")
    if index.keys() != {"metadata", "weight_map"} or not isinstance(weight_map, dict):
        raise ArtifactError(f"{file}: expected metadata and weight_map, got {sorted(index)[:5]}")
    if weight_map != where:
        keys = where.keys() | weight_map.keys()
        odd = min(key for key in keys if where.get(key) != weight_map.get(key))
        raise ArtifactError(f"{file}: disagrees with the shards on {odd}")
    if index["metadata"] != {"sha256": digest}:
        raise ArtifactError(
            f"{folder / MANIFEST_FILE}: expected the SHA-256 that {INDEX_FILE} gives, got {digest}"
        )
    return where


def _header(file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Entries of a safetensors file: key, (torch dtype name, shape)."""
    try:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                view = shard.get_slice(key)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype() or "", "unknown")
                yield key, (dtype, tuple(view.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a whole safetensors file: {error}") from error


def file_sha256(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one step of compression finished: some tensors' records and their stored entries."""

    records: tuple[Record, ...]
    entries: dict[str, Tensor]


class ArtifactWriter:
    """Writes an artifact unit by unit, so that a run can be interrupted and continued.

    Args:
        output: the artifact's folder; must not exist yet.
        identity: what the result depends on (inputs, options). A resumed run must have the same.
        resume: continue `OUT.partial` if there is one.

    Raises:
        ArtifactError: the output exists; an unfinished run exists and `resume` is off, or was made
            from something else; another process writes here.
    """

    def __init__(self, output: str | Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.output = Path(output)
        self.partial = partial_of(self.output)
        self._lock = claim(self.output)
        file = self.partial / RUN_FILE
        try:
            if file.exists():
                if not resume:
                    raise OutputError(
                        f"{self.partial}: holds an unfinished run; "
                        "continue it with --resume or remove it"
                    )
                _check_identity(file, identity)
            with disk_errors(self.partial):
                write_atomic(file, json.dumps(identity, indent=1, sort_keys=True))
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> Unit | None:
        """A unit that an earlier run finished, or None."""
        records_file = self.partial / f"{name}.json"
        if not records_file.exists():
            return None
        try:
            values = json.loads(records_file.read_text())
            records = tuple(record_from_json(key, value) for key, value in values.items())
            with safe_open(self.partial / f"{name}.safetensors", framework="pt") as file:
                entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.partial}: {name} cannot be read: {error}; remove the folder to start anew"
            ) from error
        return Unit(records, entries)

    def save(self, name: str, unit: Unit) -> None:
        """Stores a finished unit."""
        save_unit(self.partial, name, unit)

    def has(self, name: str) -> bool:
        """Whether a unit is there."""
        return (self.partial / f"{name}.json").exists()

    def finish(
        self,
        names: list[str],
        manifest: Manifest,
        files: Mapping[str, bytes] = MappingProxyType({}),
        card: Callable[[Artifact], bytes] | None = None,
    ) -> Path:
        """Assembles the artifact from its units and moves it into place.

        Args:
            names: the units, in the order of their bytes.
            manifest: without shards, records and files.
            files: of the tuned model that go along (name → content).
            card: gives the `README.md` of the artifact.
        """
        final = self.partial / "final"
        with disk_errors(self.partial, STAYS):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            records = {}
            for name in names:
                unit_records = json.loads((self.partial / f"{name}.json").read_text())
                records |= {key: record_from_json(key, v) for key, v in unit_records.items()}
            shards, weight_map = self._write_shards(final, names)
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
    ) -> tuple[dict[str, FileInfo], dict[str, str]]:
        files = ((name, self.partial / f"{name}.safetensors") for name in names)
        groups = list(grouped(((name, f.stat().st_size) for name, f in files), MAX_SHARD_BYTES))
        weight_map, shards = {}, {}
        for number, group in enumerate(groups, 1):
            shard = f"delta-{number:05}-of-{len(groups):05}.safetensors"
            entries: dict[str, Tensor] = {}
            for name in group:
                unit = self.load(name)
                assert unit is not None, name
                entries |= unit.entries
            save_file(entries, final / shard, metadata={"format": "deltacome"})
            weight_map |= dict.fromkeys(sorted(entries), shard)
            file = final / shard
            shards[shard] = FileInfo(file.stat().st_size, file_sha256(file))
        return shards, weight_map


def save_unit(partial: Path, name: str, unit: Unit) -> None:
    """Stores a finished unit; tensors first, the list of records that makes it count last.

    Args:
        partial: the folder of the run, which this process or its parent has locked.
        name: of the unit.
        unit: what was finished.

    Raises:
        OutputError: it cannot be written.
    """
    with disk_errors(partial, STAYS):
        temporary = partial / f"{name}.safetensors.tmp"
        save_file({key: t.contiguous() for key, t in unit.entries.items()}, temporary)
        sync(temporary)
        os.replace(temporary, partial / f"{name}.safetensors")
        text = json.dumps({record.name: record_to_json(record) for record in unit.records})
        write_atomic(partial / f"{name}.json", text)


def _write_index(folder: Path, weight_map: dict[str, str], digest: str) -> None:
    index = {"metadata": {"sha256": digest}, "weight_map": weight_map}
    write_atomic(folder / INDEX_FILE, json.dumps(index, separators=(",", ":")) + "\n")


def file_infos(files: Mapping[str, bytes]) -> dict[str, FileInfo]:
    """Sizes and checksums of contents by name, as the manifest lists them."""
    return {
        name: FileInfo(len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }


def grouped(sizes: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Runs of items, in their order, whose sizes together stay within a limit; one item may not."""
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
    """Bytes on disk beside the terms: headers, index, manifest, of an artifact with these records.

    Exact for one shard up to the digits of errors and the alignment of the header; a plan that must
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


def _check_identity(file: Path, identity: dict[str, Any]) -> None:
    before = json.loads(file.read_text())
    now = json.loads(json.dumps(identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise OutputError(
                f"{file.parent}: cannot be resumed: {key} was {before.get(key)!r}, "
                f"is now {now.get(key)!r}; remove the folder to start anew"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
