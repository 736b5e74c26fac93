"""How long a row a model can read: one with a table of learned positions ends where the table does."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from deltacome.errors import DeltaError

OFFSET = 2
"""Most rows before the first position in such a table (OPT)."""


def learned_positions(model: Any) -> int | None:
    """The length of a model's table of positions; None if it computes them, for any length."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    learned = any(limit <= table.num_embeddings <= limit + OFFSET for table in tables)
    return limit if learned else None


def check_positions(model: Any, tokens: int) -> int | None:
    """Refuses a row of more tokens than a model has positions; returns how many it has, if they end.

    Raises:
        DeltaError: says how many it has.
    """
    limit = learned_positions(model)
    if limit is not None and tokens > limit:
        raise DeltaError(
            f"{type(model).__name__}: expected rows of at most {limit} tokens, as many as it has "
            f"positions, got {tokens}"
        )
    return limit
