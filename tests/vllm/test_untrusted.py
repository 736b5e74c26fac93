"""Uploads by strangers, and names that anybody may ask for: refused, and cheaply."""

import asyncio
import itertools
import json
import shutil
import threading
from pathlib import Path

import fsspec
import jinja2
import pytest
import torch
import vllm
from artifact_helpers import random_artifact, random_term, write_artifact
from test_parts import launched, loaded, manners
from tiny_pairs import make_base, rewrite, weights_of

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import ArtifactError, MismatchError
from deltacome.format.artifact import Artifact
from deltacome.format.spec import Band
from deltacome.vllm import compat, find
from deltacome.vllm import launch as launch_module
from deltacome.vllm.find import Finder
from deltacome.vllm.manners import Manners
from deltacome.vllm.templates import MAX_NBYTES, check_template


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("small", folder, torch.float32)
    return folder


# --- chat templates ------------------------------------------------------------------------------

BUSY = {
    "circle": "{% set a = messages %}{% set b = a %}{% set a = b %}",
    "twice as many each time": "{% set a0 = messages %}"
    + "".join(f"{{% set a{i + 1} = a{i} %}}" * 2 for i in range(40)),
    "loops in macros": "{% macro m(x) %}{% endmacro %}" * 100
    + "{% for m in messages %}{{ m(m.content) }}{% endfor %}" * 800,
    "nested": "{{ " + "(" * 20_000 + "x" + ")" * 20_000 + " }}",
}


def circle_ends():
    """Whether this vLLM's search remembers where it has been, as 0.33's does."""
    found = compat.assigned_from(jinja2.Environment().parse(BUSY["circle"]), "messages")
    return len(list(itertools.islice(found, 100))) < 100


@pytest.mark.parametrize("kind", BUSY)
def test_a_template_that_vllm_would_search_for_ever(kind, base, tmp_path):
    """In its event loop, before a chat's time limit starts."""
    if kind == "circle" and circle_ends():
        assert manners(base, tmp_path / "a", chat_template_jinja=BUSY[kind].encode()).template
        return
    with pytest.raises(ArtifactError, match="a: chat template: expected"):
        manners(base, tmp_path / "a", chat_template_jinja=BUSY[kind].encode())


def test_a_template_that_is_large(base, tmp_path):
    large = "{{ x }}".ljust(MAX_NBYTES + 1)
    assert manners(base, tmp_path / "a", chat_template_jinja=large[:-1].encode()).template
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: expected at most 65536 bytes"):
        manners(base, tmp_path / "b", chat_template_jinja=large.encode())
    content = json.dumps({"chat_template": large}).encode()
    with pytest.raises(ArtifactError, match="chat template: expected at most 65536 bytes"):
        manners(base, tmp_path / "c", tokenizer_config_json=content)


def test_templates_that_people_use():
    """Those that vLLM ships, and one as long and as nested as those of models that call tools."""
    folder = Path(vllm.__file__).parent / "transformers_utils" / "chat_templates"
    templates = [file.read_text() for file in folder.glob("*.jinja")]
    assert templates
    tool = (
        "{%- macro m(x) -%}{%- for k, v in x.items() if k not in ('a', 'b') -%}{{ k ~ v | tojson }}"
        "{%- if not loop.last %}, {% endif -%}{%- endfor -%}{%- endmacro -%}"
    )
    message = (
        "{%- for message in loop_messages -%}{%- if message.role == 'user' and message.content -%}"
        "{%- for part in message.content -%}{{ '<|start|>' ~ m(part.text) ~ '<|end|>' }}{%- endfor -%}"
        "{%- else -%}{%- continue -%}{%- endif -%}{%- generation -%}x{%- endgeneration -%}{%- endfor -%}"
    )
    templates.append("{%- set loop_messages = messages[1:] -%}" + tool * 8 + message * 12)
    templates.append("{{ no jinja")  # which vLLM reports to whoever asks for a chat
    for template in templates:
        check_template("a", template)


def test_templates_are_not_taken_where_they_are_not_trusted(base, tmp_path):
    files = {
        "chat_template.jinja": BUSY["circle"].encode(),
        "generation_config.json": b'{"temperature": 0.5}',
    }
    artifact = random_artifact(base, tmp_path / "a", files=files)
    found = Manners.read(artifact, {}, 300, templates=False)
    assert (found.template, found.sampling) == (None, {"temperature": 0.5})


# --- artifacts that would keep others waiting -----------------------------------------------------


