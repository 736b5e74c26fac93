"""Tiny bases and artifacts of random codes, made with `deltacome.format` alone.

O out, I in, R directions, N entries of a direction.
"""

import json
from pathlib import Path

import torch

from deltacome.arch.checkpoint import Checkpoint, full_digest, sample_digest
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.codec import BandTensors, Factor, Packed, SignTensors
from deltacome.format.manifest import Manifest, Record
from deltacome.format.spec import Band
from deltacome.format.tensors import dtype_name
from deltacome.format.writer import ArtifactWriter, Unit

PLAN = (Band(16, 1), Band(8, 1), Band(4, 1), Band(3, 2), Band(2, 2), Band(1, 3))
"""Every width, in ten directions."""
TERMS = {
    "bands": ("bands",),
    "mixed": ("one+bands", "rows", "bands", "one", "rows+bands"),
}
"""The packed terms that an artifact's matrices get in turn: signs with one scale for the matrix ("one")
or one for each row ("rows"), bands, or both."""


def random_factor(bits, count, size, group_size, generator):
    if bits == 16:
        return Factor.from_values(torch.randn(count, size, generator=generator) / size**0.5)
    groups = -(-size // group_size)
    codes_RN = torch.randint(0, 2**bits, (count, size), generator=generator).to(torch.uint8)
    zero_RG = torch.randint(0, 2**bits, (count, groups), generator=generator).to(torch.uint8)
    scale_RG = torch.rand(count, groups, generator=generator) + 0.5
    scale_RG /= size**0.5 * 2**bits
    return Factor.from_codes(codes_RN, scale_RG.to(torch.float16), zero_RG, bits, group_size)


def random_bands(shape, plan=PLAN, group_size=32, seed=0, size=0.5):
    """Bands of random codes; `size` scales the singular values."""
    generator = torch.Generator().manual_seed(seed)
    bands = []
    for band in plan:
        v = random_factor(band.bits, band.count, shape[1], group_size, generator)
        u = random_factor(band.bits, band.count, shape[0], group_size, generator)
        bands.append(BandTensors(v, u, size * torch.rand(band.count, generator=generator)))
    return bands


def random_signs(shape, scales, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positive_OI = torch.rand(shape, generator=generator) < 0.5
    return SignTensors.from_signs(positive_OI, torch.randn(scales, generator=generator) / 20)


def random_packed(shape, terms, plan, group_size, seed):
    """Packed terms of a matrix, by their names in `TERMS`."""
    scales = 1 if "one" in terms else shape[0] if "rows" in terms else None
    return Packed(
        random_bands(shape, plan, group_size, seed) if "bands" in terms else (),
        random_signs(shape, scales, seed) if scales else None,
    )


def random_term(name, base, base_name, rows, group_size, generator, plan, terms):
    """A record and its entries: packed terms for a matrix, the tuned value for anything else."""
    tensor = base.read(base_name)
    shape = (rows, *tensor.shape[1:])
    entries = {}
    exact_rows, packed = None, Packed()
    if tensor.dim() == 2:
        covered = (min(rows, len(tensor)), tensor.shape[1])
        seed = int(torch.randint(0, 2**31, (), generator=generator))
        packed = random_packed(covered, terms, plan, group_size, seed)
        entries |= {f"{name}.{kind}": blob for kind, blob in packed.blobs().items()}
        if rows > len(tensor):
            exact_rows = (len(tensor), rows)
    else:
        exact_rows = (0, rows)
    if exact_rows:
        value = torch.randn(exact_rows[1] - exact_rows[0], *shape[1:], generator=generator)
        value = 1 + value / 8 if tensor.dim() == 1 else value / 2
        entries[f"{name}.exact"] = value.to(tensor.dtype)
    record = Record(
        name=name,
        shape=shape,
        dtype=dtype_name(tensor.dtype),
        base_name=base_name,
        base_shape=tuple(tensor.shape),
        base_sample=sample_digest(tensor),
        base_digest=full_digest(tensor),
        plan=plan if packed.bands else (),
        sign_scales=None if packed.signs is None else packed.signs.scale.numel(),
        exact_rows=exact_rows,
    )
    return record, entries


def write_artifact(output, records, entries, *, config=None, group_size=32, files=None):
    """An artifact on disk from records and their entries."""
    writer = ArtifactWriter(output, {}, resume=False)
    writer.save("all", Unit(tuple(records), entries))
    extra = dict(files or {})
    if config is not None:
        extra[TUNED_CONFIG_FILE] = json.dumps(config).encode()
    card = extra.pop("README.md", None)
    manifest = Manifest("a base", None, {"name": "random"}, {}, {}, group_size=group_size)
    writer.finish(["all"], manifest, extra, card and (lambda artifact: card))
    return Artifact.open(output)


def random_artifact(
    base_folder: Path,
    output: Path,
    *,
    vocab: int | None = None,
    tie: bool | None = None,
    same=(),
    seed: int = 0,
    group_size: int = 32,
    plan=PLAN,
    terms: str = "bands",
    files=None,
    **config,
) -> Artifact:
    """An artifact that changes every tensor of a base except those named in `same`.

    Args:
        vocab: rows of the tuned embedding and head, if not the base's.
        tie: whether the tuned model ties its head, if not as the base does.
        terms: which packed terms the matrices have, a key of `TERMS`.
        config: fields of the tuned configuration that differ from the base's.
    """
    base = Checkpoint(base_folder)
    generator = torch.Generator().manual_seed(seed)
    names = {name: name for name in base.tensors}
    if tie is True:
        names.pop("lm_head.weight", None)
    if tie is False:
        names.setdefault("lm_head.weight", "model.embed_tokens.weight")
    tuned_config = dict(base.config) | config
    if vocab is not None:
        tuned_config["vocab_size"] = vocab
    if tie is not None:
        tuned_config["tie_word_embeddings"] = tie
    records, entries = [], {}
    for number, (name, base_name) in enumerate(names.items()):
        rows = base.tensors[base_name].shape[0]
        if vocab is not None and ("embed_tokens" in name or "lm_head" in name):
            rows = vocab
        mine = TERMS[terms][number % len(TERMS[terms])]
        record, parts = random_term(name, base, base_name, rows, group_size, generator, plan, mine)
        if name in same:
            record = Record(*(getattr(record, f) for f in list(record.__dataclass_fields__)[:7]))
            parts = {}
        records.append(record)
        entries |= parts
    return write_artifact(
        output, records, entries, config=tuned_config, group_size=group_size, files=files
    )
