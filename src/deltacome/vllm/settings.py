"""The plugin's settings: the key `deltacome` of vLLM's `--additional-config`.

    vllm serve BASE --enable-lora --additional-config '{"deltacome": {"slot_bytes": 20000000}}'

Each setting has a default. That of `slot_bytes` fits artifacts of a sixteenth of the base's bytes;
`deltacome serve` sets it from the artifacts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deltacome.errors import UnsupportedError
from deltacome.format.spec import GROUP


@dataclass(frozen=True)
class Settings:
    """Settings of one engine."""

    slot_bytes: int | None = None
    """Bytes of packed terms that a resident tenant can have on each worker; None: 1.2 times a
    worker's part of 1/16 of the base."""
    max_rank: int | None = None
    """Directions that a tenant can have in a layer; None: as many as the layer allows."""
    max_bands: int = 6
    """Bands that a matrix of a tenant can have."""
    group_size: int = GROUP
    """Entries of a direction that share a scale, the same for all tenants."""
    signs: bool = False
    """Whether tenants with dense 1-bit terms are served, which takes a second op in each layer."""
    lora: bool = True
    """Whether ordinary LoRA adapters are served too, which reserves vLLM's own buffers for them."""
    base: str | None = None
    """The checkpoint that deltas were taken against, if it is not the model that is served (a quantised
    base, say)."""
    base_tokenizer: bool = False
    """Whether tenants with another tokenizer are served, with the base's; otherwise they are refused."""
    templates: bool = True
    """Whether a tenant's chats are written with its own chat template; otherwise with the base's. A
    template is a program, which the API server runs."""
    canary: float | None = 0.25
    """How far, in nats (root mean square), the logprobs of an artifact's canary may be from those
    recorded when it was made; None: no canary is checked. A quantised base needs more."""
    impl: str | None = None
    """Implementation of the ops; None: the fastest that runs here."""
    tenants: str | None = None
    """Where tenants that nobody has loaded are looked for by name: a folder of artifacts, or an address
    that fsspec understands."""

    @classmethod
    def parse(cls, additional_config: Any) -> Settings:
        """Reads vLLM's additional configuration.

        Raises:
            UnsupportedError: a key that does not exist, or a value of another type.
        """
        values = (additional_config or {}).get("deltacome", {})
        if not isinstance(values, dict):
            raise UnsupportedError(
                f"additional_config: deltacome: expected an object, got {values!r}"
            )
        known = {field.name: str(field.type) for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise UnsupportedError(
                    f"additional_config: deltacome: expected keys of {sorted(known)}, got {key!r}"
                )
            kinds = {kind.strip() for kind in known[key].split("|")}
            kinds |= {"int"} if "float" in kinds else set()  # JSON has 1 for 1.0
            if type(value).__name__.replace("NoneType", "None") not in kinds:
                raise UnsupportedError(
                    f"additional_config: deltacome: {key}: expected {known[key]}, got {value!r}"
                )
        return cls(**values)
