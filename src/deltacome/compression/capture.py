"""Runs a model one decoder block at a time, holding one block's weights.

The model exists as a skeleton whose weights are on the meta device. To learn what each block is
called with (masks, rotary tables, whatever the family passes), the model's own forward runs once per
batch with blocks that only record their arguments and pass the hidden states on. Those arguments
depend on positions and not on values, so blocks can then be run one after another over all batches:
no family needs code here. A model that does something to hidden states between its blocks is refused.

Rows are padded on the right. Under a causal mask padding changes nothing before it, so no attention
mask is needed, and padded positions are left out of grams.

Legend: B rows of a batch, L positions, H hidden size, T tokens, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.arch.layout import Layout, inputs_of, linears_of, shared_inputs
from deltacome.errors import CalibrationError, UnsupportedError
from deltacome.numerics.gram import Gram
from deltacome.rows import Row, alike, collate, model_inputs
from deltacome.skeleton import picture_token, set_weight

ReadTensor = Callable[[str], Tensor]


class _Stop(Exception):
    pass


class _Taken(Exception):
    """A model indexed what a block returned, so a stand-in for the block must return a tuple."""


def drop_weights(module: nn.Module) -> None:
    """Frees the weights of a module."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@dataclass
class Batch:
    """Rows of one length class on their way through the model."""

    ids: Tensor  # (B, L) int64
    valid: Tensor  # (B, L) bool, False at padding
    words: Tensor  # (B, L) bool, where the embedding's row enters: valid, and not part of a picture
    seen: dict[str, Tensor]  # the model's other inputs: pictures
    hidden: Tensor  # (B, L, H), output of the blocks so far
    calls: list[tuple[tuple, dict[str, Any]]]  # each block's other arguments


