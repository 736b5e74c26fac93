"""The sweep gives the grams of the whole model, differentiated in one piece."""

from functools import partial

import pytest
import torch
from test_stream import load, some_rows, stream_of
from transformers import AutoModelForCausalLM

from deltacome.arch.layout import find_layout, linears_of
from deltacome.compression import sensitivity
from deltacome.compression.sensitivity import (
    ANSWER,
    TEMPERATURE,
    Weights,
    keep,
    measured,
    sweep,
)
from deltacome.errors import UnsupportedError

SEED = 3


def whole(folder, stream, first=lambda row: 0):
    """What C and G of every linear, and the weights of embedding and head, are made from."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = find_layout(model)
    table = model.get_input_embeddings()
    draw = torch.Generator().manual_seed(SEED)
    xs, gs, ids = {}, {}, []
    rows = [i[v].tolist() for b in stream.batches for i, v in zip(b.ids, b.valid, strict=True)]
    answers = [len(row) - first(row) for row in rows if first(row)]
    for batch in stream.batches:
        valid, kept = batch.valid, {}
        counts = valid.clone()
        for row, one, real in zip(counts, batch.ids, valid, strict=True):
            row[: first(one[real].tolist())] = False

        def keep(name, kept=kept):
            def hook(module, args, output):
                output.retain_grad()
                kept[name] = (args[0], output)

            return hook

        handles = [
            module.register_forward_hook(keep(name))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        ]
        logits = model(input_ids=batch.ids).logits.float()[counts]
        p = logits.detach().softmax(-1)
        # A row of text weighs one, however many of its tokens count; a token of an answer weighs the
        # same in each, and those of an answer of the mean length `ANSWER` together.
        each = [
            ANSWER * len(answers) / sum(answers) if first(one[real].tolist()) else 1 / int(n)
            for one, real, n in zip(batch.ids, valid, counts.sum(1), strict=True)
        ]
        shares = torch.tensor(each).repeat_interleave(counts.sum(1))[:, None]
        # A token that the model is sure of counts for more, but not where the head itself is weighed.
        lifted = shares * (p - p * p).sum(1, keepdim=True).sqrt()
        soft = (logits.detach() / TEMPERATURE).softmax(-1)
        signs = 2.0 * torch.randint(0, 2, p.shape, generator=draw) - 1
        # Softer log-probabilities along the signs: the same as logits along the centred signs.
        along = TEMPERATURE * soft.sqrt() * signs
        lifted = lifted / (soft - soft * soft).sum(1, keepdim=True)
        ((logits / TEMPERATURE).log_softmax(-1) * along * lifted.sqrt()).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in kept.items():
            at_head = name == layout.head.removesuffix(".weight")
            xs.setdefault(name, []).append(x.detach()[counts if at_head else valid])
            gs.setdefault(name, []).append(
                ((p - p * p) * shares).sqrt() if at_head else y.grad[valid]
            )
        ids.append(batch.ids[valid])
    xs, gs = ({name: torch.cat(parts) for name, parts in of.items()} for of in (xs, gs))
    return layout, table, xs, gs, torch.cat(ids)


def inputs_of(x, g, tokens):
    weights = g.square().sum(1)
    return x.T @ (weights[:, None] * x) * tokens / weights.sum()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5 * float(expected.abs().max()))


def late(row):
    """Some rows are text, the others half question, half answer."""
    return 0 if row[0] % 2 else len(row) // 2


@pytest.mark.parametrize("first", [lambda row: 0, late], ids=["all", "late"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "qwen2"])
def test_the_sweep_is_the_model_differentiated(pairs, family, first):
    tuned = pairs[family][1]
    stream, checkpoint = stream_of(tuned, some_rows(), batch_tokens=48)
    tied = find_layout(stream.model).head not in checkpoint.tensors
    steps, found = [], {}
    options = {"seed": SEED, "diagonal": False, "tied": tied, "first": first}
    put = partial(load, stream, checkpoint)
    for one in sweep(stream, put, **options, on_step=lambda: steps.append(1)):
        found |= one
    layout, table, xs, gs, ids = whole(tuned, stream, first)
    assert len(steps) == 2 * len(layout.blocks)
    linears = [n for block in layout.blocks.items() for n, _ in linears_of(*block)]
    assert len(found) == len(linears) + (1 if tied else 2)
    for name in (f"{linear}.weight" for linear in linears):
        x, g = (of[name.removesuffix(".weight")] for of in (xs, gs))
        close(found[name].inputs, inputs_of(x, g, len(ids)))
        close(found[name].outputs, g.T @ g / len(ids))
    x, g = (of[layout.head.removesuffix(".weight")] for of in (xs, gs))
    head = inputs_of(x, g, len(ids)), g.square().sum(0) / len(ids)
    # An embedding that multiplies its rows passes the factor on to their gradients.
    scale = (table(torch.tensor([7])) / table.weight[7]).detach().mean()
    g = scale * gs[layout.embedding.removesuffix(".weight")]
    worth = torch.zeros(len(head[1])).index_add(0, ids, g.square().sum(1))
    embedding = g.T @ g, worth / worth.sum()
    if not tied:
        for name, expected in ((layout.head, head), (layout.embedding, embedding)):
            close(found[name].inputs, expected[0])
            close(found[name].outputs, expected[1])
        return
    both = found[layout.embedding]
    worth = sum(inputs.trace() * outputs for inputs, outputs in (embedding, head))
    assert float(both.outputs.sum() * both.inputs.trace()) == pytest.approx(
        float(worth.sum()), rel=1e-3
    )
    close(both.outputs, worth / worth.sum())


def sweep_of(tuned, **options):
    stream, checkpoint = stream_of(tuned, some_rows())
    return sweep(stream, partial(load, stream, checkpoint), tied=False, **options)


def test_a_diagonal_is_that_of_the_gram(pairs):
    full, diagonal = (
        {
            name: weights
            for one in sweep_of(pairs["llama"][1], **options)
            for name, weights in one.items()
        }
        for options in ({"seed": 0, "diagonal": False}, {"seed": 0, "diagonal": True})
    )
    for name, weights in full.items():
        got = weights.outputs if weights.outputs.ndim == 1 else weights.outputs.diagonal()
        torch.testing.assert_close(diagonal[name].outputs, got)


def test_no_gram_is_of_the_vocabulary(pairs, monkeypatch):
    """One of Gemma's would take 275 GB."""
    sizes = []

    class Noted(sensitivity.Gram):
        def __init__(self, name, size, **options):
            sizes.append(size)
            super().__init__(name, size, **options)

    monkeypatch.setattr(sensitivity, "Gram", Noted)
    for found in sweep_of(pairs["llama"][1], seed=SEED, diagonal=False):
        vocabulary = [len(w.outputs) for name, w in found.items() if name == "lm_head.weight"]
    assert vocabulary[0] not in sizes


