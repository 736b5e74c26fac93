"""Names on the Hub, by one rule for checkpoints and artifacts, and errors that say what is wrong.

A folder that exists is used as it is. Anything else must be `org/name` or `org/name@revision`; its files
go to the Hub's cache, where the next call finds them. Transport, cache and login are huggingface_hub's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltacome.errors import DeltaError

FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
"""What is fetched from a repository: no pickles and no code."""
TWICE = ("consolidated*",)
"""Weights that some repositories hold a second time, in their makers' own layout."""
NAME = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^\s@]+))?")


def split_name(
    name_or_path: str | Path, revision: str | None, refused: type[DeltaError]
) -> tuple[str, str | None]:
    """Splits `org/name@revision` into name and revision; returns a folder as it is.

    Args:
        name_or_path: a folder, or a name on the Hub.
        revision: a branch, tag or commit, where the name has none.
        refused: the error to raise, which depends on what the caller is looking for.
    """
    text = str(name_or_path)
    if os.path.isdir(text):  # Path's own raises where the text is too long for a name
        return text, revision
    if os.path.isfile(text):
        what = " (GGUF is not read: give the checkpoint that it was made from)"
        raise refused(
            f"{text}: expected a folder, got a file{what if text.endswith('.gguf') else ''}"
        )
    match = NAME.fullmatch(text)
    if match is None:
        raise refused(f"{text}: expected a folder, or org/name on the Hub; found none")
    if match["revision"] and revision is not None:
        raise refused(f"{text}: already names a revision, got {revision!r} as well")
    return match["repo"], match["revision"] or revision


def fetch_folder(
    name_or_path: str | Path,
    revision: str | None,
    refused: type[DeltaError],
    patterns: Sequence[str] = FILES,
    **download: Any,
) -> Path:
    """The local folder that a name stands for, fetched from the Hub where necessary.

    Args:
        name_or_path, revision, refused: as `split_name` takes them.
        patterns: of the files to fetch from a repository.
        download: further arguments of `huggingface_hub.snapshot_download`: token, cache_dir, …
    """
    name, revision = split_name(name_or_path, revision, refused)
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    with hub_errors(name if revision is None else f"{name}@{revision}", refused):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(TWICE),
                **download,
            )
        )


@contextmanager
def hub_errors(name: str, refused: type[DeltaError]) -> Iterator[None]:
    """Turns whatever goes wrong between here and the Hub into an error of one line about `name`."""
    try:
        yield
    except (DeltaError, TypeError):  # TypeError: an argument that huggingface_hub does not know
        raise
    except Exception as error:  # each transport and each storage has errors of its own
        raise refused(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for access at {hub}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"neither a folder nor a repository that {hub} shows you; for a private one run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository at {hub} has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = _first_line(error.__cause__ or error)
        return f"no folder, not in the cache, and {hub} cannot be asked: {why}"
    return f"{hub}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
