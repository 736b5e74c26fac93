import json

import make_golden as golden
import pytest
import torch

from deltacome.errors import ArtifactError, OutputError
from deltacome.format.artifact import Artifact
from deltacome.format.folder import new_folder
from deltacome.format.writer import ArtifactWriter, Unit, grouped

RUN = {"base": "some/base", "seed": 0, "plan": [[2, 4]]}


def parts():
    """The golden unit, split in two."""
    unit = golden.unit()
    for records in (unit.records[:2], unit.records[2:]):
        keys = [key for record in records for key in record.entries(golden.GROUP)]
        yield Unit(records, {key: unit.entries[key] for key in keys})


def assert_equal(got, expected):
    assert got.records == expected.records
    assert got.entries.keys() == expected.entries.keys()
    assert all(torch.equal(got.entries[key], value) for key, value in expected.entries.items())


def test_units_round_trip(tmp_path):
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    assert not writer.has("one")
    with pytest.raises(ArtifactError, match="one cannot be read"):
        writer.load("one")
    for name, unit in zip(("one", "two"), parts(), strict=True):
        writer.save(name, unit)
        rounded = [
            r.__class__(**{**vars(r), "error": got.error})
            for r, got in zip(unit.records, writer.load(name).records, strict=True)
        ]
        assert_equal(writer.load(name), Unit(tuple(rounded), unit.entries))


def test_resumed_run_gives_the_same_bytes(tmp_path):
    one, two = parts()
    writer = ArtifactWriter(tmp_path / "straight", RUN, resume=False)
    writer.save("one", one)
    writer.save("two", two)
    straight = writer.finish(["one", "two"], golden.manifest())

    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    writer.save("one", one)
    writer.close()
    writer = ArtifactWriter(tmp_path / "out", dict(reversed(RUN.items())), resume=True)
    assert writer.has("one")
    assert not writer.has("two")
    writer.save("two", two)
    resumed = writer.finish(["one", "two"], golden.manifest())
    names = {file.name for file in straight.iterdir()}
    assert names == {file.name for file in resumed.iterdir()}
    assert all((straight / n).read_bytes() == (resumed / n).read_bytes() for n in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def test_units_may_come_in_another_order_than_their_bytes(tmp_path):
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        writer = ArtifactWriter(tmp_path / name, RUN, resume=False)
        units = list(parts())
        for i in order:
            writer.save(str(i), units[i])
        writer.finish(["0", "1"], golden.manifest())
    assert (tmp_path / "a" / "delta_config.json").read_bytes() == (
        tmp_path / "b" / "delta_config.json"
    ).read_bytes()


def test_extra_files_and_their_rights(tmp_path):
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    writer.save("all", golden.unit())
    seen = []

    def card(artifact):
        seen.append(artifact.ratio())
        return b"# card"

    out = writer.finish(["all"], golden.manifest(), {"tokenizer.json": b"{}"}, card)
    artifact = Artifact.open(out)
    assert seen == [artifact.ratio()]
    assert artifact.file("tokenizer.json") == b"{}"
    assert artifact.file("README.md") is None
    assert (out / "README.md").read_bytes() == b"# card"
    (tmp_path / "file").touch()
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_output_exists(tmp_path):
    (tmp_path / "out").mkdir()
    for resume in (False, True):
        with pytest.raises(OutputError, match="exists already"):
            ArtifactWriter(tmp_path / "out", RUN, resume=resume)
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_run_is_not_overwritten(tmp_path):
    ArtifactWriter(tmp_path / "out", RUN, resume=False).close()
    with pytest.raises(OutputError, match="unfinished run"):
        ArtifactWriter(tmp_path / "out", RUN, resume=False)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RUN | {"seed": 1}, "seed was 0, is now 1"),
        (RUN | {"plan": [[2, 5]]}, "plan was"),
        (RUN | {"method": "new"}, "method was None, is now 'new'"),
        ({"base": "some/base"}, "plan was"),
    ],
)
def test_run_of_something_else_is_not_continued(tmp_path, run, message):
    ArtifactWriter(tmp_path / "out", RUN, resume=False).close()
    with pytest.raises(OutputError, match=f"cannot be resumed: {message}"):
        ArtifactWriter(tmp_path / "out", run, resume=True)
    ArtifactWriter(tmp_path / "out", RUN, resume=True).close()


