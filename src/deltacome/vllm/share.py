"""How large a part of an artifact one of several workers may have to hold.

Pipeline parallelism gives a worker some of the layers. Under tensor parallelism it has some rows or some
columns of a matrix, and so a part of U or of V; the other factor is whole. Which of the two it is comes
from transformers' plan for the family, `base_model_tp_plan`; what the plan does not name counts as whole.
A tenant is refused if its slot is too small, so every doubt makes the slot larger.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from deltacome.format.artifact import Artifact
from deltacome.format.manifest import Record
from deltacome.format.spec import BLOCK, bands_nbytes, signs_nbytes
from deltacome.runtime.capacity import slot_nbytes

LAYER = re.compile(r"(.*?)\.\d+\.")
"""Matches the name of a layer; its group is the name of the stack of layers."""


def worker_nbytes(artifact: Artifact, config: Any, tensor: int, pipeline: int) -> int:
    """The most bytes of packed terms that one worker has.

    Args:
        artifact: of a tenant.
        config: transformers' configuration of the base.
        tensor: number of workers that share each layer.
        pipeline: number of stages. Layers count as shared out evenly; if the environment says how
            (VLLM_PP_LAYER_PARTITION), all of them count.
    """
    if tensor == pipeline == 1:
        return slot_nbytes(artifact)
    group = artifact.manifest.group_size
    beside, stacks = 0, defaultdict[str, defaultdict[str, int]](lambda: defaultdict(int))
    for record in artifact.manifest.records.values():
        nbytes = _nbytes(record, group, config, tensor)
        if layer := LAYER.match(record.name):
            stacks[layer[1]][layer[0]] += nbytes
        else:
            beside += nbytes
    stages = 1 if os.environ.get("VLLM_PP_LAYER_PARTITION") else pipeline
    for layers in stacks.values():
        most = math.ceil(len(layers) / stages)
        beside += sum(sorted(layers.values(), reverse=True)[:most])
    return beside


def _nbytes(record: Record, group: int, config: Any, tensor: int) -> int:
    if not record.packed:
        return 0
    rows, columns = record.bands_shape
    if tensor > 1:
        group = min(group, BLOCK)  # a cut within a group makes smaller groups, of a block at least
        text = config.get_text_config()
        way = _way(record, text)
        if way == "colwise":  # columns of the transpose: rows, at least a head's
            padded = math.ceil(rows / BLOCK) * BLOCK  # as vocabularies are
            mine = max(math.ceil(padded / tensor), _head_size(text))
            if record.shape[0] == text.vocab_size and mine % BLOCK:
                mine += 2 * BLOCK  # with rows around them, to whole blocks
            rows = min(rows, mine)
        elif way == "rowwise":
            columns = math.ceil(columns / tensor)
    scales = record.sign_scales and min(record.sign_scales, rows)
    return bands_nbytes((rows, columns), record.plan, group) + signs_nbytes((rows, columns), scales)


def _way(record: Record, text: Any) -> str | None:
    """How a matrix is shared out, in transformers' words."""
    if record.shape[0] == text.vocab_size:
        return "colwise"
    name = re.sub(r"\.\d+\.", ".*.", record.name.removesuffix(".weight"))
    plan: Mapping[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    return next((way for key, way in plan.items() if f".{name}".endswith(f".{key}")), None)


def _head_size(text: Any) -> int:
    """Entries of the largest attention head."""
    sizes = [v for k, v in text.to_dict().items() if k.endswith("head_dim") and isinstance(v, int)]
    heads = getattr(text, "num_attention_heads", None) or 1
    return max([text.hidden_size // heads, *sizes])
