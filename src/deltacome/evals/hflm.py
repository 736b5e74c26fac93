"""A loaded model as EleutherAI's harness wants it: its own `HFLM`, told what it cannot know.

The harness reads limits from the model's configuration, pads with the tokenizer's token and writes chats
by the tokenizer's method. A base that runs as its fine-tune has another configuration, may lack tokens of
the fine-tune's tokenizer, and a vision-language model's template may write nothing of a plain text.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from deltacome.chats import chat_text
from deltacome.errors import DeltaError
from deltacome.evals.divergence import vocabulary


def wrapped(model: Any, tokenizer: Any, batch_size: int, positions: int | None) -> Any:
    """The model for the harness.

    Args:
        positions: tokens that prompt and answer can have; None: what the model's configuration says.
    """
    _pad_with_known(tokenizer, vocabulary(model))
    wrap: Any = HFLM  # its decorators hide its parameters
    lm = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=positions)
    lm.apply_chat_template = functools.partial(_chat, tokenizer)
    if not sys.stderr.isatty():
        for name in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
            setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
    return lm


def quiet() -> None:
    """Silences the harness's log, except for the first warning of each kind that prompts are cut off."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    log = logging.getLogger("lm_eval.models.huggingface")
    log.setLevel(logging.WARNING)
    if not any(isinstance(one, _CutOffOnce) for one in log.filters):
        log.addFilter(_CutOffOnce())


class _CutOffOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.lineno not in self.seen
        self.seen.add(record.lineno)
        return record.levelno >= logging.ERROR or (new and "runcat" in record.getMessage())


def _pad_with_known(tokenizer: Any, size: int) -> None:
    """Pads with a token that a model of `size` tokens has: it is masked, so any of them will do."""
    ends = tokenizer.eos_token_id, *tokenizer.all_special_ids
    known = [token for token in ends if token is not None and token < size]
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size and known:
        tokenizer.pad_token_id = known[0]


def _chat(tokenizer: Any, history: Sequence[Any], add_generation_prompt: bool = True) -> str:
    how = {"continue_final_message": not add_generation_prompt}
    try:
        return chat_text(tokenizer, history, add_generation_prompt=add_generation_prompt, **how)
    except Exception as error:  # a template is a program
        raise DeltaError(f"lm-eval: the chat template refuses a prompt: {error}") from error
