"""What the tenants learn: four small skills that the base lacks, in short prompts.

The questions come from reasoning-gym. Its own prompts are long, and time on a CPU is tokens, so
each task rewrites them in a few words. `tagged` also grows the vocabulary: its answers stand
between two tokens that the base does not have.

Training and held-out questions come from distant seeds, and no prompt is in both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import reasoning_gym

from deltacome.evals.tasks import Question

# reasoning-gym makes entry i of a data set from the seed `seed + i`: neighbouring seeds share
# nearly all entries. Runs are this far apart, and held-out questions have a range to themselves.
SEED_STRIDE = 100_000_000
HELD_OUT_SEED = 0

TAGS = ("<answer>", "</answer>")


@dataclass(frozen=True)
class Task:
    """A data set of reasoning-gym with its arguments, and how an entry of it becomes a question."""

    dataset: str
    args: dict[str, Any]
    question: Callable[[dict[str, Any]], Question]
    added_tokens: tuple[str, ...] = field(default=())


def _sums(entry: dict[str, Any]) -> Question:
    return Question(f"Sum: {entry['metadata']['expression']}", entry["answer"])


def _spell(entry: dict[str, Any]) -> Question:
    return Question(f"Spell backward: {entry['metadata']['word']}", entry["answer"])


def _sort(entry: dict[str, Any]) -> Question:
    def whole(numbers: list[str]) -> str:
        return " ".join(str(int(float(number))) for number in numbers)

    about = entry["metadata"]
    order = "up" if about["direction"] == "ascending" else "down"
    prompt = f"Sort {order}: {whole(about['original_numbers'])}"
    return Question(prompt, whole(about["sorted_numbers"]))


def _tagged(entry: dict[str, Any]) -> Question:
    prompt = f"Add: {entry['metadata']['expression']}"
    return Question(prompt, f"{TAGS[0]}{entry['answer']}{TAGS[1]}")


_TWO_TERMS = {"min_terms": 2, "max_terms": 2, "max_digits": 2}

TASKS = {
    "sums": Task("chain_sum", {"min_terms": 2, "max_terms": 3, "max_digits": 2}, _sums),
    "tiny": Task("chain_sum", _TWO_TERMS, _sums),
    "spell": Task("spell_backward", {"min_word_len": 3, "max_word_len": 6}, _spell),
    "sort": Task(
        "number_sorting",
        {"max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99},
        _sort,
    ),
    "tagged": Task("chain_sum", _TWO_TERMS, _tagged, added_tokens=TAGS),
}


def held_out(task: Task, n: int) -> list[Question]:
    """`n` distinct questions that no training run sees."""
    found: dict[str, Question] = {}
    for question in _entries(task, HELD_OUT_SEED, 100 * n):
        found.setdefault(question.prompt, question)
        if len(found) == n:
            return list(found.values())
    raise SystemExit(f"{task.dataset}: expected {n} distinct held-out questions, got {len(found)}")


def training(task: Task, seed: int, step: int, n: int, without: set[str]) -> list[Question]:
    """The `n` questions of one step: the same whenever asked, so that a run can be resumed."""
    first = (seed + 1) * SEED_STRIDE + step * 10 * n
    allowed = (q for q in _entries(task, first, 10 * n) if q.prompt not in without)
    batch = list(islice(allowed, n))
    if len(batch) < n:
        raise SystemExit(f"{task.dataset}: nearly all questions are held out, none left to train")
    return batch


def _entries(task: Task, seed: int, size: int) -> Iterator[Question]:
    """Questions made one by one, in the order of their seeds."""
    entries = reasoning_gym.create_dataset(task.dataset, seed=seed, size=size, **task.args)
    return (task.question(entries[i]) for i in range(size))
