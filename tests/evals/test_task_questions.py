import builtins
import json

import pytest

from deltacome.errors import DeltaError
from deltacome.evals.tasks import Question, load_questions, read_questions, write_questions


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def line(i):
    return json.dumps({"prompt": f"question {i}", "answer": str(i)})


def test_reasoning_gym_questions_repeat_with_the_seed():
    first = load_questions("chain_sum", 5, seed=3, args={"max_terms": 3})
    assert first == load_questions("chain_sum", 5, seed=3, args={"max_terms": 3})
    assert first != load_questions("chain_sum", 5, seed=4000, args={"max_terms": 3})
    assert len(first) == 5
    assert all(isinstance(q, Question) and q.prompt and q.answer for q in first)


def test_arguments_reach_the_data_set():
    for question in load_questions("spell_backward", 20, 0, {"min_word_len": 4, "max_word_len": 4}):
        assert len(question.answer) == 4


def test_unknown_task_names_what_was_got_and_what_is_near():
    with pytest.raises(DeltaError, match=r"'chain_sums'.*near:.*chain_sum"):
        load_questions("chain_sums", 5, 0)


@pytest.mark.parametrize("args", [{"no_such_argument": 1}, {"min_terms": 9, "max_terms": 2}])
def test_refused_arguments_are_named(args):
    with pytest.raises(DeltaError, match=f"chain_sum.*{next(iter(args))}"):
        load_questions("chain_sum", 5, 0, args)


def test_missing_reasoning_gym_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(DeltaError, match=r"deltacome\[evals\]"):
        load_questions("chain_sum", 5, 0)


def test_file_is_shuffled_by_seed_and_cut(tmp_path):
    path = write(tmp_path / "q.jsonl", *map(line, range(20)))
    some = load_questions(str(path), 5, seed=1)
    assert some == load_questions(str(path), 5, seed=1)
    assert some != load_questions(str(path), 5, seed=2)
    assert some != read_questions(path)[:5]
    everything = load_questions(str(path), 100, seed=1)
    assert everything[:5] == some
    assert sorted(q.answer for q in everything) == sorted(map(str, range(20)))


def test_what_is_written_is_read(tmp_path):
    questions = [Question("a\nb", "<x>é</x>"), Question("c", "d")]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{not json", "invalid JSON"),
        pytest.param("[" * 100_000, "invalid JSON", id="deep"),
        pytest.param('{"prompt": %s}' % ("1" * 5000), "invalid JSON", id="long"),
        pytest.param(
            '{"prompt": "p", "answer": "a", "image": "%s"}' % ("x" * 300), "found none", id="name"
        ),
        ('["prompt", "answer"]', "list"),
        ('{"prompt": "p"}', "answer = None"),
        ('{"prompt": 3, "answer": "a"}', "prompt = 3"),
        ('{"prompt": "p", "answer": " "}', "answer = ' '"),
    ],
)
def test_malformed_line_is_named(tmp_path, bad, said):
    path = write(tmp_path / "q.jsonl", line(0), "", bad)
    with pytest.raises(DeltaError) as caught:
        load_questions(str(path), 1, 0)
    assert f"{path}:3" in str(caught.value)
    assert said in str(caught.value)


def test_a_text_that_is_no_name_of_a_task():
    with pytest.raises(DeltaError, match="expected a data set of reasoning-gym or the path"):
        load_questions("What is one plus one? " * 20, 1, 0)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(DeltaError, match="empty"):
        load_questions(str(path), 1, 0)


def test_missing_file_arguments_and_counts_are_refused(tmp_path):
    with pytest.raises(DeltaError, match=r"none\.jsonl"):
        load_questions(str(tmp_path / "none.jsonl"), 1, 0)
    path = write(tmp_path / "q.jsonl", line(0))
    with pytest.raises(DeltaError, match="no task arguments"):
        load_questions(str(path), 1, 0, {"max_terms": 2})
    with pytest.raises(DeltaError, match="n = 0"):
        load_questions("chain_sum", 0, 0)


def test_tasks_with_many_right_answers_are_refused():
    with pytest.raises(
        DeltaError, match=r"rush_hour: question 0: expected one right answer, got None"
    ):
        load_questions("rush_hour", 2, 0)
