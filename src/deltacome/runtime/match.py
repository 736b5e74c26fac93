"""Pairs the records of an artifact with the tensors of a live model, and checks that they fit.

Almost everything that can be refused is refused here, before the model is touched; what only a layer's
replacement can tell is refused where that is built. A tensor is found by
the name that transformers loads it under; a parameter whose name the artifact lacks is looked up under
its other names, so tied heads need no knowledge of the architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.arch.bypassed import bypassed
from deltacome.arch.checkpoint import sample_digest
from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.manifest import Manifest, Record
from deltacome.runtime.configs import Config, check_config
from deltacome.skeleton import Target, ignored, targets


@dataclass(frozen=True)
class Place:
    """One place in the model that holds a tensor: `module`'s parameter or buffer `attr`."""

    name: str
    module: nn.Module
    attr: str
    live: Tensor
    """The base's value there; for a stack of experts, the rows that the record is about."""
    record: Record
    target: Target
    quantized: bool = False
    """Whether the base's values are held as another library's codes."""

    @property
    def resized(self) -> bool:
        """Whether the tuned model has another number of rows here."""
        return not self.quantized and self.record.shape[:1] != tuple(self.live.shape[:1])

    @property
    def patched(self) -> bool:
        """Whether the module needs another `forward`, for packed terms or added rows."""
        return self.record.packed or self.record.grown


def match(
    model: nn.Module,
    manifest: Manifest,
    tuned_config: Config | None,
    *,
    quantized_base: bool = False,
) -> list[Place]:
    """Pairs every tensor of the model with its record and checks that they fit.

    Args:
        model: holds the base's weights.
        manifest: the artifact's.
        tuned_config: `config.json` of the tuned model, if known.
        quantized_base: whether linears may hold the base's weights quantised. Their fingerprints are
            not checked; those of all other tensors are.

    Raises:
        MismatchError: a record without a tensor, a tensor without a record, another shape, or values
            other than those of the base that the delta was taken against.
        UnsupportedError: a configuration that changes what the model computes, or a module that
            cannot run from packed codes.
    """
    tuned = check_config(model, tuned_config)
    where = targets(model, manifest.records)
    whole = {t.parameter: manifest.records[n] for n, t in where.items() if t.expert is None}
    stacked = {t.parameter for t in where.values() if t.expert is not None}
    places = list(_pair(model, whole, stacked, tuned))
    places += _stacks(model, manifest.records, where)
    found = {place.record.name for place in places}
    if quantized_base:
        places += _quantized(model, whole, found)
        places = [replace(p, quantized=p.quantized or _holds_codes(p)) for p in places]
        found = {place.record.name for place in places}
    _check_all_found(model, manifest.records, found)
    checked, passed_by = set(), bypassed(model)
    in_training = bypassed(model, training=True) if model.training else passed_by
    for place in places:
        check_module(place)
        if place.patched and place.name in in_training:
            way_out = "merge it" if place.name in passed_by else "call the model's eval() first"
            raise UnsupportedError(
                f"{place.name}: the model reads this weight without calling its layer, where the delta "
                f"would run: {way_out}"
            )
        if (id(place.live), place.record.name) not in checked and not place.quantized:
            check_base(place)
            checked.add((id(place.live), place.record.name))
    if places and all(place.quantized for place in places):
        raise MismatchError("every tensor of the model is quantised: nothing says which base it is")
    return places


def _pair(
    model: nn.Module, records: dict[str, Record], stacked: set[str], tuned: Any
) -> Iterator[Place]:
    """Places of tensors that are a whole parameter or buffer.

    Args:
        model: holds the base's weights.
        records: by the parameter that they are about.
        stacked: parameters that stack many tensors, which are left out here.
        tuned: configuration of the tuned model, if known.
    """
    places = _places(model)
    names_of = defaultdict(list)
    for (_, _, tensor), names in places:
        names_of[id(tensor)] += names
    head = _untied_head(model, records, tuned)
    unknown = []
    for (module, attr, tensor), names in places:
        known = next((n for n in names + names_of[id(tensor)] if n in records), None)
        if known is not None:
            name = known if known in names else names[0]
            yield Place(name, module, attr, tensor, records[known], Target(known))
        elif head is not None and tensor is head[0]:
            yield Place(names[0], module, attr, head[1], records[head[2]], Target(head[2]))
        elif isinstance(tensor, nn.Parameter) and not stacked & {*names}:
            unknown.append(names[0])
    if unknown:
        raise MismatchError(
            f"the artifact has no record of {len(unknown)} parameters of the model, the first is "
            f"{unknown[0]}: is this the artifact's base?"
        )


def _stacks(
    model: nn.Module, records: dict[str, Record], where: dict[str, Target]
) -> Iterator[Place]:
    """Places of matrices that lie stacked in one parameter."""
    for name, target in where.items():
        if target.expert is None:
            continue
        path, _, attr = target.parameter.rpartition(".")
        try:
            module, live = model.get_submodule(path), model.get_parameter(target.parameter)
        except AttributeError:
            continue  # `_check_all_found` reports it
        yield Place(name, module, attr, target.view(live.detach()), records[name], target)


