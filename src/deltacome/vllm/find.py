"""Finds tenants by name in a folder, or at any address that fsspec understands: S3, GCS, `hf://org`;
and an artifact that a client names as `org/name` of the Hub.

A remote artifact is copied once for each state of its manifest into a cache beside the Hub's, whole or
not at all: its bytes are checked before the copy counts, as an upload may still run. What was copied
stays: another server may use it. The name is one component of a path; anything else is nobody's name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from deltacome.errors import ArtifactError
from deltacome.format.artifact import Artifact
from deltacome.format.hub import NAME as HUB_NAME
from deltacome.format.hub import fetch_folder
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.vllm.request import is_artifact

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a tenant can be called: no separators, and no leading dot."""


def hub_artifact(path: str) -> str:
    """The folder in the Hub's cache of an artifact named `org/name` or `org/name@revision`.

    Any other path as it is: a folder, or a repository without an artifact, of which vLLM may know more.

    Raises:
        ArtifactError: there is an artifact, and it cannot be fetched.
    """
    match = HUB_NAME.fullmatch(path)
    if match is None or "/" not in match["repo"] or Path(path).is_dir():
        return path
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(match["repo"], MANIFEST_FILE, revision=match["revision"])
    except Exception:  # not there, or the Hub is not: vLLM's own loading says which
        return path
    return str(fetch_folder(path, None, ArtifactError))


class Finder:
    """Looks for `<place>/<name>`.

    Args:
        place: a folder, or an fsspec address.
        cache: where remote artifacts are kept; by default below the Hub's cache.
    """

    def __init__(self, place: str, cache: Path | None = None) -> None:
        self.place = place
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        self.cache = cache or Path(home).expanduser() / "deltacome"
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def find(self, name: str) -> Path | None:
        """The local folder of a tenant, copied where it is remote; None if there is none.

        Raises:
            ArtifactError: the remote place cannot be read, or its artifact is not whole yet.
        """
        if not NAME.fullmatch(name):
            return None
        # Requests that come together copy once.
        async with self._locks.setdefault(name, asyncio.Lock()):
            return await asyncio.to_thread(self._find, name)

    def _find(self, name: str) -> Path | None:
        if "://" not in self.place:
            folder = Path(self.place) / name
            return folder if is_artifact(str(folder)) else None
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.place)
            system.invalidate_cache()  # listings of what was there before
            source = f"{root.rstrip('/')}/{name}"
            if not system.exists(f"{source}/{MANIFEST_FILE}"):
                return None
            manifest = system.cat_file(f"{source}/{MANIFEST_FILE}")
            target = self.cache / f"{name}-{hashlib.sha256(manifest).hexdigest()[:16]}"
            if not target.is_dir():
                self._copy(system, source, manifest, target)
            return target
        except ArtifactError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise ArtifactError(f"{self.place}: {name} cannot be read: {error}") from error

    def _copy(self, system: Any, source: str, manifest: bytes, target: Path) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self.cache, prefix=".partial-"))
        try:
            for file in system.find(source, maxdepth=1):
                system.get_file(file, str(partial / file.rpartition("/")[2]))
            (partial / MANIFEST_FILE).write_bytes(manifest)  # it may have changed since
            try:
                Artifact.open(partial).check_bytes()
            except ArtifactError as error:
                raise ArtifactError(
                    f"{source}: not complete yet, or damaged (it is read again when asked for): {error}"
                ) from error
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():  # else another server was first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
