"""Finds tenants by name, in a folder or at any address that fsspec understands (S3, GCS, `hf://org`).

It also fetches an artifact that a client names as `org/name` on the Hub.

A remote artifact is copied into a cache beside the Hub's, once for each state of its manifest, whole or
not at all. Only the files that the manifest names are copied, and their bytes are checked before the copy
counts, since an upload may still be running. Copies are kept: another server may use them. A tenant's
name is a single path component; anything else is nobody's name.

Names come from clients, so lookups have a few threads of their own and a time limit, and a name that was
missing a moment ago is not looked up again. What a storage reports goes to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deltacome.errors import ArtifactError
from deltacome.format.artifact import INDEX_FILE, MAX_JSON_BYTES, Artifact, read_manifest
from deltacome.format.folder import sync
from deltacome.format.hub import NAME as HUB_NAME
from deltacome.format.hub import fetch_folder
from deltacome.format.manifest import MANIFEST_FILE, Manifest
from deltacome.vllm.locks import Locks
from deltacome.vllm.request import is_artifact

A = TypeVar("A")
T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a tenant can be called: no separators, and no leading dot."""
LOOKING, COPYING = 4, 2
"""How many names are looked up, and how many artifacts are copied, at the same time."""
_fetching = ThreadPoolExecutor(COPYING, thread_name_prefix="deltacome-hub")
LOOK_SECONDS = 20.0
"""How long a storage may take to say whether it has a name."""
MISSING_SECONDS, MISSING_NAMES = 5.0, 4096
"""How long a name that a remote place lacked is not looked up again, and how many are remembered."""


async def fetched(path: str) -> str:
    """`hub_artifact`, in threads for that alone: others would wait for downloads in those of asyncio."""
    if _on_hub(path) is None:
        return path
    return await asyncio.get_running_loop().run_in_executor(_fetching, hub_artifact, path)


def hub_artifact(path: str) -> str:
    """The folder in the Hub's cache of an artifact named `org/name` or `org/name@revision`.

    Any other path is returned as it is: a folder, or a repository without an artifact, about which vLLM
    may know more.

    Raises:
        ArtifactError: there is an artifact, but it cannot be fetched.
    """
    match = _on_hub(path)
    if match is None:
        return path
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(match["repo"], MANIFEST_FILE, revision=match["revision"])
    except Exception:  # no such file, or no Hub: vLLM's own loading says which
        return path
    names = _named(read_manifest(Path(found).parent))
    return str(fetch_folder(path, None, ArtifactError, [MANIFEST_FILE, *names]))


def _on_hub(path: str) -> re.Match[str] | None:
    """The parts of `org/name@revision`; None for anything else, and for a folder of this machine."""
    match = HUB_NAME.fullmatch(path)
    return match if match and "/" in match["repo"] and not os.path.isdir(path) else None


class StorageError(ArtifactError):
    """A storage did not answer. What was copied from it before can still be read."""


class Source(NamedTuple):
    """A remote artifact."""

    system: Any
    """fsspec's file system."""
    folder: str
    manifest: bytes


