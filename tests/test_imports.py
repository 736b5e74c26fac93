"""What importing a room loads: each needs neither Triton nor vLLM, and readers need no writers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deltacome

SOURCE = Path(deltacome.__path__[0])
MODULES = [
    ".".join(("deltacome", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for file in sorted(SOURCE.rglob("*.py"))
    # Only kernel files may need Triton; they have tests of their own.
    if not file.name.startswith("triton") and file.parent.name != "vllm"
]
MODULES.remove("deltacome")
ROOMS = sorted({name.split(".")[1] for name in MODULES})
WRITERS = ("compression", "methods", "numerics")
WRITING = tuple(f"deltacome.{room}" for room in WRITERS)
TOGETHER = {
    # Rooms that share a process, since torch takes seconds to load → what must not be loaded.
    ("errors", "cli"): ("torch", "transformers", "deltacome.format"),
    ("device", "format", "rows", "chats", "arch", "ops"): (
        "transformers",
        "deltacome.runtime",
        *WRITING,
    ),
    ("runtime",): WRITING,
    ("skeleton", "pictures", "outline"): ("deltacome.runtime", "deltacome.ops", *WRITING),
    ("numerics", "methods"): ("transformers", "deltacome.arch", "deltacome.compression"),
    ("evals",): WRITING,
    ("report",): (
        "transformers",
        "matplotlib.pyplot",
        "deltacome.runtime",
        "deltacome.arch",
        *WRITING,
    ),
    ("compression",): ("deltacome.runtime", "deltacome.evals"),
}

CHECK = """
import importlib, json, os, sys, traceback

def check(names, never, blocked=("triton", "vllm"), then=""):
    for name in blocked:
        sys.modules[name] = None  # importing it raises ImportError
    for name in names:
        importlib.import_module(name)
    loaded = sorted(name for name in never if name in sys.modules)
    assert not loaded, f"loaded {loaded}"
    exec(then, {})
"""
ONE = (
    CHECK
    + """
check(**json.loads(sys.argv[1]))
"""
)
EACH = (
    CHECK
    + """
statuses = {}
for heavy, groups in json.loads(sys.argv[1]).items():
    if heavy:  # what none of these groups is kept from is loaded once; each then has a fork
        sys.modules["triton"] = None
        importlib.import_module(heavy)
    for key, group in groups.items():
        process = os.fork()
        if not process:
            try:
                check(**group)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        statuses[key] = os.waitpid(process, 0)[1]
print(json.dumps(statuses))
"""
)


NAMES = """
# Public names are what they should be whatever was imported before.
import deltacome
from deltacome import *
from deltacome import Artifact, DeltaCome, DeltaError, attach, compress, merge
for name in deltacome.__all__:
    assert callable(getattr(deltacome, name)), name
try:
    compress("/no/base", "/no/tuned", "/no/out")
except DeltaError as error:
    assert "/no/base" in str(error)
else:
    raise AssertionError
"""


def python(code, said):
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(said)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run(names, never=(), **more):
    return python(ONE, {"names": names, "never": never, **more})


@pytest.fixture(scope="module")
def each():
    """The outcome of each group of rooms."""
    groups = {"": {}, "torch": {}, "transformers": {}}
    for rooms, never in TOGETHER.items():
        names = [name for name in MODULES if name.split(".")[1] in rooms]
        assert len(names) >= len(rooms)
        heavy = "" if "torch" in never else "torch" if "transformers" in never else "transformers"
        then = NAMES if "compression" in rooms else ""
        groups[heavy]["+".join(rooms)] = {"names": names, "never": never, "then": then}
    return python(EACH, groups)


def test_all_rooms_are_seen():
    assert sorted(room for rooms in TOGETHER for room in rooms) == ROOMS
    folder = Path(deltacome.__path__[0])
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("rooms", TOGETHER, ids="+".join)
def test_rooms_in_a_fresh_process(rooms, each):
    assert each.returncode == 0, each.stderr
    assert json.loads(each.stdout.splitlines()[-1])["+".join(rooms)] == 0, each.stderr


def test_the_package_alone_loads_nothing():
    child = run(
        ["deltacome"], ["torch", "transformers", "safetensors", "numpy", "deltacome.format"]
    )
    assert child.returncode == 0, child.stderr


def test_a_child_sees_what_is_forbidden():
    # The tests above can fail.
    assert "loaded ['deltacome.format']" in run(["deltacome.format"], ["deltacome.format"]).stderr
    assert "halted" in run(["deltacome.errors"], blocked=("deltacome.errors",)).stderr


def test_names_are_listed():
    assert {*deltacome.__all__, "__version__"} <= {*dir(deltacome)}
    assert {*deltacome.__all__} == {*deltacome._HOMES}


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deltacome.nothing
