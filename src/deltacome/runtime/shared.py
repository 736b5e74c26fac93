"""Several tenants attached at once: the base's parameters stay, and each row gets its own tenant's part.

What a tenant stores exactly is applied row by row: norms by the op `norm`, biases by adding their
difference. A vocabulary of another size would give the rows of one batch logits of different sizes; that
and other kinds of exact tensors are refused, and the error says what to do instead.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.arch.bypassed import bypassed
from deltacome.errors import UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.runtime.choice import Choice
from deltacome.runtime.match import Place
from deltacome.runtime.modules import (
    embedding_scale,
    norm_of,
    own_forward,
    set_forward,
    tuned_embedding,
    tuned_linear,
    tuned_norm,
)
from deltacome.runtime.terms import Terms

Tenants = list[Place | None]
"""The same tensor of a module, as each tenant's artifact has it."""


def install_shared(
    stack: contextlib.ExitStack,
    model: nn.Module,
    artifacts: Sequence[Artifact],
    places: Sequence[Sequence[Place]],
    choice: Choice,
    impl: str,
) -> None:
    """Gives a tuned forward to every module that some tenant changes; the stack undoes each.

    Raises:
        UnsupportedError: something that several tenants cannot each have.
        ArtifactError: an artifact cannot be read.
    """
    modules: dict[int, dict[str, Tenants]] = defaultdict(dict)
    passed_by = bypassed(model, training=model.training)
    for slot, mine in enumerate(places):
        for place in mine:
            if place.patched or place.record.replaced:
                attrs = modules[id(place.module)]
                attrs.setdefault(place.attr, [None] * len(places))[slot] = place
            _refuse(artifacts[slot].path, place, passed_by)
    choice.beside = _beside_text(model, map(_any, modules.values()))
    # All refusals come before anything is read.
    plans = [_plan(attrs) for attrs in modules.values()]
    terms = Terms(artifacts, places)
    for attrs, (kind, numbers) in zip(modules.values(), plans, strict=True):
        place = _any(attrs)
        module: Any = place.module
        weights = attrs.get("weight", [None] * len(places))
        if kind == "norm":
            forward = tuned_norm(
                own_forward(module), _weights(terms, weights, numbers[1]), numbers[0], choice, impl
            )
        elif kind == "embedding":
            packed, rows = terms.packed(weights), place.live.shape[0]
            forward = tuned_embedding(
                own_forward(module), packed, None, rows, numbers[0], choice, impl
            )
        else:
            bias_SO = _biases(terms, attrs["bias"]) if "bias" in attrs else None
            packed = terms.packed(weights)
            forward = tuned_linear(own_forward(module), packed, None, bias_SO, choice, impl)
        set_forward(stack, module, forward)


def _refuse(path: Path, place: Place, passed_by: Collection[str]) -> None:
    """Refuses what several tenants cannot each have, wherever it lies.

    Args:
        path: the artifact's.
        place: one of its places.
        passed_by: weights of layers that the model does not call.
    """
    why, layer = None, place.name.rpartition(".")[0]
    if place.target.expert is not None:
        why = "experts" if place.record.kind != "same" else None
    elif place.resized or place.record.grown:
        why = "a vocabulary of another size than the base's"
    elif not place.quantized and place.live is not getattr(place.module, place.attr):
        why = "a head tied to the embedding, over a base whose head is not"
    elif place.record.replaced and f"{layer}.weight" in passed_by:
        why = "read by the model without calling its layer"
    if why is not None:
        raise UnsupportedError(
            f"{path}: {place.name}: {why}, which several tenants cannot each have: attach this artifact "
            "alone, or merge it"
        )


def _beside_text(model: Any, places: Iterable[Place]) -> str | None:
    """Name of the first place whose input may have other rows than the batch: pictures, positions."""
    if not hasattr(model, "get_decoder"):
        return None
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    within = {id(m) for m in model.get_decoder().modules() if not isinstance(m, nn.Embedding)}
    within |= {id(end) for end in ends}
    return next((place.name for place in places if id(place.module) not in within), None)


def _any(attrs: dict[str, Tenants]) -> Place:
    return next(place for tenants in attrs.values() for place in tenants if place is not None)


def _plan(attrs: dict[str, Tenants]) -> tuple[str, tuple[float, ...]]:
    """What kind of module it is, and its scale (embedding) or eps and offset (norm)."""
    place = _any(attrs)
    module: Any = place.module
    stored = [p for tenants in attrs.values() for p in tenants if p and p.record.replaced]
    if isinstance(module, nn.Embedding) and not stored:
        return "embedding", (embedding_scale(place.name, module),)
    multiplies = place.quantized or type(module).forward is nn.Linear.forward
    multiplies |= place.record.transposed
    if multiplies and all(p.attr == "bias" for p in stored):
        return "linear", ()
    if set(attrs) == {"weight"}:
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise UnsupportedError(f"{place.name}: the forward of this module was replaced")
        return "norm", norm_of(place.name, module)
    raise UnsupportedError(
        f"{stored[0].name}: stored exactly, in a {type(module).__qualname__}, which several tenants "
        "cannot each have: attach this artifact alone, or merge it"
    )


def _weights(terms: Terms, tenants: Tenants, offset: float) -> Tensor:
    """float32 (S, H): each tenant's norm weight, the base's where it changes nothing."""
    live = next(place.live for place in tenants if place is not None)
    rows = [
        live.detach() if place is None else terms.exact(slot, place)
        for slot, place in enumerate(tenants)
    ]
    return torch.stack([row.float() + offset for row in rows])


def _biases(terms: Terms, tenants: Tenants) -> Tensor:
    """(S + 1, O) in the layer's dtype: each tenant's bias minus the base's; the last row is zero."""
    live = next(place.live for place in tenants if place is not None).detach()
    rows = [
        torch.zeros_like(live)
        if place is None
        else (terms.exact(slot, place).float() - live.float()).to(live.dtype)
        for slot, place in enumerate(tenants)
    ]
    return torch.stack([*rows, torch.zeros_like(live)])
