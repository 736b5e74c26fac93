"""What `eval --json` prints, read back."""

import json

import pytest
from report_helpers import evaluated

from deltacome.errors import DeltaError
from deltacome.report.scores import read_scores

BASE = ("base", None, None, None, 0.1)
ONE = ("one", "delta-come", 1000, 16.0, 0.5)
TWO = ("two", "low-rank", 100, 64.0, 0.3)


def test_files_of_one_exam_are_put_together(tmp_path):
    first = evaluated(tmp_path / "1.json", [BASE, TWO], task="/somewhere/else/q.jsonl")
    second = evaluated(tmp_path / "2.json", [BASE, ONE], task="/somewhere/else/q.jsonl")
    other = evaluated(tmp_path / "3.json", [ONE], task="sums")
    exams = read_scores([first, second, other])
    assert [(exam.task, exam.questions) for exam in exams] == [("else/q.jsonl", 50), ("sums", 50)]
    assert [model.name for model in exams[0].models] == ["base", "two", "one"]
    assert [model.name for model in exams[0].deltas] == ["one", "two"]
    assert exams[0].dense("base").score == 0.1
    assert exams[0].dense("tuned") is None
    assert exams[0].percent


def test_what_was_asked_otherwise_stands_apart(tmp_path):
    files = []
    for i, how in enumerate(
        [
            *({}, {"seed": 0, "dtype": "float32", "max_new_tokens": 64, "text": None}),
            *({"seed": 1}, {"dtype": "bfloat16"}, {"max_new_tokens": 512}, {"text": "/a/b/c.txt"}),
        ]
    ):
        file = evaluated(tmp_path / f"{i}.json", [BASE, ONE], task="sums")
        file.write_text(json.dumps(json.loads(file.read_text()) | how))
        files.append(file)
    assert [exam.task for exam in read_scores(files)] == [
        "sums",
        "sums, seed 1",
        "sums, dtype bfloat16",
        "sums, max_new_tokens 512",
        "sums, text b/c.txt",
    ]
    base = {"name": "base", "results": {"arc": {"acc,none": 0.5}}}
    for shots in (None, 5):
        file = tmp_path / f"{shots}.json"
        file.write_text(
            json.dumps({"tasks": ["arc"], "shots": shots, "chat": False, "models": [base]})
        )
    exams = read_scores([tmp_path / "None.json", tmp_path / "5.json"])
    assert [exam.task for exam in exams] == ["arc", "arc, shots 5"]


def test_scores_of_two_fine_tunes_stand_apart(tmp_path):
    tuned = [("tuned", None, None, None, score) for score in (0.9, 0.4)]
    first = evaluated(tmp_path / "1.json", [BASE, tuned[0], TWO], task="sums")
    second = evaluated(tmp_path / "2.json", [BASE, tuned[1], ONE], task="sums")
    third = evaluated(
        tmp_path / "3.json", [BASE, tuned[1], ("three", "x", 10, 8.0, 0.2)], task="sums"
    )
    exams = read_scores([first, second, third])
    assert [exam.dense("tuned").score for exam in exams] == [0.9, 0.4]
    assert [[model.name for model in exam.deltas] for exam in exams] == [["two"], ["three", "one"]]


def test_what_is_no_share_is_no_percentage(tmp_path):
    results = {"pile": {"bits_per_byte,none": 0.652}, "arc": {"acc,none": 0.652}}
    file = tmp_path / "scores.json"
    file.write_text(
        json.dumps({"tasks": list(results), "models": [{"name": "base", "results": results}]})
    )
    assert {exam.task: exam.percent for exam in read_scores([file])} == {"pile": False, "arc": True}


def test_tasks_of_the_harness(tmp_path):
    def model(name, accuracy, error, **more):
        figures = {"acc,none": accuracy, "acc_stderr,none": error, "acc_norm,none": 0.9}
        return {
            "name": name,
            **more,
            "results": {"all": {}, "arc": figures, "words": {"ppl,x": 12.5}},
        }

    base = model("base", 0.01, 0.01)
    tuned = model("tuned", 0.0, 0.0)
    delta = model("d", 0.5, 0.02, artifact="a", method="adaptive", bytes=10, ratio=32.0)
    file = tmp_path / "h.json"
    file.write_text(json.dumps({"tasks": ["all"], "models": [base, tuned, delta]}))
    arc, words = read_scores([file])
    assert (arc.task, arc.metric, arc.questions) == ("arc", "acc", None)
    assert arc.deltas[0].low == pytest.approx(0.5 - 1.96 * 0.02)
    assert arc.percent  # though the base's interval begins below 0
    assert (arc.dense("tuned").low, words.deltas[0].low, words.deltas[0].high) == (None,) * 3
    assert (words.metric, words.percent, words.deltas[0].score) == ("ppl,x", False, 12.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"task": "t", "n": 1, "models": [{"name": "x", "score": 0.5}]}',
        '{"task": "t", "n": 1, "models": [{"name": "base", "score": "high"}]}',
        '{"task": "t", "n": 1, "models": [{"name": "base", "score": NaN}]}',
        '{"task": "t", "n": 1, "models": [{"name": "x", "artifact": "a", "method": "m", "bytes": 1, '
        '"ratio": -1}]}',
        '{"task": "t", "n": 1e999, "models": [{"name": "base", "score": 0.5}]}',
        '{"task": "t", "n": 1, "models": [{"name": "x", "artifact": "a", "method": "m", "bytes": 1e999, '
        '"ratio": 2}]}',
        '{"models": [{"name": "x", "results": {"t": {}}}]}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused(tmp_path, text):
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(
        DeltaError, match=r"scores\.json: expected what deltacome eval --json prints"
    ):
        read_scores([file])
