"""Finds tenants by name in a folder, or at any address that fsspec understands: S3, GCS, `hf://org`.

A remote artifact is copied once for each state of its manifest into a cache beside the Hub's, whole or
not at all. The name is one component of a path; anything else is nobody's name.
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

from deltacome.errors import ArtifactError
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.vllm import compat
from deltacome.vllm.request import content_path, is_artifact

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a tenant can be called: no separators, and no leading dot."""


class TenantResolver(compat.LoRAResolver):
    """Looks for `<place>/<name>`.

    Args:
        place: a folder, or an fsspec address.
        cache: where remote artifacts are kept; by default below the Hub's cache.
    """

    def __init__(self, place: str, cache: Path | None = None) -> None:
        self.place = place
        self.remote = "://" in place
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        self.cache = cache or Path(home).expanduser() / "deltacome"

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The request for a tenant; None if there is none of this name."""
        if not NAME.fullmatch(lora_name):
            return None
        folder = await asyncio.to_thread(self.find, lora_name)
        if folder is None:
            return None
        return compat.LoRARequest(
            lora_name=lora_name,
            lora_int_id=1,  # the registry gives it another
            lora_path=content_path(str(folder)),
        )

    def find(self, name: str) -> Path | None:
        """The local folder of a tenant; copies a remote one.

        Raises:
            ArtifactError: the remote place cannot be read.
        """
        if not self.remote:
            folder = Path(self.place) / name
            return folder if is_artifact(str(folder)) else None
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.place)
            source = f"{root.rstrip('/')}/{name}"
            if not system.exists(f"{source}/{MANIFEST_FILE}"):
                return None
            digest = hashlib.sha256(system.cat_file(f"{source}/{MANIFEST_FILE}")).hexdigest()[:16]
            target = self.cache / f"{name}-{digest}"
            if not target.is_dir():
                self.cache.mkdir(parents=True, exist_ok=True)
                partial = tempfile.mkdtemp(dir=self.cache, prefix=".partial-")
                try:
                    for file in system.find(source, maxdepth=1):
                        system.get_file(file, f"{partial}/{file.rpartition('/')[2]}")
                    os.replace(partial, target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            return target
        except (OSError, ValueError, ImportError) as error:
            raise ArtifactError(f"{self.place}: {name} cannot be read: {error}") from error
