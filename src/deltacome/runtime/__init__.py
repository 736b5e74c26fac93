"""Running a delta in transformers: attached to its base, or merged back into a dense checkpoint."""

from deltacome.runtime.attach import Attachment, attach
from deltacome.runtime.build import base_for
from deltacome.runtime.lora import Exported, export_lora
from deltacome.runtime.merge import merge
from deltacome.runtime.verify import Verified, verify

__all__ = [
    "Attachment",
    "Exported",
    "Verified",
    "attach",
    "base_for",
    "export_lora",
    "merge",
    "verify",
]
