"""Parts of the plugin that need no engine."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from artifact_helpers import PLAN, random_artifact, random_bands
from tiny_pairs import make_base
from typer.testing import CliRunner

from deltacome.cli import app
from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.canary import Canary, canary_ids
from deltacome.format.codec import dense, read_bands, write_bands
from deltacome.format.spec import Band
from deltacome.vllm import compat
from deltacome.vllm.find import Finder, hub_artifact
from deltacome.vllm.launch import plan_launch
from deltacome.vllm.manners import Manners
from deltacome.vllm.request import artifact_path, content_path, has_digest, is_artifact
from deltacome.vllm.settings import Settings
from deltacome.vllm.shard import common_group, shard_bands
from deltacome.vllm.step import Step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("small", folder, torch.float32)
    return folder


# --- versions ------------------------------------------------------------------------------------


def test_this_vllm_is_known():
    compat.check()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0"])
def test_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: version)
    with pytest.raises(UnsupportedError, match=rf"from 0\.32 on and before 0\.33, got {version}"):
        compat.check()


def test_another_signature_is_refused_by_name(monkeypatch):
    def _load_adapter(self, lora_request, surprise):
        raise AssertionError

    monkeypatch.setitem(compat.SIGNATURES, _load_adapter, ("self", "lora_request"))
    with pytest.raises(
        UnsupportedError, match=r"_load_adapter: expected parameters .* got .*surprise"
    ):
        compat.check()


# --- settings and names --------------------------------------------------------------------------


def test_settings():
    assert Settings.parse(None) == Settings()
    assert Settings.parse({"other": 1, "deltacome": {"slot_bytes": 7}}).slot_bytes == 7
    with pytest.raises(UnsupportedError, match="'slotbytes'"):
        Settings.parse({"deltacome": {"slotbytes": 7}})
    with pytest.raises(UnsupportedError, match=r"slot_bytes: expected int \| None, got '7'"):
        Settings.parse({"deltacome": {"slot_bytes": "7"}})
    with pytest.raises(UnsupportedError, match="signs"):
        Settings.parse({"deltacome": {"signs": 1}})
    assert Settings.parse({"deltacome": {"canary": None}}).canary is None


def test_a_path_says_what_its_folder_holds(base, tmp_path):
    random_artifact(base, tmp_path / "a", seed=1)
    first = content_path(str(tmp_path / "a"))
    assert artifact_path(first) == str(tmp_path / "a")
    assert has_digest(first)
    assert not has_digest(str(tmp_path / "a"))
    assert content_path(first) == first
    assert is_artifact(first)
    assert not is_artifact(str(base))
    random_artifact(base, tmp_path / "b", seed=2)
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    assert content_path(first) != first


# --- shards --------------------------------------------------------------------------------------

CUTS = {
    "all": ([(0, 320)], (0, 256)),
    "rows of a group": ([(0, 128)], (0, 256)),
    "rows within a group": ([(192, 320)], (0, 256)),
    "columns": ([(0, 320)], (128, 256)),
    "two runs": ([(64, 128), (192, 320)], (0, 256)),
}


@pytest.mark.parametrize("cut", CUTS)
def test_shards_are_the_same_bytes(cut):
    """A shard decodes to exactly those rows and columns of what the whole decodes to."""
    rows, columns = CUTS[cut]
    blob = write_bands(random_bands((320, 256), PLAN, 128))
    whole = dense(read_bands(blob, (320, 256), PLAN, 128))
    group = common_group(128, [rows, [columns]])
    shard = shard_bands("w", blob, (320, 256), PLAN, 128, rows, columns, group)
    expected = torch.cat([whole[a:b] for a, b in rows])[:, slice(*columns)]
    got = dense(read_bands(shard, tuple(expected.shape), PLAN, group))
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    if cut == "all":
        assert shard is blob


def test_shards_that_cut_a_block_are_refused():
    blob = write_bands(random_bands((320, 256), PLAN, 128))
    rows = [(0, 160)]
    group = common_group(128, [[(160, 320)]])
    with pytest.raises(UnsupportedError, match="w: tensor parallelism cuts it at 0 and 160 of 320"):
        shard_bands("w", blob, (320, 256), PLAN, 128, rows, (0, 256), group)


# --- rows ----------------------------------------------------------------------------------------


def test_rows_of_a_prompts_logprobs():
    """The head's rows are those of the tokens, wherever the engine's view of them begins."""
    step = Step(4, 16, torch.device("cpu"))
    step.set([2, 2, 2, -1, -1, 0, 0, 0], [2, -1, 0])
    assert not step.idle
    hidden = torch.randn(12, 5)[2:]  # hidden states may themselves begin within a buffer
    assert step.sampled(hidden[:3]).slot_T.tolist() == [2, -1, 0]
    with Step.prompt_logits(hidden):
        assert step.sampled(hidden[3:7]).slot_T.tolist() == [-1, -1, 0, 0]
        assert step.sampled(hidden[0:2]).slot_T.tolist() == [2, 2]
    assert step.sampled(hidden[:3]).slot_T.tolist() == [2, -1, 0]
    step.set([-1, -1], [-1])
    assert step.idle
    assert step.tokens(8).slot_T.tolist() == [-1] * 8


# --- what a tuned model says beside its weights ---------------------------------------------------


def manners(base, folder, **files):
    made = {
        name.replace("_json", ".json").replace("_jinja", ".jinja"): c for name, c in files.items()
    }
    return Manners.read(random_artifact(base, folder, files=made), {"<end>": 0, "<stop>": 9})


def test_manners(base, tmp_path):
    assert manners(base, tmp_path / "a") == Manners()
    found = manners(
        *(base, tmp_path / "b"),
        chat_template_jinja=b"{{ x }}",
        generation_config_json=b'{"eos_token_id": [4, 5], "temperature": 0.2, "top_k": null}',
        tokenizer_config_json=b'{"eos_token": {"content": "<stop>"}, "chat_template": "other"}',
    )
    assert found == Manners("{{ x }}", {"temperature": 0.2}, frozenset({4, 5, 9}))
    named = b'{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}'
    assert manners(base, tmp_path / "c", tokenizer_config_json=named).template == "d"


def test_canary():
    canary = Canary((1, 2, 3), (-1.0, -2.5))
    assert Canary.from_json(canary.to_json()) == canary
    assert canary.distance([-1.0, -2.5]) == 0
    assert canary.distance([-1.0, -3.5]) == pytest.approx(0.5**0.5)
    assert canary_ids(50) == canary_ids(50)
    assert max(canary_ids(7)) < 7
    for content in (b"{", b"[]", b'{"ids": [1, 2]}', b'{"ids": [1, 2], "logprobs": [-1, -2]}'):
        with pytest.raises(ArtifactError, match="ids and"):
            Canary.from_json(content)
    with pytest.raises(ArtifactError, match="finite"):
        Canary.from_json(b'{"ids": [1, 2], "logprobs": [NaN]}')


# --- finding -------------------------------------------------------------------------------------


@pytest.fixture
def memory(base, tmp_path):
    """An fsspec place with one artifact."""
    import fsspec

    random_artifact(base, tmp_path / "a", seed=1)
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "a"), "/bucket/tenants/math", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def test_found_in_a_remote_place(memory, base, tmp_path):
    finder = Finder("memory://bucket/tenants", tmp_path / "cache")
    folder = asyncio.run(finder.find("math"))
    assert content_path(str(folder)).endswith(content_path(str(tmp_path / "a")).rpartition("#")[2])
    assert asyncio.run(finder.find("math")) == folder  # and is not copied again
    assert asyncio.run(finder.find("nobody")) is None
    random_artifact(base, tmp_path / "b", seed=2)
    memory.put(f"{tmp_path / 'b'}/", "/bucket/tenants/math", recursive=True)
    other = asyncio.run(finder.find("math"))
    assert other != folder
    assert folder.is_dir()
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_place_that_cannot_be_read(tmp_path, memory, monkeypatch):
    with pytest.raises(ArtifactError, match=r"nowhere://x: math cannot be read"):
        asyncio.run(Finder("nowhere://x", tmp_path).find("math"))

    def broken(*args, **kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr(type(memory), "get_file", broken)
    with pytest.raises(ArtifactError, match="the line is dead"):
        asyncio.run(Finder("memory://bucket/tenants", tmp_path / "cache").find("math"))
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "", "a\n", "x" * 129])
def test_names_are_one_component(name, tmp_path):
    assert asyncio.run(Finder(str(tmp_path)).find(name)) is None


def test_an_artifact_named_on_the_hub(base, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact = random_artifact(base, tmp_path / "mine")
    artifact.push_to_hub("org/delta", branch="v1")
    folder = Path(hub_artifact("org/delta@v1"))
    assert Artifact.open(folder).digest == artifact.digest
    hub.repos["org/lora"] = type(hub.repos["org/delta"])(private=False)
    (tmp_path / "org" / "local").mkdir(parents=True)
    for other in ("org/delta", "org/lora", "org/none", "org/local", "/no/folder", "gpt2", ""):
        assert hub_artifact(other) == other
    repo = hub.repos["org/delta"]
    files = repo.commits[repo.branches["v1"]]
    repo.commit("broken", {k: v for k, v in files.items() if not k.endswith(".safetensors")})
    with pytest.raises(ArtifactError, match="is missing"):
        Artifact.open(hub_artifact("org/delta@broken"))


# --- launching -----------------------------------------------------------------------------------


def launched(base, tenants, **options):
    launch = plan_launch(str(base), tenants, **options)
    at = launch.command.index("--additional-config")
    return launch, json.loads(launch.command[at + 1])["deltacome"]


def test_launch_sets_what_tenants_need(base, tmp_path):
    small = random_artifact(base, tmp_path / "t" / "small", plan=(Band(8, 1),))
    large = random_artifact(base, tmp_path / "t" / "large", plan=(Band(8, 9),), terms="mixed")
    launch, settings = launched(base, {"s": str(small.path)})
    assert settings["slot_bytes"] < 20_000
    assert settings["group_size"] == 32
    assert settings["signs"] is False
    both, more = launched(base, {"s": str(small.path)}, folder=str(tmp_path / "t"), lora=True)
    assert more["slot_bytes"] > 2 * settings["slot_bytes"]
    assert more["signs"] is True
    assert more["tenants"] == str(tmp_path / "t")
    assert more["max_rank"] >= 27
    assert both.command[both.command.index("--max-loras") + 1] == "2"
    assert f"s={small.path}" in both.command
    assert launch.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    assert large.path.name not in str(launch)


def test_launch_checks_fingerprints_first(base, tmp_path):
    other = tmp_path / "other"
    make_base("llama", other, torch.float32)
    artifact = random_artifact(other, tmp_path / "a")
    with pytest.raises(MismatchError, match=r"wrong base|no such tensor"):
        plan_launch(str(base), {"m": str(artifact.path)})
    mixed = {"a": str(random_artifact(base, tmp_path / "x").path)}
    mixed["b"] = str(random_artifact(base, tmp_path / "y", group_size=64).path)
    with pytest.raises(UnsupportedError, match=r"one size of scale groups, got \[32, 64\]"):
        plan_launch(str(base), mixed)


def test_dry_run(base, tmp_path):
    random_artifact(base, tmp_path / "a")
    run = CliRunner().invoke(
        app,
        ["serve", str(base), "--tenant", f"m={tmp_path / 'a'}", "--dry-run", "--", "--seed", "3"],
    )
    assert run.exit_code == 0
    assert run.stdout.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ")
    assert re.search(
        r"-m vllm\.entrypoints\.openai\.api_server --model .* --seed 3$", run.stdout.strip()
    )
    for wrong in (["--tenant", "m"], ["--tenant", "m=a", "--tenant", "m=b"]):
        assert CliRunner().invoke(app, ["serve", str(base), *wrong]).exit_code == 2
