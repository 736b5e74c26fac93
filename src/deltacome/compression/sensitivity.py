"""What an error in each matrix costs: a sweep through the tuned model and back.

`measure` runs it and keeps what a method needs later beside the run's units.

Forward once, block by block, keeping what each block was given; then backward, block by block from the
head, each run again to differentiate it. So one block's weights are held at a time here too, and hidden
states of all calibration tokens at all blocks. What is differentiated is the log-probability of tokens
drawn from the model's own answers: the mean of `g gᵀ` over them is its Fisher information, and takes no
labels (Kunstner et al. 2019, arXiv 1905.12558, on why not those of the data).

A tied embedding counts for both of its uses: as the head at each row by how uncertain the model is of
its token, as the embedding at each row by how often its token comes.

Legend: T tokens, I in, O out, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltacome.arch.layout import linears_of
from deltacome.compression.capture import Stream, drop_weights, set_weight
from deltacome.numerics.gram import Gram


class Weights(NamedTuple):
    """How much the errors of a matrix weigh; half of tr(G E C Eᵀ) is the KL summed over tokens."""

    inputs: Tensor
    """C, float32 (I, I), summed over tokens."""
    outputs: Tensor
    """G, float32 (O, O) or its diagonal (O,), the mean over tokens."""
    outside: bool = False
    """Of the embedding or the head."""


def measure(
    folder: Path,
    weights: Iterator[dict[str, Weights]],
    spectrum: Callable[[str, Weights], Tensor | None],
) -> dict[str, Tensor]:
    """Runs a sweep: what `spectrum` makes of each matrix is returned, the weights go to files.

    Args:
        folder: made here; one file a matrix. The gram of a linear's inputs is not kept, since it is
            taken again when the layers before it are compressed; that of embedding and head is.
        weights: of a sweep.
        spectrum: (name, its weights) → float32 (R,), or None for a matrix that is not asked about.
    """
    folder.mkdir(exist_ok=True)
    spectra = {}
    for found in weights:
        for name, one in found.items():
            if (values := spectrum(name, one)) is None:
                continue
            spectra[name] = values.cpu()
            kept = {"outputs": one.outputs} | ({"inputs": one.inputs} if one.outside else {})
            save_file({key: value.cpu() for key, value in kept.items()}, _file(folder, name))
    return spectra


def measured(folder: Path, name: str) -> dict[str, Tensor]:
    """What `measure` kept of a matrix: `outputs`, and `inputs` of embedding and head."""
    return load_file(_file(folder, name))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def sweep(
    stream: Stream,
    *,
    seed: int,
    diagonal: bool,
    tied: bool,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Weights]]:
    """Weights of the embedding and the head, then of each block's linears, the last block first.

    Args:
        stream: of the tuned model, at its first block; it is at its end afterwards.
        seed: of the tokens that are drawn.
        diagonal: keep the diagonal of G alone: less memory, and less to go by.
        tied: the head uses the embedding's weight.
        on_step: called after each block, forward and backward.

    Yields:
        Name of a parameter → its weights.
    """
    entered: list[list[Tensor]] = []
    for block in stream.layout.blocks:
        entered.append([batch.hidden for batch in stream.batches])
        _load(stream, block)
        stream.advance(block)
        drop_weights(stream.layout.blocks[block])
        on_step()
    head, gradients = _head(stream, seed, tied)
    for block, hidden in reversed(list(zip(stream.layout.blocks, entered, strict=True))):
        _load(stream, block)
        found, gradients = _backward(stream, block, hidden, gradients, diagonal)
        drop_weights(stream.layout.blocks[block])
        on_step()
        yield found
    yield _outside(stream, head, entered[0], gradients, tied)


def _load(stream: Stream, block: str) -> None:
    for name, _ in list(stream.layout.blocks[block].named_parameters()):
        full = f"{block}.{name}"
        set_weight(stream.model, full, stream.read(full).to(stream.device, stream.dtype))


def _head(stream: Stream, seed: int, tied: bool) -> tuple[Weights, list[Tensor]]:
    """Weights of the head, and the gradient at the last block's output of each batch."""
    name = stream.layout.head.removesuffix(".weight")
    module = stream.model.get_submodule(name)
    gram, spread_V, gradients = None, None, []
    draw = torch.Generator(device=stream.device).manual_seed(seed)
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    used = stream.layout.embedding if tied else stream.layout.head
    with stream.outside_weights(head=used):
        for batch in stream.batches:
            hidden = batch.hidden.detach().requires_grad_()
            with torch.enable_grad():
                logits_TV = stream.answer(batch, hidden).float()[batch.valid.to(stream.device)]
                log_p_TV = logits_TV.log_softmax(-1)
                p_TV = log_p_TV.detach().exp()
                drawn_T1 = torch.multinomial(p_TV, 1, generator=draw)
                (gradient,) = torch.autograd.grad(log_p_TV.gather(1, drawn_T1).sum(), hidden)
            gradients.append(gradient)
            x_TH = inputs.pop()[batch.valid.to(stream.device)]
            gram = gram or Gram(name, x_TH.shape[-1], device=stream.device)
            gram.add(x_TH)
            # The variance of a token's log-odds: what an error of its logit costs.
            sums_V = (p_TV - p_TV.square()).sum(0)
            spread_V = sums_V if spread_V is None else spread_V + sums_V
    handle.remove()
    assert gram is not None
    assert spread_V is not None
    return Weights(gram.value, spread_V / gram.tokens, outside=True), gradients


