"""Turns a question into a model's input, in one place, so that training and every score use the same.

A tokenizer with a chat template gets the question as the one user message of a conversation;
a tokenizer without one gets the bare text. A question with pictures goes through the
vision-language model's processor, whose template puts the pictures first. No system message is added
here: whatever a template adds by itself is part of the model it belongs to.
"""

from typing import Any

from deltacome.chats import chat_text
from deltacome.errors import DeltaError, PictureError
from deltacome.evals.tasks import Question
from deltacome.pictures import Seen, picture_row, question
from deltacome.rows import Row


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids up to where the answer begins."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    asked = [{"role": "user", "content": prompt}]
    try:
        text = chat_text(tokenizer, asked, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        raise DeltaError(f"chat template: it refuses {prompt!r:.80}: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_row(tokenizer: Any, asked: Question, processor: Any = None) -> Row:
    """The model's input up to where its answer begins.

    Raises:
        PictureError: there are pictures but no processor, or the processor refuses them.
    """
    if not asked.pictures:
        return Row(prompt_ids(tokenizer, asked.prompt))
    where = str(asked.pictures[0])
    if processor is None:
        raise PictureError(f"{where}: expected a processor for pictures, got none")
    parts = [{"type": "image", "path": str(file)} for file in asked.pictures]
    return picture_row(processor, Seen([question(asked.prompt, parts)], where), opens=True)


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer, without the token that ends it."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation config."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [of_model]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})
