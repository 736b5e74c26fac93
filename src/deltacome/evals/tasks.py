"""Questions with one right answer: from reasoning-gym by name, or a JSONL file, which may name pictures.

reasoning-gym generates its questions from a seed, so a score can be repeated without a data set to
download. It is an extra (`pip install deltacome[evals]`) and imported only when it is asked for.
"""

import difflib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome.errors import DeltaError, PictureError
from deltacome.pictures import given_in


@dataclass(frozen=True)
class Question:
    """A prompt (one user message), the answer that counts as right, and the pictures that precede it."""

    prompt: str
    answer: str
    pictures: tuple[Path, ...] = ()


def load_questions(
    task: str, n: int, seed: int, args: dict[str, Any] | None = None
) -> list[Question]:
    """`n` questions of `task`, the same for the same `seed`.

    `task` is a data set of reasoning-gym, made with `args`, or the path of a JSONL file with
    `{"prompt": ..., "answer": ...}` on each line. For vision-language models a line may also have the
    path of an `image` or of several `images`; relative paths start at the file's folder. A file gives its
    first `n` lines after a shuffle by `seed`, or all of them if there are fewer. reasoning-gym makes
    question i from `seed + i`, so seeds less than `n` apart share questions. Raises DeltaError for an
    unknown task, one without single right answers, arguments that the data set refuses, a file that is
    empty or malformed, and a picture that is not there.
    """
    if n < 1:
        raise DeltaError(f"task {task}: expected at least 1 question, got n = {n}")
    if task.endswith((".jsonl", ".json")) or os.path.isfile(task):
        if args:
            raise DeltaError(f"task {task}: a file takes no task arguments, got {args}")
        questions = read_questions(Path(task))
        random.Random(seed).shuffle(questions)
        return questions[:n]
    return _generate(task, n, seed, args or {})


def read_questions(path: Path) -> list[Question]:
    """All questions of a JSONL file, in its order; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaError(f"{path}: expected a readable JSONL file, got {error}") from error
    questions = [_parse(line, path, i) for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DeltaError(f"{path}: expected at least one question, got an empty file")
    return questions


def write_questions(path: Path, questions: list[Question]) -> None:
    """Write questions as the JSONL that `read_questions` reads."""
    lines = []
    for q in questions:
        pictures = {"images": [str(file.resolve()) for file in q.pictures]} if q.pictures else {}
        lines.append(json.dumps({**pictures, "prompt": q.prompt, "answer": q.answer}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parse(line: str, path: Path, number: int) -> Question:
    where = f"{path}:{number}"
    wanted = 'an object with the strings "prompt" and "answer"'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{where}: expected {wanted}, got invalid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DeltaError(f"{where}: expected {wanted}, got {type(record).__name__}")
    for key in ("prompt", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DeltaError(f"{where}: expected {wanted}, got {key} = {record.get(key)!r}")
        if not record[key].isascii() and any("\ud800" <= c <= "\udfff" for c in record[key]):
            raise DeltaError(f"{where}: {key}: expected text, got half of a surrogate pair")
    return Question(record["prompt"], record["answer"], tuple(_pictures(record, path, where)))


def _pictures(record: dict[str, Any], path: Path, where: str) -> Iterator[Path]:
    for name in given_in(record):
        if not isinstance(name, str):
            raise PictureError(f"{where}: expected the path of a picture, got {name!r:.80}")
        if not os.path.isfile(file := path.parent / name):
            raise PictureError(f"{where}: expected a picture at {file}, found none")
        yield file


def _generate(task: str, n: int, seed: int, args: dict[str, Any]) -> list[Question]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DeltaError(
            f"task {task}: needs reasoning-gym (pip install 'deltacome[evals]'), or give the path "
            "of a JSONL file"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise DeltaError(
            f"task {task!r}: expected a data set of reasoning-gym or the path of a JSONL file{hint}"
        )
    try:
        entries = reasoning_gym.create_dataset(task, size=n, seed=seed, **args)
        made = [entries[i] for i in range(n)]
    except (TypeError, ValueError, AssertionError) as error:
        raise DeltaError(f"task {task}: reasoning-gym refused {args}: {error}") from error
    return [_made(task, i, entry) for i, entry in enumerate(made)]


def _made(task: str, number: int, entry: dict[str, Any]) -> Question:
    answer = "" if entry["answer"] is None else str(entry["answer"])
    if not answer.strip():  # such a question has many right answers: only its own scorer knows them
        raise DeltaError(
            f"task {task}: question {number}: expected one right answer, got {entry['answer']!r}"
        )
    return Question(str(entry["question"]), answer)
