"""Distils a few scalars of packed terms, and nothing else, against the tuned model's logits.

BitDelta (arXiv 2402.10193, section 3.1): with base and signs frozen, the scales are those that minimise
the squared distance of the logits to those of the tuned model on a little text (equation 4). There are a
few hundred numbers to find, so a short run of Adam over some hundred rows is enough.

Ours: the same for bands, whose scalars are the singular values. What is cut off at 1/64 of the bytes is
cut off in every layer, and no layer's own error tells how these losses add up in the answer. A few
thousand scalars are enough to make up for much of that, and too few to memorise the text.

Scalars are trained through their logarithms: those of one model differ by orders of magnitude, and this
way one rate suits all, where the paper's rate of 1e-4 is for scales of about that size.

What counts weighs as in the sweep (`sensitivity`), but an answer of the mean length as much as a text.

Only tokens that count reach the head, the most expensive layer of a small model. The tuned model's hidden
states there are kept, so that each row runs through its blocks once, however often it is drawn.

Legend: O out, I in, R directions, B rows, L positions, T tokens that count, H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltacome.compression.answers import First
from deltacome.errors import CalibrationError, CheckpointError
from deltacome.format.codec import BandTensors, Packed, SignTensors
from deltacome.rows import Row, alike, collate, model_inputs, token_shares

SLOTS = 1024
"""At most this many rows times the longest of them in one pass; a step takes as many passes as needed."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits obtained and logits wanted, (T, V) each → what each token costs, (T,)."""


def squared_distance(got_TV: Tensor, wanted_TV: Tensor) -> Tensor:
    """BitDelta's equation 4."""
    return (got_TV - wanted_TV).square().mean(1)


