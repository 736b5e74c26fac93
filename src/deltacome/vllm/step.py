"""Which slot each row of the running batch belongs to: written once a step, read by every layer.

The buffers keep their addresses, since captured graphs read them. On a CPU the kernels group rows
themselves, so only the slots are kept there. What code that is compiled reads from the buffers must not
depend on the number of rows: the compiler traces it once for all batches, and keeps what it saw.

Legend: T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltacome.errors import MismatchError
from deltacome.ops.rows import TILES, Rows, group_all, group_rows, set_unused


class _Rows:
    """The slots of up to `size` rows and, if `grouped`, their tiles of each size.

    Slots, order and tiles then lie in one buffer, so that one copy brings those of a step.
    """

    def __init__(self, slots: int, size: int, device: torch.device, *, grouped: bool) -> None:
        self.slots, self.grouped, self.pinned = slots, grouped, device.type == "cuda"
        shape = (2 + len(TILES), 3 * size) if grouped else (1, size)
        self._lines = torch.full(shape, -1, dtype=torch.int32, device=device)
        slot_T = self._lines[0]
        self.all = _parts(self._lines) if grouped else Rows(slot_T, slot_T, slot_T, 1)
        self.used = size
        self.set([])

    def set(self, slots: Sequence[int]) -> None:
        # A graph can be larger than the batch that it runs.
        rows = max(self.used, len(slots))
        self.used = len(slots)
        slot_T = torch.tensor([*slots, *[-1] * (rows - len(slots))], dtype=torch.int32)
        if not self.grouped:
            self.all.slot_T[:rows].copy_(slot_T)
            return
        grouped = group_all(slot_T, self.slots)  # on the host, so without kernels
        # Pinned, or the copy would wait for the running step; new, as the last one may not be read yet.
        shape = (len(self._lines), 3 * rows)
        lines = torch.full(shape, -1, dtype=torch.int32, pin_memory=self.pinned)
        parts = _parts(lines)
        parts.slot_T.copy_(slot_T)
        parts.order_T.copy_(grouped.order_T)
        parts.tiles_M3.copy_(grouped.tiles_M3)
        self._lines[:, : 3 * rows].copy_(lines, non_blocking=True)

    def get(self, tokens: int) -> Rows:
        rows = self.all
        return Rows(rows.slot_T[:tokens], rows.order_T, rows.tiles_M3, rows.tile)


def _parts(lines: Tensor) -> Rows:
    """What a buffer holds: slots and order in the first third of a line each, a line for each tile size.

    The rest of the first two lines is −1, which makes the rows that follow nobody's.
    """
    rows = lines.shape[1] // 3
    return Rows(lines[0, :rows], lines[1, :rows], lines[2:].view(len(TILES), rows, 3), 0)


class Step:
    """The rows of a step's tokens, and of those whose logits are asked for.

    Attributes:
        idle: no row has a slot, and no graph that is captured now will run for rows that have one.
            Compiled code must not look at it; the ops do, when they run.
    """

    _prompts: Tensor | None = None
    """Hidden states of all tokens, while logprobs of prompts are computed from runs of their rows."""

    def __init__(self, slots: int, max_tokens: int, device: torch.device) -> None:
        self.graphs = device.type != "cpu"
        self._tokens = _Rows(slots, max_tokens, device, grouped=self.graphs)
        self._sampled = _Rows(slots, max_tokens, device, grouped=self.graphs)
        self.set([], [])

    def set(
        self, token_slots: Sequence[int], sampled_slots: Sequence[int], *, adapters: bool = False
    ) -> None:
        """Takes the slots of the batch's rows, −1 for the base.

        Args:
            token_slots: of each token.
            sampled_slots: of each row that the head gets.
            adapters: whether the batch has any adapters. The engine captures separate graphs for batches
                without; the others it captures with made-up adapters, which have no tenant's slot.
        """
        slots = max(token_slots, default=-1) >= 0 or max(sampled_slots, default=-1) >= 0
        self.idle = not (slots or (adapters and self.graphs))
        for rows, new in ((self._tokens, token_slots), (self._sampled, sampled_slots)):
            rows.set(new)
            set_unused(rows.all.slot_T, self.idle)

    @property
    def skipped(self) -> bool:
        """Whether layers may leave out their deltas: when `idle`, unless a compiler is tracing them."""
        return not torch.compiler.is_compiling() and self.idle

    def tokens(self, count: int) -> Rows:
        """The rows of a layer's input."""
        return self._tokens.get(count)

    def sampled(self, x_TI: Tensor) -> Rows:
        """The rows of the head's input: sampled tokens, or a run of a prompt's tokens."""
        first = self.first_row(x_TI)
        if first is None:
            return self._sampled.get(x_TI.shape[0])
        return self._regrouped(self._tokens.all.slot_T[first : first + x_TI.shape[0]])

    @classmethod
    def first_row(cls, x_TI: Tensor) -> int | None:
        """Where a head's input begins in the hidden states of all tokens, for logprobs of prompts.

        Raises:
            MismatchError: it is not a run of their rows, so it is not known whose they are.
        """
        if cls._prompts is None:
            return None
        all_TI, count = cls._prompts, len(x_TI)
        row = all_TI.stride(0) * all_TI.element_size()
        first, within = divmod(x_TI.data_ptr() - all_TI.data_ptr(), row)
        strides = x_TI.stride(0), all_TI.stride(0)
        if within or not 0 <= first <= len(all_TI) - count or (count > 1 and len({*strides}) > 1):
            raise MismatchError(
                f"logprobs of prompts: the head: expected a run of the {len(all_TI)} hidden states, got "
                f"{count} rows that lie {x_TI.data_ptr() - all_TI.data_ptr()} bytes behind the first"
            )
        return first

    def _regrouped(self, slot_T: Tensor) -> Rows:
        if not self._tokens.grouped:
            return Rows(slot_T, slot_T, slot_T, 1)
        return group_rows(slot_T, self._tokens.slots)

    @classmethod
    @contextlib.contextmanager
    def prompt_logits(cls, hidden_states_TI: Tensor) -> Iterator[None]:
        """While open, the head's rows are runs of these hidden states, in every step of this process."""
        cls._prompts = hidden_states_TI
        try:
            yield
        finally:
            cls._prompts = None
