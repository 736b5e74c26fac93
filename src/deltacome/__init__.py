"""Store and serve many full fine-tunes of one LLM for little more than the price of one.

The names below are loaded when they are first used, so that importing the package costs nothing and
a serving process never loads what compression needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltacome.compression import compress
    from deltacome.compression.run import Progress
    from deltacome.errors import DeltaError
    from deltacome.format.artifact import Artifact
    from deltacome.methods.adaptive import Adaptive
    from deltacome.methods.bitdelta import BitDelta
    from deltacome.methods.delta_come import DeltaCome
    from deltacome.methods.low_rank import LowRank
    from deltacome.methods.method import Method
    from deltacome.methods.prinmix import PrinMix
    from deltacome.methods.residual import Residual
    from deltacome.runtime import Attachment, attach, base_for, export_lora, merge, verify

_HOMES = {
    "Adaptive": "deltacome.methods.adaptive",
    "Artifact": "deltacome.format.artifact",
    "Attachment": "deltacome.runtime",
    "BitDelta": "deltacome.methods.bitdelta",
    "DeltaCome": "deltacome.methods.delta_come",
    "DeltaError": "deltacome.errors",
    "LowRank": "deltacome.methods.low_rank",
    "Method": "deltacome.methods.method",
    "PrinMix": "deltacome.methods.prinmix",
    "Progress": "deltacome.compression.run",
    "Residual": "deltacome.methods.residual",
    "attach": "deltacome.runtime",
    "base_for": "deltacome.runtime",
    "compress": "deltacome.compression",
    "export_lora": "deltacome.runtime",
    "merge": "deltacome.runtime",
    "verify": "deltacome.runtime",
}

__all__ = [
    "Adaptive",
    "Artifact",
    "Attachment",
    "BitDelta",
    "DeltaCome",
    "DeltaError",
    "LowRank",
    "Method",
    "PrinMix",
    "Progress",
    "Residual",
    "attach",
    "base_for",
    "compress",
    "export_lora",
    "merge",
    "verify",
]


try:
    __version__ = importlib.metadata.version("deltacome")
except importlib.metadata.PackageNotFoundError:  # sources on a path, not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltacome' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
