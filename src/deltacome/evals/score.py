"""Exact match of greedy answers, with a confidence interval.

The loop is written out instead of calling `generate`, which fills whatever is unset from the
model's own generation config: a repetition penalty there would differ between two models of one
table. Here greedy means the largest logit and nothing else. The price is that only models with
one cache are supported (no encoder-decoders), and neither beam search nor sampling.

Shapes: B answers in a batch, T tokens of the longest prompt, V vocabulary.
"""

import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from deltacome.errors import DeltaError
from deltacome.evals.positions import check_positions
from deltacome.evals.prompts import prompt_ids, stop_ids
from deltacome.evals.tasks import Question
from deltacome.rows import Row, collate, to_device

CACHES = ("cache", "past_key_values", "cache_params")
"""Names of a cache in transformers: since 5.24; before that; before that, of models without attention."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answers of `model` to `prompts`, in their order.

    An answer ends before the first stop token, or after `max_new_tokens`. Added tokens stay
    visible in the text, special ones too.
    """
    rows = [Row(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    return answers(model, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)


def answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """The greedy answers of `model` to rows that end where an answer begins, in order, as in `generate`.

    Rows of similar length share a batch; left padding is masked, so an answer does not depend on its
    neighbours beyond rounding.
    """
    stops = stop_ids(model, tokenizer)
    found = [""] * len(rows)
    for batch in _batches(rows, batch_size, padded=_takes_positions(model)):
        said = greedy(model, [rows[i] for i in batch], stops, max_new_tokens)
        for i, tokens in zip(batch, said, strict=True):
            found[i] = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return found


def _batches(rows: Sequence[Row], size: int, padded: bool) -> Iterator[list[int]]:
    """Indices of rows that share a batch.

    Rows with pictures share one only where they need no padding: each model family counts the positions
    of a padded one in its own way. So do all rows where none is to be `padded`.
    """
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (rows[i].kind, len(rows[i]))):
        first = rows[batch[0]] if batch else rows[i]
        alike = len(rows[i]) == len(first) or (padded and not first.seen)
        together = rows[i].kind == first.kind and alike
        if batch and (len(batch) == size or not together):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def greedy(
    model: Any, rows: Sequence[Row], stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue each row by the most likely token until one of `stops`, excluded.

    Rows with pictures are of one kind and length, and so are rows of a model that takes no positions.

    Where a model's positions end, so do its answers.

    Raises DeltaError if a row is empty, of another length or longer than the model's positions, or the
    model generates without a cache.
    """
    if not rows or not all(rows):
        raise DeltaError("generation: expected prompts of at least one token, got an empty one")
    weight = model.get_input_embeddings().weight
    device = weight.device
    width = max(map(len, rows))
    limit = check_positions(model, width + 1)
    count = max_new_tokens if limit is None else min(max_new_tokens, limit - width)
    ids = [[0] * (width - len(r)) + r.ids for r in rows]
    ids_BT = torch.tensor(ids, device=device)
    mask_BT = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    stops_S = torch.tensor(list(stops), device=device, dtype=torch.long)
    takes = inspect.signature(model.forward).parameters
    cached = _cache_name(model, takes)
    seen = to_device(collate(rows)[2], device, weight.dtype)
    masked = _takes_positions(model) and not seen
    if not masked and min(map(len, rows)) < width:
        raise DeltaError("generation: expected prompts of one length, got some that need padding")
    done_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
    said: list[torch.Tensor] = []
    cache = None
    for _ in range(count):
        # The head is the costliest layer of a small model, so it runs on the last position only.
        extra: dict[str, Any] = {"logits_to_keep": 1}
        if masked:  # otherwise the model counts positions itself; unpadded rows need no mask
            extra["position_ids"] = _positions(mask_BT)[:, -ids_BT.shape[1] :]
            extra["attention_mask"] = mask_BT
        out = model(
            input_ids=ids_BT,
            use_cache=True,
            **{cached: cache},
            **{name: value for name, value in extra.items() if name in takes},
            **seen,
        )
        seen = {}
        cache = out[cached]
        next_B = out.logits[:, -1].argmax(-1)
        said.append(next_B)
        done_B |= torch.isin(next_B, stops_S)
        if bool(done_B.all()):
            break
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
    return [_before_stop(row, set(stops)) for row in torch.stack(said, dim=1).tolist()]


def _takes_positions(model: Any) -> bool:
    """Whether a model can be told positions; if so, it attends to what it is told, so rows can be padded.

    Of models that cannot, some have states that padding would enter (Mamba).
    """
    return "position_ids" in inspect.signature(model.forward).parameters


def _cache_name(model: Any, takes: Collection[str]) -> str:
    """What a model calls its cache. By another name it would take none, and forget what it read."""
    for name in CACHES:
        if name in takes:
            return name
    raise DeltaError(
        f"generation: expected a model that takes one of {', '.join(CACHES)}, got "
        f"{type(model).__name__}, which takes {', '.join(takes)}"
    )


def _positions(mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions counted from the first real token; padding gets 0 and is masked anyway."""
    return (mask_BT.cumsum(-1) - 1).clamp_(min=0)


def _before_stop(tokens: list[int], stops: set[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in stops), tokens)


def exact_match(said: str, answer: str) -> bool:
    """Whether the answer was given, to the letter.

    White space around each line is ignored, and so is what follows the lines that the right
    answer has (mostly one): a model that gives the answer first and then explains it is right,
    one that wraps the answer in a sentence is not.
    """
    wanted = [line.strip() for line in answer.strip().splitlines()]
    given = [line.strip() for line in said.strip().splitlines()]
    return given[: len(wanted)] == wanted


def score(said: Sequence[str], questions: Sequence[Question]) -> tuple[float, float, float]:
    """Fraction of exact matches and its 95 % Wilson interval: (score, low, high)."""
    hits = sum(exact_match(s, q.answer) for s, q in zip(said, questions, strict=True))
    low, high = wilson(hits, len(questions))
    return hits / len(questions), low, high


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a binomial fraction (Wilson 1927), 95 % by default.

    Unlike the interval of the normal approximation it stays inside [0, 1] and has a width at
    0 and n hits, where fine-tunes and their bases often are.
    """
    if n < 1 or not 0 <= hits <= n:
        raise DeltaError(f"interval: expected 0 <= hits <= n and n >= 1, got {hits} of {n}")
    share = hits / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # At the ends the bounds are exactly 0 and 1; rounding would leave them a hair off.
    return centre - half if hits else 0.0, centre + half if hits < n else 1.0
