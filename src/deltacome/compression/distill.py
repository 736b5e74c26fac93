"""Distils the scales of signs against the tuned model's logits, and nothing but the scales.

BitDelta (arXiv 2402.10193, section 3.1): with base and signs frozen, the scales are what minimises the
squared distance of the logits to those of the tuned model on a little text (equation 4). There are a
few hundred numbers to find, so a short run of Adam over some hundred rows does.

A scale is trained by its logarithm, ours: scales of one model differ by orders of magnitude, and one
rate then suits all, where the paper's rate of 1e-4 is for scales of about that size.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from deltacome.errors import CheckpointError
from deltacome.format.codec import SignTensors

BATCH = 4
RATE = 0.01


def distill_scales(
    tuned: Path,
    signs: Mapping[str, SignTensors],
    base: Callable[[str], Tensor],
    rows: list[list[int]],
    *,
    steps: int,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Scales with which base and signs come closest to the tuned model's logits.

    Holds the tuned model, the base's matrices and the signs in float32 at once.

    Args:
        tuned: checkpoint of the tuned model.
        signs: by the name of a parameter, with the scales to start from.
        base: reads what the base has of a matrix, the rows that signs cover.
        rows: token ids.
        steps: of four rows each, in an order that the seed draws; the rate falls linearly to 0.

    Returns:
        Scales by name, float32, of the shape they had.

    Raises:
        CheckpointError: the tuned model cannot be loaded, or lacks a parameter.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tuned}: expected a causal language model: {error}") from error
    model = model.to(device).eval().requires_grad_(False)
    everywhere = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if strange := sorted(signs.keys() - everywhere):
        raise CheckpointError(f"{tuned}: {type(model).__name__} has no parameter {strange[0]}")
    # What a model ties to another weight goes along with that one.
    names = [name for name, _ in model.named_parameters() if name in signs]
    parts = {name: _parts(model, name, signs[name], base(name)) for name in names}
    logs = {name: torch.zeros_like(signs[name].scale, device=device) for name in names}
    for log in logs.values():
        log.requires_grad_()
    optimizer = torch.optim.Adam(list(logs.values()), lr=RATE)
    draw, order = random.Random(seed), []
    for step in range(steps):
        if len(order) < BATCH:
            order = draw.sample(range(len(rows)), len(rows)) * (1 + BATCH // len(rows))
        batch, order = [rows[i] for i in order[:BATCH]], order[BATCH:]
        ids_BL, valid_BL = (tensor.to(device) for tensor in _padded(batch))
        with torch.no_grad():
            wanted_TV = model(input_ids=ids_BL, use_cache=False).logits[valid_BL]
        weights = {
            n: fixed + logs[n].exp()[:, None] * signed for n, (fixed, signed) in parts.items()
        }
        inputs = {"input_ids": ids_BL, "use_cache": False}
        got_TV = functional_call(model, weights, (), inputs).logits[valid_BL]
        loss = torch.nn.functional.mse_loss(got_TV, wanted_TV)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        on_step(step + 1, steps)
    found = {n: signs[n].scale * logs[n].detach().exp().cpu() for n in names}
    del model, parts
    gc.collect()
    return {name: found.get(name, term.scale) for name, term in signs.items()}


def _parts(model: Any, name: str, signs: SignTensors, base_OI: Tensor) -> tuple[Tensor, Tensor]:
    """What of a weight is fixed, and what its scales multiply; rows that the base lacks are tuned."""
    fixed = model.get_parameter(name).clone()
    fixed[: len(base_OI)] = base_OI.to(fixed)
    signed = torch.zeros_like(fixed)
    signed[: len(base_OI)] = signs.dense().to(fixed)
    return fixed, signed


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, where a causal model looks at nothing, and what is not padding."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
