"""Where the figures of a page come from: commit, versions, machine, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def origin(*packages: str) -> str:
    """One line of Markdown, with the versions of deltacome, torch and the given packages.

    Where git or a package's metadata is missing, the value is "unknown".
    """
    made_by = _git("status", "--porcelain", "../src", ".", "../examples")
    changed = " with uncommitted changes" if made_by else ""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("deltacome", "torch", *packages))
    return (
        f"Commit {_git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}; {versions}; Python "
        f"{platform.python_version()}; {device()}, load {os.getloadavg()[0]:.1f} before the run."
    )


def command(base: Path | None = None) -> str:
    """The command line of this run; the folder of the base is written BASE."""
    script, *words = sys.argv
    words = ["BASE" if base is not None and Path(word) == base else word for word in words]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])


def _git(*words: str) -> str:
    """What git prints; empty without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def device() -> str:
    """The GPU's name, or the CPU's and the number of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
