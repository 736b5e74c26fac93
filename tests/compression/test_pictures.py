"""Calibration with pictures: a vision-language model is given what its own processor makes of them."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import load
from PIL import Image
from seeing import CONFIGS, SIZE, TOKENS, made_by_hand, make_llava, make_pair
from tiny_pairs import text_lines, write_jsonl
from torch.func import functional_call
from transformers import AutoTokenizer

from deltacome import Adaptive, BitDelta, DeltaCome, attach, base_for, compress, merge
from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression import pipeline, planning, polish
from deltacome.compression.answers import answers_from
from deltacome.compression.calibration import Calibration
from deltacome.compression.conversations import as_messages
from deltacome.compression.data import calibration_rows
from deltacome.compression.distill import _inputs, _picking, _Tuned, distill
from deltacome.compression.run import stream_of
from deltacome.compression.sensitivity import sweep
from deltacome.errors import CalibrationError, PictureError, UnsupportedError
from deltacome.pictures import Seen, picture_row, seen_in
from deltacome.rows import Row, alike, collate
from deltacome.skeleton import read_config, set_part

QUICK = {"samples": 8, "seq_len": 96, "seed": 0}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Chats with pictures, written in both ways, chats without, and texts."""
    folder = tmp_path_factory.mktemp("pictures")
    lines, words = [], text_lines(8)
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (SIZE + i, SIZE), colour).save(folder / f"{colour}.png")
        lines.append({"image": f"{colour}.png", "prompt": words[i], "answer": colour})
    asked = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "one and"}]
    asked += [{"type": "image", "path": str(folder / "blue.png")}, {"type": "text", "text": "two"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red, blue"}]}
    lines.append({"messages": [{"role": "user", "content": asked}, answer]})
    lines += [{"prompt": words[4], "answer": "five"}, {"text": words[5]}, {"text": words[6]}]
    return write_jsonl(folder / "c.jsonl", lines)


@pytest.fixture(scope="module")
def rows(vision, source):
    return calibration_rows(Calibration(str(source), **QUICK), vision[1])


def told(row):
    """The arguments that a model is called with for one row."""
    return {"input_ids": torch.tensor([row.ids]), **row.seen}


def picture_token(tuned):
    return read_config(tuned).image_token_id


# --- families, on rows made by hand ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["Llava", *CONFIGS])
def seeing(request, tmp_path_factory):
    """The base and tuned model of a family, and rows."""
    if request.param == "Llava":
        pair = request.getfixturevalue("vision")
        return pair, request.getfixturevalue("rows")
    pair = make_pair(request.param, tmp_path_factory.mktemp("seeing"))
    return pair, made_by_hand(request.param)


def run_of(pair):
    base, tuned = map(Checkpoint, pair)
    text = Calibration("none", **QUICK)
    return pipeline._prepare(
        base, tuned, DeltaCome(), text, "cpu", torch.float32, lambda said: None
    )


def load_block(run, block):
    for name, target in run.where.items():
        if target.parameter.startswith(f"{block}."):
            set_part(run.model, target, run.tuned.read(name).float())


def test_logits_are_those_of_the_model_that_sees(seeing):
    (base, tuned), rows = seeing
    run = run_of((base, tuned))
    stream = stream_of(run, rows, batch_tokens=70)
    assert len(stream.batches) >= 2
    for block in stream.layout.blocks:
        load_block(run, block)
        stream.advance(block)
    model, by_ids = load(tuned), {tuple(row.ids): row for row in rows}
    head = stream.layout.embedding if run.tied else stream.layout.head
    with torch.no_grad(), stream.outside_weights(head):
        for batch in stream.batches:
            logits = stream.answer(batch)
            for ids, valid, got in zip(batch.ids, batch.valid, logits, strict=True):
                row = by_ids.pop(tuple(ids[valid].tolist()))
                wanted = model(**told(row)).logits[0]
                torch.testing.assert_close(got[valid], wanted, rtol=1e-4, atol=1e-4)
    assert not by_ids


def test_a_picture_s_tokens_are_no_words(seeing):
    """No error of the embedding reaches them, and no model is asked to predict them."""
    pair, rows = seeing
    run, found = run_of(pair), {}
    token = run.model.config.image_token_id
    stream = stream_of(run, rows)
    how = {"seed": 0, "diagonal": False, "tied": False, "first": lambda row: len(row) // 2}
    for one in sweep(stream, partial(load_block, run), **how):
        found |= one
    embedding = found[stream.layout.embedding]
    said = {i for row in rows if row.seen for i in row.ids} - {token}
    assert embedding.outputs[token] == 0
    assert any(embedding.outputs[i] > 0 for i in said)
    assert all(w.inputs.isfinite().all() and w.outputs.isfinite().all() for w in found.values())


def test_distillation_asks_the_model_that_sees(seeing):
    (_, tuned), rows = seeing
    model, pictured = load(tuned), [row for row in rows if row.seen]

    def first(row):
        return len(row) - 3

    with torch.no_grad():
        wanted = [model(**told(row)).logits[0, first(row.ids) :] for row in pictured]
        inputs, counts_BL = _inputs(model, pictured, first)
        with _picking(model, counts_BL):
            got = functional_call(model, dict(model.named_parameters()), (), inputs).logits[0]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    asked = _Tuned(model, first)
    for _ in range(2):
        kept = asked.logits(pictured)
        torch.testing.assert_close(kept, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_it_sees_from_packed_bytes(seeing, tmp_path):
    (base, tuned), rows = seeing
    row = next(row for row in rows if row.seen)
    artifact = compress(base, tuned, tmp_path / "delta", ratio=1.3, calibration="none")
    model = base_for(base, artifact)
    with torch.no_grad():
        wanted = load(merge(base, artifact, tmp_path / "merged"))(**told(row)).logits
        with attach(model, artifact):
            got = model(**told(row)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# --- rows, by a processor ------------------------------------------------------------------------


def test_rows_are_what_the_processor_makes(vision, rows):
    tuned = vision[1]
    token = picture_token(tuned)
    counts = sorted(row.ids.count(token) for row in rows)
    assert counts == [0, 0, 0, *[TOKENS] * 4, 2 * TOKENS]
    for row in rows:
        pictures = row.ids.count(token) // TOKENS
        assert set(row.seen) == ({"pixel_values"} if pictures else set())
        if pictures:
            assert row.seen["pixel_values"].shape == (pictures, 3, SIZE, SIZE)
    # A chat is recognised by its opening, like one without pictures.
    first, tokenizer = answers_from(tuned), AutoTokenizer.from_pretrained(tuned)
    answers = {tokenizer.decode(row.ids[first(row.ids) + 1 :]) for row in rows if first(row.ids)}
    assert answers >= {"red<end>", "green<end>", "blue<end>", "white<end>", "red, blue<end>"}


def test_rows_with_and_without_pictures_do_not_go_together(rows):
    ordered = sorted(rows, key=lambda row: (row.kind, -len(row)))
    runs = list(alike(ordered, 10_000))
    assert [len(run) for run in runs] == [3, 5]
    ids, valid, seen = collate(runs[1])
    assert seen["pixel_values"].shape[0] == 6
    assert int(valid.sum()) == sum(map(len, runs[1]))
    assert not ids[~valid].any()


def test_an_input_for_each_token_is_padded():
    marks = [Row([5] * n, {"kinds": torch.ones(1, n), "grid": torch.ones(1, 3)}) for n in (4, 2)]
    assert len({row.kind for row in marks}) == 1
    *_, seen = collate(marks)
    assert seen["kinds"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert seen["grid"].shape == (2, 3)


@pytest.mark.parametrize(
    "method", [DeltaCome(distill=2), Adaptive(distill=2)], ids=["paper", "ours"]
)
def test_compressed_in_one_go_or_two(vision, source, tmp_path, monkeypatch, method):
    base, tuned = vision
    options = {"ratio": 1.3, "calibration": str(source), "samples": 8, "seq_len": 96}
    whole = compress(base, tuned, tmp_path / "whole", method=method, **options)
    errors = [r.error for r in whole.manifest.records.values() if r.error is not None]
    assert errors
    assert max(errors) < 1
    blind = tmp_path / "blind.jsonl"
    lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
    write_jsonl(blind, [line for line in lines if not {"image", "messages"} & line.keys()])
    other = compress(
        base, tuned, tmp_path / "blind", method=method, **{**options, "calibration": str(blind)}
    )
    assert other.digest != whole.digest

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "distill_terms", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(base, tuned, tmp_path / "cut", method=method, **options)
    again = compress(base, tuned, tmp_path / "cut", method=method, **options, resume=True)
    assert again.digest == whole.digest


@pytest.mark.parametrize(
    ("method", "garbles"),
    [
        (Adaptive(distill=1), True),
        (BitDelta(distill=1, loss="answers"), True),
        (BitDelta(distill=1), False),
    ],
)
def test_questions_are_garbled_for_our_last_step_alone(
    vision, rows, source, tmp_path, monkeypatch, method, garbles
):
    """BitDelta's is its paper's. Chats with pictures have no garbled copy, texts neither."""
    base, tuned = vision
    first, given = answers_from(tuned), []

    def spy(load, terms, rows, **options):
        given.extend(rows)
        return distill(load, terms, rows, **options)

    monkeypatch.setattr(polish, "distill", spy)
    ratio = None if isinstance(method, BitDelta) else 1.3
    options = {"ratio": ratio, "calibration": str(source), "samples": 8, "seq_len": 96}
    compress(base, tuned, tmp_path / "a", method=method, **options)
    assert [row.ids for row in given[:8]] == [row.ids for row in rows]
    copies, chats = given[8:], [row for row in rows if first(row.ids) and not row.seen]
    assert 0 < len(chats) < 8
    assert len(copies) == garbles * len(chats)
    for row, copy in zip(chats if garbles else [], copies, strict=True):
        start = first(row.ids)
        assert (len(copy), copy.ids[start:]) == (len(row), row.ids[start:])
        assert not copy.seen


@pytest.mark.filterwarnings("ignore:.* takes pictures, and none of")
def test_the_sweep_sees_half_of_the_chats_garbled_and_the_last_step_a_copy_of_each(
    vision, tmp_path, monkeypatch
):
    words = text_lines(8)
    lines = [{"prompt": word, "answer": str(i)} for i, word in enumerate(words)]
    chats = write_jsonl(tmp_path / "chats.jsonl", lines)
    swept, given = [], []
    spies = [(planning, "stream_of", swept, stream_of), (polish, "distill", given, distill)]
    for module, name, seen, real in spies:

        def spy(one, two, *rest, seen=seen, real=real, **options):
            seen.extend(next(x for x in (two, *rest) if isinstance(x, list)))
            return real(one, two, *rest, **options)

        monkeypatch.setattr(module, name, spy)
    options = {"calibration": str(chats), "samples": 8, "seq_len": 96, "ratio": 1.3}
    compress(*vision, tmp_path / "a", method=Adaptive(distill=1), **options)
    plain, copies = ([row.ids for row in some] for some in (given[:8], given[8:]))
    found = [row.ids for row in swept]
    assert found[1::2] == plain[1::2]
    assert len(copies) == 8
    differ = [
        sum(a != b for a, b in zip(*some, strict=True))
        for some in ((found[::2], plain[::2]), (copies, plain), (found[::2], copies[::2]))
    ]
    assert min(differ) > 0  # the two steps garble in different ways


def test_a_sweep_is_kept_for_these_pictures_alone(vision, tmp_path):
    """The calibration file stays the same; a picture that it names does not."""
    line = {"image": "it.png", "prompt": "one", "answer": "two"}
    source = write_jsonl(tmp_path / "c.jsonl", [line])
    options = {"ratio": 1.3, "calibration": str(source), "method": Adaptive(distill=0)}
    sweeps = tmp_path / "sweeps"
    digests = []
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / "it.png")
        out = tmp_path / f"{len(digests)}"
        digests.append(compress(*vision, out, sweeps=sweeps, **options).digest)
    assert digests[0] == digests[1] != digests[2]
    assert len(list(sweeps.iterdir())) == 2


PICTURE, BLUE = {"type": "image"}, {"type": "image", "path": "blue.png"}
NULLS = {"type": "image", "path": None, "text": None}
CALL = {"role": "assistant", "content": None, "tool_calls": []}


def asked(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "one"}]}]


def turns(said):
    return [{"from": "human", "value": said}, {"from": "gpt", "value": "two"}]


def test_conversations_are_messages():
    item = as_messages({"id": 7, "image": "a.png", "conversations": turns("one\n<image>\ntwo")}, "")
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    answer = {"role": "assistant", "content": "two"}
    messages = [{"role": "user", "content": parts}, answer]
    assert item == {"id": 7, "image": "a.png", "messages": messages}


@pytest.mark.parametrize(
    "line",
    [
        {"images": ["red.png", "blue.png"], "messages": asked(PICTURE, PICTURE)},
        {"images": None, "image": "red.png", "messages": asked(PICTURE, BLUE)},
        {"image": "red.png", "messages": asked(NULLS, BLUE)},
        {"messages": asked(PICTURE | {"image": "red.png"}, PICTURE | {"path": "blue.png"})},
        {"images": ["red.png", "blue.png"], "conversations": turns("<image>\n<image>one and")},
        {"images": ["red.png", "blue.png"], "conversations": turns("one<image> and <image>")},
    ],
)
def test_ways_to_give_pictures(vision, source, line):
    folder = Path(source).parent
    (row,) = calibration_rows(
        Calibration(write_jsonl(folder / "way.jsonl", [line]), **QUICK), vision[1]
    )
    red, blue = row.seen["pixel_values"]
    assert float(red[0].mean()) > float(red[2].mean())
    assert float(blue[0].mean()) < float(blue[2].mean())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"image": "red.png", "text": "one"}, "has 1 pictures, and neither prompt and answer nor"),
        ({"image": "red.png", "messages": asked()}, "has 1 pictures, and neither prompt and ans"),
        ({"messages": asked(PICTURE)}, "its messages have more parts of type image than pictures"),
        ({"images": ["red.png"] * 3, "messages": asked(PICTURE)}, "2 more pictures than its mes"),
        (
            {"image": "red.png", "prompt": None, "answer": "red"},
            "expected a text as prompt, got N",
        ),
        (
            {"image": "red.png", "prompt": "what", "answer": None},
            "expected a text as answer, got None",
        ),
        ({"messages": ["one", *asked(BLUE)]}, "the processor refuses it"),
        ({"image": "red.png", "conversations": turns("no place")}, "has 1 pictures, and neither"),
        (
            {"image": "red.png", "conversations": turns("<image><image>")},
            "its messages have more parts of type image",
        ),
    ],
)
def test_a_picture_belongs_somewhere(vision, source, line, reason):
    file = write_jsonl(Path(source).parent / "wrong.jsonl", [line])
    with pytest.raises(PictureError, match=rf"wrong\.jsonl:1: {reason}"):
        calibration_rows(Calibration(file, **QUICK), vision[1])


