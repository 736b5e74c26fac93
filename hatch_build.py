"""Compiles the CPU kernels into the wheel; an editable install compiles them in place.

The libraries are plain C behind ctypes, so this runs a compiler and nothing else: `$CXX`, or c++, g++,
clang++, whichever is there. No compiler, or one without OpenMP, is not an error: the line printed says
so, the package works without, and `impl="cpu"` then says how to get it.

This file also runs by itself, `python hatch_build.py`, to compile again after a change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by itself, or by a test
    BuildHookInterface = object

FOLDER = Path(__file__).resolve().parent / "src" / "deltacome" / "ops"
SOURCES = (
    FOLDER / "native.cpp",
    *(FOLDER / f"native_{part}.h" for part in ("vectors", "floats", "bytes", "torch")),
)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VNNI = (*AVX512, "-mavx512vnni")


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Names of the libraries to build for this machine's kind of CPU → flags of the compiler."""
    wide = {"avx2": AVX2, "avx512": AVX512, "avx512_vnni": VNNI}
    return {"portable": ()} | (wide if platform.machine() in ("x86_64", "AMD64") else {})


def compiler() -> list[str] | None:
    """The command of a C++ compiler, or None."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return [found] if found else None


def source_digest() -> str:
    """What a library says that it was built from, so that a test can tell an old one."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES)).hexdigest()


def build(folder: Path) -> list[Path]:
    """Compiles `native.cpp` for each instruction set into `folder`; returns what was built."""
    command = compiler()
    if command is None:
        for stale in folder.glob("_native_*.so"):
            stale.unlink()
        print("deltacome: no C++ compiler found: built without the CPU kernels", file=sys.stderr)
        return []
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        built = compilers.map(lambda isa: _compile(command, folder, isa), instruction_sets())
    return [library for library in built if library]


def _compile(command: list[str], folder: Path, isa: str) -> Path | None:
    """The library of one instruction set; None, and a line that says why, where it will not compile."""
    library = folder / f"_native_{isa}.so"
    # Not over the old file: a process that has it mapped would crash.
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    flags = (*FLAGS, *instruction_sets()[isa], f'-DSOURCE="{source_digest()}"')
    arguments = [*command, *flags, str(SOURCES[0]), "-o", str(partial)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        partial.replace(library)
        return library
    partial.unlink(missing_ok=True)
    library.unlink(missing_ok=True)
    print(
        f"deltacome: built without the {isa} CPU kernels: {shlex.join(arguments)}\n{done.stderr}",
        file=sys.stderr,
    )
    return None


class NativeBuildHook(BuildHookInterface):
    """What hatchling calls before it packs a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not build(FOLDER):
            return
        # Nothing in the libraries depends on the version of Python.
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{system}"
        build_data["artifacts"].append("/src/deltacome/ops/_native_*.so")


if __name__ == "__main__":
    sys.exit(0 if build(FOLDER) else 1)