def test_what_does_not_fit_is_refused_before_its_bytes_are_read(base, tmp_path, monkeypatch):
    artifact = random_artifact(base, tmp_path / "a", terms="mixed")
    tenant = loaded(base, artifact, signs=True)
    exactly = {"signs": True, "slot_bytes": tenant.nbytes}
    assert loaded(base, artifact, **exactly).nbytes == tenant.nbytes
    other = tmp_path / "other"
    shutil.copytree(base, other)
    rewrite(other, {n: w + 1 for n, w in weights_of(base).items()}, dtype=None)
    monkeypatch.setattr(Artifact, "verify_bytes", lambda self: pytest.fail("its bytes were read"))
    with pytest.raises(ArtifactError, match=f"set slot_bytes to {tenant.nbytes} in"):
        loaded(base, artifact, signs=True, slot_bytes=tenant.nbytes - 1)
    with pytest.raises(MismatchError, match="tensors that this artifact changes have no place"):
        loaded(base, artifact, without="model.layers.1.mlp", **exactly)
    with pytest.raises(MismatchError, match="wrong base"):
        loaded(other, artifact, **exactly)
    longer = artifact_with_norm(base, tmp_path / "b", 1 << 16)
    with pytest.raises(MismatchError, match=r"norm\.weight: expected .*\(64,\), got \(65536,\)"):
        loaded(base, longer, slot_bytes=1 << 20)


def artifact_with_norm(base, output, rows):
    """An artifact whose last norm has `rows` values; everything else is the base's."""
    read, generator, norm = Checkpoint(base), torch.Generator().manual_seed(0), "model.norm.weight"
    terms = (read, norm, rows, 32, generator, (), ("bands",))
    record, entries = random_term(norm, *terms)
    same = [name for name in read.tensors if name != norm]
    records = random_artifact(base, output.with_name("same"), same=same).manifest.records
    records = [record, *(records[name] for name in same)]
    return write_artifact(output, records, entries, config=dict(read.config))


def test_a_folder_of_tenants_keeps_no_server_from_its_start(base, tmp_path, monkeypatch):
    """Not one that is damaged, of another base, of other groups, or so large that slots would be too."""
    tenants, other = tmp_path / "tenants", tmp_path / "other"
    for name in ("math", "code"):
        random_artifact(base, tenants / name)
    expected = launched(base, {}, folder=str(tenants))[1]
    make_base("llama", other, torch.float32)
    random_artifact(other, tenants / "foreign")
    random_artifact(base, tenants / "groups", group_size=64)
    random_artifact(base, tenants / "half")
    (shard,) = (tenants / "half").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    random_artifact(base, tenants / "large", plan=(Band(16, 30),))
    monkeypatch.setattr(launch_module, "LARGEST", 4)  # these are small compared with their headers
    (tenants / "nonsense").mkdir()
    (tenants / "nonsense" / "delta_config.json").write_text("{\n\x1b[31m")
    launch, settings = launched(base, {}, folder=str(tenants))
    assert settings == expected
    left_out = [line for line in launch.warnings if "is left out" in line]
    assert [line.split()[0] for line in left_out] == [
        *("foreign", "half", "large", "nonsense", "groups")
    ]
    assert all(line.isprintable() for line in left_out)
    assert "wrong base" in left_out[0]
    assert "give --slot-bytes, or name it with --tenant" in left_out[2]
    assert "expected scale groups of 32, got 64" in left_out[4]
    # Whoever starts the server can still have them.
    large = launched(base, {"large": str(tenants / "large")}, folder=str(tenants))[1]
    assert large["slot_bytes"] > expected["slot_bytes"]
    given = launched(base, {}, folder=str(tenants), slot_bytes=7)[1]
    assert (given["slot_bytes"], given["max_rank"]) == (7, large["max_rank"])
    groups = launched(base, {"groups": str(tenants / "groups")}, folder=str(tenants))
    assert groups[1]["group_size"] == 64
    assert sum("scale groups of 64, got 32" in line for line in groups[0].warnings) == 2
    monkeypatch.setattr(launch_module, "LARGEST", 1 << 20)
    assert "slot_bytes" not in launched(base, {}, folder=str(tenants))[1]


# --- finding -------------------------------------------------------------------------------------


@pytest.fixture
def place(base, tmp_path):
    """A folder of tenants that holds one."""
    random_artifact(base, tmp_path / "tenants" / "math", seed=1)
    return tmp_path / "tenants"


