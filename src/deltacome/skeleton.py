"""The model of a configuration, without weights, and where stored tensors go in it.

transformers gives parameters other names than checkpoints do (`language_model.model.…` is
`model.language_model.…` in memory) and stacks some (the matrices of experts). Its own loading rules say
where each tensor goes, so no family is named here; a rule that does more than rename and stack is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from deltacome.errors import CheckpointError, DeltaError, MismatchError, UnsupportedError
from deltacome.format.fields import tagged_floats


@dataclass(frozen=True)
class Target:
    """Where a stored tensor goes: a parameter, or rows of one expert in a parameter of all experts."""

    parameter: str
    expert: int | None = None
    """Index along dimension 0 of the parameter; None: the tensor is the whole parameter."""
    part: int = 0
    """Which of `parts` equal runs of the expert's rows: gate and up share one parameter."""
    parts: int = 1

    def view(self, parameter: Tensor) -> Tensor:
        """The part of a parameter that the tensor fills."""
        if self.expert is None:
            return parameter
        rows = parameter.shape[1] // self.parts
        return parameter[self.expert, self.part * rows : (self.part + 1) * rows]


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint; code that comes with it is not run.

    Raises:
        CheckpointError: there is none, or transformers does not know its model type.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration runs through a library's code: any kind of error
        raise CheckpointError(f"{folder}: expected a model configuration: {error}") from error


def load_tokenizer(
    source: str | Path, revision: str | None = None, *, refused: type[DeltaError]
) -> Any:
    """The tokenizer of a folder or of a repository on the Hub; code that comes with it is not run.

    Raises:
        DeltaError: of the kind `refused`, if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # which one depends on the kind of tokenizer that is broken
        raise refused(f"{source}: expected a tokenizer: {error}") from error


def parse_config(document: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that a parsed `config.json` stands for.

    Raises:
        CheckpointError: transformers does not know its model type, or a value is invalid for it.
    """
    try:
        return type(AutoConfig.for_model(document["model_type"])).from_dict(tagged_floats(document))
    except Exception as error:  # as above
        raise CheckpointError(f"expected a model configuration: {error}") from error


def model_class(config: PreTrainedConfig, where: str | Path) -> Any:
    """The class of transformers that a configuration names, or `AutoModelForCausalLM` if it names none.

    Raises:
        CheckpointError: transformers lacks it, or it takes another configuration.
    """
    names = config.architectures or []
    if not isinstance(names, list) or not isinstance(names[0] if names else "", str):
        raise CheckpointError(
            f"{where}: expected a model of transformers: architectures: expected a list of names, got "
            f"{names!r:.80}"
        )
    kind: Any = getattr(transformers, names[0], None) if names else AutoModelForCausalLM
    if kind is None:
        raise CheckpointError(
            f"{where}: expected a model of transformers, got {names[0]}: code that comes with a "
            "checkpoint is not run"
        )
    if not isinstance(config, getattr(kind, "config_class", None) or PreTrainedConfig):
        raise CheckpointError(
            f"{where}: expected a configuration of {names[0]}, got one of {config.model_type}"
        )
    return kind


def make_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, where: str | Path
) -> PreTrainedModel:
    """The model of a configuration, without weights; its buffers (rotary tables) are real.

    Args:
        config: names the class; one that names none is taken for a causal language model's.
        dtype: that of the passes to come, which some buffers (the scale of an embedding) follow.
        where: what an error names.

    Raises:
        CheckpointError: transformers lacks the class, or cannot build it from this configuration.
    """
    kind = model_class(config, where)
    try:
        with init_empty_weights(include_buffers=False):
            build = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
            model = build(config, dtype=dtype)
        model.tie_weights()  # out here: within the context, each place gets a parameter of its own
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: expected a model of transformers: {error}") from error
    for part in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False  # of training's loss; passes block by block have none
    return model.eval()


def targets(model: nn.Module, names: Iterable[str]) -> dict[str, Target]:
    """Where each tensor of a checkpoint goes in a model; a name that no rule knows stays as it is.

    Raises:
        UnsupportedError: a rule does more than rename and stack.
    """
    if not isinstance(model, PreTrainedModel):
        return {name: Target(name) for name in names}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    there = model.state_dict()
    found = {}
    for name in names:
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, there
        )
        if pattern is None:
            found[name] = Target(parameter)
        else:
            found[name] = _stacked(name, parameter, pattern, converters)
    return found


def _stacked(name: str, parameter: str, pattern: str, converters: list[WeightConverter]) -> Target:
    rule = next(rule for rule in converters if pattern in rule.source_patterns)
    steps = [type(step).__name__ for step in rule.operations]
    number = re.search(pattern.replace(".", r"\.").replace("*", r"(\d+)"), name)
    stacks = steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
    if not stacks or number is None or not number.groups():
        raise UnsupportedError(f"{name}: goes to {parameter} by {', '.join(steps)}: not covered")
    part = rule.source_patterns.index(pattern)
    return Target(parameter, int(number[1]), part, len(rule.source_patterns))


