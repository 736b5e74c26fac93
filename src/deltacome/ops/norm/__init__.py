"""RMS norms whose weight is each row's own tenant's."""

from deltacome.ops.norm.api import norm

__all__ = ["norm"]