def _quantized(model: nn.Module, records: dict[str, Record], found: set[str]) -> Iterator[Place]:
    """Places of weights that have no tensor of their name: codes of a quantised linear."""
    for parameter, record in records.items():
        path, _, attr = parameter.rpartition(".")
        if record.name in found or attr != "weight":
            continue
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and _computes(module, record):
            yield Place(parameter, module, attr, tensors[0], record, Target(parameter), True)


def _holds_codes(place: Place) -> bool:
    """Whether a linear holds its weight in another form than the checkpoint's."""
    kind, record = type(place.module), place.record
    own = kind.forward is nn.Linear.forward and place.live.is_floating_point()
    return place.attr == "weight" and not own and _computes(place.module, record)


def _computes(module: nn.Module, record: Record) -> bool:
    """Whether a module has the sizes of a record's matrix, which is packed or the base's as it is."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    multiplied = record.packed or (record.kind == "same" and len(record.shape) == 2)
    return multiplied and not record.exact_rows and record.bands_shape == sizes


def _places(model: nn.Module) -> list[tuple[tuple[nn.Module, str, Tensor], list[str]]]:
    """Every (module, attribute, tensor) once, with all its names; saved buffers too."""
    places: dict[tuple[int, str], tuple[tuple[nn.Module, str, Tensor], list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {
            attr: tensor
            for attr, tensor in module._buffers.items()
            if attr not in module._non_persistent_buffers_set
        }
        for attr, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                place = places.setdefault((id(module), attr), ((module, attr, tensor), []))
                place[1].append(f"{prefix}.{attr}" if prefix else attr)
    return list(places.values())


def _untied_head(
    model: nn.Module, records: dict[str, Record], tuned: Any
) -> tuple[Tensor, Tensor, str] | None:
    """(head, embedding, the embedding's record) if only the tuned model ties the two.

    The head is then the tuned embedding, and the base's own head is not used at all.
    """
    if not getattr(tuned, "tie_word_embeddings", False):
        return None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore
    if head is None or head.weight is embedding.weight:
        return None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is embedding.weight and name in records:
            return head.weight, embedding.weight, name
    return None


def _check_all_found(model: nn.Module, records: dict[str, Record], found: set[str]) -> None:
    missing = [name for name in records if name not in found and not ignored(model, name)]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise MismatchError(
            f"the model lacks {len(missing)} of the artifact's {len(records)} tensors: {shown}"
        )


def check_base(place: Place) -> None:
    """Compares a live tensor with the base tensor that the delta was taken against.

    Raises:
        MismatchError: shape or sampled values differ.
        UnsupportedError: the tensor has no values on this machine.
    """
    live, record = place.live, place.record
    if live.is_meta:
        raise UnsupportedError(f"{place.name}: expected values, got a tensor on the meta device")
    expected = record.base_shape
    if expected is None:  # new in the tuned model; its place may have another number of rows
        expected = (*live.shape[:1], *record.shape[1:])
    if tuple(live.shape) != expected:
        raise MismatchError(f"{place.name}: expected shape {expected}, got {tuple(live.shape)}")
    if record.base_sample is None:
        return
    got = sample_digest(live)
    if got != record.base_sample:
        way_out = "load the base that the artifact names, in the dtype of its checkpoint, unchanged"
        if live.dtype == torch.float16:
            way_out = (
                "unless its checkpoint is in float16 too, that dtype is the likely reason: load the base "
                "in bfloat16 or float32"
            )
        raise MismatchError(
            f"{place.name}: wrong base: expected values of fingerprint {record.base_sample}, got "
            f"{got} ({live.dtype}): {way_out}"
        )


def check_module(place: Place) -> None:
    """Checks that a module can run from packed codes, or with added rows, if it has to.

    Raises:
        UnsupportedError: names the tensor and the module's type.
    """
    module = place.module
    if not place.patched:
        return
    kind = type(module)
    if "forward" in vars(module) and not (place.quantized or hasattr(module, "_hf_hook")):
        raise UnsupportedError(
            f"{place.name}: the forward of this {kind.__qualname__} was replaced"
        )
    if place.target.expert is not None or place.quantized:
        return
    covered = place.attr == "weight" and (
        (kind.forward is nn.Linear.forward and not place.record.transposed)
        or (isinstance(module, nn.Embedding) and module.max_norm is None)
        or (kind.__name__ == "Conv1D" and place.record.transposed)
    )
    if not covered or not place.live.is_floating_point():
        hint = ""
        if _holds_codes(place):
            hint = "; if that is a quantised linear, say quantized_base=True"
        raise UnsupportedError(
            f"{place.name}: expected the weight of a linear layer or an embedding, got "
            f"{place.attr} ({place.live.dtype}) of {kind.__module__}.{kind.__qualname__}{hint}"
        )
    if place.record.grown and isinstance(module, nn.Linear) and module.bias is not None:
        raise UnsupportedError(f"{place.name}: rows added to a linear layer with a bias")
