"""RMS norms with the weight of each row's own tenant."""

from deltacome.ops.norm.api import norm

__all__ = ["norm"]
