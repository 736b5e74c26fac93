"""What the bands terms of a batch's tenants add to a linear layer or to an embedding."""

from deltacome.ops.bands.api import band_rows, bands

__all__ = ["band_rows", "bands"]
