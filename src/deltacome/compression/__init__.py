"""From two checkpoints to an artifact."""

from deltacome.compression.pipeline import Progress, compress

__all__ = ["Progress", "compress"]
