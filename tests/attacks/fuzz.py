"""Reads mutated artifacts by the thousand and counts the outcomes.

    python tests/attacks/fuzz.py --count 100000 --seed 0
    python tests/attacks/fuzz.py --seed 0 --only 4711 --keep work/mutant    # look at one

Reading is what `merge` does: open, check all bytes, rebuild every tuned tensor from the base. A mutant
may be refused with one of our own errors, or give exactly the original. Where the checksums were mended
(a forgery) it may also give what it says; only a signature guards against that. Anything else is a
finding: another exception, other values in silence, a slow read, much memory.

The mutations are ours and seeded, with one generator for each mutant, so that a count can be repeated and
one mutant looked at alone. A coverage-guided fuzzer would get further into safetensors' own parser, which
is not ours to test; the reader here is a few hundred lines of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "format"))
import originals
from mutate import Files, Folder, Link, mend, mutate

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import DeltaError
from deltacome.format.artifact import Artifact
from deltacome.runtime import verify
from deltacome.runtime.merge import tuned_tensor

SECONDS = 5
"""Of this process's CPU time: a mutant that takes longer to read has hung the reader."""
GROWTH = 256 << 20
"""Bytes by which peak memory may grow over all mutants."""


class Hung(BaseException):
    """Time is up; not an Exception, so that no handler catches it."""


def main() -> None:
    options = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch:
        fuzzer = Fuzzer(Path(scratch), options.seed)
        if options.only is not None:
            print(json.dumps(fuzzer.one(options.only, options.keep)))
            return
        start = time.monotonic()
        counts, findings = fuzzer.many(range(options.first, options.first + options.count))
    seconds = time.monotonic() - start
    report = {
        "seed": options.seed,
        "first": options.first,
        "mutants": options.count,
        "outcomes": dict(sorted(counts.items())),
        "findings": findings,
        "slowest_seconds": round(fuzzer.slowest, 3),
        "peak_growth_mib": fuzzer.growth() >> 20,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report, indent=1))
    sys.exit(bool(findings))


class Fuzzer:
    """Makes mutants of the originals in a scratch folder, and reads them."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.base, self.originals = originals.make(scratch)
        self.folder = scratch / "mutant"
        self.seed = seed
        self.slowest = 0.0
        self.expected = []
        for files in self.originals:
            _place(files, self.folder)
            self.expected.append(read(self.folder, self.base))
        _read_or_refuse(self.folder, self.base)  # so that late imports happen now
        self._before = _peak()

    def growth(self) -> int:
        """Bytes by which peak memory has grown since the originals were read."""
        return _peak() - self._before

    def many(self, numbers: range) -> tuple[Counter[str], list[dict[str, Any]]]:
        """Outcomes by name, and what should not have happened."""
        counts: Counter[str] = Counter()
        findings = []
        for number in numbers:
            result = self.one(number)
            counts[result["outcome"]] += 1
            if "finding" in result:
                findings.append(result)
        if self.growth() > GROWTH:
            findings.append({"finding": f"memory grew by {self.growth()} bytes"})
        return counts, findings

    def one(self, number: int, keep: Path | None = None) -> dict[str, Any]:
        """The outcome of one mutant."""
        draw = Random(f"{self.seed}:{number}")
        which = draw.randrange(len(self.originals))
        files: Files = dict(self.originals[which])
        steps = mutate(files, draw)
        forged = draw.random() < 0.5
        if forged:
            mend(files)
            steps.append("mend")
        _place(files, self.folder)
        if keep is not None:
            shutil.copytree(self.folder, keep, symlinks=True)
        start = time.process_time()
        outcome, got = _read_or_refuse(self.folder, self.base)
        seconds = time.process_time() - start
        self.slowest = max(self.slowest, seconds)
        result = {"number": number, "steps": steps, "seconds": round(seconds, 3)}
        if outcome != "read":
            result["outcome"] = outcome
            result["message"] = str(got)[:300]
            if outcome.startswith("crash"):
                result["finding"] = outcome
        elif got == self.expected[which]:
            result["outcome"] = "exactly the original"
        elif forged:
            result["outcome"] = "forged: what its own checksums say"
        else:
            result |= {"outcome": "other values in silence", "finding": "other values in silence"}
        if seconds > SECONDS:
            result["finding"] = f"took {seconds:.1f} s"
        return result


def read(folder: Path, base: Checkpoint) -> dict[str, Any]:
    """Everything that an artifact gives: tensors by name, carried files, what it says of itself."""
    artifact = Artifact.open(folder)
    described = artifact.describe()
    verify(artifact)
    given: dict[str, Any] = {"described": json.dumps(described["tensors"])}
    for record in artifact.manifest.records.values():
        value = tuned_tensor(base, artifact, record)
        raw = value.contiguous().view(-1).view(torch.uint8) if value.numel() else value
        given[record.name] = (value.dtype, value.shape, bytes(raw.tolist()))
    for name in artifact.manifest.files:
        given[f"file {name}"] = artifact.file(name)
    artifact.json_file("tuned_config.json")
    artifact.json_file("generation_config.json")
    return given


def _read_or_refuse(folder: Path, base: Checkpoint) -> tuple[str, Any]:
    try:
        with _time_limit():
            return "read", read(folder, base)
    except DeltaError as error:
        return f"refused: {type(error).__name__}", error
    except Hung:
        return "crash: time is up", ""
    except Exception as error:  # this is what the fuzzer looks for
        return f"crash: {type(error).__name__}", error


@contextlib.contextmanager
def _time_limit():
    def stop(signum: int, frame: Any) -> None:
        raise Hung

    # CPU time, and a long wall-clock time for a reader that waits for something.
    timers = [(signal.ITIMER_PROF, signal.SIGPROF, 2), (signal.ITIMER_REAL, signal.SIGALRM, 60)]
    before = [signal.signal(signum, stop) for _, signum, _ in timers]
    for timer, _, times in timers:
        signal.setitimer(timer, times * SECONDS)
    try:
        yield
    finally:
        for (timer, signum, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(signum, handler)


def _place(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, Link):
            os.symlink(content.to, folder / name)
        elif isinstance(content, Folder):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory() -> str | None:
    """A file system in memory, if there is one: a hundred thousand folders are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Read mutated artifacts, count the outcomes.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="read this mutant alone")
    parser.add_argument("--keep", type=Path, help="with --only: copy the mutant here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
