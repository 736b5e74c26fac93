"""What a finished artifact's model says to a few tokens, for comparison by those who load it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from deltacome.compression.capture import Stream, drop_weights
from deltacome.compression.run import Progress, Run, load_block, restored
from deltacome.errors import UnsupportedError
from deltacome.format.canary import Canary, canary_ids
from deltacome.format.writer import ArtifactWriter
from deltacome.rows import Row
from deltacome.skeleton import is_causal


def make_canary(run: Run, writer: ArtifactWriter, names: list[str]) -> Canary | None:
    """Records what the finished artifact's model says to a few tokens, reading every block once more.

    The pass that compresses cannot do this, as it begins with the tuned embedding. Returns None, with a
    warning, for a model that cannot be run block by block.
    """
    layout, outside = run.layout, {}
    for unit in (writer.load(name) for name in names[len(run.layout.blocks) :]):
        outside |= {record.name: (record, unit.entries) for record in unit.records}

    def read(parameter: str) -> Tensor:
        if (stored := run.names.get(parameter)) not in outside:
            raise UnsupportedError(
                f"{parameter}: no single tensor of the checkpoint holds all of it"
            )
        record, entries = outside[stored]
        value = restored(run, record, entries)
        if stored not in run.plans or record.exact_rows is None:
            return value  # all of it: the tuned tensor where nothing is packed, or no row was added
        rest = run.tuned.read(record.name)[record.exact_rows[0] :]
        return torch.cat([value, rest.to(value.dtype)])

    try:
        if not is_causal(run.model) or layout.embedding is None or layout.head is None:
            raise UnsupportedError(f"{type(run.model).__name__} is not a causal language model")
        embedding = run.records[run.names[layout.embedding]]
        ids = canary_ids(min(embedding.shape[0], (embedding.base_shape or embedding.shape)[0]))
        stream = Stream(*(run.model, layout, read, [Row(ids)]), device=run.device, dtype=run.dtype)
        for number, (block, name) in enumerate(zip(layout.blocks, names, strict=False)):
            load_block(run, block, writer.load(name))
            stream.advance(block)
            drop_weights(layout.blocks[block])
            run.report(Progress("canary", number + 1, len(layout.blocks), block))
        head = layout.embedding if run.tied else layout.head
        with stream.outside_weights(head), torch.no_grad():
            logits_LV = stream.answer(stream.batches[0])[0]
    except UnsupportedError as error:
        warnings.warn(f"the artifact carries no canary: {error}", stacklevel=2)
        return None
    said_LV = logits_LV.float().log_softmax(-1)
    return Canary(tuple(ids), tuple(float(said_LV[i, id]) for i, id in enumerate(ids[1:])))
