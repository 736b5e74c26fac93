"""What the dense 1-bit terms of a batch's tenants add to a linear layer."""

from deltacome.ops.signs.api import signs

__all__ = ["signs"]
