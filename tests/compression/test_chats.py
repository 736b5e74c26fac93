"""Templates of vision-language models may take text only in parts; what is said must reach the model."""

import pytest
from tiny_pairs import make_tokenizer

from deltacome.chats import chat_text
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.evals.prompts import prompt_ids

PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRINGS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}"
    "{% endfor %}" + PARTS
)
SAID = "<|user|>what is one<end><|assistant|>one<end>"


@pytest.mark.parametrize("template", [PARTS, STRINGS, REFUSES])
def test_what_is_said_is_in_the_text(template, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [("user", "what is one "), ("assistant", "one")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert chat_text(tokenizer, messages) == SAID
    asked = tokenizer.decode(prompt_ids(tokenizer, "what is one "))
    assert asked == "<|user|>what is one<end><|assistant|>"

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"prompt": "what is one ", "answer": "one"}\n')
    (row,) = calibration_rows(Calibration(str(lines), 1, 99, 0), tmp_path)
    assert tokenizer.decode(row.ids) == SAID


def test_what_a_template_refuses_is_its_own_error():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(Exception, match="never"):
        chat_text(tokenizer, [{"role": "user", "content": "one"}])
