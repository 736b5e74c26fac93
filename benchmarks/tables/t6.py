"""Table 6: a compressed full fine-tune against LoRA fine-tuning of equal bytes.

LoRA (Hu et al. 2021, arXiv 2106.09685) on all linears of the blocks, of the rank whose 16-bit adapter has
as many bytes as the delta, trained on the same questions for the same number of steps.
"""

from __future__ import annotations

import json
import math
from typing import Any

import cells as md
import torch
from lab import Lab, Variant, device, hash_of, say
from rows import RATIO, main_rows
from safetensors.torch import load_file, save_file

BATCH, RATE = 24, 5e-4


def make(lab: Lab) -> str:
    rows = []
    for task in lab.size.side:
        deltas = [row for row in main_rows(lab.size) if row[2] == RATIO and row[1].calibrates]
        name, method, ratio = deltas[-1]
        delta = lab.cell(task, method, ratio)
        lora, rank = _lora(lab, task, delta["bytes"])
        tuned = lab.measure(task, lab.dense(lab.tenant(task)))
        found = {"full fine-tune": tuned, f"its delta, {name}": delta, f"LoRA of rank {rank}": lora}
        for label, cell in found.items():
            rows.append([f"{task}: {label}", *md.figures(cell)])
    header = ["", *md.SIZES, "score %", "KL task", "KL text"]
    note = (
        "A LoRA is another model, not a copy of the fine-tune: its KL to the fine-tune measures how far "
        "apart two trainings end up."
    )
    return "## T6: LoRA fine-tuning at equal bytes\n\n" + md.table(header, rows) + f"\n\n{note}"


def _lora(lab: Lab, task: str, nbytes: int) -> tuple[dict[str, Any], int]:
    from peft import LoraConfig, get_peft_model

    inside = [n for n, p in lab.model.named_parameters() if p.ndim == 2 and ".layers." in n]
    sizes = [sum(lab.model.get_parameter(name).shape) for name in inside]
    rank = max(1, nbytes // (2 * sum(sizes)))
    key = hash_of(
        lab.dense(lab.base).key, lab.dense(lab.tenant(task)).key, rank, lab.size.steps, BATCH, RATE
    )
    file = lab.work / "lora" / f"{task}-{key}.safetensors"
    if not file.exists():
        say(f"training a LoRA of rank {rank} on {task}, {lab.size.steps} steps")
        with lab.weights(lab.dense(lab.base)) as model:
            targets = sorted({name.split(".")[-2] for name in inside})
            torch.manual_seed(0)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            adapted: Any = get_peft_model(model, config)
            _train(lab, task, adapted)
            layers: Any = adapted.base_model.model
            values = {}
            for name in inside:
                layer = layers.get_submodule(name.removesuffix(".weight"))
                weight = layer.weight + layer.get_delta_weight("default")
                values[name] = weight.detach().bfloat16().cpu()
            adapted.unload()
            model.requires_grad_(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        save_file(values, partial)
        partial.replace(file)
    base = lab.dense(lab.base)
    changed = load_file(file)
    nbytes = 2 * rank * sum(sizes)
    total = sum(2 * parameter.numel() for parameter in lab.model.parameters())
    variant = Variant(
        hash_of(base.key, file.name),
        lambda: ((name, changed.get(name, value)) for name, value in base.weights()),
        nbytes,
        total / nbytes,
    )
    return lab.measure(task, variant), rank


def _train(lab: Lab, task: str, model: Any) -> None:
    """The loop of `examples/tenants/finetune.py`, with the same questions, for the adapter alone."""
    from finetune import CPU_PASSES, Run, Stream, backward, learning_rate

    said = json.loads((lab.tenant(task) / "training.json").read_text())
    steps, tokenizer = said["steps"], lab.tokenizer(task)
    run = Run(task, said["seed"], said["batch"], RATE, steps, None)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    inner = model.base_model.model
    stream = Stream(run, tokenizer, CPU_PASSES if device() == "cpu" else 1)
    last = math.nan
    for step in range(steps):
        last = float(backward(inner, [part.to(torch.device(device())) for part in stream[step]]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    say(f"LoRA on {task}: last loss {last:.3f}")
