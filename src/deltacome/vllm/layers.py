"""What a tenant changes in a layer of vLLM's model.

Linears, embedding and head get their deltas where their `quant_method` computes: before the
collectives of tensor parallelism, and over a quantised base as well. The object that a layer already has
there is given a subclass of its own class, so that any check of its type still gets the expected answer.
(A subclass of two classes would not do: their layouts differ, and Python refuses the assignment.)

A norm gets another `forward`, which normalises the rows of tenants again with their own weights.

Without tenants in the batch nothing is added. Compiled code must not depend on that: it always runs the
ops, which look at the batch themselves. A graph contains what they launched when it was captured: nothing
in the engine's graphs for batches without adapters, everything in the others, whose batches may lack
tenants (`Step.idle`).

Legend: T tokens, I in, O out, H size, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.ops.bands import band_rows, bands
from deltacome.ops.norm import norm
from deltacome.ops.rows import Rows
from deltacome.ops.signs import sign_rows, signs
from deltacome.ops.slots import BandTable, Pool, SignTable
from deltacome.vllm import compat
from deltacome.vllm.biases import add_biases
from deltacome.vllm.places import Place
from deltacome.vllm.settings import Settings
from deltacome.vllm.step import Step
from deltacome.vllm.tenant import Tenant


@dataclass
class Delta:
    """What the tenants of all slots change in one linear, embedding or head."""

    step: Step
    bands: BandTable
    signs: SignTable | None
    bias_SO: Tensor | None
    """float32 (S + 1, O), tuned minus base; the last row, which slot −1 indexes, is zero."""
    head: bool
    impl: str
    before: int = 0
    """Number of rows of a vocabulary that the terms have before the module's own (`Part.before`)."""

    def add(self, y: Tensor, x: Tensor, *, biased: bool) -> None:
        """Adds each row's own delta to a linear's output, in place.

        Args:
            biased: whether the layer added its bias; of the workers that share a row-parallel layer only
                one does.
        """
        size = sum(self.bands.outs)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])[:, :size]
        rows = self.step.sampled(x_TI) if self.head else self.step.tokens(x_TI.shape[0])
        if self.before or size > y_TO.shape[1]:
            wide_TO = y_TO.new_zeros(len(y_TO), size, dtype=torch.float32)
            self._add_terms(wide_TO, x_TI, rows)
            mine_TO = wide_TO[:, self.before :][:, : y_TO.shape[1]]
            y_TO[:, : mine_TO.shape[1]] += mine_TO
        else:
            self._add_terms(y_TO, x_TI, rows)
        if self.bias_SO is not None and biased:
            add_biases(y_TO, rows.slot_T, self.bias_SO)

    def _add_terms(self, y_TO: Tensor, x_TI: Tensor, rows: Rows) -> None:
        bands(y_TO, x_TI, rows, self.bands, impl=self.impl)
        if self.signs is not None:
            signs(y_TO, x_TI, rows, self.signs, impl=self.impl)

    def add_rows(self, y: Tensor, ids: Tensor) -> None:
        """Adds each row's own delta to an embedding's output, in place."""
        y_TI, ids_T = y.view(-1, y.shape[-1]), ids.reshape(-1)
        if self.before:
            ids_T = ids_T + self.before
        rows = self.step.tokens(ids_T.shape[0])
        band_rows(y_TI, ids_T, rows, self.bands, impl=self.impl)
        if self.signs is not None:
            sign_rows(y_TI, ids_T, rows, self.signs)

    def load(self, slot: int, tenant: Tenant, place: Place) -> None:
        """Gives a cleared slot to a tenant whose bytes are in the pool."""
        if place.name in tenant.bands:
            self.bands.fields_SPBF[slot].copy_(tenant.fields[place.name])
        if self.signs is not None and place.name in tenant.signs:
            self.signs.load(slot, tenant.signs[place.name])
        if self.bias_SO is not None:
            change = tenant.biases.get(place.name)
            self.bias_SO[slot] = 0 if change is None else change.to(self.bias_SO.device)

    def clear(self, slot: int) -> None:
        """Makes a slot nobody's."""
        self.bands.clear(slot)
        if self.signs is not None:
            self.signs.clear(slot)
        if self.bias_SO is not None:
            self.bias_SO[slot] = 0


