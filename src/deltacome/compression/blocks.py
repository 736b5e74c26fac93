"""Compresses block after block, then embedding and head.

Within a decoder block, linears are compressed in the order of their calls, those that share an input
together. Each group sees the inputs that the model *compressed so far* gives it, earlier groups of the
same block included (GPTQ's true-sequential order, and section 3.3 of Delta-CoMe, arXiv 2406.08903).
Hidden states advance once per block.

Embedding and head come last, when the inputs of the head are known; until then hidden states start
from the tuned embedding. A tied embedding is one matrix with two uses: it is compressed for its use
as head, against the grams of the last hidden states. An untied input embedding is compressed as if
its inputs were white, as one-hot rows of equal frequency are.

Each block is a unit of the writer: resuming replays finished blocks from their stored bytes, so the
hidden states, and with them every later byte, are those of an uninterrupted run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from deltacome.arch.layout import Layout
from deltacome.compression.capture import Stream, drop_weights
from deltacome.compression.run import (
    Progress,
    Run,
    delta_of,
    load_block,
    measured_weights,
    restored,
    stored_delta,
    stream_of,
)
from deltacome.compression.workers import side_by_side
from deltacome.errors import naming
from deltacome.format.manifest import Record
from deltacome.format.writer import ArtifactWriter, Unit
from deltacome.methods.adaptive import Adaptive
from deltacome.numerics.gram import relative_error
from deltacome.rows import Row
from deltacome.skeleton import set_part


def compress_units(run: Run, writer: ArtifactWriter, rows: list[Row] | None) -> list[str]:
    """Compresses every tensor into exactly one unit; returns the units in the order of their bytes."""
    stream = None if rows is None else stream_of(run, rows)
    tensors = _units(run)
    outside = tensors.pop("")
    blocks = list(tensors)
    total = len(blocks) + 1
    names = []
    for number, (block, inside) in enumerate(tensors.items()):
        name = f"unit-{number:05}"
        streamed = stream if block in run.layout.blocks else None
        if writer.has(name):
            unit = writer.load(name)
            if streamed is not None:
                load_block(run, block, unit)
        else:
            unit = _compress_block(run, block, inside, streamed)  # and its weights stay loaded
            writer.save(name, unit)
        if streamed is not None:
            streamed.advance(block)
            drop_weights(run.layout.blocks[block])
        names.append(name)
        _note(run, unit, Progress("blocks", number + 1, total, block))
        del unit  # not held while the next is made
    name = f"unit-{len(blocks):05}"
    if writer.has(name):
        unit = writer.load(name)
    else:
        unit = _compress_outside(run, outside, stream)
        writer.save(name, unit)
    _note(run, unit, Progress("blocks", total, total, "embedding and head"))
    return [*names, name]


def compress_side_by_side(run: Run, writer: ArtifactWriter, workers: int) -> None:
    """Makes all units and leaves them on disk, for `compress_units` to find there."""
    units = {f"unit-{number:05}": names for number, names in enumerate(_units(run).values())}
    todo = {name: names for name, names in units.items() if not writer.has(name)}
    # Processes get no model: without inputs nothing in its modules matters.
    nothing = Layout({}, {}, None, None, frozenset(), frozenset())
    bare = replace(run, model=torch.nn.Module(), layout=nothing, report=_say_nothing)
    done = len(units) - len(todo)

    def on_unit(name: str) -> None:
        nonlocal done
        done += 1
        run.report(Progress("blocks", done, len(units), name))

    side_by_side(partial(_make_unit, bare), todo, writer.partial, workers, run.device, on_unit)


def _make_unit(run: Run, names: list[str], device: str) -> Unit:
    return _compress_block(replace(run, device=device), "", names, None)


def _say_nothing(progress: Progress) -> None:
    pass


def _units(run: Run) -> dict[str, list[str]]:
    """Names of tensors by block, in the order of their bytes; what is outside the blocks comes last."""
    blocks = [*run.layout.blocks, *run.layout.side_blocks]
    names: dict[str, list[str]] = {block: [] for block in blocks} | {"": []}
    for name, target in run.where.items():
        inside = (block for block in blocks if target.parameter.startswith(f"{block}."))
        names[next(inside, "")].append(name)
    return names


def _compress_block(run: Run, block: str, names: list[str], stream: Stream | None) -> Unit:
    """Compresses one block, group after group, each against the inputs that reach it.

    Without a stream, and for experts, whose inputs depend on the router, inputs are taken as white.
    """
    records, entries = {name: run.records[name] for name in names}, {}
    groups: list[tuple[str | None, list[str]]] = []
    if stream is not None:
        load_block(run, block, Unit(tuple(records.values()), {}))
        for linears in stream.groups(block):
            members = [run.names[f"{linear}.weight"] for linear in linears]
            groups.append((linears[0], [name for name in members if name in run.plans]))
    grouped = {name for _, members in groups for name in members}
    groups += [(None, [name]) for name in names if name in run.plans and name not in grouped]
    for linear, members in groups:
        if not members:
            continue
        gram = None if stream is None or linear is None else stream.gram(block, linear)
        with naming(members):
            finished, packed = _compress_group(run, members, gram)
        for record in finished:
            records[record.name] = record
            if stream is not None:
                value = restored(run, record, packed).to(run.device, run.dtype)
                set_part(run.model, run.where[record.name], value)
        entries |= packed
    for name in names:
        entries |= _exact_entry(run, name)
    return Unit(tuple(records.values()), entries)


def _compress_outside(run: Run, names: list[str], stream: Stream | None) -> Unit:
    """Compresses embedding, head, and whatever else lies outside the blocks."""
    records, entries = {name: run.records[name] for name in names}, {}
    # Some models store a head even though their configuration ties it.
    heads = {run.names.get(str(run.layout.head))}
    if run.tied:
        heads.add(run.names.get(str(run.layout.embedding)))
    for name in names:
        if name in run.plans:
            gram = stream.head_gram() if name in heads and stream is not None else None
            with naming([name]):
                (records[name],), packed = _compress_group(run, [name], gram)
            entries |= packed
        entries |= _exact_entry(run, name)
    return Unit(tuple(records.values()), entries)


def _compress_group(
    run: Run, names: list[str], gram: Tensor | None
) -> tuple[list[Record], dict[str, Tensor]]:
    """Compresses matrices that share an input; their errors are measured on the stored bytes."""
    deltas = {name: delta_of(run, name) for name in names}
    plans = {name: run.plans[name] for name in names}
    records, entries = [], {}
    if isinstance(run.method, Adaptive) and (weights := measured_weights(run, names[0])):
        (name,) = names
        gram, outputs = weights
        found = {name: run.method.pack(deltas[name], plans[name], gram, outputs)}
    else:
        found = run.method.compress(deltas, plans, gram)
    for name, packed in found.items():
        terms = {"plan": plans[name].bands, "sign_scales": plans[name].sign_scales}
        record = replace(run.records[name], **terms)
        blobs = {f"{name}.{kind}": blob for kind, blob in packed.blobs().items()}
        delta_hat = stored_delta(record, blobs).to(run.device)
        records.append(replace(record, error=relative_error(deltas[name], delta_hat, gram)))
        entries |= blobs
    return records, entries


def _exact_entry(run: Run, name: str) -> dict[str, Tensor]:
    record = run.records[name]
    if record.exact_rows is None:
        return {}
    value = run.tuned.read(name)
    if record.shape:
        value = value[record.exact_rows[0] : record.exact_rows[1]].contiguous()
    return {f"{name}.exact": value}


def _note(run: Run, unit: Unit, progress: Progress) -> None:
    run.errors += [record.error for record in unit.records if record.error is not None]
    mean = sum(run.errors) / len(run.errors) if run.errors else None
    run.report(progress._replace(error=mean))
