"""The artifact folder: strict, lazy reading, and transfer to and from the Hub.

Reading trusts nothing: the manifest decides which safetensors entries must exist, with which types
and shapes, and the folder must hold exactly those. `Artifact.open` reads only headers; checksums of
all bytes are left to `Artifact.verify_bytes`, as a 7B artifact is most of a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from safetensors import SafetensorError
from torch import Tensor

from deltacome.errors import ArtifactError, OutputError
from deltacome.format.canary import CANARY_FILE
from deltacome.format.card import MARK, model_card
from deltacome.format.codec import BandTensors, Packed, SignTensors, read_bands, read_signs
from deltacome.format.fields import parse_json
from deltacome.format.folder import new_folder
from deltacome.format.hub import FILES, fetch_folder, hub_errors
from deltacome.format.manifest import (
    MANIFEST_FILE,
    MAX_CARRIED_BYTES,
    FileInfo,
    Manifest,
)
from deltacome.format.spec import ALIGN
from deltacome.format.tensors import open_shard, read_header

INDEX_FILE = "delta.safetensors.index.json"
CARD_FILE = "README.md"
TUNED_CONFIG_FILE = "tuned_config.json"
MAX_JSON_BYTES = 64 << 20
"""Limit for the manifest and the index; a mixture with 70,000 expert matrices needs a third of it."""
MAX_PARSED_BYTES = {
    TUNED_CONFIG_FILE: 4 << 20,
    "generation_config.json": 1 << 20,
    "chat_template.json": 1 << 20,
    "tokenizer.json": MAX_JSON_BYTES,
}
"""Limits for carried files that are parsed, which takes tens of times their size; others may have
`MAX_OTHER_BYTES`. Gemma 3's `tokenizer.json` has 33 MB, a configuration that names 21,000 labels 1 MB."""
MAX_OTHER_BYTES = 16 << 20