def divergence(got_TV: Tensor, wanted_TV: Tensor) -> Tensor:
    """KL from the tuned model's answers to those obtained, in nats."""
    got_TV, wanted_TV = got_TV.log_softmax(-1), wanted_TV.log_softmax(-1)
    return nn.functional.kl_div(got_TV, wanted_TV, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class Trained:
    """A matrix whose scalars are to be found."""

    packed: Packed
    base: Callable[[], Tensor]
    """Reads the base's rows of it that the terms cover, (O, I)."""
    transposed: bool = False
    """Whether the model holds it as (I, O)."""


@torch.enable_grad()
def distill(
    load: Callable[[], nn.Module],
    terms: Mapping[str, Trained],
    rows: Sequence[Row],
    *,
    loss: Loss,
    rate: float,
    batch: int,
    steps: int,
    seed: int,
    first: First = lambda row: 0,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Packed]:
    """Finds the scalars that bring base and delta closest to the tuned model's logits.

    Holds the tuned model, the base's matrices, these with the delta added, and the gradients of the
    latter at once: four times the tuned model. A hidden state for each token that counts comes on top.

    Args:
        load: loads the tuned model, which is called with token ids and returns logits.
        terms: by the name of a parameter, with the scalars to start from.
        rows: calibration rows.
        loss: of logits at the positions that count, which weigh as the module says.
        rate: learning rate of Adam; it falls linearly to 0.
        batch: rows of a step, in an order that the seed draws.
        steps: steps of Adam.
        first: gives the position of a row from which on its predictions count.

    Returns:
        All terms, with the scalars that were found.

    Raises:
        CalibrationError: scalars that were found are not finite.
        CheckpointError: the tuned model lacks a parameter.
    """
    model = load().to(device).eval().requires_grad_(False)
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    if strange := sorted(terms.keys() - everywhere.keys()):
        raise CheckpointError(f"{type(model).__name__} has no parameter {strange[0]}")
    # Tied weights are one weight, found under the first of its names that has a term.
    firsts = {id(everywhere[name]): name for name in reversed(everywhere) if name in terms}
    weights = {name: _Weight(everywhere[name], terms[name]) for name in firsts.values()}
    optimizer = torch.optim.Adam([w.logs for w in weights.values()], lr=rate, betas=(0.9, 0.95))
    tuned = _Tuned(model, first)
    answers = [len(row) - first(row.ids) for row in rows if first(row.ids)]
    mean = sum(answers) / len(answers) if answers else 1.0
    draw, order = random.Random(seed), []
    for step in range(steps):
        while len(order) < batch:
            order += draw.sample(range(len(rows)), len(rows))
        drawn, order = [rows[i] for i in order[:batch]], order[batch:]
        drawn.sort(key=lambda row: (row.kind, len(row)))
        optimizer.zero_grad()
        values = {name: weight() for name, weight in weights.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        for some in alike(drawn, SLOTS, least=0.5):
            wanted_TV = tuned.logits(some)
            inputs, counts_BL = _inputs(model, some, first)
            with _picking(model, counts_BL):
                got_TV = functional_call(model, leaves, (), inputs).logits[0].float()
            answers_B = torch.tensor([first(row.ids) > 0 for row in some], device=counts_BL.device)
            share_T = token_shares(counts_BL, answers_B, mean)
            ((loss(got_TV, wanted_TV) * share_T).sum() / batch).backward()
        reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward(
            [values[name] for name in reached], [leaves[name].grad for name in reached]
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        if not all(torch.isfinite(part).all() for w in weights.values() for part in w.scalars()):
            raise CalibrationError(
                f"distillation: after step {step + 1} of {steps} scalars are not finite: compress with a "
                "lower rate, passes of another dtype, or distill 0"
            )
        on_step(step + 1, steps)
    found = {name: weight.packed() for name, weight in weights.items()}
    del model, tuned, weights
    gc.collect()
    return {name: found.get(name, term.packed) for name, term in terms.items()}


class _Weight:
    """A weight as a function of the logarithms of the factors on its scalars."""

    def __init__(self, whole: Tensor, term: Trained) -> None:
        self._term, packed = term, term.packed
        tuned_OI = whole.T if term.transposed else whole
        self._base_OI = term.base().to(whole)
        # Rows that the base lacks are the tuned model's.
        self._rest = tuned_OI[len(self._base_OI) :]
        self._parts = [_of_bands(packed.bands, whole.device)] if packed.bands else []
        self._parts += [_of_signs(packed.signs, whole.device)] if packed.signs else []
        self._sizes = [len(scalars) for scalars, _ in self._parts]
        self.logs = torch.zeros(sum(self._sizes), device=whole.device, requires_grad=True)

    def __call__(self) -> Tensor:
        """The weight as the model holds it."""
        value_OI = self._base_OI
        for (_, make), scalars in zip(self._parts, self.scalars(), strict=True):
            value_OI = value_OI + make(scalars).to(value_OI.dtype)
        value_OI = torch.cat([value_OI, self._rest]) if len(self._rest) else value_OI
        return value_OI.T if self._term.transposed else value_OI

    def packed(self) -> Packed:
        """The terms with the scalars that were found."""
        packed = self._term.packed
        found = [scalars.detach().cpu() for scalars in self.scalars()]
        bands, signs = packed.bands, packed.signs
        if bands:
            parts = found[0].split([len(band.s) for band in bands])
            bands = [replace(band, s=s) for band, s in zip(bands, parts, strict=True)]
        return Packed(bands, signs and replace(signs, scale=found[-1]))

    def scalars(self) -> list[Tensor]:
        """The scalars as they are now, those of bands before those of signs."""
        logs = self.logs.split(self._sizes)
        return [start * log.exp() for (start, _), log in zip(self._parts, logs, strict=True)]


def _of_bands(
    bands: Sequence[BandTensors], device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Singular values, and a function from them to the delta."""
    u_RO = torch.cat([band.u.dequantize() for band in bands]).to(device)
    v_RI = torch.cat([band.v.dequantize() for band in bands]).to(device)
    s_R = torch.cat([band.s.float() for band in bands]).to(device)
    return s_R, lambda s_R: u_RO.T @ (s_R[:, None] * v_RI)


def _of_signs(
    signs: SignTensors, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Scales, and a function from them to the delta."""
    signs_OI = replace(signs, scale=torch.ones(1)).dense().to(device)
    return signs.scale.to(device), lambda scale: scale[:, None] * signs_OI


def _inputs(model: Any, rows: Sequence[Row], first: First) -> tuple[dict[str, Any], Tensor]:
    """What a model is called with for some rows, and which positions' predictions count, (B, L)."""
    ids_BL, counts_BL, seen = collate(rows)
    for counts_L, row in zip(counts_BL, rows, strict=True):
        counts_L[: first(row.ids)] = False
    return model_inputs(ids_BL, seen, model.device, model.dtype), counts_BL.to(model.device)


class _Tuned:
    """The tuned model's logits; the hidden states that its head is given are kept."""

    def __init__(self, model: Any, first: First) -> None:
        self._model, self._first = model, first
        self._kept: dict[Row, Tensor] = {}
        self._output: Any = None

    @torch.no_grad()
    def logits(self, rows: list[Row]) -> Tensor:
        """Logits for those tokens of some rows that count, (T, V) float32."""
        new = [row for row in rows if row not in self._kept]
        if new:
            inputs, counts_BL = _inputs(self._model, new, self._first)
            self._output = self._model.base_model(**inputs)
            found_TH = self._output.last_hidden_state[counts_BL]
            parts = found_TH.split(counts_BL.sum(1).tolist())
            self._kept |= dict(zip(new, parts, strict=True))
        self._output.last_hidden_state = torch.cat([self._kept[row] for row in rows])[None]
        with _instead_of_blocks(self._model, lambda *args, **kwargs: self._output):
            ids_11 = torch.zeros(1, 1, dtype=torch.int64, device=self._model.device)
            return self._model(input_ids=ids_11, use_cache=False).logits[0].float()


@contextmanager
def _picking(model: Any, counts_BL: Tensor) -> Iterator[None]:
    """Makes the head answer only for the tokens that count, as if they were one row."""
    blocks = model.base_model.forward

    def pick(*args: Any, **kwargs: Any) -> Any:
        output = blocks(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state[counts_BL][None]
        return output

    with _instead_of_blocks(model, pick):
        yield


@contextmanager
def _instead_of_blocks(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces all that a model does before its head by another forward."""
    model.base_model.forward = forward
    try:
        yield
    finally:
        del model.base_model.__dict__["forward"]
