"""Which tenant each row of a batch belongs to while one or more artifacts are attached.

Every patched layer asks the one `Choice` of its attachment. Rows are grouped once for each batch size,
not once for each layer. Compiled code and CUDA graphs group them anew: they read the slots from a tensor
that stays where it is, so one compilation, or graph, serves whichever tenants are chosen later.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops.rows import Rows, group_one, group_rows, tile_for

KEPT = 16
"""Groupings that are remembered: those of a prompt and of decoding, for a few batches."""

Slots = int | tuple[int, ...]


class Choice:
    """The slots of a batch's rows.

    Attributes:
        slots: one for all rows, or one for each (dimension 0 of a layer's input); −1 is the base.
        idle: whether all rows are the base's.
        beside: a changed layer whose input's dimension 0 may not be the batch, if there is one.
    """

    def __init__(
        self, names: Sequence[str], slots: Slots, device: torch.device | str = "cpu"
    ) -> None:
        self.names = list(names)
        self._device = device
        self._held: dict[int, Tensor] = {}
        self._set(slots)
        self.beside: str | None = None
        self._outside = slots
        self._open: list[_Block] = []
        self._entering = threading.Lock()
        self._rows: dict[tuple[object, ...], Rows] = {}

    @contextlib.contextmanager
    def using(self, who: str | Sequence[str | None] | None) -> Iterator[None]:
        """Makes all rows one tenant's, or each its own tenant's, while open; None is the base.

        Raises:
            MismatchError: a name that was not attached.
            UnsupportedError: several tenants, one of which changes a layer outside the text model; a
                block while another thread or task has one open; or one left before one within it.
        """
        mine = _Block(self._slots(who), _runner())
        with self._entering:
            if self._open and self._open[-1].runner != mine.runner:
                raise UnsupportedError(
                    "using(): expected one thread or task at a time, got a block while another has one "
                    "open: the choice holds for the whole model"
                )
            self._open.append(mine)
            self._set(mine.slots)
        try:
            yield
        finally:
            with self._entering:
                last = self._open[-1]
                self._open.remove(mine)
                self._set(self._open[-1].slots if self._open else self._outside)
            if last is not mine:
                raise UnsupportedError(
                    "using(): expected the block entered last to be left first, got an earlier one: "
                    "what ran in it since then ran as the tenants of the later one"
                )

    def _slots(self, who: str | Sequence[str | None] | None) -> Slots:
        if who is None or isinstance(who, str):
            return self._slot(who)
        slots = tuple(self._slot(name) for name in who)
        if self.beside is not None and len(set(slots)) > 1:
            raise UnsupportedError(
                f"using(): {self.beside}: lies outside the text model, where a layer's input may not "
                "have the batch's rows: expected one name for all rows, got several"
            )
        return slots

    def _slot(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.names:
            raise MismatchError(f"expected a tenant of {self.names}, got {name!r}")
        return self.names.index(name)

    def _set(self, slots: Slots) -> None:
        """Makes slots the choice; those of as many rows always lie in the same tensor."""
        self.slots, self.idle = slots, slots == -1
        self._one = isinstance(slots, int)
        given = [slots] if isinstance(slots, int) else slots
        with torch.inference_mode(False):  # or it could not be overwritten outside of that mode
            slot_B = torch.tensor(given, dtype=torch.int32, device=self._device)
            self._slot_B = self._held.setdefault(len(given), slot_B).copy_(slot_B)

    def rows(self, x: Tensor, tokens: int) -> Rows:
        """The rows of a layer's input.

        Args:
            x: the input; its dimension 0 is the batch.
            tokens: rows of the input, seen as a matrix.

        Raises:
            MismatchError: slots were given row by row, and the batch has another number of rows.
        """
        if torch.compiler.is_compiling() or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()
        ):  # a graph must own what it reads
            return self._group(x, tokens)
        key = (self.slots, x.shape[0], tokens, x.device)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._group(x, tokens)
            if len(self._rows) >= KEPT:
                self._rows.clear()  # at once: other threads may be looking something up
            self._rows[key] = rows
        return rows

    def _group(self, x: Tensor, tokens: int) -> Rows:
        slot_B, on_cpu = self._slot_B.to(x.device), x.device.type == "cpu"
        if self._one and not on_cpu:
            return group_one(slot_B, tokens, tile=tile_for(tokens, len(self.names)))
        if self._one:
            slot_T = slot_B.repeat(tokens)
        elif len(slot_B) == x.shape[0]:
            slot_T = slot_B.repeat_interleave(tokens // max(1, x.shape[0]), output_size=tokens)
        else:
            raise MismatchError(
                f"using(): expected a batch of {len(slot_B)} rows, one for each tenant named, got an "
                f"input of {tuple(x.shape)} (some models flatten rows and positions, in shared experts "
                "for example: give those one name for all rows)"
            )
        if on_cpu:  # its kernels, and the reference, use the slots alone
            return Rows(slot_T, slot_T, slot_T, 1)
        return group_rows(slot_T, len(self.names), tile=tile_for(tokens, len(self.names)))


class _Block:
    """A block of `using` that is open."""

    def __init__(self, slots: Slots, runner: object) -> None:
        self.slots, self.runner = slots, runner


def _runner() -> tuple[int, object]:
    """The thread, and the asyncio task if there is one: either can run between two steps of another."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop
        task = None
    return threading.get_ident(), task
