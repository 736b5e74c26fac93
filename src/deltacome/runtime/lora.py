"""Writes a delta as a PEFT LoRA adapter, for stacks that can load nothing else.

Bands are low-rank already: `U diag(s) Vᵀ` is `B A`, exact except that its factors are rounded to 16 bits,
which makes them several times larger. A smaller rank keeps the largest singular values of that product.
What LoRA has no place for (norms, biases, anything stored exactly) goes along as `modules_to_save` and
biases, which PEFT loads and vLLM refuses; it is left out only on request, and then listed.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltacome.arch.checkpoint import Checkpoint
from deltacome.device import pick_dtype
from deltacome.errors import ArtifactError, CheckpointError, PlanError, UnsupportedError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.format.codec import Packed
from deltacome.format.folder import new_folder
from deltacome.format.hub import fetch_folder
from deltacome.format.manifest import Record
from deltacome.runtime.merge import base_tensor
from deltacome.skeleton import is_causal, make_skeleton, parse_config, read_config, targets

PREFIX = "base_model.model."
"""What PEFT's wrappers put before a module's name."""


@dataclass
class Exported:
    """What an adapter holds and what it does not."""

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    """By module."""
    errors: dict[str, float] = field(default_factory=dict)
    """By module: `‖Δ − BA‖² / ‖Δ‖²`, Δ the artifact's delta, B and A as stored."""
    saved: list[str] = field(default_factory=list)
    """Modules saved whole, and biases."""
    left_out: list[str] = field(default_factory=list)
    """Tensors that the tuned model changes and the adapter does not."""
    nbytes: int = 0
    """Of the adapter's weights."""


