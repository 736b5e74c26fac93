"""Pushing to and pulling from the Hub, against a stand-in of its API on this machine."""

import shutil

import make_golden as golden
import pytest
from huggingface_hub import ModelCard, constants

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import ArtifactError, CheckpointError, DeltaError, MismatchError, OutputError
from deltacome.format.artifact import Artifact
from deltacome.format.hub import FILES, split_name

SHARD = "delta-00001-of-00001.safetensors"


@pytest.fixture
def artifact(tmp_path):
    return Artifact.open(shutil.copytree(golden.GOLDEN, tmp_path / "mine"))


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_push_and_pull(hub, artifact):
    url = artifact.push_to_hub("org/name")
    pulled = Artifact.from_pretrained("org/name")
    assert url == f"{hub.address}/org/name/commit/{pulled.path.name}"
    assert content(pulled.path) == {
        name: text for name, text in content(artifact.path).items() if name != "README.md"
    }
    pulled.verify_bytes()
    assert pulled.digest == artifact.digest
    # Weights are pushed and pulled by LFS, not within the commit.
    assert len(hub.asked("PUT", "^/lfs/")) == 1
    assert len(hub.asked("GET", "^/lfs/")) == 1
    # The card is on the Hub only, where people read it.
    files = hub.repos["org/name"].commits[pulled.path.name]
    assert files.keys() == content(pulled.path).keys() | {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "deltacome"
    assert "deltacome merge some/base@main org/name" in card.text


def test_a_second_pull_is_served_from_the_cache(hub, artifact, monkeypatch):
    artifact.push_to_hub("org/name")
    first = Artifact.from_pretrained("org/name")
    hub.requests.clear()
    assert Artifact.from_pretrained("org/name").path == first.path
    assert not hub.asked("GET", "/resolve/|/lfs/")
    hub.requests.clear()
    assert Artifact.from_pretrained(f"org/name@{first.path.name}").path == first.path
    assert not hub.requests  # a commit never changes
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Artifact.from_pretrained("org/name").path == first.path


def test_revisions(hub, artifact, tmp_path):
    old = artifact.push_to_hub("org/name").rpartition("/")[2]
    other = golden_of_other_weights(tmp_path / "other")
    other.push_to_hub("org/name")
    assert Artifact.from_pretrained("org/name").digest == other.digest
    for name, revision in (("org/name", old), (f"org/name@{old}", None)):
        assert Artifact.from_pretrained(name, revision=revision).digest == artifact.digest
    artifact.push_to_hub("org/name", branch="v1", commit_message="As it was")
    assert Artifact.from_pretrained("org/name@v1").digest == artifact.digest
    assert Artifact.from_pretrained("org/name@main").digest == other.digest


def golden_of_other_weights(folder):
    unit = golden.unit()
    record = unit.records[0]
    entries = {k: unit.entries[k] for k in record.entries(golden.GROUP)}
    writer = golden.ArtifactWriter(folder, {}, resume=False)
    writer.save("one", golden.Unit((record,), entries))
    return Artifact.open(writer.finish(["one"], golden.manifest(), {"tokenizer.json": b"{}"}))


def test_nothing_stays_of_what_was_there(hub, artifact, tmp_path):
    golden_of_other_weights(tmp_path / "other").push_to_hub("org/name")
    repo = hub.repos["org/name"]
    files = dict(repo.commits[repo.branches["main"]])
    old = {"delta-00002-of-00002.safetensors": b"old", "logo.png": b"png", "tokenizer.json": b"{}"}
    repo.commit("main", files | old)
    artifact.push_to_hub("org/name")
    now = repo.commits[repo.branches["main"]]
    assert now.keys() & old.keys() == {"logo.png"}  # not a file of an artifact
    Artifact.from_pretrained("org/name").verify_bytes()


def test_code_pickles_and_what_is_there_twice_are_not_fetched(hub, artifact):
    artifact.push_to_hub("org/name")
    repo = hub.repos["org/name"]
    files = dict(repo.commits[repo.branches["main"]])
    unwanted = {"modeling.py": b"raise", "pytorch_model.bin": b"pickle"}
    unwanted |= {"consolidated.safetensors": b"all of it once more"}
    repo.commit("main", files | unwanted)
    pulled = Artifact.from_pretrained("org/name")
    assert not unwanted.keys() & content(pulled.path).keys()
    assert not hub.asked("GET", r"\.py|\.bin|consolidated")


def test_a_private_repository(hub, artifact, tmp_path):
    artifact.push_to_hub("org/name", private=True)
    assert hub.repos["org/name"].private
    Artifact.from_pretrained("org/name")
    with pytest.raises(ArtifactError, match="hf auth login"):
        Artifact.from_pretrained("org/name", token=False, cache_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("org/none", None, r"neither a folder nor a repository that http://127.* shows you"),
        ("org/name", "v9", r"^org/name@v9: the repository at http://127.* has no such revision"),
        ("org/name@v9", None, r"has no such revision"),
        ("org/name@v1", "v2", "already names a revision, got 'v2' as well"),
        ("a/b/c", None, "expected a folder, or org/name on the Hub"),
        ("./none", None, "expected a folder, or org/name on the Hub"),
        ("org/", None, "expected a folder, or org/name on the Hub"),
        ("org/empty", None, "not an artifact: expected a file delta_config.json"),
    ],
)
def test_what_is_not_there_is_one_clear_error(hub, artifact, name, revision, reason):
    artifact.push_to_hub("org/name")
    hub.repos["org/empty"] = type(hub.repos["org/name"])(private=False)
    with pytest.raises(ArtifactError, match=reason) as error:
        Artifact.from_pretrained(name, revision=revision)
    assert "\n" not in str(error.value)
    if "empty" not in name:  # the same rule for checkpoints
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint(name, revision)


