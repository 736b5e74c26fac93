"""`deltacome inspect`."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from deltacome.cli.options import Delta, Json
from deltacome.cli.printing import show, summary


def inspect(artifact: Delta, as_json: Json = False) -> None:
    """Show what an artifact holds, tensor by tensor."""
    from deltacome.format.artifact import Artifact
    from deltacome.format.clip import clip

    result = Artifact.from_pretrained(artifact).describe()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("tensor", "shape", "kind", "plan", "bytes", "error", box=None, pad_edge=False)
    for column in table.columns[4:]:
        column.justify = "right"
    for tensor in result["tensors"]:
        plan = ",".join(f"{bits}:{count}" for bits, count in tensor["plan"])
        error = "" if tensor["error"] is None else f"{tensor['error']:.4g}"
        shape = "×".join(map(str, tensor["shape"]))
        name = Text(clip(tensor["name"], 200))  # never read as markup, whatever it holds
        table.add_row(name, shape, tensor["kind"], plan, f"{tensor['bytes']:,}", error)
    show(table, 160)
    print(summary(result))
