"""The vision-language table: a model that sees, tuned from a text-only base.

A LLaVA-style model is assembled from the text base and a small tower and projector of random weights,
and all of it is trained on generated pictures (`pictures.py`). Its tensor names differ from the base's by
a prefix, one token is new, and tower and projector have no base and are stored as they are. Each method
that calibrates does so with text alone, and with pictures too; answers to held-out pictures come from the
packed runtime.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cells as md
import torch
from lab import Lab, code_hash, device, general_text, hash_of, hashes_of, say
from pictures import CELL, CELLS, NOISE, PROMPT, SIDE, Picture, picture
from rows import RATIO
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import deltacome
from deltacome import Adaptive, Artifact, BitDelta, DeltaCome, LowRank, PrinMix, attach, base_for
from deltacome.evals.divergence import Reference, divergence, question_rows, record
from deltacome.evals.models import load_model
from deltacome.evals.run import Exam, scores
from deltacome.evals.tasks import read_questions
from deltacome.methods.method import Method

HELD_OUT, TRAINED, CALIBRATED = 0, 1_000_000, 2_000_000
"""First seeds of the pictures of each kind."""
BATCH, RATE, RATE_OF_NEW = 24, 1e-4, 1e-3
ROW_TOKENS = 128
"""Tokens of a calibration row; a chat with its picture is one row."""
MARK = "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ 'MARK' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("MARK", MARK)
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
}
BLIND = "text alone"
ROWS: list[tuple[str, Method, float | None]] = [
    ("low rank", LowRank(), RATIO),
    ("BitDelta", BitDelta(), None),
    ("Delta-CoMe", DeltaCome(), RATIO),
    ("PrinMix", PrinMix(), RATIO),
    ("adaptive", Adaptive(), RATIO),
    ("adaptive, half the bytes", Adaptive(), 2 * RATIO),
]
"""Methods that distil use the number of steps of the size."""


def make(lab: Lab) -> str:
    asked = Asked(lab, _tuned(lab))
    dense = {"nominal": None, "bytes": asked.nbytes, "ratio": None}
    table, new = [["tuned", *md.sizes(dense), "", *_figures(asked.tuned())]], 0
    for name, method, ratio in _rows(lab):
        reads = method.calibrates or method.options().get("distill")
        for seen in (False, True) if reads else (None,):
            artifact = _artifact(lab, asked.folder, name, method, ratio, seen)
            with_what = {None: "nothing", False: BLIND, True: "pictures too"}[seen]
            row = [name, *md.sizes(_size(artifact)), with_what]
            table.append([*row, *_figures(asked.packed(artifact))])
            records = artifact.manifest.records.values()
            new = sum(record.nbytes() for record in records if record.base_name is None)
    header = ["", *md.SIZES, "calibrated with", "pictures %", "KL"]
    return (
        "## VLM on pictures: a vision-language model on a text base\n\n"
        + md.table(header, table)
        + f"\n\nTower and projector, which the base has nothing of, take {new:,} bytes of each. "
        f"{lab.size.questions} held-out pictures, run from the packed bytes."
    )


def _rows(lab: Lab) -> Iterator[tuple[str, Method, float | None]]:
    for name, method, ratio in ROWS:
        if isinstance(method, BitDelta):
            method = BitDelta(distill=lab.size.distill)
        if isinstance(method, Adaptive):
            method = Adaptive(distill=lab.size.fit)
        yield name, method, ratio


def _size(artifact: Artifact) -> dict[str, Any]:
    return {
        "nominal": artifact.manifest.nominal_ratio(),
        "bytes": artifact.bytes_on_disk(),
        "ratio": artifact.ratio(),
    }


def _figures(found: dict[str, Any]) -> list[str]:
    return [md.score(found), md.nats(found["kl"], found["kl_error"])]


@dataclass(frozen=True)
class Asked:
    """The held-out pictures, and the dense model's answers to them."""

    lab: Lab
    folder: Path

    @cached_property
    def exam(self) -> Exam:
        lines = [
            picture(HELD_OUT + i).line(self.lab.work / "vlm" / "heldout", i)
            for i in range(self.lab.size.questions)
        ]
        file = self.lab.work / "vlm" / "heldout.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        processor: Any = LlavaProcessor.from_pretrained(self.folder)
        return Exam(processor.tokenizer, read_questions(file), 50, 8, processor=processor)

    @cached_property
    def dense(self) -> Any:
        return load_model(self.folder, device(), "float32")

    @cached_property
    def reference(self) -> Reference:
        exam = self.exam
        rows = question_rows(exam.tokenizer, exam.questions, exam.processor)
        return record(self.dense, rows, batch_size=exam.batch_size)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    @property
    def _how(self) -> list[Any]:
        """What a measurement depends on, besides the weights."""
        return [
            self.folder.name,
            self.lab.size.questions,
            *hashes_of(".", "evals", "format", "runtime"),
        ]

    def tuned(self) -> dict[str, Any]:
        name = hash_of(*self._how)
        return self.lab.kept(f"measured/vlm-{name}", lambda: self._ask(self.dense))

    def packed(self, artifact: Artifact) -> dict[str, Any]:
        name = hash_of(*self._how, artifact.digest)

        def ask() -> dict[str, Any]:
            say(f"measuring the vision-language model, {artifact.path.name}")
            base: Any = base_for(self.lab.base, artifact, dtype=torch.float32)
            model = base.to(device()).eval()
            with attach(model, artifact):
                return self._ask(model)

        return self.lab.kept(f"measured/vlm-{name}", ask)

    def _ask(self, model: Any) -> dict[str, Any]:
        kl = divergence(model, self.reference)
        return {**scores(model, self.exam), "kl": kl.nats, "kl_error": kl.error}


