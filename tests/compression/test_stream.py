"""The model run block by block is the model."""

from functools import partial

import pytest
import torch
from tiny_pairs import FAMILIES, VOCAB, text_lines, write_jsonl
from transformers import AutoModelForCausalLM

from deltacome import DeltaCome, compress
from deltacome.arch.checkpoint import Checkpoint
from deltacome.arch.layout import find_layout
from deltacome.compression.calibration import Calibration
from deltacome.compression.capture import Stream, drop_weights
from deltacome.compression.data import calibration_rows
from deltacome.errors import CalibrationError, UnsupportedError
from deltacome.methods.template import parse_template
from deltacome.rows import Row
from deltacome.skeleton import make_skeleton, read_config, set_weight


def some_rows(lengths=(3, 24, 9, 17, 24, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def stream_of(folder, rows, **options):
    checkpoint = Checkpoint(folder)
    options = {"device": "cpu", "dtype": torch.float32} | options
    model = make_skeleton(read_config(folder), options["dtype"], folder)
    layout = find_layout(model)
    rows = [Row(ids) for ids in rows]
    return Stream(model, layout, checkpoint.read, rows, **options), checkpoint


def load(stream, checkpoint, block):
    for name, _ in stream.layout.blocks[block].named_parameters():
        value = checkpoint.read(f"{block}.{name}").to(torch.float32)
        set_weight(stream.model, f"{block}.{name}", value)


def hidden_of(stream):
    """Row → hidden states (L, H) without padding."""
    return {
        tuple(ids[valid].tolist()): hidden[valid]
        for batch in stream.batches
        for ids, valid, hidden in zip(batch.ids, batch.valid, batch.hidden, strict=True)
    }


@torch.no_grad()
def dense_hidden(folder, rows):
    """Row → output of each block (L, H), each row alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    for block in find_layout(model).blocks.values():
        block.register_forward_hook(
            lambda _, args, out: outputs.append((out[0] if isinstance(out, tuple) else out)[0])
        )
    found = {}
    for row in rows:
        outputs.clear()
        model(input_ids=torch.tensor([row]))
        found[tuple(row)] = list(outputs)
    return found


def assert_same(got, expected, tolerance=1e-5):
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_dense_model(pairs, family):
    rows = some_rows()
    stream, checkpoint = stream_of(pairs[family][1], rows, batch_tokens=60)
    assert len(stream.batches) > 1
    assert stream.tokens == sum(map(len, rows))
    expected = dense_hidden(pairs[family][1], rows)
    for number, block in enumerate(stream.layout.blocks):
        load(stream, checkpoint, block)
        stream.advance(block)
        drop_weights(stream.layout.blocks[block])
        for row, hidden in hidden_of(stream).items():
            assert_same(hidden, expected[row][number])
    assert all(parameter.is_meta for parameter in stream.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_is_in_no_gram(pairs, family):
    rows = some_rows()
    grams = []
    for batch_tokens in (10_000, 1):  # all rows in one batch, and each row alone
        stream, checkpoint = stream_of(pairs[family][1], rows, batch_tokens=batch_tokens)
        for block in stream.layout.blocks:
            load(stream, checkpoint, block)
            found = [stream.gram(block, group[0]) for group in stream.groups(block)]
            grams.append(found)
            stream.advance(block)
        grams.append([stream.head_gram()])
    half = len(grams) // 2
    for together, alone in zip(grams[:half], grams[half:], strict=True):
        for one, other in zip(together, alone, strict=True):
            assert_same(one, other)


def test_what_is_padded_with_does_not_matter(pairs):
    rows = some_rows()
    plain, checkpoint = stream_of(pairs["llama"][1], rows)
    other, _ = stream_of(pairs["llama"][1], rows)
    (batch,) = other.batches
    assert not batch.valid.all()
    batch.hidden[~batch.valid] = 1e4
    for stream in (plain, other):
        load(stream, checkpoint, "model.layers.0")
    for linear in ("self_attn.q_proj", "mlp.down_proj"):
        one, two = (s.gram("model.layers.0", f"model.layers.0.{linear}") for s in (plain, other))
        assert torch.equal(one, two)


def test_no_rows(pairs):
    with pytest.raises(CalibrationError, match="at least one row"):
        stream_of(pairs["llama"][1], [])


def test_hooks_and_forwards_are_put_back(pairs):
    stream, checkpoint = stream_of(pairs["llama"][1], some_rows())
    load(stream, checkpoint, "model.layers.0")
    stream.gram("model.layers.0", "model.layers.0.mlp.down_proj")
    stream.head_gram()
    for module in stream.model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_exact_deltas_give_the_tuned_model_s_hidden_states(pairs, family, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": line} for line in text_lines(6)])
    options = {"samples": 6, "seq_len": 24, "seed": 0}
    base, tuned = pairs[family]
    streams = []
    advance = Stream.advance
    monkeypatch.setattr(Stream, "advance", lambda s, name: (streams.append(s), advance(s, name)))
    method = DeltaCome(parse_template("16:*"))
    artifact = compress(
        base, tuned, tmp_path / "a", method=method, ratio=0.4, calibration=source, **options
    )
    errors = [r.error for r in artifact.manifest.records.values() if r.error is not None]
    assert max(errors) < 1e-6
    rows = [row.ids for row in calibration_rows(Calibration(source, **options), tuned)]
    expected = dense_hidden(tuned, rows)
    first, *_, canary = streams
    got = hidden_of(first)
    assert streams == [first, first, canary, canary]
    assert set(got) == set(map(tuple, rows))
    for row, hidden in got.items():
        assert_same(hidden, expected[row][-1], 5e-4)


@pytest.mark.parametrize("block", [0, 1])
def test_a_model_that_does_something_between_its_blocks_is_refused(pairs, block):
    """As some vision-language models do with pictures; blocks run one by one would get something else."""
    folder = pairs["llama"][1]
    model = make_skeleton(read_config(folder), torch.float32, folder)
    model.model.layers[block].register_forward_hook(lambda module, args, output: output + 1)
    options = {"device": "cpu", "dtype": torch.float32}
    make = partial(
        Stream, model, find_layout(model), Checkpoint(folder).read, [Row([2, 3])], **options
    )
    if block:  # what follows the last block is run whole
        make()
        return
    with pytest.raises(
        UnsupportedError, match=r"LlamaForCausalLM: changes hidden states between .* 1,"
    ):
        make()