@dataclass
class NormDelta:
    """The norm weights of the tenants of all slots."""

    step: Step
    base_H: Tensor
    """float32, the weight that the base's norm multiplies by."""
    weights_SH: Tensor
    eps: float
    impl: str

    def write(self, y: Tensor, x: Tensor) -> None:
        """Writes the outputs of the rows that have a slot. Rows are (T, H) or (T, heads, H)."""
        rows = self.step.tokens(x.shape[0])
        norm(y, x, rows, self.weights_SH, self.eps, impl=self.impl)

    def load(self, slot: int, tenant: Tenant, place: Place) -> None:
        """Takes a tenant's weight, or the base's where the two are the same."""
        self.weights_SH[slot].copy_(tenant.norms.get(place.name, self.base_H))

    def clear(self, slot: int) -> None:
        """Makes a slot nobody's: it has the base's weight."""
        self.weights_SH[slot].copy_(self.base_H)


def install(
    place: Place, pool: Pool, step: Step, impl: str, settings: Settings
) -> Delta | NormDelta | None:
    """Hooks one module; returns None for a norm of a kind that no tenant may change."""
    if place.kind == "norm":
        return _install_norm(place, len(pool.blobs_SN), step, impl)
    (columns,) = {part.columns for part in place.parts}
    in_size, outs = columns[1] - columns[0], [part.size for part in place.parts]
    table = BandTable(
        *(pool, in_size, outs),
        max_rank=settings.max_rank,
        max_bands=settings.max_bands,
        group_size=place.group(settings.group_size),
    )
    module: Any = place.module
    bias_SO = None
    if place.kind == "linear" and getattr(module, "bias", None) is not None:
        shape = (len(pool.blobs_SN) + 1, sum(outs))
        bias_SO = torch.zeros(shape, device=pool.blobs_SN.device)
    sign_table = SignTable(pool, in_size, outs) if settings.signs else None
    before = place.parts[0].before
    delta = Delta(step, table, sign_table, bias_SO, place.kind != "linear", impl, before)
    module.quant_method.__class__ = _with_delta(type(module.quant_method))
    module._delta = delta
    if hasattr(module, "use_fused_embedding"):
        module.use_fused_embedding = False  # it looks rows up without calling the quant_method
    return delta


def _with_delta(kind: type) -> type:
    """A subclass of a quant_method's class that adds the layer's delta."""

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = kind.apply(self, layer, x, bias)  # pyright: ignore[reportAttributeAccessIssue]
        delta = layer._delta
        if not delta.step.skipped:
            delta.add(y, x, biased=bias is not None)
        return y

    def embedding(self: Any, layer: Any, input_: Tensor) -> Tensor:
        y = kind.embedding(self, layer, input_)  # pyright: ignore[reportAttributeAccessIssue]
        delta = layer._delta
        if not delta.step.skipped:
            delta.add_rows(y, input_)
        return y

    body: dict[str, Any] = {"apply": apply}
    if hasattr(kind, "embedding"):
        body["embedding"] = embedding
    return type(kind.__name__, (kind,), body)


def _install_norm(place: Place, slots: int, step: Step, impl: str) -> NormDelta | None:
    module: Any = place.module
    if isinstance(module, compat.LayerNorm) or getattr(module, "variance_size_override", None):
        return None
    weight_H = module.weight.detach().float()
    if isinstance(module, compat.GemmaRMSNorm):
        weight_H = weight_H + 1
    weights_SH = weight_H.repeat(slots, 1)
    delta = NormDelta(step, weight_H, weights_SH, module.variance_epsilon, impl)
    module.forward = _norm_forward(module.forward, delta)
    return delta


def _norm_forward(base: Callable[..., Any], delta: NormDelta) -> Callable[..., Any]:
    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if delta.step.skipped:
            return base(x) if residual is None else base(x, residual)
        if residual is None:
            # The engine's norm may overwrite its input.
            y = base(x.clone())
            delta.write(y, x)
            return y
        y, total = base(x, residual)
        delta.write(y, total)
        return y, total

    return forward
