"""Where answers begin in chats, with the kinds of templates and tokenizers in use."""

import pytest
from tiny_pairs import make_tokenizer, text_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltacome.compression.answers import answers_from

TURNS = "{% for m in messages %}"
ADDED = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": TURNS
    + "<start>{{ m.role }}\n{{ m.content }}<end>\n"
    + ADDED
    + "<start>assistant\n{% endif %}",
    # No generation prompt is added: an answer follows the end of the question.
    "inst": TURNS
    + "{% if m.role == 'user' %}<start>[INST] {{ m.content }} [/INST]"
    + "{% else %} {{ m.content }}<end>{% endif %}{% endfor %}",
    # Marks in plain text, which a tokenizer that marks words by their space splits differently alone.
    "zephyr": TURNS + "<|{{ m.role }}|>\n{{ m.content }}<end>\n" + ADDED + "<|assistant|>\n{% endif %}",
    "closed": TURNS
    + "<|{{ m.role }}|>{{ m.content }}\n"
    + ADDED
    + "<|assistant|>{% else %}<end>{% endif %}",
    "words": TURNS
    + "{% if m.role == 'user' %}USER: {{ m.content }} "
    + "{% else %}ASSISTANT: {{ m.content }}<end>{% endif %}"
    + ADDED
    + "ASSISTANT:{% endif %}",
}  # fmt: skip
CHAT = [
    {"role": "user", "content": "what is one plus two"},
    {"role": "assistant", "content": "the sum is three"},
    {"role": "user", "content": "what is two plus two"},
    {"role": "assistant", "content": "four of one"},
]


def by_spaces():
    """A tokenizer that marks words by the space before them, and puts one before the first."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<start>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace()
    lines = [
        *text_lines(50),
        "[INST] [/INST]\n<|user|>\n<|assistant|>\nUSER: ASSISTANT:system assistant",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<start>"], show_progress=False
    )
    inner.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", bos_token="<start>")


def test_a_template_that_takes_parts_alone(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        TURNS
        + "<|{{ m.role }}|>{% for part in m.content %}"
        + "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<end>"
        + ADDED
        + "<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    row = tokenizer("<|user|>what is one<end><|assistant|>one<end>", add_special_tokens=False)[
        "input_ids"
    ]
    assert tokenizer.decode(row[answers_from(tmp_path)(row) + 1 :]) == "one<end>"


@pytest.mark.parametrize("make", [make_tokenizer, by_spaces])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_last_answer_is_found(template, make, tmp_path):
    tokenizer = make()
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(tmp_path)
    first = answers_from(tmp_path)
    for chat in (CHAT, CHAT[:2]):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer.decode(row[first(row) + 1 :])
        assert answer.strip().removesuffix("<end>").strip() == chat[-1]["content"]
    assert first(tokenizer("what is one plus two", add_special_tokens=False)["input_ids"]) == 0


def test_where_it_cannot_be_told_a_warning_says_so(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS + "{{ m.content }} {% endfor %}"  # nothing separates the turns
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="where answers begin .* cannot be told"):
        first = answers_from(tmp_path)
    assert first(tokenizer("what is one plus two")["input_ids"]) == 0
