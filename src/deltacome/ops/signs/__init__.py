"""What the dense 1-bit terms of a batch's tenants add to a linear layer or an embedding."""

from deltacome.ops.signs.api import sign_rows, signs

__all__ = ["sign_rows", "signs"]
