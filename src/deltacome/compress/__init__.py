"""From two checkpoints to an artifact.

`from deltacome import compress` names both the function and this room: importing any module of it
makes Python bind the package's attribute to the module. So the module can be called, and either
order of imports gives something that compresses.
"""

import sys
from types import ModuleType
from typing import Any

from deltacome.compress.pipeline import Progress, compress

__all__ = ["Progress", "compress"]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
