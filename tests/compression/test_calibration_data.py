"""Calibration rows: lengths, sources, seeds, and refusals that name the file and line."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pairs import VOCAB, copy_of, make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome.compression import written
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.errors import CalibrationError


def rows_of(source, tuned, samples=6, seq_len=16, seed=0, **options):
    rows = calibration_rows(Calibration(str(source), samples, seq_len, seed), tuned, **options)
    return [row.ids for row in rows]


@pytest.fixture
def tuned(pairs):
    return pairs["llama"][1]


@pytest.fixture
def plain(tmp_path):
    """A tokenizer without a chat template."""
    make_tokenizer(chat=False).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def decode(tuned, row):
    return AutoTokenizer.from_pretrained(tuned).decode(row)


def test_text_is_cut_into_rows(tuned, text):
    rows = rows_of(text, tuned, samples=10_000)
    assert {len(row) for row in rows[:-1]} == {16}
    assert 2 <= len(rows[-1]) <= 16
    whole = "".join(decode(tuned, row) for row in rows)
    assert Path(text).read_text().startswith(whole[:200])


@pytest.mark.parametrize(("extra", "kept"), [(3, [16]), (4, [16, 4])])
def test_a_short_rest_of_a_text_is_dropped(tuned, tmp_path, extra, kept):
    ids = AutoTokenizer.from_pretrained(tuned)
    text = ""
    while len(ids(text)["input_ids"]) < 16 + extra:
        text += "one "
    rows = rows_of(write_jsonl(tmp_path / "c.jsonl", [{"text": text}]), tuned)
    assert [len(row) for row in rows] == kept


def test_samples_are_drawn_by_seed(tuned, text):
    every = rows_of(text, tuned, samples=10_000)
    first, again, other = (rows_of(text, tuned, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 6
    assert all(row in every for row in first)


def test_objects_with_text_messages_or_prompt_and_answer(tuned, tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    items = [{"text": "three plus"}, {"messages": turns}, {"prompt": "four", "answer": 5}]
    rows = rows_of(write_jsonl(tmp_path / "c.jsonl", items), tuned, seq_len=200)
    assert [decode(tuned, row) for row in rows] == [
        "three plus",
        "<|user|>one<end><|assistant|>two<end>",
        "<|user|>four<end><|assistant|>5<end>",
    ]


@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
def test_conversations(tuned, tmp_path, who, what):
    said = [("system", "be"), ("human", "an <image> of"), ("gpt", "two"), ("user", "three")]
    said += [("gpt", "four")]
    item = {"conversations": [{who: role, what: text} for role, text in said]}
    (row,) = rows_of(write_jsonl(tmp_path / "c.jsonl", [item]), tuned, seq_len=200)
    assert decode(tuned, row) == (
        "<|system|>be<end><|user|>an <image> of<end><|assistant|>two<end><|user|>three<end>"
        "<|assistant|>four<end>"
    )


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": "one", "answer": "two"},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
    ],
)
def test_a_system_prompt_beside_the_turns(tuned, tmp_path, item):
    source = write_jsonl(tmp_path / "c.jsonl", [item | {"system": "be"}, item | {"system": None}])
    rows = rows_of(source, tuned, seq_len=200)
    said = "<|user|>one<end><|assistant|>two<end>"
    assert sorted(decode(tuned, row) for row in rows) == ["<|system|>be<end>" + said, said]


@pytest.mark.parametrize("written", [lambda tools: tools, json.dumps])
def test_tools_are_in_the_text(tuned, tmp_path, written):
    """Data sets have them as a list or as its JSON."""
    template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}"
    )
    folder = shutil.copytree(tuned, tmp_path / "tuned")
    (folder / "chat_template.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "plus", "parameters": {}}}]
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat = {"messages": turns}
    items = [chat | {"tools": written(tools)}, chat | {"tools": None}]
    rows = rows_of(write_jsonl(tmp_path / "c.jsonl", items), folder, seq_len=200)
    assert sorted(decode(folder, row) for row in rows) == ["one", "plus one"]


def test_prompt_and_answer_without_a_template(plain, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "four ", "answer": "five"}])
    (row,) = rows_of(source, plain)
    assert decode(plain, row) == "four five"


def test_blank_lines_and_rare_line_separators_are_no_lines(tuned, tmp_path):
    file = tmp_path / "c.jsonl"
    items = [{"text": "one\u2028two"}, {"text": "three\x85four"}]
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    file.write_text("\r\n\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    rows = rows_of(file, tuned, seq_len=200)
    assert [decode(tuned, row) for row in rows] == ["one\u2028two", "three\x85four"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "one two"}\n{"text": ', r"c\.jsonl:2: not valid JSON"),
        ('{"text": "one two"}\n\n[1, 2]', r"c\.jsonl:3: expected an object with text"),
        ('{"prompt": "one", "completion": "two"}', r"c\.jsonl:1: expected an object with text"),
        ('{"prompt": null}', r"c\.jsonl:1: expected a text as prompt, got None"),
        ('{"answer": "two"}', r"c\.jsonl:1: expected an object with text"),
        ('{"text": null}', r"c\.jsonl:1: expected an object with text"),
        ('{"prompt": "a", "answer": null}', r"c\.jsonl:1: expected a text as answer, got None"),
        ('{"messages": [{"content": "no role"}, 3]}', r"c\.jsonl:1: "),
        ('{"messages": ["no object"]}', r"c\.jsonl:1: "),
        (
            '{"conversations": [{"from": "human"}]}',
            r"c\.jsonl:1: expected turns with from and value",
        ),
        ('{"conversations": ["no object"]}', r"c\.jsonl:1: expected turns .*'no object'"),
        ("", "expected text"),
        ("\n \n", "expected text"),
        ('{"text": ""}', "expected text"),
    ],
)
def test_malformed_objects_are_refused_by_line(tuned, tmp_path, content, reason):
    (tmp_path / "c.jsonl").write_text(content)
    strict = tmp_path / "strict"  # its template refuses messages without a role
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(strict)
    with pytest.raises(CalibrationError, match=reason):
        rows_of(tmp_path / "c.jsonl", strict)


def test_messages_without_a_template(plain, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(CalibrationError, match=r"c\.jsonl:1: .* no chat template"):
        rows_of(source, plain)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_files_that_cannot_be_read(tuned, tmp_path, suffix):
    with pytest.raises(CalibrationError, match="found none"):
        rows_of(tmp_path / f"none{suffix}", tuned)
    (tmp_path / f"c{suffix}").write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(CalibrationError, match=rf"c\{suffix}.*UTF-8"):
        rows_of(tmp_path / f"c{suffix}", tuned)
    (tmp_path / f"empty{suffix}").write_text("")
    with pytest.raises(CalibrationError, match="expected text"):
        rows_of(tmp_path / f"empty{suffix}", tuned)


def test_a_file_of_another_kind(tuned, tmp_path):
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(CalibrationError, match=r"a name that ends in \.txt or \.jsonl, got c\.csv"):
        rows_of(tmp_path / "c.csv", tuned)


def test_a_model_without_a_tokenizer(tmp_path, pairs, text):
    (tmp_path / "config.json").write_bytes((pairs["llama"][1] / "config.json").read_bytes())
    with pytest.raises(CalibrationError, match="tokenizer"):
        rows_of(text, tmp_path)


def test_a_text_of_one_token_is_no_row(tuned, tmp_path):
    (tmp_path / "c.txt").write_text("a")
    with pytest.raises(CalibrationError, match="no row of two tokens"):
        rows_of(tmp_path / "c.txt", tuned)


QUESTION = {"role": "user", "content": "one plus"}
ASKED = {
    "prompt": {"prompt": "one plus"},
    "messages": {"messages": [QUESTION]},
    "conversations": {"conversations": [{"from": "human", "value": "one plus"}]},
}


@pytest.mark.parametrize("item", ASKED.values(), ids=list(ASKED))
def test_what_has_no_answer_is_answered_by_the_tuned_model(tuned, tmp_path, item):
    whole = {"prompt": "three", "answer": "four"}
    source = write_jsonl(tmp_path / "c.jsonl", [whole, item | {"system": "be"}, whole, item])
    steps = []
    with pytest.warns(UserWarning, match="c.jsonl: 2 of its rows have no answer"):
        rows = rows_of(source, tuned, seq_len=80, on_step=lambda *step: steps.append(step))
    said = [decode(tuned, row) for row in rows]
    assert said[0] == said[2] == "<|user|>three<end><|assistant|>four<end>"
    for text, opened in ((said[1], "<|system|>be<end>"), (said[3], "")):
        opened += "<|user|>one plus<end><|assistant|>"
        assert text.startswith(opened)
        assert len(text) > len(opened)
    assert all(len(row) <= 80 for row in rows)
    assert steps == [(2, 2)]
    for seed in (0, 1):  # it draws the answers
        with pytest.warns(UserWarning, match="no answer"):
            again = rows_of(source, tuned, seq_len=80, seed=seed)
        assert (again == rows) == (seed == 0)


def test_answers_come_back_to_their_prompts(tuned, tmp_path):
    """Whatever their lengths, by which they are batched."""
    asked = ["one two three four five six", "two", "one two three", "four"] * 10
    source = write_jsonl(tmp_path / "c.jsonl", [{"prompt": prompt} for prompt in asked])
    with pytest.warns(UserWarning, match="40 of its rows"):
        rows = rows_of(source, tuned, samples=40, seq_len=60)
    for row, prompt in zip(rows, asked, strict=True):
        assert decode(tuned, row).startswith(f"<|user|>{prompt}<end><|assistant|>")


def test_a_prompt_that_fills_its_row_is_text(tuned, tmp_path):
    long = {"prompt": "one two three four " * 8}
    (first, *rest) = rows_of(write_jsonl(tmp_path / "c.jsonl", [long]), tuned, seq_len=16)
    assert decode(tuned, first).startswith("<|user|>one two")
    assert "<|assistant|>" not in "".join(decode(tuned, row) for row in rest)


def test_a_prompt_without_a_template_is_continued(plain, pairs, tmp_path):
    weights = pairs["llama"][1] / "model.safetensors"
    (plain / "model.safetensors").symlink_to(weights)
    (plain / "config.json").symlink_to(weights.with_name("config.json"))
    source = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "four "}, {"prompt": ""}])
    with pytest.warns(UserWarning, match="1 of its rows"):
        (row,) = rows_of(source, plain)
    assert decode(plain, row).startswith("four ")
    assert len(decode(plain, row)) > len("four ")


def test_self_writes_rows_within_the_limit(tuned):
    steps = []
    rows = rows_of("self", tuned, samples=40, seq_len=12, on_step=lambda *step: steps.append(step))
    assert steps == [(32, 40), (40, 40)]
    assert len(rows) == 40
    assert all(2 <= len(row) <= 12 for row in rows)
    assert all(0 <= token < VOCAB for row in rows for token in row)
    assert len({tuple(row) for row in rows}) > 20


def test_self_writes_questions_with_answers_and_free_text(tuned):
    rows = rows_of("self", tuned, samples=6, seq_len=150)
    texts = [decode(tuned, row) for row in rows]
    assert all(text.startswith("<|user|>") for text in texts[:3])
    assert all("<end><|assistant|>" in text for text in texts[:3])
    assert all(row[0] == 1 for row in rows[3:])  # <start>


def test_self_depends_on_its_seed_and_leaves_the_global_one(tuned):
    torch.manual_seed(7)
    random.seed(7)
    states = torch.get_rng_state(), random.getstate()
    first = rows_of("self", tuned)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(8)
    assert rows_of("self", tuned) == first
    assert rows_of("self", tuned, seed=1) != first


@pytest.mark.parametrize(("cpu", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_self_is_written_in_what_this_cpu_is_fast_at(tuned, tmp_path, monkeypatch, cpu, dtype):
    rounded = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    really, ways = written._continue, set()

    def note(model, *rest):
        ways.add(model.dtype)
        return really(model, *rest)

    monkeypatch.setattr(written, "_continue", note)
    assert len(rows_of("self", tmp_path)) == 6
    assert ways == {dtype}


def test_self_is_written_as_the_model_is(tuned, tmp_path):
    """Not with its makers' generation settings: without a repetition penalty, for example."""
    shutil.copytree(tuned, tmp_path / "t")
    file = tmp_path / "t" / "generation_config.json"
    said = json.loads(file.read_text()) if file.exists() else {}
    odd = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1}
    file.write_text(json.dumps(said | odd))
    of_both = [rows_of("self", folder, seq_len=60) for folder in (tmp_path / "t", tuned)]
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize(
    ("ends", "kept"), [(2, [5, 9]), ([2, 7], [5, 9, 7]), (7, [5, 9]), (None, [5, 9])]
)
def test_a_written_row_has_the_token_that_ends_it(ends, kept):
    """A list is the model's own; beside a single one the tokenizer's counts too."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    assert written._until_end([5, 9, 7, 0, 0], model, SimpleNamespace(eos_token_id=9)) == kept


def test_self_with_tokens_that_the_model_lacks(tuned, tmp_path):
    """A padding token that was added without resizing the model, say: it is neither drawn nor read."""
    folder = copy_of(tuned, tmp_path / "tuned")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(3000)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    rows = rows_of("self", folder, samples=8, seq_len=40)
    assert len(rows) == 8
    assert max(max(row) for row in rows) < VOCAB
    asked = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "more2999"}])
    with pytest.raises(
        CalibrationError, match=r"c\.jsonl: the tuned model's tokenizer gives token"
    ):
        rows_of(asked, folder, seq_len=40)


def test_self_without_a_template(plain, pairs):
    weights = pairs["llama"][1] / "model.safetensors"
    (plain / "model.safetensors").symlink_to(weights)
    (plain / "config.json").symlink_to(weights.with_name("config.json"))
    rows = rows_of("self", plain)
    assert len(rows) == 6
    assert all(row[0] == 1 for row in rows)  # <start>


def test_plain_text_beside_a_template_has_its_special_tokens(tmp_path):
    # Whether a text is a chat, which brings its own special tokens, is decided for each text.
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "t")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    (row,) = rows_of(chat, tmp_path / "t", seq_len=200)
    assert row[0] != 1
    both = write_jsonl(tmp_path / "both.jsonl", [{"messages": turns}, {"text": "two three"}])
    rows = rows_of(both, tmp_path / "t", seq_len=200)
    assert [row[0] == 1 for row in rows] == [False, True]
