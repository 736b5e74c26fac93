"""The Triton kernels in Triton's interpreter: the tests of the ops, run again in a process of their own.

Where there is a GPU, the tests run on it as well (`ops_helpers.IMPLS`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ops_helpers import INTERPRETED

FILES = ("test_bands.py", "test_signs.py", "test_norm.py", "test_graphs.py", "test_benchmarks.py")
# Without the project's own options: with their -q as a second one, pytest leaves out how many passed.
OPTIONS = (
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=--strict-markers",
    "-q",
    "-rs",
    "--durations=15",
    "--disable-warnings",
)


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_in_the_interpreter(capfd):
    here = Path(__file__).parent
    files = [str(here / name) for name in FILES]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # A log shows where the minutes go; of pytest's workers it has stderr.
    with capfd.disabled():
        sys.stderr.write(child.stdout[-3000:])
    assert child.returncode == 0, child.stdout + child.stderr
    (passed,) = re.findall(r"(\d+) passed", child.stdout)
    assert int(passed) > 200, child.stdout
