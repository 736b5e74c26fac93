"""Output folders: written by one process at a time beside their final place, and whole or absent.

Work happens in `OUT.partial`, under a lock that ends with its process. The finished output is a folder
of its own in there, which is renamed into place after every byte has reached the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from deltacome.errors import OutputError

RUN_FILE = "run.json"
"""In a partial folder: what the unfinished run there is made from."""


def partial_of(output: Path) -> Path:
    """The folder in which an output is being made."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, *, resume: bool = False) -> None:
    """Refuses an output before work that precedes `claim`, which checks again under its lock.

    Raises:
        OutputError: it exists, or there is an unfinished compression that is not to be continued.
    """
    if os.path.lexists(output):  # a link to nothing too: no folder can be renamed over it
        raise OutputError(f"{output}: the output exists already; remove it or name another")
    partial = partial_of(output)
    if not resume and os.path.exists(partial / RUN_FILE):
        raise OutputError(
            f"{partial}: holds an unfinished run of compress; continue it with --resume or remove it"
        )


def claim(output: Path, *, resume: bool = False) -> IO[str]:
    """Makes the partial folder of an output and locks it until the returned stream is closed.

    Raises:
        OutputError: as `check_output`, or it cannot be written, or another process is writing it.
    """
    check_output(output, resume=True)  # a run found there may be another process's: see below
    partial = partial_of(output)
    file = partial / "lock"
    if os.path.isfile(partial) or (
        os.path.isdir(partial) and not file.exists() and any(partial.iterdir())
    ):
        raise OutputError(
            f"{partial}: expected what an earlier run left, or nothing; got other files"
        )
    with disk_errors(output):
        partial.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have finished, and removed this file, since it was opened.
        if not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            raise FileNotFoundError(file)
    except (BlockingIOError, FileNotFoundError) as error:
        stream.close()
        raise OutputError(f"{partial}: another process is writing here") from error
    except OSError as error:  # some network file systems have no locks
        stream.close()
        raise OutputError(f"{file}: cannot be locked: {error}") from error
    try:
        check_output(output, resume=resume)
    except OutputError:
        if os.path.lexists(output):  # it appeared since the check above
            release(output, stream)
        stream.close()
        raise
    return stream


def release(output: Path, stream: IO[str]) -> None:
    """Removes the partial folder and then releases its lock."""
    shutil.rmtree(partial_of(output), ignore_errors=True)
    stream.close()


def publish(finished: Path, output: Path) -> None:
    """Moves a folder or file out of the partial folder into its place, once all bytes are on disk."""
    for file in finished.iterdir() if finished.is_dir() else ():
        # safetensors writes files that only their owner may read; the lock has the usual permissions.
        shutil.copymode(partial_of(output) / "lock", file)
        sync(file)
    sync(finished)
    os.replace(finished, output)
    sync(output.parent)


@contextlib.contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A file to write, which becomes `output` when the block ends.

    If the block raises, nothing is left. Whatever a killed process left behind is discarded.

    Raises:
        OutputError: the output exists, cannot be written, is being written by another process, or has
            an unfinished compression in its place.
    """
    stream, finished = claim(output), partial_of(output) / "final"
    try:
        with disk_errors(output):
            if finished.is_dir():
                shutil.rmtree(finished)
            yield finished
            publish(finished, output)
    finally:
        release(output, stream)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write files into; otherwise as `new_file`.

    Raises:
        OutputError: as `new_file`.
    """
    with new_file(output) as folder:
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def disk_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turns a full disk, a read-only one and the like into a refusal with a reason, not a traceback.

    Raises:
        OutputError: in place of the system's or safetensors' error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}{hint}") from error


@contextlib.contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A temporary file to write, which then replaces `file`, so that `file` is whole or absent."""
    temporary = file.with_name(f"{file.name}.tmp")
    yield temporary
    sync(temporary)
    os.replace(temporary, file)


def write_atomic(file: Path, text: str) -> None:
    """Writes a small text file so that it is whole or absent."""
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