class Stream:
    """Calibration rows and their hidden states, advancing block by block.

    Args:
        model: a skeleton.
        layout: the skeleton's.
        read: gives the weights outside the blocks (embedding, norms) by name.
        rows: calibration rows.

    Raises:
        CalibrationError: there are no rows.
        UnsupportedError: blocks are not called as expected, or rows have pictures and nothing tells
            which tokens stand for them.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        read: ReadTensor,
        rows: Sequence[Row],
        *,
        device: str,
        dtype: torch.dtype,
        batch_tokens: int = 4096,
    ) -> None:
        if not rows:
            raise CalibrationError("calibration: expected at least one row of tokens, got none")
        self.model, self.layout, self.read = model, layout, read
        self.device, self.dtype = device, dtype
        self.batches: list[Batch] = []
        self._in_tuple = False  # whether the model takes the first of what a block returns
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._index = {name: i for i, name in enumerate(layout.blocks)}
        with self.outside_weights(), torch.no_grad():
            for some in alike(sorted(rows, key=lambda row: (row.kind, -len(row))), batch_tokens):
                ids, valid, seen = collate(some)
                words = valid & self._words(ids) if seen else valid
                hidden, calls = self._record_calls(self._inputs(ids, seen))
                self.batches.append(Batch(ids, valid, words, seen, hidden, calls))

    @property
    def tokens(self) -> int:
        """Calibration tokens without padding."""
        return sum(int(batch.valid.sum()) for batch in self.batches)

    def groups(self, name: str) -> list[list[str]]:
        """Linears of a block in the order of their calls, those that share an input together."""
        block = self.layout.blocks[name]
        batch = self.batches[0]
        with torch.no_grad():
            return shared_inputs(linears_of(name, block), lambda: self.run(name, batch))

    def gram(self, name: str, linear: str) -> Tensor:
        """Gram of the inputs that reach a linear of a block, under the weights now loaded."""
        module = self.model.get_submodule(linear)
        return self._gram(linear, module, inputs_of(module), lambda batch: self.run(name, batch))

    def head_gram(self) -> Tensor:
        """Gram of the inputs of the output head, after the last block."""
        hidden_size = self.batches[0].hidden.shape[-1]
        with self.outside_weights():
            return self._gram(str(self.layout.head), self.head, hidden_size, self.answer)

    def _gram(
        self, name: str, module: nn.Module, inputs: int, run: Callable[[Batch], Tensor]
    ) -> Tensor:
        gram = Gram(name, inputs, device=self.device)
        for batch in self.batches:

            def take(module: nn.Module, args: tuple, batch: Batch = batch) -> None:
                # Some layers flatten rows and positions before they multiply.
                gram.add(args[0].reshape(*batch.valid.shape, -1)[batch.valid.to(self.device)])
                raise _Stop

            self._until_stopped(module, take, lambda batch=batch: run(batch))
        return gram.value

    def advance(self, name: str) -> None:
        """Replaces all hidden states by the block's output."""
        with torch.no_grad():
            for batch in self.batches:
                batch.hidden = self.run(name, batch)

    def run(self, name: str, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """A block's output, (B, L, H), for the hidden states of a batch or for others of that shape."""
        args, kwargs = batch.calls[self._index[name]]
        hidden = batch.hidden if hidden is None else hidden
        output = self.layout.blocks[name](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def answer(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) for the last block's output: the batch's hidden states, or others."""
        hidden = batch.hidden if hidden is None else hidden
        *_, last = self.layout.blocks
        outputs = {name: (lambda h, *a, **k: self._returned(h)) for name in self.layout.blocks}
        outputs[last] = lambda h, *a, **k: self._returned(hidden)
        with self._patched(outputs):
            return self.model(**self._inputs(batch.ids, batch.seen)).logits

    def _inputs(self, ids: Tensor, seen: dict[str, Tensor]) -> dict[str, Any]:
        return model_inputs(ids, seen, self.device, self.dtype)

    def _words(self, ids: Tensor) -> Tensor:
        """Which tokens are not part of a picture."""
        token = picture_token(self.model)
        if token is None:
            raise UnsupportedError(
                f"{type(self.model).__name__}: calibration rows have pictures, and its configuration has "
                "no image_token_id that tells which tokens stand for them: calibrate with text alone"
            )
        return ids != token

    def _until_stopped(self, module: nn.Module, hook: Callable, run: Callable[[], Any]) -> None:
        handle = module.register_forward_pre_hook(hook)
        try:
            with torch.no_grad():
                run()
        except _Stop:
            return
        finally:
            handle.remove()

    @property
    def head(self) -> nn.Module:
        """The output head."""
        assert self.layout.head is not None
        return self.model.get_submodule(self.layout.head.removesuffix(".weight"))

    def _record_calls(
        self, inputs: dict[str, Any]
    ) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
        """Hidden states at the first block, and the other arguments of each block.

        Raises:
            UnsupportedError: blocks do not run once each, or a block does not get what the one before it
                returned.
        """
        calls: list[tuple[tuple, dict[str, Any]]] = []
        first: list[Tensor] = []

        def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first and hidden.ndim < first[0].ndim:
                raise _Taken
            if first and not torch.equal(hidden, first[0]):
                raise UnsupportedError(
                    f"{type(self.model).__name__}: changes hidden states between its blocks, before the "
                    f"one of index {len(calls)}, so they cannot be run one by one"
                )
            if not first:
                first.append(hidden.clone())  # a copy, as the model may change its own in place
            calls.append((args, kwargs))
            return self._returned(hidden)

        head = self.head

        def stop(module: nn.Module, args: tuple) -> None:
            raise _Stop

        try:
            with self._patched(dict.fromkeys(self.layout.blocks, note)):
                self._until_stopped(head, stop, lambda: self.model(**inputs))
        except _Taken:
            self._in_tuple = True
            return self._record_calls(inputs)
        if len(calls) != len(self.layout.blocks):
            raise UnsupportedError(
                f"{type(self.model).__name__}: expected each of {len(self.layout.blocks)} blocks to "
                f"run once with hidden states first, {len(calls)} calls were seen"
            )
        return first[0], calls

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._in_tuple else hidden

    @contextmanager
    def _patched(self, forwards: Mapping[str, Callable]) -> Iterator[None]:
        """Gives blocks another forward; the attributes that the model reads from a block stay."""
        for name, forward in forwards.items():
            self.layout.blocks[name].forward = forward
        try:
            yield
        finally:
            for name in forwards:
                del self.layout.blocks[name].__dict__["forward"]

    @contextmanager
    def outside_weights(self, head: str | None = None) -> Iterator[None]:
        """Loads all weights outside the blocks, the head only if the tensor that it uses is named."""
        inside = tuple(f"{name}." for name in self.layout.blocks)
        # Deduplicated names show a tied head under the embedding's name, which is what is wanted.
        names = {
            name: name
            for name, _ in self.model.named_parameters()
            if not name.startswith(inside) and name != self.layout.head
        }
        if head is not None:
            names[str(self.layout.head)] = head
        for name, source in names.items():
            set_weight(self.model, name, self.read(source).to(self.device, self.dtype))
        try:
            yield
        finally:
            for name in names:
                drop_weights(self.model.get_submodule(name.rpartition(".")[0]))