def test_what_a_turn_without_words_says_is_the_template_s_matter(source):
    seen = seen_in({"messages": [*asked(BLUE), CALL]}, Path(source).parent, "here")
    assert seen.messages[1] == CALL


@pytest.mark.parametrize("more", [{}, {"token_type_ids": torch.ones(1, 2)}])
def test_pictures_that_are_no_tensor_are_not_left_out(more):
    inputs = {"input_ids": torch.ones(1, 2), "pixel_values": [0.5], **more}
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(model_input_names=["pixel_values"]),
        apply_chat_template=lambda *_, **__: inputs,
    )
    with pytest.raises(PictureError, match=r"here: expected tensors .* got pixel_values \(list\)"):
        picture_row(processor, Seen([], "here"))


def test_what_cannot_be_seen_is_an_error_that_names_it(vision, source, tmp_path):
    base, tuned = vision
    line = {"image": "none.png", "prompt": "what", "answer": "that"}
    file = write_jsonl(tmp_path / "c.jsonl", [line])
    with pytest.raises(PictureError, match=r"c\.jsonl:1: expected a picture at .*none\.png"):
        compress(base, tuned, tmp_path / "a", ratio=1.3, calibration=str(file))
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"c\.jsonl:1: the processor refuses it"):
        compress(base, tuned, tmp_path / "a", ratio=1.3, calibration=str(file))
    with pytest.raises(
        CalibrationError, match=r"at most seq_len = 9 tokens, got \d+ with its pict"
    ):
        compress(base, tuned, tmp_path / "a", ratio=1.3, calibration=str(source), seq_len=9)
    blind = tmp_path / "blind"
    shutil.copytree(tuned, blind)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (blind / name).unlink(missing_ok=True)
    with pytest.raises(PictureError, match=r"blind: expected a processor for pictures"):
        compress(base, blind, tmp_path / "a", ratio=1.3, calibration=str(source))
    assert not list(tmp_path.glob("a*"))
    run = run_of(vision)
    run.model.config.image_token_id = None
    with pytest.raises(UnsupportedError, match=r"^LlavaForCond.* no image_token_id that tells"):
        stream_of(run, [Row([3], {"pixel_values": torch.ones(1, 3, SIZE, SIZE)})])
