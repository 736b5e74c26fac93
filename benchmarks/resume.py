"""Kills compression and merging at random moments, starts them again, and compares every byte.

    python benchmarks/resume.py work/base work/sums --kills 50

Each trial forks a process that works, kills it (SIGKILL) after a random part of a whole run's time,
checks the output, and starts again until it is done; one trial in three is killed a second time. The
output must be absent or whole after each kill, and in the end have the bytes of an uninterrupted run.
Forking keeps the imports out of the time in which the kill may fall.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

import deltacome
from deltacome.format.folder import partial_of
from deltacome.skeleton import make_skeleton, read_config

Work = Callable[[Path], object]
"""Makes an output, or continues one."""


def main() -> None:
    options = _parse()
    torch.set_num_threads(1)  # a fork copies only the current thread
    preload(options.base)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        compress = compressing(options.base, options.tuned, options.compress)
        delta = folder / "delta"
        report = {"compress": trials(compress, delta, options.kills, options.seed)}
        merge = merging(options.base, delta)
        report["merge"] = trials(merge, folder / "dense", options.kills, options.seed)
    print(json.dumps(report, indent=1))
    sys.exit(any(one["wrong"] for one in report.values()))


def preload(base: str | Path) -> None:
    """Imports what a run would import later, so that forked processes need not."""
    make_skeleton(read_config(Path(base)), torch.float32, base)
    AutoTokenizer.from_pretrained(base)


def compressing(base: str | Path, tuned: str | Path, options: dict) -> Work:
    """Compression of a pair, resumed if it was begun before."""
    return lambda output: deltacome.compress(base, tuned, output, resume=True, **options)


def merging(base: str | Path, delta: str | Path) -> Work:
    """Merging, which starts over each time."""
    return lambda output: deltacome.merge(base, delta, output)


def trials(work: Work, output: Path, kills: int, seed: int) -> dict:
    """Kills `work` at random moments and counts the outcomes; leaves `output` whole.

    Returns:
        Counts of outputs `absent` and `whole` after a kill, and of runs `finished` before it; a reason
        for each `wrong` output.
    """
    draw = random.Random(seed)
    start = time.monotonic()
    _run(work, output)
    seconds, whole = time.monotonic() - start, digests(output)
    found: Counter[str] = Counter()
    blocks: Counter[int] = Counter()
    wrong: list[str] = []
    while found["absent"] + found["whole"] < kills:
        shutil.rmtree(output)
        for _ in range(draw.choice([1, 1, 2])):
            # A little beyond the end, so that the last moments are hit as often as the others.
            state = _kill_after(work, output, draw.uniform(0, 1.05 * seconds))
            found[state] += 1
            blocks[len(list(partial_of(output).glob("unit-*.json")))] += 1
            if state == "whole" and digests(output) != whole:
                wrong.append("other bytes at the output after a kill")
            if output.exists():
                break
        if not output.exists():
            _run(work, output)
        if digests(output) != whole:
            wrong.append("other bytes after the run was continued")
        # A kill between the rename and the clean-up may leave the folder that the output was made in.
        shutil.rmtree(partial_of(output), ignore_errors=True)
    return {
        "kills": found["absent"] + found["whole"],
        "seconds_of_a_whole_run": round(seconds, 2),
        **found,
        "finished_units_when_killed": {str(k): v for k, v in sorted(blocks.items())},
        "wrong": wrong,
    }


def _kill_after(work: Work, output: Path, seconds: float) -> str:
    """The state of the output after a kill, `absent` or `whole`; `finished` if the kill came too late."""
    child = _fork(work, output)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, "the work failed"
        return "finished"
    return "whole" if output.exists() else "absent"


def _run(work: Work, output: Path) -> None:
    _, status = os.waitpid(_fork(work, output), 0)
    if status != 0:
        raise RuntimeError("the work failed")


def _fork(work: Work, output: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(output)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill, start again, compare bytes.")
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where temporary outputs go")
    parser.add_argument(
        "--compress",
        type=json.loads,
        default={"ratio": 16, "samples": 16, "seq_len": 64},  # small: resuming is what is tested
        help="options of compress, JSON",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
