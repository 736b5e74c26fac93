"""The commands of examples/deploy, as each file says them."""

import shlex
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "examples/deploy"


def load(file):
    """The documents of a YAML file."""
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def serve_commands():
    """File → the arguments of `deltacome serve` in it."""
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
