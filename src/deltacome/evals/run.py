"""One table: base, tuned and its deltas on the same prompts, with the same measures.

The tuned model is loaded first and freed again; only its log-probabilities are kept (see
`divergence`). Then the base is loaded once and each delta attached to it in turn. So at most one
dense model is in memory, and a delta is measured as it is served, not merged. Where a delta's model
is of another class than the base (`models.tuned_by`) there are two.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltacome.arch.checkpoint import SIDE_FILES
from deltacome.device import pick_device
from deltacome.errors import CheckpointError, DeltaError, MismatchError, PictureError
from deltacome.evals.divergence import (
    Reference,
    divergence,
    question_rows,
    readable,
    record,
    text_rows,
)
from deltacome.evals.models import check_base, load_model, tuned_by
from deltacome.evals.prompts import prompt_row
from deltacome.evals.score import answers, score
from deltacome.evals.tasks import Question, load_questions
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.format.canary import CANARY_FILE
from deltacome.format.hub import fetch_folder, split_name
from deltacome.format.side_files import write_side_files
from deltacome.pictures import load_processor
from deltacome.skeleton import load_tokenizer

KLS = ("kl_task", "kl_task_error", "kl_text", "kl_text_error")


def evaluate(
    base: str | Path,
    *,
    tuned: str | Path | None = None,
    deltas: Sequence[str | Path] = (),
    task: str,
    task_args: dict[str, Any] | None = None,
    n: int = 200,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    batch_size: int = 16,
    max_new_tokens: int = 64,
    text: str | Path | None = None,
) -> dict[str, Any]:
    """Score base, tuned and deltas on one task; compare each with the tuned model, if given.

    `task`, `n`, `seed` and `task_args` are those of `load_questions`. `text` is a file to measure
    `kl_text` on instead of the default of `text_rows`, and needs `tuned`. `dtype` is a torch dtype or
    its name, or "auto" for that of the checkpoints; note that bfloat16 arithmetic alone changes the KL
    of a good delta severalfold.
    All models get the prompts of one tokenizer: the tuned model's, else the one that the deltas
    carry, else the base's.

    Returns `{"task", "n", "seed", "task_args", "dtype", "max_new_tokens", "text", "models": [{"name",
    "score", "score_low", "score_high", "kl_task", "kl_task_error", "kl_text", "kl_text_error"}]}`: scores
    in 0..1 with a 95 % interval, KL(tuned ‖ model) in nats per token with its standard error; deltas
    also have the entries of `account`. A KL is None without a tuned model. Any figure is None where a
    model cannot read its input: the base's `kl_task` if the answers use tokens that the fine-tune added,
    and its score too if the chat template uses them, or if the questions have pictures and it takes none.
    """
    if text is not None and tuned is None:
        raise DeltaError(
            f"text {text}: is for KL to the tuned model: expected one (--tuned), got none"
        )
    text = None if text is None else Path(text)
    dtype, device = str(dtype).removeprefix("torch."), pick_device(device)
    questions = load_questions(task, n, seed, task_args)
    artifacts = [opened(delta) for delta in deltas]
    check_base(base, artifacts)
    tokenizer = shared_tokenizer(base, tuned, artifacts)
    sees = any(question.pictures for question in questions)
    processor = shared_processor(base, tuned, artifacts) if sees else None
    exam = Exam(tokenizer, questions, batch_size, max_new_tokens, processor=processor)
    of_tuned = []
    if tuned is not None:
        rows = question_rows(tokenizer, questions, processor), text_rows(tokenizer, text)
        model = load_model(tuned, device, dtype)
        of_tuned = [{"name": "tuned", **scores(model, exam), **dict.fromkeys(KLS, 0.0)}]
        references = tuple(record(model, r, batch_size=batch_size) for r in rows)
        exam = replace(exam, references=references)
        del model
        free_memory()

    model = load_model(base, device, dtype)
    of_base = {"name": "base", **scores(model, exam), **kls(model, exam)}
    of_deltas = []
    for name, artifact in zip(names(deltas), artifacts, strict=True):
        with tuned_by(artifact, base, model) as running:
            figures = scores(running, exam) | kls(running, exam)
        of_deltas.append({"name": name, **account(artifact), **figures})
    how = {"seed": seed, "task_args": task_args, "dtype": dtype, "max_new_tokens": max_new_tokens}
    how["text"] = None if text is None else str(text)
    models = [of_base, *of_tuned, *of_deltas]
    return {"task": task, "n": len(questions), **how, "models": models}


@dataclass(frozen=True)
class Exam:
    """What every model of a table is asked, and the tuned model's references (task, text)."""

    tokenizer: Any
    questions: list[Question]
    batch_size: int
    max_new_tokens: int
    references: tuple[Reference, ...] = ()
    processor: Any = None
    """For questions with pictures."""


def scores(model: Any, exam: Exam) -> dict[str, float | None]:
    """Exact match with its interval; None if the model cannot read the prompts."""
    keys = ("score", "score_low", "score_high")
    rows = [prompt_row(exam.tokenizer, question, exam.processor) for question in exam.questions]
    if not readable(model, rows):
        return dict.fromkeys(keys)
    said = answers(
        model,
        exam.tokenizer,
        rows,
        batch_size=exam.batch_size,
        max_new_tokens=exam.max_new_tokens,
    )
    return dict(zip(keys, score(said, exam.questions), strict=True))


