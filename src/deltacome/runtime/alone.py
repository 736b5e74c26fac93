"""One artifact attached alone: the model becomes the tuned model, vocabulary included."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltacome.errors import ArtifactError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.runtime.choice import Choice
from deltacome.runtime.experts import install_experts
from deltacome.runtime.match import Place
from deltacome.runtime.modules import (
    embedding_scale,
    own_forward,
    set_forward,
    tuned_embedding,
    tuned_linear,
)
from deltacome.runtime.terms import Terms


def install_alone(
    stack: contextlib.ExitStack,
    model: nn.Module,
    artifact: Artifact,
    places: Sequence[Place],
    choice: Choice,
    impl: str,
) -> None:
    """Puts tuned values and tuned forwards into all places; the stack undoes each change.

    Raises:
        UnsupportedError: an embedding does more than scale.
        ArtifactError: the artifact cannot be read.
    """
    terms = Terms([artifact], [places])
    experts: dict[int, list[Place]] = {}
    for place in places:
        if place.target.expert is not None:
            experts.setdefault(id(place.module), []).append(place)
    for mine in experts.values():
        if any(place.record.kind != "same" for place in mine):
            install_experts(stack, mine, terms, choice, impl)
    places = [place for place in places if place.target.expert is None]
    scales = [_scale(place) for place in places]
    values: dict[tuple[str, int], Tensor] = {}
    for place, scale in zip(places, scales, strict=True):
        key = (place.record.name, id(place.live))
        if key not in values:
            values[key] = _value(terms, place)
        if not place.quantized:
            _put(stack, place, values[key])
        if place.patched:
            _patch(stack, place, terms, scale, choice, impl)
    _resize(stack, model, places)
    _set_generation_config(stack, model, artifact)


def _scale(place: Place) -> float:
    if isinstance(place.module, nn.Embedding) and place.patched:
        return embedding_scale(place.name, place.module)
    return 1.0


def _value(terms: Terms, place: Place) -> Tensor:
    """The tensor that belongs in the place: the tuned value, or the rows of the base's that are used."""
    record, live = place.record, place.live
    if record.replaced:
        value = terms.exact(0, place)
    elif place.resized and record.shape[0] < live.shape[0]:
        value = live.detach()[: record.shape[0]]  # a view: no copy
    else:
        return live
    return nn.Parameter(value, requires_grad=False) if isinstance(live, nn.Parameter) else value


def _put(stack: contextlib.ExitStack, place: Place, value: Tensor) -> None:
    module = place.module
    table: Any = module._parameters if place.attr in module._parameters else module._buffers
    if value is not table[place.attr]:
        stack.callback(table.__setitem__, place.attr, table[place.attr])
        table[place.attr] = value


def _patch(
    stack: contextlib.ExitStack,
    place: Place,
    terms: Terms,
    scale: float,
    choice: Choice,
    impl: str,
) -> None:
    module: Any = place.module
    packed = terms.packed([place])
    added = terms.exact(0, place) if place.record.grown else None
    if isinstance(module, nn.Embedding):
        rows = place.live.shape[0]
        forward = tuned_embedding(own_forward(module), packed, added, rows, scale, choice, impl)
    else:
        forward = tuned_linear(own_forward(module), packed, added, None, choice, impl)
    set_forward(stack, module, forward)


def _resize(stack: contextlib.ExitStack, model: nn.Module, places: Sequence[Place]) -> None:
    """Sets the vocabulary size to the tuned model's wherever the model states it."""
    for place in places:
        if not place.resized or place.attr != "weight":
            continue
        before, after = place.live.shape[0], place.record.shape[0]
        owner: Any
        for owner in (place.module, *_vocabulary_configs(model)):
            for name in ("num_embeddings", "out_features", "vocab_size"):
                if getattr(owner, name, None) == before:
                    stack.callback(setattr, owner, name, before)
                    setattr(owner, name, after)


def _vocabulary_configs(model: nn.Module) -> list[Any]:
    """Every configuration and module of the model that states the size of a vocabulary."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            if isinstance(getattr(owner, "vocab_size", None), int):
                owners[id(owner)] = owner
            if owner is not module and hasattr(owner, "get_text_config"):
                text = owner.get_text_config()  # type: ignore
                if isinstance(getattr(text, "vocab_size", None), int):
                    owners[id(text)] = text
    return list(owners.values())


def _set_generation_config(
    stack: contextlib.ExitStack, model: nn.Module, artifact: Artifact
) -> None:
    holder: Any = model
    before = getattr(holder, "generation_config", None)
    if before is None:
        return
    from transformers import GenerationConfig

    name, make = "generation_config.json", GenerationConfig.from_dict
    config = artifact.json_file(name)
    if config is None and (
        name in artifact.manifest.dropped_files or getattr(before, "_from_model_config", False)
    ):
        # The tuned model has no such file, so its defaults come from its model configuration.
        name, make = TUNED_CONFIG_FILE, GenerationConfig.from_model_config
        config = artifact.json_file(name)
    if config is None:
        return
    stack.callback(setattr, model, "generation_config", before)
    try:
        holder.generation_config = make(config)
    except (AttributeError, ValueError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: {name}: {error}") from error