def first_stack(model: nn.Module) -> str | None:
    """The first parameter that checkpoints may store as one tensor for each expert, if any."""
    rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    ends = [t for r in rules if isinstance(r, WeightConverter) for t in r.target_patterns]
    matches = [re.compile(end.replace(".", r"\.") + "$").search for end in ends]
    names = (name for name, _ in model.named_parameters())
    return next((name for name in names if any(match(name) for match in matches)), None)


def set_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in place of a parameter, or of a buffer, which keeps its dtype."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._buffers:
        module._buffers[attribute] = value.to(getattr(module, attribute).dtype)
    else:
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)


def set_buffers(
    model: nn.Module, where: Mapping[str, Target], read: Callable[[str], Tensor]
) -> None:
    """Puts stored tensors in place of saved buffers.

    A pass needs them as it needs weights: running statistics of a tower, scales of a block.

    Args:
        model: a skeleton.
        where: the targets of a checkpoint's tensors.
        read: gives one by name.
    """
    there = model.state_dict(keep_vars=True)
    for name, target in where.items():
        value = there.get(target.parameter)
        if value is not None and not isinstance(value, nn.Parameter):
            set_weight(model, target.parameter, read(name))


def set_part(model: nn.Module, target: Target, value: Tensor) -> None:
    """Puts a tensor where it goes: in place of a parameter, or into rows of one."""
    if target.expert is None:
        set_weight(model, target.parameter, value)
        return
    parameter = model.get_parameter(target.parameter)
    if parameter.is_meta:
        parameter = torch.zeros(parameter.shape, dtype=value.dtype, device=value.device)
        set_weight(model, target.parameter, parameter)
    target.view(parameter.data).copy_(value)


def check_names(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: Mapping[str, Target]
) -> None:
    """Checks that every parameter of the model has its tensors in the checkpoint, of the right shape.

    Args:
        model: a skeleton.
        shapes: of the checkpoint's tensors, by name.
        where: their targets.

    Raises:
        MismatchError: parameters are missing, or a tensor has another shape; the model's code or
            configuration and the checkpoint disagree.
    """
    aliases: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    filled = {target.parameter for target in where.values()}
    missing = [names[0] for names in aliases.values() if not filled & set(names)]
    if missing:
        raise MismatchError(
            f"{len(missing)} parameters of {type(model).__name__} are not in the checkpoint, "
            f"the first is {min(missing)}"
        )
    _check_experts(parameters, where)
    for name, target in where.items():
        if target.parameter in parameters:
            expected = tuple(target.view(parameters[target.parameter]).shape)
            if shapes[name] != expected:
                raise MismatchError(
                    f"{name}: the configuration gives shape {expected}, the checkpoint has {shapes[name]}"
                )


def _check_experts(parameters: Mapping[str, Tensor], where: Mapping[str, Target]) -> None:
    """Checks that each stacked expert has its tensors: rows of one without would stay zeros."""
    found: dict[str, set[tuple[int, int]]] = {}
    parts: dict[str, int] = {}
    for target in where.values():
        if target.expert is not None and target.parameter in parameters:
            found.setdefault(target.parameter, set()).add((target.expert, target.part))
            parts[target.parameter] = target.parts
    for name, there in found.items():
        experts = len(parameters[name])
        expected = {(e, part) for e in range(experts) for part in range(parts[name])}
        if there != expected:
            raise MismatchError(
                f"{name}: the configuration gives {experts} experts, {len(expected)} tensors, the "
                f"checkpoint has {len(there)}; the first to differ is expert {min(there ^ expected)[0]}"
            )


def is_causal(model: nn.Module) -> bool:
    """Whether a model reads text from left to right through one list of blocks."""
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    kinds |= {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    config: Any = getattr(model, "config", None)
    return type(model).__name__ in kinds and not getattr(config, "is_encoder_decoder", False)


def picture_token(model: nn.Module) -> int | None:
    """The id of the tokens that a picture takes the place of, if the model's configuration names one."""
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    return token if isinstance(token, int) else None


def parameter_names(model: nn.Module, where: Mapping[str, Target]) -> dict[str, str]:
    """Every name of a parameter or saved buffer → the stored tensor that is the whole of it."""
    whole = {target.parameter: name for name, target in where.items() if target.expert is None}
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    names = {}
    for group in aliases.values():
        stored = [whole[name] for name in group if name in whole]
        names |= {name: whole.get(name, stored[0]) for name in group if stored}
    return names


def ignored(model: nn.Module, name: str) -> bool:
    """Whether a stored tensor is a table that the model computes itself, as in old checkpoints."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"}
    return any(re.search(pattern, name) for pattern in patterns)
