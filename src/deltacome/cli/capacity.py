"""`deltacome capacity`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from deltacome.cli.options import Device, Json
from deltacome.cli.printing import quiet_libraries, say

NAMES = {"slot": "packed terms of a tenant", "beside": "tables and exact values of a tenant"}
"""Figures whose names in Python say too little."""
MOST_GIB = 2.0**30
"""More than any machine has; infinity and the like are no numbers of bytes."""


def capacity(
    base: Annotated[str, typer.Argument(help="Base checkpoint; config.json is enough.")],
    gpu_gib: Annotated[float, typer.Option(help="Memory of the device, GiB.")],
    delta: Annotated[
        list[str] | None, typer.Option(help="Artifact; may be repeated: the largest counts.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Ratio of an artifact yet to be made, instead of --delta.")
    ] = None,
    kv_gib: Annotated[
        float,
        typer.Option(help="KV cache, GiB. A server needs some: this, or --kv-tokens."),
    ] = 0,
    kv_tokens: Annotated[int, typer.Option(min=0, help="KV cache, tokens at 16 bits.")] = 0,
    utilization: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the memory to use.")
    ] = 0.9,
    check: Annotated[
        bool, typer.Option("--check", help="Actually allocate all of it, and measure.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say how many tenants fit beside BASE and a KV cache."""
    for option, gib in (("--gpu-gib", gpu_gib), ("--kv-gib", kv_gib)):
        if not 0 <= gib <= MOST_GIB:
            raise typer.BadParameter(f"expected a size in GiB, got {gib:g}", param_hint=option)
    quiet_libraries()
    from deltacome.device import pick_device
    from deltacome.runtime.capacity import allocate
    from deltacome.runtime.capacity import capacity as count

    found = count(
        base,
        delta or [],
        ratio=ratio,
        device_bytes=int(gpu_gib * 2**30),
        utilization=utilization,
        kv_bytes=int(kv_gib * 2**30),
        kv_tokens=kv_tokens,
    )
    result = dataclasses.asdict(found)
    if check:
        with allocate(found, pick_device(device)) as nbytes:
            result["allocated"] = nbytes
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        unit = "" if key in ("tenants", "whole_models") else " bytes"
        print(f"{NAMES.get(key, key.replace('_', ' '))}: {value:,}{unit}")
    if not found.kv_cache:
        say("warning: no KV cache (--kv-gib, --kv-tokens) was counted; a server needs one")
