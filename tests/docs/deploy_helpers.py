"""What the files of examples/deploy hold: the commands that they start and the metrics they query."""

import json
import re
import shlex
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "examples/deploy"


def load(file):
    """The documents of a YAML file."""
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def serve_commands():
    """File → its arguments of `deltacome serve`."""
    (compose,), (deployment,) = load("compose.yaml"), load("kubernetes/deployment.yaml")
    unit = (DEPLOY / "deltacome.service").read_text().splitlines()
    (started,) = [line for line in unit if line.startswith("ExecStart=")]
    program, command, *arguments = shlex.split(started.removeprefix("ExecStart="))
    assert (Path(program).name, command) == ("deltacome", "serve")
    return {
        "compose.yaml": compose["services"]["serve"]["command"],
        "deployment.yaml": deployment["spec"]["template"]["spec"]["containers"][0]["args"],
        "deltacome.service": arguments,
    }


def asked_metrics():
    """Sample names in the queries of the dashboard and the alerts."""
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    (alerts,) = load("prometheus/alerts.yml")
    queries += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    return {name for query in queries for name in re.findall(r"(?:vllm:|deltacome_)\w+", query)}
