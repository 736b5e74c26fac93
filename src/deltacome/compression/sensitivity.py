"""What an error in each matrix costs: a sweep through the tuned model and back.

`keep` runs it and stores what a method needs later, beside the run's units or where other runs find it.

The sweep runs forward once, block by block, keeping what each block was given; then backward from the
head, running each block again to differentiate it. So here too only one block's weights are held at a
time, along with hidden states of all calibration tokens at all blocks. The mean of `g gᵀ` is to be the
Fisher information of the model's own answers, which needs no labels (Kunstner et al. 2019, arXiv
1905.12558, on why not to take those of the data). Drawing an answer at each token would estimate it too.
But where the model is sure, as it is at most tokens of an answer, nearly every draw is the same and
nothing is learnt; `_root` has what is differentiated instead.

In the blocks, each token's information is divided by the root of its trace, which is how unsure the model
is there. Where the model is sure, small errors cost nothing, and there is hardly any information. But the
loss of a skill is not small, and the model is sure of nearly all that it was tuned on: undivided, kinds
of questions that it finds easy were the first to be lost. And whatever a token weighs, its information is
that of a softer answer, which has more of the words that the model would say elsewhere: calibration text
is short, and words that were never an answer in it were the next to be lost. The head's own errors are
not such a loss, and are weighed as they are.

Inputs are weighted by the squared gradient that meets them, so that a token on which no answer depends
does not count. K-FAC takes the two as independent; with this weighting, the product G ⊗ C has the right
trace for each layer. In a chat only the last answer and what follows it count (`answers` explains why):
what a model would have said in the user's place is nobody's concern. Rows of text weigh alike and tokens
of answers weigh alike, but an answer of the mean length weighs `ANSWER` times as much as a text. The
model is unsure of most words of a text and of few of an answer, so otherwise errors of texts would decide
nearly everything.

A tied embedding is weighed for both of its uses: as the head, each row by how uncertain the model is of
its token; as the embedding, each row by the gradients that meet its token.

Legend: T tokens, I in, O out, H hidden size, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltacome.arch.layout import linears_of
from deltacome.compression.answers import First
from deltacome.compression.capture import Batch, Stream, drop_weights
from deltacome.errors import ArtifactError, UnsupportedError
from deltacome.numerics.gram import Gram
from deltacome.rows import token_shares

ANSWER = 30.0
"""Weight of an answer relative to a row of text (left out in `benchmarks/tables/ablation.py`)."""

LIFT = 0.5
"""A token's information in the blocks is scaled to this power of the model's uncertainty; 1 leaves it
unscaled (`benchmarks/tables/ablation.py`)."""

LEAST = 1e-6
"""Lower bound of a token's uncertainty."""

TEMPERATURE = 2.0
"""Temperature of the answers whose information goes into the blocks; 1 takes the model's own
(`benchmarks/tables/ablation.py`)."""


class Weights(NamedTuple):
    """How much the errors of a matrix weigh.

    Half of tr(G E C Eᵀ) is in proportion to the KL, summed over tokens that count, with each of them
    weighed and lifted as the module says.
    """

    inputs: Tensor
    """C, float32 (I, I), summed over tokens, each weighted by its ‖g‖² relative to the mean."""
    outputs: Tensor
    """G, float32 (O, O) or its diagonal (O,), the mean over tokens."""


def keep(folder: Path, weights: Iterator[dict[str, Weights]], wanted: Collection[str]) -> None:
    """Runs a sweep and stores what it finds of some matrices, one file each.

    Args:
        folder: made here, or meanwhile by another process that ran the same sweep; if it exists, it is
            whole.
        weights: those that a sweep yields.
        wanted: names of the matrices.

    Raises:
        UnsupportedError: a matrix that the sweep does not reach (experts, a vision tower).
    """
    left = set(wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as own:
        partial = Path(own) / "sweep"
        partial.mkdir()  # readable by everybody, unlike the folder around it
        for found in weights:
            for name in found.keys() & left:
                kept = {key: value.cpu() for key, value in found[name]._asdict().items()}
                save_file(kept, _file(partial, name))
            left -= found.keys()
        refuse_unreached(left)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise


def refuse_unreached(names: Collection[str]) -> None:
    """Refuses matrices that no sweep weighs, if there are any.

    Raises:
        UnsupportedError: names the first.
    """
    if names:
        raise UnsupportedError(
            f"adaptive: {len(names)} matrices are not reached by text that runs through the "
            f"decoder's blocks, {min(names)} the first: use another method, or calibration none"
        )


def measured(folder: Path, name: str) -> Weights:
    """What `keep` stored of a matrix.

    Raises:
        ArtifactError: it cannot be read any more.
    """
    file = _file(folder, name)
    try:
        return Weights(**load_file(file))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file}: cannot be read: {error}; remove the folder to measure anew"
        ) from error


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def sweep(
    stream: Stream,
    load: Callable[[str], None],
    *,
    seed: int,
    diagonal: bool,
    tied: bool,
    first: First = lambda row: 0,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Weights]]:
    """Weights of each block's linears, the last block first, then of the embedding and the head.

    Args:
        stream: of the tuned model, at its first block; it is at its end afterwards.
        load: puts the tuned weights of a block into the model.
        seed: for the random signs.
        diagonal: keep only the diagonal of G: less memory, and less information.
        tied: the head uses the embedding's weight.
        first: gives the position of a row from which on its predictions count.
        on_step: called after each block, forward and backward.

    Yields:
        Name of a parameter → its weights.
    """
    entered: list[list[Tensor]] = []
    for block in stream.layout.blocks:
        entered.append([batch.hidden for batch in stream.batches])
        load(block)
        stream.advance(block)
        drop_weights(stream.layout.blocks[block])
        on_step()
    head, gradients = _head(stream, seed, tied, first)
    for block, hidden in reversed(list(zip(stream.layout.blocks, entered, strict=True))):
        load(block)
        found, gradients = _backward(stream, block, hidden, gradients, diagonal)
        drop_weights(stream.layout.blocks[block])
        on_step()
        yield found
    yield _outside(stream, head, entered[0], gradients, tied)