def test_what_a_sweep_finds_is_kept(pairs, tmp_path):
    asked = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    keep(tmp_path / "sweep", sweep_of(pairs["llama"][1], seed=0, diagonal=True), asked)
    found = {
        n: w for one in sweep_of(pairs["llama"][1], seed=0, diagonal=True) for n, w in one.items()
    }
    for name in asked:
        for kept, value in zip(measured(tmp_path / "sweep", name), found[name], strict=True):
            assert torch.equal(kept, value)
    assert len(list((tmp_path / "sweep").iterdir())) == len(asked)


def test_two_that_sweep_into_one_folder(tmp_path):
    folder = tmp_path / "sweep"
    one, other = ({name: Weights(torch.ones(1, 1), torch.ones(1))} for name in ("one", "other"))

    def overtaken():
        yield one
        keep(folder, iter([one, other]), ["one", "other"])
        yield other

    keep(folder, overtaken(), ["one", "other"])
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert sorted(path.stem for path in folder.iterdir()) == ["one", "other"]
    assert measured(folder, "other") == other["other"]


def test_a_sweep_that_misses_a_matrix_is_not_kept(pairs, tmp_path):
    weights = sweep_of(pairs["llama"][1], seed=0, diagonal=True)
    with pytest.raises(UnsupportedError, match=r"1 matrices are not reached .*, tower\.weight"):
        keep(tmp_path / "sweep", weights, ["tower.weight", "lm_head.weight"])
    assert not list(tmp_path.iterdir())


def test_random_signs_average_to_the_fisher_information():
    p = torch.tensor([[0.7, 0.2, 0.0999, 0.0001]]).expand(200_000, 4)
    r = sensitivity._root(p, torch.Generator().manual_seed(0))
    got, expected = r.T @ r / len(r), p[0].diag() - torch.outer(p[0], p[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    # The rare token too: a single draw from p would meet it once in ten thousand.
    torch.testing.assert_close(got.diagonal(), expected.diagonal(), rtol=0.02, atol=0)
