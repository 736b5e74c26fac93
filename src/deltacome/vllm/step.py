"""Which slot each row of the running batch belongs to: written once a step, read by every layer.

The buffers keep their addresses, since captured graphs read them. On a CPU the kernels group rows
themselves, so only the slots are kept there.

Legend: T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltacome.ops.rows import Rows, group_rows

TILES = (16, 64)
"""Rows of a tile for decoding, and for prefill."""
PREFILL = 256
"""Rows from which on the larger tiles are used."""


class _Rows:
    """The slots of up to `size` rows, and their grouping."""

    def __init__(self, slots: int, size: int, device: torch.device) -> None:
        self.slots = slots
        self.slot_T = torch.full((size,), -1, dtype=torch.int32, device=device)
        # What `group_rows` gives of rows without a slot.
        self.groups = (
            {}
            if device.type == "cpu"
            else {t: group_rows(self.slot_T, slots, tile=t) for t in TILES}
        )
        self.used = 0

    def set(self, slots: Sequence[int]) -> None:
        slot_T = torch.tensor(slots, dtype=torch.int32)
        self.slot_T[: len(slots)].copy_(slot_T, non_blocking=True)
        # A graph can be larger than the batch that it runs.
        self.slot_T[len(slots) : max(self.used, len(slots))] = -1
        self.used = len(slots)
        for tile, rows in self.groups.items():
            new = group_rows(slot_T, self.slots, tile=tile)  # on the host: no kernels for it
            rows.order_T[: len(slots)].copy_(new.order_T, non_blocking=True)
            rows.tiles_M3[:, 0] = -1
            rows.tiles_M3[: len(new.tiles_M3)].copy_(new.tiles_M3, non_blocking=True)

    def get(self, tokens: int) -> Rows:
        slot_T = self.slot_T[:tokens]
        if not self.groups:
            return Rows(slot_T, slot_T, slot_T, 1)
        tile = TILES[tokens > PREFILL]
        rows = self.groups[tile]
        # As many tiles as a batch of this size can need (`group_rows`).
        tiles = min(tokens, min(self.slots, tokens) + tokens // tile)
        return Rows(slot_T, rows.order_T[:tokens], rows.tiles_M3[:tiles], tile)


class Step:
    """Rows of the tokens of a step, and of those whose logits are asked for.

    Attributes:
        idle: no row has a slot. Code that is compiled or captured must not look at it.
    """

    _prompts: Tensor | None = None
    """Hidden states of all tokens, while logprobs of prompts are computed from runs of their rows."""

    def __init__(self, slots: int, max_tokens: int, device: torch.device) -> None:
        self.idle = True
        self._tokens = _Rows(slots, max_tokens, device)
        self._sampled = _Rows(slots, max_tokens, device)

    def set(self, token_slots: Sequence[int], sampled_slots: Sequence[int]) -> None:
        """Takes the slots of the batch's rows, −1 for the base."""
        self.idle = max(token_slots, default=-1) < 0 and max(sampled_slots, default=-1) < 0
        self._tokens.set(token_slots)
        self._sampled.set(sampled_slots)

    def tokens(self, count: int) -> Rows:
        """The rows of a layer's input."""
        return self._tokens.get(count)

    def sampled(self, x_TI: Tensor) -> Rows:
        """The rows of the head's input: sampled tokens, or a run of a prompt's."""
        first = self.first_row(x_TI)
        if first is None:
            return self._sampled.get(x_TI.shape[0])
        return self._regrouped(self._tokens.slot_T[first : first + x_TI.shape[0]])

    @classmethod
    def first_row(cls, x_TI: Tensor) -> int | None:
        """Where a head's input begins in the hidden states of all tokens, for logprobs of prompts."""
        if cls._prompts is None:
            return None
        row = x_TI.stride(0) * x_TI.element_size()
        return (x_TI.data_ptr() - cls._prompts.data_ptr()) // row

    def _regrouped(self, slot_T: Tensor) -> Rows:
        if not self._tokens.groups:
            return Rows(slot_T, slot_T, slot_T, 1)
        return group_rows(slot_T, self._tokens.slots, tile=TILES[0])

    @classmethod
    @contextlib.contextmanager
    def prompt_logits(cls, hidden_states_TI: Tensor) -> Iterator[None]:
        """While open, the head's rows are runs of these, in every step of this process."""
        cls._prompts = hidden_states_TI
        try:
            yield
        finally:
            cls._prompts = None
