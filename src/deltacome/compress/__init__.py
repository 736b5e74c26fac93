"""From two checkpoints to an artifact."""

from deltacome.compress.pipeline import Progress, compress

__all__ = ["Progress", "compress"]