def _head(stream: Stream, seed: int, tied: bool, first: First) -> tuple[Weights, list[Tensor]]:
    """Weights of the head, and the gradient at the last block's output of each batch."""
    sums, gradients = _Sums(str(stream.layout.head), diagonal=True), []
    draw = torch.Generator(device=stream.device).manual_seed(seed)
    inputs: list[Tensor] = []
    handle = stream.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    used = str(stream.layout.embedding if tied else stream.layout.head)
    with stream.outside_weights(head=used):
        for batch, counting in zip(stream.batches, _counting(stream.batches, first), strict=True):
            counts, share_T1 = (x.to(stream.device) for x in counting)
            hidden = batch.hidden.detach().requires_grad_()
            with torch.enable_grad():
                logits_TV = stream.answer(batch, hidden)[counts].float()
                p_TV = logits_TV.detach().softmax(-1)
                # The variance of whether a token comes: what an error of its logit costs (Fisher).
                spread_TV = p_TV - p_TV.square()
                worth_T1 = share_T1 * _unsure(p_TV) ** LIFT
                soft_TV = (logits_TV.detach() / TEMPERATURE).softmax(-1)
                at_logits_TV = _root(soft_TV, draw) * (worth_T1 / _unsure(soft_TV)).sqrt()
                (gradient,) = torch.autograd.grad(logits_TV, hidden, at_logits_TV)
            gradients.append(gradient)
            x_TH = inputs.pop().detach()[counts]
            sums.add(x_TH, (spread_TV * share_T1).sqrt())
    handle.remove()
    return sums.weights(stream.tokens), gradients


def _unsure(p_TV: Tensor) -> Tensor:
    """The trace of diag(p) − p pᵀ, (T, 1)."""
    return (p_TV - p_TV.square()).sum(-1, keepdim=True).clamp(min=LEAST)


def _root(p_TV: Tensor, draw: torch.Generator) -> Tensor:
    """Random r with E[r rᵀ] = diag(p) − p pᵀ, the Fisher information of the logits, (T, V).

    `r = √p ε − p ⟨√p, ε⟩` with signs ε: every word has its share in each draw, however rare it is.
    """
    signs_TV = torch.randint(0, 2, p_TV.shape, generator=draw, device=p_TV.device)
    r_TV = p_TV.sqrt() * (2.0 * signs_TV - 1)
    return r_TV - p_TV * r_TV.sum(-1, keepdim=True)


def _counting(batches: Sequence[Batch], first: First) -> list[tuple[Tensor, Tensor]]:
    """Positions of each batch whose predictions count, bool (B, L), and what these weigh, (T, 1).

    What follows a part of a picture is mostly another part, which no model is asked to predict.
    """
    found = []
    for batch in batches:
        starts = [first(i[v].tolist()) for i, v in zip(batch.ids, batch.valid, strict=True)]
        starts_B1 = torch.tensor(starts)[:, None]
        counts_BL = batch.words & (torch.arange(batch.ids.shape[1]) >= starts_B1)
        found.append((counts_BL, starts_B1[:, 0] > 0))
    lengths = torch.cat([counts_BL.sum(1)[answers_B] for counts_BL, answers_B in found])
    one = float(lengths.float().mean()) / ANSWER  # NaN, and not used, without answers
    return [
        (counts_BL, token_shares(counts_BL, answers_B, one)[:, None])
        for counts_BL, answers_B in found
    ]


