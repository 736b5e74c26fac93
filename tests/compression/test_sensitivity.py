"""The sweep gives the grams of the whole model, differentiated in one piece."""

import pytest
import torch
from test_stream import some_rows, stream_of
from transformers import AutoModelForCausalLM

from deltacome.arch.layout import find_layout
from deltacome.compression.sensitivity import measure, measured, sweep

SEED = 3


def whole(folder, stream):
    """Σ x xᵀ and the mean of g gᵀ of every linear, of the head and of the embedding's output."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = find_layout(model)
    head, embedding = (n.removesuffix(".weight") for n in (layout.head, layout.embedding))
    draw = torch.Generator().manual_seed(SEED)
    inputs, outputs, tokens, spread, counts = {}, {}, 0, 0, 0
    for batch in stream.batches:
        valid, kept = batch.valid, {}

        def keep(name, kept=kept, valid=valid):
            def hook(module, args, output):
                output.retain_grad()
                kept[name] = (args[0], output)

            return hook

        handles = [
            module.register_forward_hook(keep(name))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        ]
        log_p = model(input_ids=batch.ids).logits.float()[valid].log_softmax(-1)
        p = log_p.detach().exp()
        log_p.gather(1, torch.multinomial(p, 1, generator=draw)).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in kept.items():
            if name != embedding:
                x = x.detach()[valid]
                inputs[name] = inputs.get(name, 0) + x.T @ x
            g = y.grad[valid]
            outputs[name] = outputs.get(name, 0) + g.T @ g
        tokens += int(valid.sum())
        spread = spread + (p - p.square()).sum(0)
        counts = counts + torch.bincount(batch.ids[valid], minlength=p.shape[1])
    outputs = {name: value / tokens for name, value in outputs.items()}
    return layout, head, embedding, inputs, outputs, spread / tokens, counts / tokens, tokens


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "qwen2"])
def test_the_sweep_is_the_model_differentiated(pairs, family):
    tuned = pairs[family][1]
    stream, checkpoint = stream_of(tuned, some_rows(), batch_tokens=48)
    tied = find_layout(stream.model).head not in checkpoint.tensors
    steps = []
    found = {}
    for one in sweep(stream, seed=SEED, diagonal=False, tied=tied, on_step=lambda: steps.append(1)):
        found |= one
    layout, head, embedding, inputs, outputs, spread, counts, tokens = whole(tuned, stream)
    assert len(steps) == 2 * len(layout.blocks)
    for name in layout.linears:
        module = name.removesuffix(".weight")
        torch.testing.assert_close(found[name].inputs, inputs[module], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name].outputs, outputs[module], rtol=1e-3, atol=1e-6)
    # An embedding that multiplies its rows passes the factor on to their gradients.
    table = checkpoint.read(layout.embedding).float()
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    scale = float(model.get_input_embeddings()(torch.tensor([7])).detach()[0, 0] / table[7, 0])
    entering = scale**2 * outputs[embedding] * tokens
    if not tied:
        torch.testing.assert_close(found[layout.head].inputs, inputs[head], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[layout.head].outputs, spread, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[layout.embedding].inputs, entering, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[layout.embedding].outputs, counts.float())
        return
    both = found[layout.embedding]
    worth = spread * inputs[head].trace() + counts * entering.trace()
    total = float(both.outputs.sum() * both.inputs.trace())
    assert total == pytest.approx(float(worth.sum()), rel=1e-3)
    torch.testing.assert_close(both.outputs, worth / worth.sum(), rtol=1e-3, atol=1e-7)


def test_a_diagonal_is_that_of_the_gram(pairs):
    full, diagonal = (
        {
            name: weights
            for one in sweep(stream_of(pairs["llama"][1], some_rows())[0], **options, tied=False)
            for name, weights in one.items()
        }
        for options in ({"seed": 0, "diagonal": False}, {"seed": 0, "diagonal": True})
    )
    for name, weights in full.items():
        got = weights.outputs if weights.outputs.ndim == 1 else weights.outputs.diagonal()
        torch.testing.assert_close(diagonal[name].outputs, got)


def test_what_is_measured_is_kept(pairs, tmp_path):
    weights = sweep(stream_of(pairs["llama"][1], some_rows())[0], seed=0, diagonal=True, tied=False)
    asked = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    spectra = measure(
        tmp_path / "weights",
        weights,
        lambda name, one: one.inputs.diagonal() if name in asked else None,
    )
    assert set(spectra) == set(asked)
    assert set(measured(tmp_path / "weights", asked[0])) == {"inputs", "outputs"}
    assert set(measured(tmp_path / "weights", asked[1])) == {"outputs"}
    assert len(list((tmp_path / "weights").iterdir())) == len(asked)
