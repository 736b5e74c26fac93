"""Runs tuned models from their base and packed deltas, without changing the base's weights.

Packed terms are computed from their codes, beside the base's own layer. Nothing is ever merged, so
nothing has to be subtracted later, and the base is restored bit for bit. While one artifact is attached
alone, what it stores exactly (norms, biases) takes the parameter's place, and the base's own tensor
object comes back on detach. Several tenants at once share the parameters: their norms and biases are
applied row by row, and what cannot be applied that way (an added vocabulary, say) is refused by name.

Every change is pushed onto one `ExitStack` together with its inverse; detaching, or giving up half-way,
only has to unwind that stack.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from torch import nn

from deltacome.arch.bypassed import bypassed
from deltacome.errors import DeltaError, MismatchError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.ops import native
from deltacome.ops.impls import IMPLS, check_impl, fastest
from deltacome.runtime.alone import install_alone
from deltacome.runtime.choice import Choice
from deltacome.runtime.match import Place, match
from deltacome.runtime.shared import install_shared

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Source = Artifact | str | Path


def attach(
    model: nn.Module,
    artifact: Source | Mapping[str, Source],
    *,
    impl: str = "auto",
    quantized_base: bool = False,
) -> Attachment:
    """Makes a base model compute what tuned models compute, from packed codes.

    One artifact alone serves all rows: the model is the tuned model until detached, with its
    vocabulary (ids, logits, `vocab_size`) and, where the artifact carries one, its `generation_config`.

    A mapping from names to artifacts makes several tenants resident. The model stays the base, except
    within `using` (its `generation_config` stays there too: give `generate` a tenant's end tokens):

        with attach(model, {"math": "math-delta", "code": "code-delta"}) as attached:
            with attached.using("math"):
                ...
            with attached.using(["math", None, "code"]):  # a batch of three rows
                model.generate(...)

    For inference only: parameters require no gradient while attached. Load, resize, move or cast the
    model before attaching, and detach before copying or saving it. The choice made by `using` belongs to
    the attachment, not to a thread: while a block is open, another thread or asyncio task cannot enter
    one.

    Args:
        model: the base; any module whose parameters are named as in the checkpoint, usually a
            transformers model.
        artifact: opened, or its folder; or a mapping from names to several.
        impl: the implementation of `deltacome.ops`, or `auto`: the fastest that runs on all devices with
            patched layers. Where the slow one runs on a CPU, a warning says why.
        quantized_base: allows linears that hold the base's weights quantised (4 bits, say), which cannot
            be compared with the artifact's fingerprints; all other tensors still are.

    Returns:
        A handle that detaches, by `detach()` or as a context manager.

    Raises:
        MismatchError: the model is not the artifact's base, or lacks some of its tensors; or a name is
            empty.
        UnsupportedError: a module that cannot run from packed codes, a configuration that changes
            the model's code, an implementation that this installation lacks, something that several
            tenants cannot each have, or a model that has something attached already.
        ArtifactError: the artifact cannot be read, or its bytes do not match their checksums.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"attach: expected a loaded model, got {model!r:.100}: load the base first, with "
            "AutoModelForCausalLM.from_pretrained say"
        )
    if impl not in ("auto", *IMPLS):
        names = ("auto", *IMPLS)
        raise UnsupportedError(f"attach: expected an implementation of {names}, got {impl!r}")
    if impl != "auto":
        check_impl("attach", impl)
    if any(module in _attached for module in model.modules()):
        raise UnsupportedError("the model has an artifact attached already: detach it first")
    alone = not isinstance(artifact, Mapping)
    sources = {"": artifact} if alone else dict(artifact)
    if not sources:
        raise MismatchError("attach: expected at least one artifact, got none")
    if not alone and not all(isinstance(name, str) and name for name in sources):
        raise MismatchError(f"attach: expected a name for each artifact, got {list(sources)}")
    artifacts = {name: opened(source) for name, source in sources.items()}
    for one in artifacts.values():
        one.check_bytes()
    places = [
        match(model, one.manifest, one.json_file(TUNED_CONFIG_FILE), quantized_base=quantized_base)
        for one in artifacts.values()
    ]
    if impl == "auto":
        impl = _fastest(places)
    choice = Choice(list(artifacts), 0 if alone else -1, _devices(places)[0])
    with contextlib.ExitStack() as stack:
        _freeze(stack, model)
        _keep_from_training(stack, model, itertools.chain(*places))
        if alone:
            (one,) = artifacts.values()
            install_alone(stack, model, one, places[0], choice, impl)
        else:
            install_shared(stack, model, list(artifacts.values()), places, choice, impl)
        return Attachment(model, artifacts, choice, impl, stack.pop_all())


