"""Mean KL(tuned ‖ other) per token: how far a compressed model's predictions are from the dense one's.

Exact match saturates on easy tasks; this does not, and needs no right answers. The tuned model
runs first and alone, since two dense models may not fit at once: its log-probabilities go to an
unnamed temporary file, and each other model is then compared with them batch by batch. They are
kept in float32, because half precision would add a floor of about 1e-6 nats. This costs
4 · positions · vocabulary bytes of disk (0.4 GB for 2048 positions of 49152 tokens).

Shapes: B rows in a batch, T tokens, P compared positions of all rows, V vocabulary of the tuned
model, C tokens that both models have.
"""

import inspect
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deltacome.errors import DeltaError
from deltacome.evals.positions import check_positions
from deltacome.evals.prompts import answer_ids, prompt_row
from deltacome.evals.tasks import Question
from deltacome.format.folder import disk_errors
from deltacome.rows import Row, collate, model_inputs


@dataclass(frozen=True)
class Compared:
    """A row, and the first position whose prediction counts; all later ones count too."""

    row: Row
    first: int = 0


@dataclass(frozen=True)
class Reference:
    """The tuned model's log-probabilities (P, V) in nats, float32, on disk."""

    rows: tuple[Compared, ...]
    log_probs_PV: np.ndarray
    batch_size: int


class Divergence(NamedTuple):
    """Mean KL in nats per token, with its standard error."""

    nats: float
    error: float | None
    """Takes rows as independent, but not the tokens within a row. None if there is only one row."""


def question_rows(
    tokenizer: Any, questions: Sequence[Question], processor: Any = None
) -> list[Compared]:
    """Rows of prompt and right answer, compared where the answer and its end are predicted.

    Questions with pictures need a processor (`prompts.prompt_row`).
    """
    rows = []
    for question in questions:
        prompt = prompt_row(tokenizer, question, processor)
        whole = prompt.followed_by(answer_ids(tokenizer, question.answer))
        rows.append(Compared(whole, first=len(prompt) - 1))
    return rows


def text_rows(
    tokenizer: Any, path: Path | None = None, *, rows: int = 16, length: int = 128
) -> list[Compared]:
    """The first `rows` chunks of `length` tokens of a text file, compared at every position.

    Without a file the text is the English prose of Python's own help topics (`pydoc_data`):
    every installation has it, though its wording differs a little between versions of Python.
    Each row starts with the BOS token if the tokenizer adds one.
    A short text gives fewer rows, the last one shorter.
    """
    text = _help_topics() if path is None else _read(path)
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    room = length - len(start)
    # About four characters make a token, so this is enough text without tokenising all of it.
    ids = tokenizer(text[: 16 * rows * length], add_special_tokens=False)["input_ids"]
    chunks = [ids[i : i + room] for i in range(0, min(len(ids), rows * room), room)]
    if not chunks:
        raise DeltaError(f"{path}: expected text to compare on, got none")
    return [Compared(Row([*start, *chunk])) for chunk in chunks]


def record(model: Any, rows: Sequence[Compared], *, batch_size: int = 8) -> Reference:
    """Run the tuned model over `rows` and keep its log-probabilities.

    Raises OutputError if there is no room for them on disk.
    """
    where = _places(rows)
    log_probs: np.ndarray | None = None
    for i, logits_NV in _logits(model, rows, batch_size):
        if log_probs is None:
            log_probs = _on_disk(where[-1].stop, logits_NV.shape[-1])
        log_probs[where[i]] = torch.log_softmax(logits_NV, -1).cpu().numpy()
    if log_probs is None:
        raise DeltaError("divergence: expected at least one row of tokens, got none")
    return Reference(tuple(rows), log_probs, batch_size)


def divergence(model: Any, reference: Reference) -> Divergence:
    """Mean KL(tuned ‖ model) in nats per token (`by_row`).

    Raises DeltaError as `by_row` does, or if logits are not finite.
    """
    nats, error = over_rows(by_row(model, reference))
    return Divergence(max(0.0, nats), error)


