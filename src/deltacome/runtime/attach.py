"""Running a tuned model from its base and the packed delta; the base's weights stay as they are.

Bands are computed beside the base's own layer from packed codes. What is stored exactly (norms,
biases) takes the parameter's place, and the base's own tensor object comes back at detach: a copy
of such small tensors is cheaper than a sum in every step. Nothing is ever merged, so nothing has to
be subtracted again and the base is restored bit for bit.

Every change is pushed on one `ExitStack` with its opposite, which is all that detaching, or giving
up half-way, has to unwind.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.errors import ArtifactError, DeltaError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.ops.bands import cpu
from deltacome.ops.bands.api import IMPLS
from deltacome.runtime.match import Slot, match, vocabulary_configs
from deltacome.runtime.modules import Packed, embedding_scale, tuned_embedding, tuned_linear

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def attach(model: nn.Module, artifact: Artifact | str | Path, *, impl: str = "auto") -> Attachment:
    """Makes a base model compute what the tuned model computes, from packed codes.

    For inference: parameters require no gradient while attached. Move or cast the model before, not
    after. A vocabulary that grew or shrank is followed: ids, logits, `vocab_size`; so is the tuned
    model's `generation_config` where the artifact carries one.

    Args:
        model: the base; any module whose parameters are named as in the checkpoint, a transformers
            model above all.
        artifact: opened, or its folder.
        impl: the implementation of `deltacome.ops.bands`, or `auto`: `cpu` if all that is patched
            lies on the CPU and the native library was built, else `reference`.

    Returns:
        A handle that detaches, by `detach()` or as a context manager.

    Raises:
        MismatchError: the model is not the artifact's base, or lacks some of its tensors.
        UnsupportedError: a module that cannot run from packed codes, a configuration that changes
            the model's code, an implementation that this installation lacks, or something is
            attached already.
        ArtifactError: the artifact cannot be read.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    if impl not in ("auto", *IMPLS):
        names = ("auto", *IMPLS)
        raise UnsupportedError(f"attach: expected an implementation of {names}, got {impl!r}")
    if impl == "cpu" and (missing := cpu.missing()):
        raise missing
    if any(module in _attached for module in model.modules()):
        raise UnsupportedError("the model has an artifact attached already: detach it first")
    slots = match(model, artifact.manifest, _tuned_config(artifact))
    scales = [_scale(slot) for slot in slots]
    if impl == "auto":
        impl = _fastest({slot.live.device.type for slot in slots if slot.patched})
    with contextlib.ExitStack() as stack:
        _freeze(stack, model)
        terms = _Terms(artifact)
        for slot, scale in zip(slots, scales, strict=True):
            _patch(stack, slot, terms, scale, impl)
        _resize(stack, model, slots)
        _set_generation_config(stack, model, artifact)
        return Attachment(model, artifact, impl, stack.pop_all())


class Attachment:
    """An artifact that is attached to a model, until `detach`.

    Attributes:
        model: the model.
        artifact: the artifact.
        impl: the implementation of `deltacome.ops.bands` that runs it.
    """

    def __init__(
        self, model: nn.Module, artifact: Artifact, impl: str, undo: contextlib.ExitStack
    ) -> None:
        self.model = model
        self.artifact = artifact
        self.impl = impl
        self._undo = undo

    def detach(self) -> None:
        """Gives the base back, bit for bit and object for object. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def _fastest(devices: set[str]) -> str:
    return "cpu" if devices <= {"cpu"} and cpu.missing() is None else "reference"


class _Terms:
    """An artifact's terms on a device; tensors that share a record share the copy."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._packed: dict[tuple[str, torch.device], Packed] = {}
        self._values: dict[tuple[str, int], Tensor] = {}

    def packed(self, slot: Slot) -> Packed | None:
        record, device = slot.record, slot.live.device
        if not record.plan:
            return None
        if (record.name, device) not in self._packed:
            # A copy: what is read from the file is a view of it and would change with it.
            blob = self.artifact.blob(record.name).to(device, copy=True)
            group_size = self.artifact.manifest.group_size
            packed = Packed(blob, record.bands_shape, record.plan, group_size)
            self._packed[record.name, device] = packed
        return self._packed[record.name, device]

    def added(self, slot: Slot) -> Tensor | None:
        """Rows that the base lacks, in the dtype of the module."""
        if not slot.grown:
            return None
        value = self.artifact.exact(slot.record.name)
        return value.to(slot.live.device, slot.live.dtype, copy=True)

    def value(self, slot: Slot) -> Tensor:
        """What has to stand in the slot: the tuned value, or as much of the base's as is used."""
        key = (slot.record.name, id(slot.live))
        if key not in self._values:
            self._values[key] = self._value(slot)
        return self._values[key]

    def _value(self, slot: Slot) -> Tensor:
        record, live = slot.record, slot.live
        if record.replaced:
            value = self.artifact.exact(record.name).to(live.device, live.dtype, copy=True)
        elif slot.resized and record.shape[0] < live.shape[0]:
            value = live.detach()[: record.shape[0]]  # a view: no copy
        else:
            return live
        return nn.Parameter(value, requires_grad=False) if isinstance(live, nn.Parameter) else value