def _backward(
    stream: Stream, block: str, hidden: list[Tensor], gradients: list[Tensor], diagonal: bool
) -> tuple[dict[str, Weights], list[Tensor]]:
    """Weights of a block's linears, and the gradients at its input."""
    linears = linears_of(block, stream.layout.blocks[block])
    sums = {name: _Sums(name, diagonal) for name, _ in linears}
    before = []
    for batch, entering, gradient in zip(stream.batches, hidden, gradients, strict=True):
        valid = batch.valid.to(stream.device)
        handles = [_watch(linear, sums[name], valid) for name, linear in linears]
        with torch.enable_grad():
            leaf = entering.detach().requires_grad_()
            output = stream.run(block, batch, leaf)
            (entered,) = torch.autograd.grad(output, leaf, gradient)
        before.append(entered)
        for handle in handles:
            handle.remove()
    return {f"{name}.weight": sums[name].weights(stream.tokens) for name, _ in linears}, before


def _watch(linear: nn.Module, sums: _Sums, valid: Tensor) -> RemovableHandle:
    """Adds a linear's inputs, with the gradients of its outputs, to its sums."""

    def at(values: Tensor) -> Tensor:
        # Some layers flatten rows and positions before they multiply.
        return values.reshape(*valid.shape, -1)[valid]

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        x_TI = at(args[0].detach())
        output.register_hook(lambda gradient: sums.add(x_TI, at(gradient)))

    return linear.register_forward_hook(hook)


class _Sums:
    """Σ ‖g‖² x xᵀ and Σ g gᵀ, or the latter's diagonal."""

    def __init__(self, name: str, diagonal: bool) -> None:
        self._name, self._diagonal = name, diagonal
        self._grams: tuple[Gram, Gram | None] | None = None
        self._sum_O: Tensor | float = 0.0

    def add(self, x_TI: Tensor, g_TO: Tensor) -> None:
        if self._grams is None:
            inputs = Gram(self._name, x_TI.shape[1], device=x_TI.device)
            # For a head the whole would be as large as its vocabulary squared.
            whole = not self._diagonal
            outputs = Gram(self._name, g_TO.shape[1], device=x_TI.device) if whole else None
            self._grams = inputs, outputs
        inputs, outputs = self._grams
        squares_TO = g_TO.float().square()
        inputs.add(x_TI.float() * squares_TO.sum(1, keepdim=True).sqrt())
        self._sum_O = self._sum_O + squares_TO.sum(0)
        if outputs is not None:
            outputs.add(g_TO)

    def weights(self, tokens: int) -> Weights:
        """Weights from all that was added, for a number of tokens.

        Raises:
            UnsupportedError: nothing was added, as the layer was not called or no answer depends on it.
        """
        if self._grams is None or not isinstance(self._sum_O, Tensor):
            raise UnsupportedError(f"{self._name}: no gradient reached it: use another method")
        inputs, outputs = self._grams
        total = self._sum_O.sum().clamp(min=1e-30)
        worth = self._sum_O if outputs is None else outputs.value
        return Weights(inputs.value * (tokens / total), worth / tokens)


def _outside(
    stream: Stream,
    head: Weights,
    hidden: list[Tensor],
    gradients: list[Tensor],
    tied: bool,
) -> dict[str, Weights]:
    """Weights of the embedding and the head, as one matrix where they are tied."""
    embedding_name, head_name = str(stream.layout.embedding), str(stream.layout.head)
    table_VH = stream.read(embedding_name).to(stream.device, torch.float32)
    gram = Gram(embedding_name, table_VH.shape[1], device=stream.device)
    worth_V = torch.zeros(len(table_VH))
    for batch, entering, gradient in zip(stream.batches, hidden, gradients, strict=True):
        words = batch.words.to(stream.device)
        ids_T = batch.ids.to(stream.device)[words]
        g_TH = gradient[words].float() * _scale(entering[words].float(), table_VH[ids_T])
        gram.add(g_TH)
        # On the CPU, as a GPU adds in no fixed order.
        worth_V.index_add_(0, batch.ids[batch.words], g_TH.square().sum(1).cpu())
    worth_V = (worth_V / worth_V.sum().clamp(min=1e-30)).to(stream.device)
    embedding = Weights(gram.value, worth_V)
    if not tied:
        return {embedding_name: embedding, head_name: head}
    # Σ over uses of G ⊗ C is not such a product itself. This is the product of the same trace whose
    # sides are sums of the uses' sides, each weighted by what the use weighs.
    outputs_V = embedding.inputs.trace() * embedding.outputs + head.inputs.trace() * head.outputs
    inputs = embedding.outputs.sum() * embedding.inputs + head.outputs.sum() * head.inputs
    total = outputs_V.sum().clamp(min=1e-30)
    return {embedding_name: Weights(inputs * (total / inputs.trace()), outputs_V / total)}


def _scale(entering_TH: Tensor, rows_TH: Tensor) -> float:
    """The factor by which some models multiply rows of their embedding, by least squares."""
    return float((entering_TH * rows_TH).sum() / rows_TH.square().sum().clamp(min=1e-30))