def by_row(model: Any, reference: Reference) -> list[tuple[float, int]]:
    """Each row's KL(tuned ‖ model), summed over its compared tokens in float32, and their number.

    Where one vocabulary is larger (a fine-tune that added tokens), both distributions are
    restricted to the ids they share, the first C, and renormalised: probability that the
    tuned model gives to tokens that the other lacks does not count. Raises DeltaError if `model`
    cannot read the rows (`readable`).
    """
    if not readable(model, [one.row for one in reference.rows]):
        raise DeltaError(
            f"divergence: the rows hold pictures that the model has no input for, or token ids beyond "
            f"the {vocabulary(model)} that it has"
        )
    where = _places(reference.rows)
    found = [(0.0, 0)] * len(where)
    for i, logits_NV in _logits(model, reference.rows, reference.batch_size):
        part = torch.from_numpy(reference.log_probs_PV[where[i]])
        common = min(part.shape[-1], logits_NV.shape[-1])
        p_NC = torch.log_softmax(part[:, :common].to(logits_NV.device), -1)
        q_NC = torch.log_softmax(logits_NV[:, :common], -1)
        kl = torch.nn.functional.kl_div(q_NC, p_NC, reduction="sum", log_target=True)
        found[i] = float(kl), len(logits_NV)
    return found


def over_rows(rows: Sequence[tuple[float, int]]) -> Divergence:
    """Mean KL per token, from each row's (summed KL, tokens). Raises DeltaError if not finite."""
    total, tokens, count = math.fsum(kl for kl, _ in rows), sum(n for _, n in rows), len(rows)
    if not math.isfinite(total):
        raise DeltaError(f"divergence: expected finite logits, got a sum of {total}")
    mean = total / tokens
    if count == 1:
        return Divergence(mean, None)
    # Of a ratio of two sums over rows. Both are random, since rows differ in length.
    squares = math.fsum((kl - mean * n) ** 2 for kl, n in rows)
    return Divergence(mean, math.sqrt(squares * count / (count - 1)) / tokens)


@torch.inference_mode()
def vocabulary(model: Any) -> int:
    """How many token ids the model knows as it runs now; an attached delta may have added some."""
    weight = model.get_input_embeddings().weight
    logits_1TV = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=weight.device)).logits
    return max(int(weight.shape[0]), int(logits_1TV.shape[-1]))


def readable(model: Any, rows: Sequence[Row]) -> bool:
    """Whether the model has every token id of the rows and accepts their other inputs."""
    takes = inspect.signature(model.forward).parameters.keys()
    known = max(max(row.ids) for row in rows) < vocabulary(model)
    return known and all(row.seen.keys() <= takes for row in rows)


@torch.inference_mode()
def _logits(
    model: Any, rows: Sequence[Compared], batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each row's index and the float32 logits (N, V) of its compared positions, in any order of rows."""
    check_positions(model, max((len(one.row) for one in rows), default=0))
    weight = model.get_input_embeddings().weight
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    for drawn in _batches(rows, batch_size):
        batch = [rows[i] for i in drawn]
        # Right padding: positions start at zero in every kind of model, and no token sees the padding.
        ids_BT, mask_BT, seen = collate([one.row for one in batch])
        width = ids_BT.shape[1]
        # The head is the costliest layer of a small model: skip the positions that no row compares.
        ends = {"logits_to_keep": width - min(one.first for one in batch)} if short else {}
        inputs = model_inputs(ids_BT, seen, weight.device, weight.dtype)
        mask = mask_BT.long().to(weight.device)
        logits_BTV = model(**inputs, attention_mask=mask, **ends).logits
        skipped = width - logits_BTV.shape[1]
        for i, one, logits_TV in zip(drawn, batch, logits_BTV, strict=True):
            yield i, logits_TV[one.first - skipped : len(one.row) - skipped].float()


def _batches(rows: Sequence[Compared], size: int) -> Iterator[list[int]]:
    """Indices of rows that run together.

    Rows of a batch are of one kind and start their comparison at similar positions, because the head
    computes every position from the earliest of these starts on.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].row.kind, rows[i].first))
    for _, run in itertools.groupby(order, lambda i: rows[i].row.kind):
        alike = list(run)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _places(rows: Sequence[Compared]) -> list[slice]:
    """Each row's slice of all compared positions."""
    ends = [0, *itertools.accumulate(len(one.row) - one.first for one in rows)]
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def _on_disk(positions: int, vocabulary: int) -> np.ndarray:
    """An array (P, V) in an unnamed file, which is gone once nothing maps it, after a crash too."""
    nbytes = 4 * positions * vocabulary
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the map keeps it)
    hint = f": the tuned model's log-probabilities take {nbytes:,} bytes; set TMPDIR to move them"
    with disk_errors(Path(tempfile.gettempdir()), hint):
        # Otherwise a full disk would kill the process when a page is written.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return np.memmap(file, np.float32, "w+", shape=(positions, vocabulary))


def _help_topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaError(f"{path}: expected a readable text file, got {error}") from error