def kls(model: Any, exam: Exam) -> dict[str, float | None]:
    """KL(tuned ‖ model) on each reference, with its standard error.

    None without a reference, or if the model cannot read its rows.
    """
    found: dict[str, float | None] = dict.fromkeys(KLS)
    for name, reference in zip(("kl_task", "kl_text"), exam.references, strict=False):
        if readable(model, [one.row for one in reference.rows]):
            found[name], found[f"{name}_error"] = divergence(model, reference)
    return found


def answer_with(
    base: str | Path,
    delta: str | Path | None,
    prompt: str,
    *,
    pictures: Sequence[Path] = (),
    max_new_tokens: int = 64,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> str:
    """The greedy answer to one prompt, by the base or by the fine-tune that a delta stands for.

    Raises:
        PictureError: there are pictures, and the model takes none or has no processor.
    """
    artifacts = [] if delta is None else [opened(delta)]
    tokenizer = shared_tokenizer(base, None, artifacts)
    processor = shared_processor(base, None, artifacts) if pictures else None
    row = prompt_row(tokenizer, Question(prompt, "", tuple(pictures)), processor)
    model = load_model(base, device, dtype)
    runs = tuned_by(artifacts[0], base, model) if artifacts else nullcontext(model)
    with runs as running:
        if pictures and not readable(running, [row]):
            raise PictureError(f"{pictures[0]}: {type(running).__name__} has no input for pictures")
        return answers(running, tokenizer, [row], batch_size=1, max_new_tokens=max_new_tokens)[0]


def account(artifact: Artifact) -> dict[str, Any]:
    """What identifies an artifact beside its scores, and its size.

    The manifest's digest (`artifact`), `method`, `bytes` on disk and `ratio`.
    """
    return {
        "artifact": artifact.digest,
        "method": artifact.manifest.method["name"],
        "bytes": artifact.bytes_on_disk(),
        "ratio": artifact.ratio(),
    }


def names(deltas: Sequence[str | Path]) -> list[str]:
    """Folder names; the whole path where two folders have the same name."""
    short = [Path(delta).resolve().name for delta in deltas]
    return [str(d) if short.count(s) > 1 else s for d, s in zip(deltas, short, strict=True)]


def shared_tokenizer(
    base: str | Path, tuned: str | Path | None, artifacts: Sequence[Artifact]
) -> Any:
    """The one tokenizer of a table. Deltas that carry different ones need a tuned model."""
    if tuned is not None:
        return _tokenizer(tuned)
    found = [delta_tokenizer(base, artifact) for artifact in artifacts] or [_tokenizer(base)]
    _check_shared("tokenizer or chat template", artifacts, [_prompting(one) for one in found])
    return found[0]


def shared_processor(
    base: str | Path, tuned: str | Path | None, artifacts: Sequence[Artifact]
) -> Any:
    """The one processor of a table whose questions have pictures, chosen as in `shared_tokenizer`."""
    if tuned is not None:
        return _processor(tuned)
    found = []
    for artifact in artifacts:
        with _side_files(base, artifact) as folder:
            found.append(_processor(folder))
    found = found or [_processor(base)]
    _check_shared("processor", artifacts, [one.to_dict() for one in found])
    return found[0]


def delta_tokenizer(base: str | Path, artifact: Artifact) -> Any:
    """The tokenizer that a delta was trained with: the base's, with the files that the delta carries."""
    manifest = artifact.manifest
    if not manifest.dropped_files and not manifest.files.keys() - {TUNED_CONFIG_FILE, CANARY_FILE}:
        return _tokenizer(base)
    with _side_files(base, artifact) as folder:
        return _tokenizer(folder)


def _check_shared(what: str, artifacts: Sequence[Artifact], found: Sequence[Any]) -> None:
    for artifact, other in zip(artifacts, found, strict=False):
        if other != found[0]:
            raise MismatchError(
                f"{artifact.path}: its {what} is not that of {artifacts[0].path}; models of "
                "one table share their prompts, so evaluate them apart or give the tuned model"
            )


@contextmanager
def _side_files(base: str | Path, artifact: Artifact) -> Iterator[str]:
    """A temporary folder with the files that the tuned model has beside its weights."""
    patterns = (*SIDE_FILES, "config.json")
    of_base = fetch_folder(base, None, CheckpointError, patterns)
    with tempfile.TemporaryDirectory() as folder:
        write_side_files(Path(folder), of_base, artifact, patterns)
        yield folder


def _tokenizer(source: str | Path) -> Any:
    return load_tokenizer(*split_name(source, None, CheckpointError), refused=CheckpointError)


def _processor(source: str | Path) -> Any:
    return load_processor(*split_name(source, None, CheckpointError))


def _prompting(tokenizer: Any) -> tuple[Any, Any]:
    return tokenizer.get_vocab(), tokenizer.chat_template


def free_memory() -> None:
    """Release a deleted model's memory, so that torch does not hold it back from the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
