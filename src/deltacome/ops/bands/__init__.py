"""What a bands term adds to the output of a linear layer or of an embedding."""

from deltacome.ops.bands.api import band_rows, bands

__all__ = ["band_rows", "bands"]