def export_lora(
    artifact: Artifact | str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    lora_only: bool = False,
    base: str | Path | None = None,
    dtype: str | torch.dtype = torch.float16,
) -> Exported:
    """Writes an adapter folder that PEFT and, with `lora_only`, vLLM load over the base.

    Args:
        artifact: opened, or its folder or name on the Hub.
        output: a folder that does not exist yet.
        rank: keeps at most this many directions of a matrix, the best ones; None keeps all.
        lora_only: leaves out what LoRA cannot carry.
        base: the base, read only where a module is part changed and part not, and its configuration
            where the tuned head is tied; by default the one that the artifact names.
        dtype: dtype of the adapter's matrices, torch's or its name.

    Raises:
        ArtifactError: the artifact is damaged or carries no configuration.
        UnsupportedError: something that no adapter can hold: added rows, new tensors, experts; signs
            without a rank; nothing but what is stored exactly.
        PlanError: a rank below 1.
        OutputError: the output exists or cannot be written.
    """
    if rank is not None and rank < 1:
        raise PlanError(f"rank: expected at least 1, got {rank}")
    artifact = opened(artifact)
    artifact.verify_bytes()
    work = _Export(artifact, rank, lora_only, base, pick_dtype(dtype))
    work.check()
    with new_folder(Path(output)) as folder:
        for record in artifact.manifest.records.values():
            if record.packed:
                work.add_matrix(record)
            elif record.exact_rows:
                work.add_exact(record)
        work.said.path = Path(output)
        work.said.nbytes = sum(tensor.nbytes for tensor in work.tensors.values())
        save_file(work.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(work.config(), indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(work.said, artifact), encoding="utf-8")
    return work.said


class _Export:
    """What the steps of one export share."""

    def __init__(
        self,
        artifact: Artifact,
        rank: int | None,
        lora_only: bool,
        base: str | Path | None,
        dtype: torch.dtype,
    ) -> None:
        document = artifact.json_file(TUNED_CONFIG_FILE)
        if document is None:
            raise ArtifactError(f"{artifact.path}: expected {TUNED_CONFIG_FILE}, found none")
        self.artifact, self.rank, self.lora_only, self.dtype = artifact, rank, lora_only, dtype
        self.base = base or artifact.manifest.base_source
        self.model = make_skeleton(parse_config(document), torch.float32, artifact.path)
        self.where = targets(self.model, artifact.manifest.records)
        self.records = {self.where[n].parameter: r for n, r in artifact.manifest.records.items()}
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {}
        self.said = Exported(Path())
        self.biases = False

    def check(self) -> None:
        """Refuses what cannot be exported, before anything is written."""
        if not any(record.packed for record in self.records.values()):
            raise UnsupportedError(
                f"{self.artifact.path}: it has no matrix with bands or signs, and PEFT loads no adapter "
                "without one: export it with --to dense"
            )
        self._check_tie()
        for name, record in self.artifact.manifest.records.items():
            if record.kind == "same":
                continue
            stacked = self.where[name].expert is not None
            if stacked or record.grown or record.shape != record.base_shape:
                what = "an expert's matrix" if stacked else "added rows"
                raise UnsupportedError(
                    f"{name}: {'a new tensor' if record.base_shape is None else what}, which no LoRA "
                    "adapter holds: export it with --to dense"
                )
            if record.sign_scales and self.rank is None:
                raise UnsupportedError(
                    f"{name}: signs are of full rank: say how many directions to keep, with --rank"
                )

    def _check_tie(self) -> None:
        """Refuses a head that is the tuned embedding over a base that has a head of its own."""
        if not _is_tied(self.model):
            return
        try:
            folder = fetch_folder(self.base, None, CheckpointError, ("config.json",))
            base = make_skeleton(read_config(folder), torch.float32, folder)
        except CheckpointError as error:
            warnings.warn(
                "the tuned model ties its head to its embedding; could not check that the base does (say "
                f"where it is, with base): {error}",
                stacklevel=2,
            )
            return
        if not _is_tied(base):
            raise UnsupportedError(
                f"{self.base}: the tuned model ties its head to its embedding, the base does not, and no "
                "LoRA adapter can: export it with --to dense"
            )

    def add_matrix(self, record: Record) -> None:
        """Adds the factors of a matrix, for every module that uses it."""
        packed = self.artifact.packed(record.name)
        b_OR, a_RI = _factors(packed, self.rank)
        b_OR, a_RI = b_OR.to(self.dtype), a_RI.to(self.dtype)
        error = _error(packed, b_OR, a_RI)
        parameter = self.model.get_parameter(self.where[record.name].parameter)
        for path, module in self.modules.items():
            if getattr(module, "weight", None) is not parameter:
                continue
            self.said.ranks[path], self.said.errors[path] = len(a_RI), error
            if isinstance(module, nn.Embedding):
                self.tensors[f"{PREFIX}{path}.lora_embedding_A"] = b_OR.T.contiguous()
                self.tensors[f"{PREFIX}{path}.lora_embedding_B"] = a_RI.T.contiguous()
            else:
                self.tensors[f"{PREFIX}{path}.lora_A.weight"] = a_RI.clone()
                self.tensors[f"{PREFIX}{path}.lora_B.weight"] = b_OR.contiguous().clone()

    def add_exact(self, record: Record) -> None:
        """Adds a tensor that is stored exactly: a bias beside a LoRA, or its whole module."""
        path, _, attr = self.where[record.name].parameter.rpartition(".")
        module = self.modules.get(path)
        if self.lora_only or module is None or attr not in module._parameters:
            self.said.left_out.append(record.name)
            return
        weight = self.records.get(f"{path}.weight")
        if attr == "bias" and weight is not None and weight.packed:
            self.tensors[f"{PREFIX}{path}.base_layer.bias"] = self.artifact.exact(record.name)
            self.said.saved.append(f"{path}.bias")
            self.biases = True
            return
        if path in self.said.saved:
            return
        # PEFT would take the modules inside it from the base, without their LoRAs.
        if next(module.children(), None) is not None:
            raise UnsupportedError(
                f"{record.name}: {path or type(module).__name__} holds other modules, which PEFT saves "
                "whole or not at all: export it with --to dense, or leave it out with --lora-only"
            )
        self.said.saved.append(path)
        for other, parameter in module._parameters.items():
            if parameter is None:  # a linear without a bias
                continue
            tensor = self._tuned(self.records[f"{path}.{other}"])
            self.tensors[f"{PREFIX}{path}.{other}"] = tensor.contiguous().clone()

    def _tuned(self, record: Record) -> Tensor:
        if record.exact_rows:
            return self.artifact.exact(record.name)
        return base_tensor(Checkpoint(self.base), record)

    def config(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`."""
        ranks = self.said.ranks
        most = max(ranks.values(), default=1)
        others = {_literal(path): rank for path, rank in ranks.items() if rank != most}
        whole = [path for path in self.said.saved if path in self.modules]
        manifest = self.artifact.manifest
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if is_causal(self.model) else None,
            "base_model_name_or_path": manifest.base_name_or_path,
            "revision": manifest.base_revision,
            "r": most,
            "lora_alpha": most,  # a scale of 1
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(ranks),
            "modules_to_save": whole or None,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": any(record.transposed for record in manifest.records.values()),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def _literal(path: str) -> str:
    """A module's name escaped, as PEFT takes its patterns for regular expressions."""
    return path.replace(".", r"\.")


def _factors(packed: Packed, rank: int | None) -> tuple[Tensor, Tensor]:
    """b_OR, a_RI in float32 whose product is the delta, or its best approximation of that rank."""
    if packed.signs is not None:
        assert rank is not None
        return _balanced(*_best(packed.dense(), rank))
    b_OR = torch.cat([band.u.dequantize() for band in packed.bands]).T
    a_RI = torch.cat([band.s[:, None] * band.v.dequantize() for band in packed.bands])
    if rank is not None and rank < len(a_RI):
        # Quantised factors are not orthogonal: an SVD between the small triangles of their QRs.
        q_OR, left = torch.linalg.qr(b_OR.double())
        q_IR, right = torch.linalg.qr(a_RI.T.double())
        u, s, vt = torch.linalg.svd(left @ right.T)
        b_OR = (q_OR @ u[:, :rank]).float()
        a_RI = (s[:rank, None] * vt[:rank] @ q_IR.T).float()
    return _balanced(b_OR, a_RI)


def _best(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """b_OR, a_RI: the largest singular directions, by the eigenvectors of the smaller gram."""
    delta = delta_OI if delta_OI.shape[0] <= delta_OI.shape[1] else delta_OI.T
    _, vectors = torch.linalg.eigh(delta.double() @ delta.double().T)
    vectors = vectors[:, -rank:].flip(1).float()
    rest = vectors.T @ delta
    return (vectors, rest) if delta is delta_OI else (rest.T, vectors.T)


def _balanced(b_OR: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Scales both factors to equal size in each direction, so that 16 bits hold either."""
    sizes_b, sizes_a = b_OR.square().mean(0).sqrt(), a_RI.square().mean(1).sqrt()
    scale = (sizes_a / sizes_b.clamp(min=1e-30)).sqrt().clamp(min=1e-15)
    return b_OR * scale, a_RI / scale[:, None]


def _error(packed: Packed, b_OR: Tensor, a_RI: Tensor) -> float:
    if packed.signs is not None:
        delta = packed.dense()
        size = float(delta.square().sum())
        error = float((delta - b_OR.float() @ a_RI.float()).square().sum())
    else:
        u = torch.cat([band.u.dequantize() for band in packed.bands]).T.double()
        v = torch.cat([band.s[:, None] * band.v.dequantize() for band in packed.bands]).double()
        # ‖UV − BA‖² from grams of the factors side by side: a vocabulary's delta is never made dense.
        left, right = torch.cat([u, -b_OR.double()], 1), torch.cat([v, a_RI.double()])
        size = float(((u.T @ u) * (v @ v.T)).sum())
        error = float(((left.T @ left) * (right @ right.T)).sum())
    return max(0.0, error) / size if size else 0.0


def _card(said: Exported, artifact: Artifact) -> str:
    mean = math.fsum(said.errors.values()) / max(1, len(said.errors))
    lines = [
        "---",
        "library_name: peft",
        "---",
        "",
        "# LoRA made from a delta of a full fine-tune",
        "",
        f"Base: `{artifact.manifest.base_name_or_path}`. Delta: {artifact.bytes_on_disk():,} bytes; this "
        f"adapter: {said.nbytes:,} bytes.",
        "",
        f"Ranks up to {max(said.ranks.values(), default=0)}; relative squared error of a matrix against "
        f"the delta: {mean:.3g} on average, {max(said.errors.values(), default=0.0):.3g} at most.",
        "",
        f"Saved whole: {', '.join(said.saved) or 'nothing'}.",
        "",
        f"Left out: {', '.join(said.left_out) or 'nothing'}.",
        "",
    ]
    return "\n".join(lines)
