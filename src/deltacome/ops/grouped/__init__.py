"""What the bands terms of several tenants add to one linear layer's output, in one call."""

from deltacome.ops.grouped.api import grouped_bands
from deltacome.ops.grouped.pool import SlotPool
from deltacome.ops.grouped.rows import Rows, group_rows

__all__ = ["Rows", "SlotPool", "group_rows", "grouped_bands"]
