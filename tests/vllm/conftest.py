"""The server that most tests share, since starting one takes half a minute on two cores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
from tiny_pairs import make_base
from vllm_helpers import HELD, SLOTS, Server, Stage, load

CHAT = {
    "chat_template.jinja": b"{% for m in messages %}{{ m['content'] }} is {% endfor %}",
    "generation_config.json": b'{"eos_token_id": [0, 41], "temperature": 0.0}',
}


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    made = Stage(folder, folder / "base")
    make_base("llama", made.base, torch.float32)
    made.models["base"] = load(made.base)
    made.tenant("math")
    made.tenant("code", same=("model.layers.0.input_layernorm.weight", "lm_head.weight"))
    made.tenant("chat", files=CHAT)
    made.lora("lora")
    for name in ("one", "two", "three"):
        made.tenant(name)
    return made


@pytest.fixture(scope="session")
def server(stage, tmp_path_factory):
    """Serves math, code and chat by name, one, two and three from a folder, and a LoRA."""
    tenants = stage.folder / "tenants"
    named = [f"--tenant={name}={tenants / name}" for name in ("math", "code", "chat")]
    running = Server(
        tmp_path_factory.mktemp("log") / "server.log",
        [stage.base, *named, "--tenants", tenants, "--slots", SLOTS, "--lora"],
        [
            *("--served-model-name", "base", "--max-model-len", "256"),
            *("--max-cpu-loras", str(HELD), "--distributed-executor-backend", "uni"),
        ],
    )
    running.start()
    assert running.load("lora", stage.folder / "lora") == (
        200,
        "Success: LoRA adapter 'lora' added successfully.",
    )
    yield running
    running.kill()
