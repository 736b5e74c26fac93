"""Output folders: written beside their place by one process at a time, and whole or absent.

Work goes on in `OUT.partial`, under a lock that dies with its process. What is finished lies in a folder
of its own in there and takes its place by a rename, after every byte has reached the disk.
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
"""In a partial folder: what the unfinished run that lies there was made from."""


def partial_of(output: Path) -> Path:
    """Where an output is in the making."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, *, resume: bool = False) -> None:
    """Refuses an output ahead of work that comes before `claim`, which asks again under its lock.

    Raises:
        OutputError: it exists, or an unfinished compression that is not to be continued lies there.
    """
    if output.exists():
        raise OutputError(f"{output}: the output exists already; remove it or name another")
    partial = partial_of(output)
    if not resume and (partial / RUN_FILE).exists():
        raise OutputError(
            f"{partial}: holds an unfinished run of compress; continue it with --resume or remove it"
        )


def claim(output: Path, *, resume: bool = False) -> IO[str]:
    """Makes the partial folder of an output and locks it, until the stream that is returned is closed.

    Raises:
        OutputError: as `check_output`, or it cannot be written, or another process is at it.
    """
    check_output(output, resume=True)  # a run that lies there may be another process's: see below
    partial = partial_of(output)
    file = partial / "lock"
    if partial.exists() and not file.exists() and any(partial.iterdir()):
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
        if output.exists():  # since it was looked for above
            release(output, stream)
        stream.close()
        raise
    return stream


def release(output: Path, stream: IO[str]) -> None:
    """Removes the partial folder and gives up its lock, in this order."""
    shutil.rmtree(partial_of(output), ignore_errors=True)
    stream.close()


def publish(finished: Path, output: Path) -> None:
    """Moves a folder, or a file, out of the partial folder into its place, all bytes on disk first."""
    for file in finished.iterdir() if finished.is_dir() else ():
        # safetensors writes files that only their owner may read; the lock is like any other file.
        shutil.copymode(partial_of(output) / "lock", file)
        sync(file)
    sync(finished)
    os.replace(finished, output)
    sync(output.parent)


@contextlib.contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A file to write, which becomes `output` when the block ends.

    If it ends with an error nothing is left. What a killed process left is thrown away.

    Raises:
        OutputError: the output exists, cannot be written, is being written by another process, or an
            unfinished compression lies in its place.
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
    """Disk full, read-only and the like are refusals with a reason, not tracebacks.

    Raises:
        OutputError: in place of what the system or safetensors says.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}{hint}") from error


@contextlib.contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A file to write in the place of another, which is there as a whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    yield temporary
    sync(temporary)
    os.replace(temporary, file)


def write_atomic(file: Path, text: str) -> None:
    """Writes a small text file so that it is there as a whole or not at all."""
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