def test_second_writer_is_refused(tmp_path):
    first = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    first.save("all", golden.unit())
    with pytest.raises(OutputError, match="another process is writing here"):
        ArtifactWriter(tmp_path / "out", RUN, resume=True)
    first.finish(["all"], golden.manifest())
    Artifact.open(tmp_path / "out").verify_bytes()


def test_crash_while_a_unit_is_saved_loses_that_unit_alone(tmp_path, monkeypatch):
    one, two = parts()
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    writer.save("one", one)

    def crash(file, text):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltacome.format.writer.write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        writer.save("two", two)
    monkeypatch.undo()
    writer.close()
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=True)
    assert writer.has("one")
    assert not writer.has("two")


def test_damaged_unit_is_refused(tmp_path):
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    writer.save("all", golden.unit())
    file = tmp_path / "out.partial" / "all.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="all cannot be read"):
        writer.load("all")


@pytest.mark.parametrize("fault", ["entry", "disk", "bug"])
def test_nothing_at_the_output_when_finishing_fails(tmp_path, fault):
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=False)
    unit = golden.unit()
    if fault == "entry":
        del unit.entries["norm.weight.exact"]
    writer.save("all", unit)

    def card(artifact):
        if fault == "disk":
            raise OSError(28, "No space left on device")
        raise RuntimeError("a bug")

    errors = {"bug": RuntimeError, "disk": OutputError, "entry": ArtifactError}
    with pytest.raises(errors[fault]):
        writer.finish(["all"], golden.manifest(), card=card)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    # What was finished is still there, and the run can go on.
    writer.close()
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=True)
    writer.save("all", golden.unit())
    writer.finish(["all"], golden.manifest())
    Artifact.open(tmp_path / "out").verify_bytes()


def test_groups_are_as_large_as_the_limit_allows():
    sizes = {"a": 2, "b": 2, "c": 1, "d": 9, "e": 1}
    assert list(grouped(sizes.items(), 4)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_what_a_killed_process_left_does_not_get_into_the_output(tmp_path):
    for name in ("out", "dense"):
        (tmp_path / f"{name}.partial" / "final").mkdir(parents=True)
        (tmp_path / f"{name}.partial" / "lock").touch()
        (tmp_path / f"{name}.partial" / "final" / "half").touch()
    writer = ArtifactWriter(tmp_path / "out", RUN, resume=True)
    writer.save("all", golden.unit())
    writer.finish(["all"], golden.manifest())
    assert not (tmp_path / "out" / "half").exists()
    with new_folder(tmp_path / "dense") as folder:
        (folder / "whole").touch()
    assert [file.name for file in (tmp_path / "dense").iterdir()] == ["whole"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        ArtifactWriter(tmp_path / "file" / "out", RUN, resume=False)


def test_identity_is_what_json_makes_of_it(tmp_path):
    ArtifactWriter(tmp_path / "out", {"plan": ((2, 4),)}, resume=False).close()
    ArtifactWriter(tmp_path / "out", {"plan": [[2, 4]]}, resume=True).close()
    assert json.loads((tmp_path / "out.partial" / "run.json").read_text()) == {"plan": [[2, 4]]}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: expected what an earlier run left"):
        ArtifactWriter(tmp_path / "out", RUN, resume=True)
    assert (theirs / "notes.txt").read_text() == "mine"


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: expected what an earlier run left"):
        ArtifactWriter(tmp_path / "out", RUN, resume=True)
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OutputError, match=r"cannot be written: .*too long"):
        ArtifactWriter(tmp_path / ("x" * 300), RUN, resume=False)


def test_a_link_to_nothing_is_in_the_way(tmp_path):
    """A folder cannot be renamed over it, which would be noticed after all the work."""
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        ArtifactWriter(tmp_path / "out", RUN, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_that_one_is_in_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        ArtifactWriter(".", RUN, resume=False)
