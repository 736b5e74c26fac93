"""What the API server does with tenants: loading them by name, refusing them clearly, unloading."""

from __future__ import annotations


def install() -> None:
    """Hooks the API server's registry of models."""