def _backward(
    stream: Stream, block: str, hidden: list[Tensor], gradients: list[Tensor], diagonal: bool
) -> tuple[dict[str, Weights], list[Tensor]]:
    """Weights of a block's linears, and the gradients at its input."""
    linears = linears_of(block, stream.layout.blocks[block])
    inputs = {n: Gram(n, linear.in_features, device=stream.device) for n, linear in linears}
    outputs = {n: _Outputs(n, linear.out_features, diagonal, stream) for n, linear in linears}
    before = []
    for batch, entering, gradient in zip(stream.batches, hidden, gradients, strict=True):
        valid = batch.valid.to(stream.device)
        handles = [_watch(linear, inputs[n], outputs[n], valid) for n, linear in linears]
        with torch.enable_grad():
            leaf = entering.detach().requires_grad_()
            output = stream.run(block, batch, leaf)
            (entered,) = torch.autograd.grad(output, leaf, gradient)
        before.append(entered)
        for handle in handles:
            handle.remove()
    return {
        f"{n}.weight": Weights(inputs[n].value, outputs[n].value / inputs[n].tokens)
        for n, _ in linears
    }, before


def _watch(linear: nn.Module, inputs: Gram, outputs: _Outputs, valid: Tensor) -> RemovableHandle:
    """Adds what a linear is given, and the gradients of what it returns."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs.add(args[0].detach()[valid])
        output.register_hook(lambda gradient: outputs.add(gradient[valid]))

    return linear.register_forward_hook(hook)


class _Outputs:
    """Σ g gᵀ over gradients, or its diagonal."""

    def __init__(self, name: str, size: int, diagonal: bool, stream: Stream) -> None:
        self._gram = None if diagonal else Gram(name, size, device=stream.device)
        self._sum_O = torch.zeros(size, device=stream.device)

    def add(self, g_TO: Tensor) -> None:
        if self._gram is not None:
            self._gram.add(g_TO)
        else:
            self._sum_O += g_TO.float().square().sum(0)

    @property
    def value(self) -> Tensor:
        return self._sum_O if self._gram is None else self._gram.value


def _outside(
    stream: Stream,
    head: Weights,
    hidden: list[Tensor],
    gradients: list[Tensor],
    tied: bool,
) -> dict[str, Weights]:
    """Weights of the embedding and the head, of one matrix where they are tied."""
    layout = stream.layout
    table_VH = stream.read(layout.embedding).to(stream.device, torch.float32)
    gram = Gram(layout.embedding, table_VH.shape[1], device=stream.device)
    counts_V = torch.zeros(len(table_VH), device=stream.device)
    for batch, entering, gradient in zip(stream.batches, hidden, gradients, strict=True):
        valid = batch.valid.to(stream.device)
        ids_T = batch.ids.to(stream.device)[valid]
        gram.add(gradient[valid] * _scale(entering[valid].float(), table_VH[ids_T]))
        counts_V += torch.bincount(ids_T, minlength=len(table_VH))
    embedding = Weights(gram.value, counts_V / gram.tokens, outside=True)
    if not tied:
        return {layout.embedding: embedding, layout.head: head}
    uses = [(use.inputs, use.outputs, float(use.inputs.trace())) for use in (embedding, head)]
    # Σ over uses of G ⊗ C is no such product itself; this is the one of the same trace whose sides are
    # the uses' sides, each weighted by what the use weighs.
    worth_V = sum(trace * outputs for _, outputs, trace in uses)
    inputs = sum(outputs.sum() * gram for gram, outputs, _ in uses)
    assert isinstance(worth_V, Tensor)
    assert isinstance(inputs, Tensor)
    total = float(worth_V.sum())
    inputs = inputs * (total / inputs.trace())
    return {layout.embedding: Weights(inputs, worth_V / total, outside=True)}


def _scale(entering_TH: Tensor, rows_TH: Tensor) -> float:
    """What the model multiplies rows of its embedding by, as some do (least squares)."""
    return float((entering_TH * rows_TH).sum() / rows_TH.square().sum().clamp(min=1e-30))