class Attachment:
    """Artifacts that are attached to a model, until `detach`.

    Attributes:
        model: the model.
        artifacts: by name; one that is attached alone has the empty name.
        impl: the implementation of `deltacome.ops` that runs them.
    """

    def __init__(
        self,
        model: nn.Module,
        artifacts: dict[str, Artifact],
        choice: Choice,
        impl: str,
        undo: contextlib.ExitStack,
    ) -> None:
        self.model = model
        self.artifacts = artifacts
        self.impl = impl
        self._choice = choice
        self._undo = undo
        self._detached = False

    @property
    def artifact(self) -> Artifact:
        """The artifact that is attached alone.

        Raises:
            MismatchError: several are attached.
        """
        if "" not in self.artifacts:
            raise MismatchError(
                f"expected one artifact attached alone, got {list(self.artifacts)}: see `artifacts`"
            )
        return self.artifacts[""]

    def using(
        self, who: str | Sequence[str | None] | None
    ) -> contextlib.AbstractContextManager[None]:
        """Runs as one tenant, or each row of a batch as its own, while open; None is the base.

        Args:
            who: a name, or one for each row (dimension 0 of the model's input). Beams, and anything else
                that repeats rows, need a name for each repeated row.

        Raises:
            MismatchError: a name that was not attached; later, in the forward, a batch of another size.
            UnsupportedError: one artifact is attached alone, so all rows are its; everything was
                detached; several names, and a tenant changes something outside the text model, such as
                a projector of pictures; blocks of several threads or tasks would overlap; or a block is
                left before one within it.
        """
        if self._detached:
            raise UnsupportedError(
                "using(): detached already, so the model is the base: attach again"
            )
        if "" in self.artifacts:
            raise UnsupportedError("one artifact is attached alone: attach a mapping of names")
        return self._choice.using(who)

    def detach(self) -> None:
        """Gives the base back, bit for bit and object for object. A second call does nothing."""
        self._detached = True
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


def _fastest(places: Sequence[Sequence[Place]]) -> str:
    live = [place.live for mine in places for place in mine if place.patched]
    if any(one.dtype == torch.float64 for one in live):  # the kernels have no float64
        return "reference"
    devices = _devices(places)
    if (why := native.missing()) and any(device.type == "cpu" for device in devices):
        warnings.warn(f"attach: running the slow reference implementation: {why}", stacklevel=3)
    found = {fastest(device) for device in devices}
    if len(found) == 1 and not (found == {"reference"} and devices[0].type == "cuda"):
        return found.pop()
    where = ", ".join(map(str, devices))
    warnings.warn(
        f"attach: running the slow reference implementation: no other runs on all of {where}",
        stacklevel=3,
    )
    return "reference"


def _devices(places: Sequence[Sequence[Place]]) -> list[torch.device]:
    """Where patched tensors are, in the order of the model; the CPU if nothing is patched."""
    live = [place.live for mine in places for place in mine if place.patched]
    return list(dict.fromkeys(one.device for one in live)) or [torch.device("cpu")]


def _freeze(stack: contextlib.ExitStack, model: nn.Module) -> None:
    """Marks the model as attached and keeps it as it is: not trained, copied, saved, cast, moved, resized
    or loaded into.
    """
    for module in model.modules():
        _attached.add(module)
        stack.callback(_attached.discard, module)
        stack.callback(module.register_state_dict_pre_hook(_refuse_to_save).remove)
        stack.callback(module.register_load_state_dict_pre_hook(_refuse_to_change).remove)
        for name, refuse in (
            ("__reduce_ex__", _refuse_to_save),  # of pickle and deepcopy
            ("save_pretrained", _refuse_to_save),
            ("resize_token_embeddings", _refuse_to_change),
        ):
            if hasattr(module, name):
                _shadow(stack, module, name, refuse)
        _shadow(
            stack, module, "_apply", functools.partial(_refuse_to_move, module)
        )  # `to`, `half` …
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)


def _keep_from_training(
    stack: contextlib.ExitStack, model: nn.Module, places: Iterable[Place]
) -> None:
    """Refuses `train()` where a delta would then be passed by, as in Mamba's kernels for training."""
    only_then = bypassed(model, training=True)
    if any(place.patched and place.name in only_then for place in places):
        for module in model.modules():
            _shadow(stack, module, "train", functools.partial(_refuse_to_train, module))


def _shadow(
    stack: contextlib.ExitStack, module: nn.Module, name: str, refuse: Callable[..., object]
) -> None:
    """Puts a function in the place of a module's method until the stack unwinds."""
    own = vars(module)
    if name in own:
        stack.callback(own.__setitem__, name, own[name])
    else:
        stack.callback(own.pop, name)
    own[name] = refuse


def _refuse_to_save(*arguments: object, **options: object) -> NoReturn:
    # A saved model would mix tensors of the base and of the tuned model, and a copy's layers would call
    # those of the original.
    raise DeltaError(
        "an artifact is attached: detach before saving or copying (`Attachment.detach`), or merge into a "
        "checkpoint"
    )


def _refuse_to_change(*arguments: object, **options: object) -> NoReturn:
    # New layers would run without their deltas, and what was swapped out would come back as it was.
    raise DeltaError(
        "an artifact is attached: detach before loading weights or resizing (`Attachment.detach`)"
    )


def _refuse_to_train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise DeltaError(
            "an artifact is attached, and while it trains this model reads weights without calling their "
            "layers: detach first (`Attachment.detach`)"
        )
    return type(module).train(module, mode)


def _refuse_to_move(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    # The base's tensors that were swapped out would stay as they are, and come back into a changed model.
    tensors = itertools.chain(module.parameters(recurse), module.buffers(recurse))
    if any(change(tensor) is not tensor for tensor in tensors):
        raise DeltaError(
            "an artifact is attached: detach before casting or moving the model (`Attachment.detach`)"
        )
    return module