@pytest.fixture
def memory(place):
    """The file system of an address that has the same."""
    system = fsspec.filesystem("memory")
    system.put(str(place / "math"), "/bucket/tenants/math", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


ADDRESS = "memory://bucket/tenants"


def found(finder, name="math"):
    return asyncio.run(finder.find(name))


def test_a_link_out_of_a_tenants_folder(base, place):
    """Otherwise an uploader could make the server read somebody else's files."""
    shutil.copytree(place / "math", place / "evil")
    (shard,) = (place / "evil").glob("*.safetensors")
    shard.unlink()
    shard.symlink_to(f"../math/{shard.name}")
    with pytest.raises(ArtifactError, match=rf"evil: {shard.name}: expected files of this folder"):
        found(Finder(str(place)), "evil")
    with pytest.raises(
        ArtifactError, match=rf"evil: not complete yet.*{shard.name}: .* got a link"
    ):
        found(Finder(f"file://{place}", place.parent / "cache"), "evil")
    shard.unlink()
    shutil.copy(place / "math" / shard.name, place / "evil" / "real")
    shard.symlink_to("real")
    (place / "whole").symlink_to(place / "evil")  # a link by the owner of the place
    for name in ("math", "evil", "whole"):
        assert found(Finder(str(place)), name) == place / name


def counted(monkeypatch, system, name):
    """The paths that a storage's method is called with from now on."""
    asked, original = [], getattr(type(system), name)

    def count(self, path, *args, **kwargs):
        asked.append(path)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(type(system), name, count)
    return asked


def test_a_name_that_is_missing_is_not_asked_for_again_at_once(memory, tmp_path, monkeypatch):
    asked = counted(monkeypatch, memory, "info")
    finder = Finder(ADDRESS, tmp_path / "cache")
    assert [found(finder, "nobody") for _ in range(3)] == [None] * 3
    assert len(asked) == 1
    monkeypatch.setattr(find, "MISSING_NAMES", 2)
    for name in ("one", "two", "three"):
        assert found(finder, name) is None
    assert list(finder._missing) == ["two", "three"]
    memory.mv("/bucket/tenants/math", "/bucket/tenants/two", recursive=True)
    assert found(finder, "two") is None
    finder._missing["two"] = 0.0  # a moment later
    assert found(finder, "two") is not None


def test_a_storage_that_does_not_answer(memory, tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(type(memory), "info", lambda *args, **kwargs: answer.wait())
    monkeypatch.setattr(find, "LOOK_SECONDS", 0.05)
    with pytest.raises(ArtifactError, match=r"^math: cannot be read from where") as refused:
        found(Finder(ADDRESS, tmp_path / "cache"))
    answer.set()
    assert isinstance(refused.value.__cause__, TimeoutError)


def test_only_what_a_manifest_names_is_copied(memory, tmp_path, monkeypatch):
    (shard,) = (name for name in memory.find("/bucket") if name.endswith(".safetensors"))
    memory.pipe_file("/bucket/tenants/math/huge.bin", b"x" * 1000)
    folder = found(Finder(ADDRESS, tmp_path / "one"))
    assert not (folder / "huge.bin").exists()
    Artifact.open(folder).check_bytes()
    copied = counted(monkeypatch, memory, "get_file")
    memory.pipe_file(shard, memory.cat_file(shard) + b"x")
    with pytest.raises(ArtifactError, match=r"not complete yet.*expected \d+ bytes, got \d+"):
        found(Finder(ADDRESS, tmp_path / "two"))
    assert not copied
    read = counted(monkeypatch, memory, "cat_file")
    monkeypatch.setattr(find, "MAX_JSON_BYTES", 10)
    with pytest.raises(ArtifactError, match=r"delta_config\.json: expected at most 10 bytes"):
        found(Finder(ADDRESS, tmp_path / "three"))
    assert not read


def test_a_copy_that_was_damaged_is_made_again(memory, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(find, "sync", synced.append)
    finder = Finder(ADDRESS, tmp_path / "cache")
    folder = found(finder)
    assert {path.name for path in synced} > {file.name for file in folder.iterdir()}
    assert synced[-1] == tmp_path / "cache"  # after the rename
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert found(finder) == folder
    assert shard.read_bytes() == whole
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [folder.name]


def test_what_was_copied_does_not_wait_for_other_copies(memory, tmp_path, monkeypatch):
    """A tenant of some gigabytes would keep those waiting that are on disk, and only have to be read."""
    monkeypatch.setattr(find, "COPYING", 1)
    memory.copy("/bucket/tenants/math", "/bucket/tenants/large", recursive=True)
    finder = Finder(ADDRESS, tmp_path / "cache")
    folder = found(finder)
    copying, may_copy, copy = threading.Event(), threading.Event(), type(memory).get_file

    def slow(self, *args, **kwargs):
        copying.set()
        assert may_copy.wait(60)
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "get_file", slow)

    async def run():
        large = asyncio.create_task(finder.find("large"))
        assert await asyncio.to_thread(copying.wait, 60)
        try:
            assert await asyncio.wait_for(finder.find("math"), 10) == folder
        finally:
            may_copy.set()
        assert (await large).name.startswith("large-")

    asyncio.run(run())