def _freeze(stack: contextlib.ExitStack, model: nn.Module) -> None:
    """Marks the model as attached and keeps it from being trained or saved."""
    for module in model.modules():
        _attached.add(module)
        stack.callback(_attached.discard, module)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
    stack.callback(model.register_state_dict_pre_hook(_refuse_state_dict).remove)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    # It would hold some tensors of the base and some of the tuned model.
    raise DeltaError("an artifact is attached: detach before saving, or merge into a checkpoint")


def _patch(stack: contextlib.ExitStack, slot: Slot, terms: _Terms, scale: float, impl: str) -> None:
    """Puts the tuned value, the tuned forward, or both, into one place of the model."""
    module = slot.module
    table: Any = module._parameters if slot.attr in module._parameters else module._buffers
    value = terms.value(slot)
    if value is not table[slot.attr]:
        stack.callback(table.__setitem__, slot.attr, table[slot.attr])
        table[slot.attr] = value
    if not slot.patched:
        return
    packed, added = terms.packed(slot), terms.added(slot)
    base: Any = module.forward
    forward: Any
    if isinstance(module, nn.Embedding):
        rows = slot.live.shape[0]
        forward = tuned_embedding(base, packed, added, rows, scale, impl)
    else:
        forward = tuned_linear(base, packed, added, impl)
    if "forward" in vars(module):
        stack.callback(setattr, module, "forward", base)
    else:
        stack.callback(delattr, module, "forward")
    module.forward = forward


def _scale(slot: Slot) -> float:
    if isinstance(slot.module, nn.Embedding) and slot.patched:
        return embedding_scale(slot.name, slot.module)
    return 1.0


def _resize(stack: contextlib.ExitStack, model: nn.Module, slots: list[Slot]) -> None:
    """Lets everything that states the size of the vocabulary say that of the tuned model."""
    for slot in slots:
        if not slot.resized or slot.attr != "weight":
            continue
        before, after = slot.live.shape[0], slot.record.shape[0]
        owner: Any
        for owner in (slot.module, *vocabulary_configs(model)):
            for name in ("num_embeddings", "out_features", "vocab_size"):
                if getattr(owner, name, None) == before:
                    stack.callback(setattr, owner, name, before)
                    setattr(owner, name, after)


def _set_generation_config(
    stack: contextlib.ExitStack, model: nn.Module, artifact: Artifact
) -> None:
    if not (artifact.path / "generation_config.json").is_file():
        return
    holder: Any = model
    if getattr(holder, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    stack.callback(setattr, model, "generation_config", holder.generation_config)
    try:
        holder.generation_config = GenerationConfig.from_pretrained(artifact.path)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: generation_config.json: {error}") from error


def _tuned_config(artifact: Artifact) -> dict[str, Any] | None:
    file = artifact.path / TUNED_CONFIG_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: expected a model configuration: {error}") from error
