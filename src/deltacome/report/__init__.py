"""An artifact to look at: one page without a network, and its figures as PNG.

It needs an extra (`pip install deltacome[report]`) and reads through `format` alone.
"""

from deltacome.report.page import write_report

__all__ = ["write_report"]
