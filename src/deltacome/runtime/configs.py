"""Whether base and tuned model run the same code, by their configurations: a delta is of weights only."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltacome.errors import UnsupportedError
from deltacome.format.fields import tagged_floats

Config = dict[str, Any]

HARMLESS = {
    # Names, bookkeeping, and what only loading or training reads.
    *("_name_or_path", "transformers_version", "architectures", "model_type", "auto_map"),
    *("dtype", "torch_dtype", "quantization_config", "_attn_implementation", "pretraining_tp"),
    *("task_specific_params", "id2label", "label2id", "num_labels", "problem_type"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "dropout"),
    *("embd_pdrop", "resid_pdrop", "attn_pdrop", "neftune_noise_alpha", "gradient_checkpointing"),
    *("router_aux_loss_coef", "router_jitter_noise", "tokenizer_class"),
    *("unsloth_version", "unsloth_fixed"),
    # What is returned, not what is computed.
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    "output_router_logits",
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    # Attaching takes care of these.
    *("vocab_size", "tie_word_embeddings"),
}
"""Fields of a configuration that may differ while base and tuned model compute the same."""
MAX_COUNT = 1 << 16
"""Largest count of a tuned configuration that is read even if the base's is smaller."""


def check_config(model: nn.Module, tuned_config: Config | None) -> Any:
    """Checks that base and tuned model run the same code: attaching changes weights only.

    Returns:
        The tuned configuration as an object, without harmless fields; None if none is known.

    Raises:
        UnsupportedError: names the field, the tuned model's value and the base's.
    """
    base: Any = getattr(model, "config", None)
    if tuned_config is None or not hasattr(base, "to_dict"):
        return None
    if tuned_config.get("model_type", base.model_type) != base.model_type:
        raise UnsupportedError(
            f"model_type: the tuned model has {tuned_config['model_type']!r:.100}, the base "
            f"{base.model_type!r}"
        )
    _check_counts(tuned_config, base, "")
    try:  # as this transformers reads it, with defaults filled in as for the base
        tuned = type(base).from_dict(_telling(tagged_floats(tuned_config)))
    except Exception as error:  # a library's code, which may raise anything
        raise UnsupportedError(f"tuned_config.json: not a model configuration: {error}") from error
    _compare(_plain(tuned), _plain(base), "")
    return tuned


def _telling(document: Config) -> Config:
    """A parsed `config.json` without its harmless fields, at every level.

    A configuration's class does work for some of them: it turns a number of labels into a list of their
    names. Fields that decide on a class or on a head stay.
    """
    return {
        key: _telling(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if key not in HARMLESS - {"model_type", "vocab_size", "tie_word_embeddings"}
    }


def _check_counts(tuned: Config, base: Any, where: str) -> None:
    """Refuses counts far above the base's before anything makes lists that long (of layers, say).

    Args:
        tuned: a parsed `config.json`, or a part of it.
        base: the configuration to compare it with.
        where: which part, as a prefix of its fields' names.
    """
    parts = getattr(base, "sub_configs", {})
    text = base.get_text_config(decoder=True) if hasattr(base, "get_text_config") else base
    for key, ours in tuned.items():
        theirs = getattr(base, key, getattr(text, key, None))  # its fields may lie one level up
        if key in parts and isinstance(ours, dict) and theirs is not None:
            _check_counts(ours, theirs, f"{where}{key}.")
        elif (key in parts and ours and theirs is None) or (
            isinstance(ours, int)
            and isinstance(theirs, int)
            and key not in HARMLESS | {"max_position_embeddings"}
            and ours > max(theirs, MAX_COUNT)
        ):
            raise _differs(where + key, ours, theirs)


def _plain(config: Any) -> Config:
    return {key: value for key, value in config.to_dict().items() if key not in HARMLESS}


def _compare(tuned: Config, base: Config, where: str) -> None:
    rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
    for key in sorted(tuned.keys() | base.keys()):
        ours, theirs = tuned.get(key), base.get(key)
        if ours == theirs or key in HARMLESS:
            continue
        if key == "max_position_embeddings" and rope.get("rope_type", "default") == "default":
            continue  # a limit that plain rotary embeddings do not use
        if isinstance(ours, dict) and isinstance(theirs, dict):
            _compare(ours, theirs, f"{where}{key}.")
            continue
        raise _differs(where + key, ours, theirs)


def _differs(key: str, ours: Any, theirs: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{key}: the tuned model has {ours!r:.500}, the base {theirs!r:.500}; attaching changes weights, "
        "not the model's code: set it on the base's configuration, or merge"
    )
