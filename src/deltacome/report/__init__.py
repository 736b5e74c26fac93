"""A report on an artifact: one page that needs no network, and its figures as PNG.

It needs an extra (`pip install deltacome[report]`) and reads artifacts through `format` alone.
"""

from deltacome.report.page import write_report

__all__ = ["write_report"]