class Finder:
    """Looks for `<place>/<name>`.

    Args:
        place: a folder, or an fsspec address.
        cache: where copies of remote artifacts are kept; by default in `$HF_HOME/deltacome`.
    """

    def __init__(self, place: str, cache: Path | None = None) -> None:
        self.place = place
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        self.cache = cache or Path(home).expanduser() / "deltacome"
        self._locks = Locks()
        self._looking = ThreadPoolExecutor(LOOKING, thread_name_prefix="deltacome-find")
        self._copying = ThreadPoolExecutor(COPYING, thread_name_prefix="deltacome-copy")
        self._missing: dict[str, float] = {}
        """Names that a remote place did not have, and until when they are not looked up again."""

    async def find(self, name: str) -> Path | None:
        """The local folder of a tenant, copied first if it is remote; None if there is none.

        Raises:
            StorageError: the place cannot be read.
            ArtifactError: the artifact is not whole yet or leads elsewhere.
        """
        if not NAME.fullmatch(name) or self._missing.get(name, 0.0) > time.monotonic():
            return None
        # Requests that arrive together share one copy.
        async with self._locks[name]:
            with _storage_errors(name):
                if "://" not in self.place:
                    return await self._look(self._local, name)
                source = await self._look(self._remote, name)
                if source is None:
                    self._remember(name)
                    return None
                target = self.cache / f"{name}-{hashlib.sha256(source.manifest).hexdigest()[:16]}"
                # Looked at here, as whatever is copied already must not wait for other copies.
                if not await self._look(self._is_whole, target):
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._copying, self._copy, name, source, target)
                return target

    async def _look(self, look: Callable[[A], T], at: A) -> T:
        waiting = asyncio.get_running_loop().run_in_executor(self._looking, look, at)
        return await asyncio.wait_for(waiting, LOOK_SECONDS)

    def _remember(self, name: str) -> None:
        """Remembers that a name was missing; if there are too many, the oldest is forgotten."""
        self._missing.pop(name, None)
        self._missing[name] = time.monotonic() + MISSING_SECONDS
        if len(self._missing) > MISSING_NAMES:
            del self._missing[next(iter(self._missing))]

    def _local(self, name: str) -> Path | None:
        folder = Path(self.place) / name
        if not is_artifact(str(folder)):
            return None
        home = folder.resolve()
        for file in folder.iterdir():
            if file.is_symlink() and not file.resolve().is_relative_to(home):
                raise ArtifactError(
                    f"{name}: {file.name}: expected files of this folder, got a link out of it"
                )
        return folder

    def _remote(self, name: str) -> Source | None:
        import fsspec

        system, root = fsspec.core.url_to_fs(self.place)
        system.invalidate_cache()  # it may list what was there before
        folder = f"{root.rstrip('/')}/{name}"
        file = f"{folder}/{MANIFEST_FILE}"
        try:
            _check_size(MANIFEST_FILE, system.info(file), None)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Source(system, folder, system.cat_file(file, end=MAX_JSON_BYTES))

    def _is_whole(self, target: Path) -> bool:
        """Whether there is a copy; one that is damaged is moved away."""
        if target.is_dir():
            try:
                Artifact.open(target)
            except ArtifactError:  # the disk was full, or a power cut
                self._discard(target)
        return target.is_dir()

    def _discard(self, target: Path) -> None:
        """Moves a folder away and deletes it; whoever has one of its files open can still read it."""
        aside = Path(tempfile.mkdtemp(dir=self.cache, prefix=".damaged-"))
        with contextlib.suppress(FileNotFoundError):  # another server was first
            target.rename(aside / target.name)
        shutil.rmtree(aside, ignore_errors=True)

    def _copy(self, name: str, source: Source, target: Path) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self.cache, prefix=".partial-"))
        try:
            try:
                _fetch(source, partial)
                Artifact.open(partial).check_bytes()
            except ArtifactError as error:
                raise ArtifactError(
                    f"{name}: not complete yet, or damaged (it is read again when asked for): {error}"
                ) from error
            for file in [*partial.iterdir(), partial]:
                sync(file)  # once the folder has its name, its bytes must be on disk
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():  # else another server was first
                    raise
            sync(self.cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _fetch(source: Source, folder: Path) -> None:
    """Copies the files that a manifest names, after checking all their sizes."""
    names = _named(source.manifest)
    for name, nbytes in names.items():
        try:
            _check_size(name, source.system.info(f"{source.folder}/{name}"), nbytes)
        except FileNotFoundError:
            raise ArtifactError(f"{name} is missing") from None
    for name in names:
        source.system.get_file(f"{source.folder}/{name}", str(folder / name))
    (folder / MANIFEST_FILE).write_bytes(source.manifest)  # the remote one may have changed


def _named(manifest: bytes) -> dict[str, int | None]:
    """The files of an artifact besides its manifest → their size in bytes; None for the index."""
    try:
        said = Manifest.from_json(manifest.decode())
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{MANIFEST_FILE}: not valid UTF-8: {error}") from error
    files = said.shards | said.files
    return {INDEX_FILE: None} | {name: info.nbytes for name, info in files.items()}


def _check_size(name: str, info: dict[str, Any], nbytes: int | None) -> None:
    """Checks a file before it is copied; some storages report neither a size nor whether it is a link."""
    size = info.get("size")
    if nbytes is None and size is not None and size > MAX_JSON_BYTES:
        raise ArtifactError(f"{name}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
    if nbytes is not None and size not in (None, nbytes):
        raise ArtifactError(f"{name}: expected {nbytes} bytes, got {size}")
    if info.get("islink"):
        raise ArtifactError(f"{name}: expected a file, got a link")


@contextlib.contextmanager
def _storage_errors(name: str) -> Iterator[None]:
    """Replaces a storage's own errors, which quote addresses and whatever is written in those."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise StorageError(f"{name}: cannot be read from where tenants are looked for") from error
