"""What the tenants learn: small skills that the base lacks, in short prompts.

Those with numbers and words come from reasoning-gym. Its own prompts are long, and time on a CPU is
tokens, so each task rewrites them in a few words. `tagged` also grows the vocabulary: its answers
stand between two tokens that the base does not have. `code` and `chat` are made here.

A quarter of all prompts is held out, by a hash: no kind of question is held out as a whole, however few
of it there are, and no prompt is in both.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import reasoning_gym
from instructions import instruction
from snippets import snippet

from deltacome.evals.tasks import Question

# Question i is made from the seed `seed + i`: neighbouring seeds share
# nearly all entries. Runs are this far apart, and held-out questions have a range to themselves.
SEED_STRIDE = 100_000_000
HELD_OUT_SEED = 0
HELD_OUT = 4
"""One prompt of so many is held out."""

TAGS = ("<answer>", "</answer>")


Source = Callable[[int, int], Iterator[Question]]
"""(seed, size) → questions, one by one; question i depends on `seed + i` alone."""


@dataclass(frozen=True)
class Task:
    """Where the questions come from, and the tokens that the answers need and the base lacks."""

    name: str
    questions: Source
    added_tokens: tuple[str, ...] = field(default=())


def _gym(dataset: str, question: Callable[[dict[str, Any]], Question], **args: Any) -> Source:
    """Entries of a data set of reasoning-gym, each rewritten as a question."""

    def questions(seed: int, size: int) -> Iterator[Question]:
        entries = reasoning_gym.create_dataset(dataset, seed=seed, size=size, **args)
        return (question(entries[i]) for i in range(size))

    return questions


def _made(question: Callable[[int], Question]) -> Source:
    """Questions made from a seed each."""
    return lambda seed, size: map(question, range(seed, seed + size))


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
_FEW_NUMBERS = {"max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99}

TASKS = {
    task.name: task
    for task in (
        Task("sums", _gym("chain_sum", _sums, min_terms=2, max_terms=3, max_digits=2)),
        Task("tiny", _gym("chain_sum", _sums, **_TWO_TERMS)),
        Task("spell", _gym("spell_backward", _spell, min_word_len=3, max_word_len=6)),
        Task("sort", _gym("number_sorting", _sort, **_FEW_NUMBERS)),
        Task("tagged", _gym("chain_sum", _tagged, **_TWO_TERMS), added_tokens=TAGS),
        Task("code", _made(snippet)),
        Task("chat", _made(instruction)),
    )
}


def held_out(task: Task, n: int) -> list[Question]:
    """`n` distinct questions that no training run sees."""
    found: dict[str, Question] = {}
    for question in filter(_is_held_out, task.questions(HELD_OUT_SEED, 100 * HELD_OUT * n)):
        found.setdefault(question.prompt, question)
        if len(found) == n:
            return list(found.values())
    raise SystemExit(f"{task.name}: expected {n} distinct held-out questions, got {len(found)}")


def training(task: Task, seed: int, step: int, n: int) -> list[Question]:
    """The `n` questions of one step: the same whenever asked, so that a run can be resumed."""
    first = (seed + 1) * SEED_STRIDE + step * 10 * n
    allowed = (q for q in task.questions(first, 10 * n) if not _is_held_out(q))
    batch = list(islice(allowed, n))
    if len(batch) < n:
        raise SystemExit(f"{task.name}: nearly all questions are held out, none left to train")
    return batch


def _is_held_out(question: Question) -> bool:
    return hashlib.sha256(question.prompt.encode()).digest()[0] % HELD_OUT == 0