def test_a_hub_that_cannot_be_reached(hub, artifact):
    hub.close()
    with pytest.raises(ArtifactError, match=r"not in the cache, and http://127.* cannot be asked"):
        Artifact.from_pretrained("org/name")
    with pytest.raises(OutputError, match="org/name: http://127"):
        artifact.push_to_hub("org/name")


def test_a_push_that_is_refused(hub, artifact, monkeypatch):
    with pytest.raises(OutputError, match=r"^else/name: .*403"):
        artifact.push_to_hub("else/name")
    with pytest.raises(OutputError, match="org/na me"):
        artifact.push_to_hub("org/na me")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(OutputError, match=r"^org/name: .*(401|shows you)"):
        artifact.push_to_hub("org/name")
    assert not hub.repos


def test_damaged_bytes_are_not_pushed(hub, artifact):
    file = artifact.path / SHARD
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256"):
        artifact.push_to_hub("org/name")
    assert not hub.requests


def test_scores_are_refused_before_anything_is_sent(hub, artifact):
    scores = {"task": "sums", "n": 3, "models": [{"name": "a", "artifact": "0" * 64, "score": 1.0}]}
    with pytest.raises(MismatchError, match="got those of a"):
        artifact.push_to_hub("org/name", scores=[scores], branch="v2")
    assert not hub.requests


def test_save_pretrained(artifact, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        artifact.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    artifact.save_pretrained(tmp_path / "new")
    written = content(tmp_path / "new")
    assert {"config.json", "lock"}.isdisjoint(written)
    assert written.pop("README.md").startswith(b"---\n")
    assert written == {k: v for k, v in content(artifact.path).items() if k != "README.md"}
    assert Artifact.from_pretrained(tmp_path / "new").digest == artifact.digest


def test_save_and_push(hub, artifact, tmp_path):
    artifact.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="org/name")
    assert Artifact.from_pretrained("org/name").digest == artifact.digest


def test_save_and_push_with_scores(hub, artifact, tmp_path):
    row = {"name": "mine", "artifact": artifact.digest, "score": 0.5}
    scores = [{"task": "sums", "n": 3, "models": [row]}]
    artifact.save_pretrained(
        tmp_path / "new",
        model_card_kwargs={"scores": scores},
        push_to_hub=True,
        repo_id="org/name",
    )
    pushed = next(reversed(hub.repos["org/name"].commits.values()))["README.md"].decode()
    for card in (pushed, (tmp_path / "new" / "README.md").read_text()):
        assert "| sums | exact match, 3 questions | – | – | 0.5 |" in card


@pytest.mark.parametrize("name", ["x" * 300, "no name " * 50, "a\0b"])
def test_a_name_that_no_file_can_have(hub, name):
    with pytest.raises(ArtifactError):
        Artifact.from_pretrained(name)


def test_names(tmp_path, monkeypatch):
    assert split_name("org/name@refs/pr/1", None, DeltaError) == ("org/name", "refs/pr/1")
    assert split_name("gpt2", "v1", DeltaError) == ("gpt2", "v1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert split_name("org/name@v1", None, DeltaError) == ("org/name@v1", None)  # is a folder


def test_all_that_is_carried_is_fetched():
    for end in ("safetensors", "json", "jinja", "txt", "model", "tiktoken"):  # as in CARRIED_NAME
        assert f"*.{end}" in FILES
