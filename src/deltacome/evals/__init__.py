"""How close a compressed fine-tune stays to the dense one: exact match and KL divergence.

`run.evaluate` makes the table, `report.table` shows it. Everything is measured on what
`deltacome.runtime` runs, so nothing here knows how a delta was made.
"""