def _prompts(processor: Any, pictures: list[Picture]) -> Any:
    """Prompts with their pictures, all of one length."""
    part = {"type": "image"}, {"type": "text", "text": PROMPT}
    chat = [{"role": "user", "content": list(part)}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(
        images=[p.image for p in pictures], text=[text] * len(pictures), return_tensors="pt"
    )


def _lesson(processor: Any, pictures: list[Picture]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs padded on the right, where answers are predicted (B, L), and the answer tokens (T,)."""
    inputs, tokenizer = _prompts(processor, pictures), processor.tokenizer
    answers = [
        [*tokenizer(p.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for p in pictures
    ]
    width, start = max(map(len, answers)), inputs["input_ids"].shape[1] - 1
    padded = [a + [tokenizer.eos_token_id] * (width - len(a)) for a in answers]
    ids_BL = torch.cat([inputs["input_ids"], torch.tensor(padded)], 1)
    counts_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for counts_L, answer in zip(counts_BL, answers, strict=True):
        counts_L[start : start + len(answer)] = True
    told = {"input_ids": ids_BL, "pixel_values": inputs["pixel_values"]}
    return told, counts_BL, torch.tensor([token for answer in answers for token in answer])


# --- the model that sees -------------------------------------------------------------------------


def _tuned(lab: Lab) -> Path:
    """The trained model, with its processor; made once."""
    how = [TOWER, TEMPLATE, CELL, CELLS, NOISE, BATCH, RATE, RATE_OF_NEW, lab.size.steps]
    folder = lab.work / "vlm" / f"tuned-{hash_of(lab.dense(lab.base).key, *how)}"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model, processor = _put_together(lab.base)
        _train(model.to(device()), processor, lab.size.steps)
        model.to("cpu", torch.bfloat16).save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(folder)
    return folder


def _put_together(base: Path) -> tuple[Any, Any]:
    """The text base with a tower and a projector of random weights, in float32; and its processor."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([MARK], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids(MARK)
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=CELL,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    language: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    language.resize_token_embeddings(max(token + 1, language.vocab_size), mean_resizing=False)
    tower: dict[str, Any] = {**TOWER, "image_size": SIDE, "patch_size": CELL}
    whole: dict[str, Any] = {
        "text_config": language.config,
        "vision_config": CLIPVisionConfig(**tower),
        "image_token_id": token,
        "image_seq_length": CELLS**2,
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(LlavaConfig(**whole))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model, processor


def _train(model: Any, processor: Any, steps: int) -> None:
    """Trains all weights, the new random ones ten times as fast; the loss is on the answers alone."""
    say(f"training the vision-language model, {steps} steps")
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in model.named_parameters():
        kinds["tower" in name or "projector" in name].append(parameter)
    groups = [{"params": old, "lr": 0.0} for old in kinds]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    loss = torch.zeros(())
    for step in range(steps):
        share = min(1.0, (step + 1) / 10, (1 - step / steps) / 0.4)
        for group, rate in zip(optimizer.param_groups, (RATE, RATE_OF_NEW), strict=True):
            group["lr"] = rate * share
        pictures = [picture(TRAINED + step * BATCH + i) for i in range(BATCH)]
        inputs, counts_BL, wanted_T = _lesson(processor, pictures)
        inputs = {k: v.to(device()) for k, v in inputs.items()}
        hidden_BLH = model.model(**inputs, use_cache=False).last_hidden_state
        logits_TV = model.lm_head(hidden_BLH[counts_BL.to(device())])
        loss = torch.nn.functional.cross_entropy(logits_TV, wanted_T.to(device()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9:
            say(f"{step + 1} of {steps} steps, loss {loss.item():.3f}")


# --- its deltas ----------------------------------------------------------------------------------


def _artifact(
    lab: Lab, tuned: Path, name: str, method: Any, ratio: float | None, seen: bool | None
) -> Artifact:
    text = None if seen is None else _calibration(lab, tuned, seen)
    read = None if text is None else text.name
    key = hash_of(tuned.name, method.options(), ratio, read, code_hash(method))
    folder = lab.work / "vlm" / f"delta-{key}"
    if not folder.exists():
        say(f"compressing the vision-language model, {name}, pictures: {seen}")
        size: dict[str, Any] = {"samples": lab.size.rows, "seq_len": ROW_TOKENS}
        if isinstance(method, Adaptive):
            size["sweeps"] = lab.sweeps()
        source = None if text is None else str(text)
        deltacome.compress(
            lab.base, tuned, folder, method=method, ratio=ratio, calibration=source, **size,
            resume=True,
        )  # fmt: skip
    return Artifact.open(folder)


def _calibration(lab: Lab, tuned: Path, seen: bool) -> Path:
    """A file of chats with pictures and a quarter of general text, or the same without the pictures."""
    count = lab.size.rows // 4
    lines: list[dict[str, str]] = [
        {"text": cut} for cut in general_text(count, lab.size.row_tokens)
    ]
    for i in range(lab.size.rows - count):
        line = picture(CALIBRATED + i).line(lab.work / "vlm" / "pictures", i)
        lines.append(line if seen else {k: v for k, v in line.items() if k != "image"})
    content = "".join(json.dumps(line) + "\n" for line in lines)
    file = lab.work / "vlm" / f"{'seen' if seen else 'blind'}-{hash_of(content)}.jsonl"
    file.write_text(content)
    return file
