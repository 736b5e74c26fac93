"""Kills compression at random moments, resumes it, and compares every byte with a run left alone.

python benchmarks/resume.py work/base work/sums --kills 3 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    options = _parse()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        _start(options, whole).wait()
        units = json.loads((whole / "tuned_config.json").read_text())["num_hidden_layers"]
        moments = sorted(draw.sample(range(units), options.kills))
        for number, moment in enumerate(moments, 1):
            process = _start(options, killed)
            while process.poll() is None and _finished(killed) < moment:
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
            process.wait()
            there = killed.exists()
            print(
                f"kill {number}: {_finished(killed)} of {units} blocks finished, "
                f"artifact there: {there}",
                flush=True,
            )
            if there:
                sys.exit("the run finished before it was killed; nothing was tested")
        code = _start(options, killed).wait()
        same = code == 0 and _digests(whole) == _digests(killed)
        print(f"resumed: exit code {code}, all files identical: {same}")
        for name, digest in sorted(_digests(whole).items()):
            print(f"  {digest[:16]}  {name}")
        sys.exit(0 if same else 1)


def _start(options: argparse.Namespace, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "from deltacome.cli import main; main()", "compress"]
    command += [options.base, options.tuned, "-o", str(output), "--resume"]
    return subprocess.Popen([*command, *options.compress], stdout=subprocess.DEVNULL)


def _finished(output: Path) -> int:
    return len(list(output.with_name(f"{output.name}.partial").glob("unit-*.json")))


def _digests(folder: Path) -> dict[str, str]:
    files = folder.iterdir() if folder.exists() else []
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill, resume, compare bytes.")
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where temporary artifacts go")
    parser.add_argument(
        "--compress",
        type=str.split,
        default=["--samples", "16", "--seq-len", "64"],  # small: resuming is what is tested
        help="options passed on to deltacome compress, as one string",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
