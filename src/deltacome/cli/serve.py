"""`deltacome serve`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from deltacome.cli.options import Base, Json
from deltacome.cli.printing import say


def serve(
    context: typer.Context,
    base: Base,
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", help="NAME=ARTIFACT; may be repeated.")
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(help="Where tenants are looked up by name: a folder, s3://…, hf://…"),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tenants in one batch. Default: all known ones, at most 16; at least 4 "
            "with --tenants.",
        ),
    ] = None,
    slot_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes per slot. Default: the largest tenant's.")
    ] = None,
    lora: Annotated[bool, typer.Option(help="Serve ordinary LoRA adapters too.")] = False,
    port: Annotated[int, typer.Option(help="Port of the API server.")] = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Serve BASE and its tenants with vLLM; arguments after -- are passed to vLLM."""
    from deltacome.vllm.launch import plan_launch
    from deltacome.vllm.version import check_version

    if not dry_run:  # first: no use checking tenants for a server that would not start
        check_version()
    named = {}
    for text in tenant or []:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"expected NAME=ARTIFACT, got {text!r}", param_hint="--tenant")
        if name in named:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint="--tenant")
        named[name] = path
    launch = plan_launch(
        base,
        named,
        folder=tenants,
        slots=slots,
        slot_bytes=slot_bytes,
        lora=lora,
        port=port,
        more=context.args,
    )
    if as_json:  # includes the warnings
        print(json.dumps(dataclasses.asdict(launch)), flush=True)
    else:
        for line in launch.warnings:
            say(f"warning: {line}")
        if dry_run:
            print(launch)
    if not dry_run:
        launch.run()
