"""End to end on a real model: base, fine-tune, compress, verify, merge, generate, evaluate.

It runs the demo as a user would, but with few training steps: it checks that the delta stands for the
tuned model, whatever that has learnt. Training is limited in steps, not minutes, because on a busy
machine minutes teach nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltacome

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    little = ("--steps", "8", "--questions", "8", "--samples", "12")
    command = [sys.executable, str(DEMO), "-o", str(out), *little]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in ("ratio", "right", "Sum:"):
        assert shown in done.stdout
    return out


@pytest.fixture
def command(cli):
    """Runs a command line that must succeed → stdout."""

    def run(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        assert code == 0, err
        return out

    return run


def test_the_delta_is_small_and_stands_for_the_tuned_model(demo):
    artifact = deltacome.Artifact.open(demo / "delta")
    files = ["delta_config.json", "delta.safetensors.index.json", *artifact.manifest.shards]
    assert artifact.bytes_on_disk() == sum((demo / "delta" / f).stat().st_size for f in files)
    assert artifact.ratio() == pytest.approx(16, rel=0.02)
    base, tuned, delta = json.loads((demo / "result.json").read_text())["models"]
    assert tuned["kl_task"] == 0
    # Training moved the model; the delta is far closer to it than the base is.
    assert base["kl_task"] > 0.1
    assert delta["kl_task"] < base["kl_task"] / 20
    assert delta["kl_text"] < base["kl_text"] / 5


def test_verify_knows_the_base(demo, command):
    said = json.loads(command("verify", demo / "delta", "--base", demo / "base", "--json"))
    assert said["base_tensors"] == 272


def test_attached_equals_merged_and_detaching_restores_the_base(demo, command, tmp_path):
    command("merge", demo / "base", demo / "delta", "-o", tmp_path / "dense")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(40)[None] * 100
    with torch.no_grad(), deltacome.attach(model, demo / "delta"):
        attached = model(ids).logits
    with torch.no_grad():
        expected = merged(ids).logits
    # Merged weights were rounded to bfloat16, which moves logits by about 2⁻⁸ of their size.
    assert (attached - expected).norm() < 0.02 * expected.norm()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_generate_answers(demo, command):
    said = command(
        "generate", demo / "base", "--delta", demo / "delta", "Sum: 2 + 3", "--max-new-tokens", 4
    )
    assert said.strip()
