"""From two checkpoints to an artifact."""

from deltacome.compression.pipeline import compress
from deltacome.compression.run import Progress

__all__ = ["Progress", "compress"]