class Artifact(ModelHubMixin):
    """An opened artifact. Tensors are read when asked for.

    Attributes:
        path: the folder.
        manifest: what the artifact says about itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Artifact:
        """Bypasses the mixin's own, which keeps all arguments as JSON for a config.json."""
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
            ArtifactError: the folder is not an artifact or cannot be read; a file is missing or has
                the wrong size; or an entry is missing, unknown, or of another type or shape than the
                manifest's plan gives.
        """
        path = Path(path)
        with _reading(path):
            content = read_manifest(path)
            manifest = Manifest.from_json(_text(path / MANIFEST_FILE, content))
            for name, info in (manifest.shards | manifest.files).items():
                _check_file(path, name, info)
            for file in sorted(path.glob("*.safetensors")):
                if file.name not in manifest.shards:
                    raise ArtifactError(f"{path}: shard {file.name} is not in {MANIFEST_FILE}")
            where = _check_entries(path, manifest, hashlib.sha256(content).hexdigest())
        return cls(path, manifest, where)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        **download: Any,
    ) -> Artifact:
        """Opens a local folder, or an artifact on the Hub, which is first fetched into the Hub's cache.

        Args:
            pretrained_model_name_or_path: a folder, `org/name`, or `org/name@revision`.
            revision: a branch, tag or commit of the repository.
            download: `token`, `cache_dir`, `force_download`, `local_files_only`, as for
                `snapshot_download`.

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
            model_card_kwargs: arguments of `generate_model_card`.
            kwargs: `push_to_hub`, `repo_id` and others that `ModelHubMixin` takes.

        Raises:
            OutputError: the folder exists or cannot be written.
        """
        with new_folder(Path(save_directory)) as folder:
            super().save_pretrained(folder, model_card_kwargs=model_card_kwargs)
        if not kwargs.pop("push_to_hub", False):
            return None
        name = kwargs.pop("repo_id", None) or Path(save_directory).name
        kwargs.setdefault("scores", (model_card_kwargs or {}).get("scores", ()))
        return self.push_to_hub(name, **kwargs)

    def push_to_hub(
        self, repo_id: str, *, scores: Sequence[dict[str, Any]] = (), **kwargs: Any
    ) -> str:
        """Uploads the artifact and its model card; nothing of an artifact that was there before stays.

        It is copied to a temporary folder first. Readers refuse a large one that is only partly uploaded.

        Args:
            repo_id: `org/name`; created if it does not exist, as is `branch`.
            scores: results of `evals` for the card, as `deltacome eval --json` prints them.
            kwargs: `private`, `token`, `branch`, `create_pr`, `commit_message`, as `ModelHubMixin` takes
                them.

        Returns:
            URL of the commit.

        Raises:
            ArtifactError: the bytes are not those that were written.
            MismatchError: the scores are those of another artifact.
            OutputError: the Hub refuses it, or cannot be reached.
        """
        self.check_bytes()
        # Scores of another artifact are to be refused before a repository is created.
        self.generate_model_card(name=repo_id, scores=scores)
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
        """The model card; a README.md that somebody wrote keeps its text and has its metadata updated.

        Args:
            name: the name that readers use for the artifact; by default, the folder they are in.
            scores: as `push_to_hub` takes them.

        Raises:
            ArtifactError: that README.md cannot be read.
            MismatchError: as `push_to_hub`.
        """
        card = model_card(self, name, scores)
        file = self.path / CARD_FILE
        if file.is_file():
            with _reading(file):
                text = _text(file, file.read_bytes())
            own = ModelCard(text, ignore_metadata_errors=True)
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

        It is a copy, since the file may change or disappear.

        Args:
            name: the tensor's name.
            kind: the kind of term, `bands` or `signs`.
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

    def file(self, name: str, limit: int = MAX_CARRIED_BYTES) -> bytes | None:
        """Reads and checks a file of the tuned model; None if the artifact does not carry it.

        Args:
            name: the file's name.
            limit: bytes that it may have; a larger file is not read.

        Raises:
            ArtifactError: the file is missing, too large, or has changed.
        """
        info = self.manifest.files.get(name)
        if info is None:
            return None
        with _reading(self.path / name):
            _check_file(self.path, name, info)
            content = _read_within(self.path / name, limit)
        got = hashlib.sha256(content).hexdigest()
        if got != info.sha256:
            raise ArtifactError(f"{self.path / name}: expected SHA-256 {info.sha256}, got {got}")
        return content

    def json_file(self, name: str) -> dict[str, Any] | None:
        """`file`, parsed as a JSON object: `tuned_config.json`, `generation_config.json`.

        Raises:
            ArtifactError: as `file`; or it is not a JSON object, or is larger than files of its name
                may be.
        """
        content = self.file(name, MAX_PARSED_BYTES.get(name, MAX_OTHER_BYTES))
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
        """Hex SHA-256 of the manifest, which has the checksums of all weights and side files."""
        return file_sha256(self.path / MANIFEST_FILE)

    def bytes_on_disk(self) -> int:
        """Bytes of the weight files, the index and the manifest: what `ratio` divides by."""
        names = [MANIFEST_FILE, INDEX_FILE, *self.manifest.shards]
        return sum((self.path / name).stat().st_size for name in names)

    def ratio(self) -> float:
        """Bytes of the tuned model's weights (as if at 16 bit) ÷ bytes on disk."""
        return self.manifest.tuned_nbytes() / self.bytes_on_disk()

    def describe(self) -> dict[str, Any]:
        """Sizes, and what is stored for each tensor, as `deltacome inspect --json` prints them.

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
        """Reads every byte of the weight files and of the carried files, and compares checksums.

        Raises:
            ArtifactError: a file's SHA-256 is not the manifest's, or it cannot be read.
        """
        for name, shard in self.manifest.shards.items():
            with _reading(self.path / name):
                got = file_sha256(self.path / name)
            if got != shard.sha256:
                raise ArtifactError(
                    f"{self.path / name}: expected SHA-256 {shard.sha256}, got {got}"
                )
        for name in self.manifest.files:
            self.file(name)
        self._checked = True

    def check_bytes(self) -> None:
        """`verify_bytes`, unless it was called before: whatever runs a delta reads all of it anyway."""
        if not self._checked:
            self.verify_bytes()

    def _read(self, key: str) -> Tensor:
        file = self.path / self._where[key]
        try:
            with open_shard(file) as shard:
                return shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: {key} cannot be read: {error}") from error

    def __repr__(self) -> str:
        method = self.manifest.method["name"]
        return f"Artifact({str(self.path)!r}, method={method!r}, ratio={self.ratio():.2f})"


def opened(source: Artifact | str | Path) -> Artifact:
    """Returns an artifact as it is, and opens a folder or Hub name by `Artifact.from_pretrained`."""
    return source if isinstance(source, Artifact) else Artifact.from_pretrained(source)


def read_manifest(folder: Path) -> bytes:
    """The bytes of `delta_config.json` in an artifact's folder.

    Raises:
        ArtifactError: there is none, it cannot be read, or it is larger than `MAX_JSON_BYTES`.
    """
    return _read_own(folder, MANIFEST_FILE)


def _read_own(folder: Path, name: str) -> bytes:
    """The bytes of the manifest or the index."""
    with _reading(folder):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: not an artifact: expected a file {name}, found none")
        return _read_within(folder / name, MAX_JSON_BYTES)


def _read_within(file: Path, limit: int) -> bytes:
    """Reads a file of at most `limit` bytes: its size is checked first, and no more than that is read."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ArtifactError(f"{file}: expected at most {limit} bytes, got {size}")
        return stream.read(size)


def _text(file: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file}: not valid UTF-8: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns system errors, and paths that no file can have (ValueError), into `ArtifactError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error


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
        for key, got in _header(folder / name).items():
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
    index = parse_json(_text(file, _read_own(folder, INDEX_FILE)), str(file))
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


def _header(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        return read_header(shard)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{shard}: not a whole safetensors file: {error}") from error


def file_sha256(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
