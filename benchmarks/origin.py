"""Where the figures of a page come from: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def origin() -> str:
    """One line of Markdown."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = " with uncommitted changes" if git("status", "--porcelain", "../src") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("deltacome", "torch"))
    return (
        f"Commit {git('rev-parse', '--short', 'HEAD')}{changed}; {versions}; Python "
        f"{platform.python_version()}; {device()}, load {os.getloadavg()[0]:.1f} before the run."
    )


def device() -> str:
    """The GPU's name, or the CPU's and the number of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
