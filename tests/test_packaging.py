"""What is declared: the distributions that are imported, and the files that a build depends on."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOUND_BY_TORCH = {"triton"}
"""Comes with torch's GPU builds, and is looked for before it is imported."""


def imported():
    """Top-level names of all that the sources import."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(one for name in extras if name != "dev" for one in extras[name]),
    ]
    declared = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in asked}
    others = {*imported()} - sys.stdlib_module_names - FOUND_BY_TORCH - {"deltacome"}
    assert "torch" in others
    assert others <= declared, others - declared


def test_make_compiles_again_after_a_change_of_any_source():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (needed,) = re.findall(r"^\$\(VENV\)/\.installed: (.*)$", text, re.M)
    files = {ROOT / word for word in re.sub(r"\$\(wildcard (\S+)\)", r"\1", needed).split()}
    found = {one for file in files for one in file.parent.glob(file.name)}
    assert {*hatch_build.SOURCES} <= found
