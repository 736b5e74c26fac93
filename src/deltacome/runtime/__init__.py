"""Running a delta in transformers: attached to its base, or merged back into a dense checkpoint."""

from deltacome.runtime.attach import Attachment, attach
from deltacome.runtime.build import base_for
from deltacome.runtime.merge import merge
from deltacome.runtime.verify import Verified, verify

__all__ = ["Attachment", "Verified", "attach", "base_for", "merge", "verify"]
