"""The vision-language row: a model whose language half is a fine-tune of a text base.

A LLaVA-style model is put together from a text tenant and a small tower and projector of random weights:
what is shown is that such a checkpoint goes the whole way (names differ by a prefix, one token is new,
tower and projector have no base and are stored as they are) and what compression of the language half
does to a model that sees. It was not trained on images, so there is no accuracy to tell: figures are
the KL to the dense model, and how often both find the same next token most likely, where answers to
held-out questions are predicted behind a generated image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cells as md
import torch
from lab import Lab, device, hash_of, say
from rows import main_rows
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import deltacome
from deltacome import Artifact, attach, base_for
from deltacome.evals.divergence import Row, over_rows, question_rows

QUESTIONS = 64
PATCH, SIDE = 8, 32
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
}
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1]])


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    tuned = _model(lab, task)
    rows = question_rows(lab.tokenizer(task), lab.questions(task)[:QUESTIONS])
    images = torch.stack([_picture(i) for i in range(len(rows))])
    dense: Any = LlavaForConditionalGeneration.from_pretrained(tuned, dtype=torch.float32)
    wanted = _log_probs(dense.to(device()).eval(), rows, images)
    del dense
    table = []
    for name, method, ratio in main_rows(lab.size):
        artifact = _artifact(lab, task, tuned, name, method, ratio)
        base: Any = base_for(lab.base, artifact, dtype=torch.float32)
        model = base.to(device()).eval()
        with attach(model, artifact):
            got = _log_probs(model, rows, images)
        kl = over_rows([(float((w.exp() * (w - g)).sum()), len(w))
                        for w, g in zip(wanted, got, strict=True)])  # fmt: skip
        same = [int((w.argmax(-1) == g.argmax(-1)).sum())
                for w, g in zip(wanted, got, strict=True)]  # fmt: skip
        positions = sum(map(len, wanted))
        size = {
            "nominal": artifact.manifest.nominal_ratio(),
            "bytes": artifact.bytes_on_disk(),
            "ratio": artifact.ratio(),
        }
        kinds = [r for r in artifact.manifest.records.values() if r.base_name is None]
        exact = f"{sum(r.nbytes() for r in kinds):,}"
        figures = [
            f"{100 * sum(same) / positions:.1f}",
            md.nats(kl.nats, kl.error),
        ]
        table.append([name, *md.sizes(size), exact, *figures])
    header = ["", *md.SIZES, "of it tower and projector", "same next token %", "KL"]
    return (
        "## VLM: a vision-language model on a text base\n\n"
        + md.table(header, table)
        + f"\n\nTower and projector are random, the language half is the tenant `{task}`; {QUESTIONS} "
        "questions behind generated pictures, run from the packed bytes."
    )


def _model(lab: Lab, task: str) -> Path:
    """The tenant inside of a LLaVA, with one token more for images; made once."""
    tenant = lab.tenant(task)
    key = hash_of(lab.dense(tenant).key, TOWER, PATCH, SIDE)
    folder = lab.work / "vlm" / f"{task}-{key}"
    if folder.exists():
        return folder
    text = AutoConfig.from_pretrained(tenant)
    image_token = text.vocab_size
    language: Any = AutoModelForCausalLM.from_pretrained(tenant, dtype=torch.bfloat16)
    language.resize_token_embeddings(image_token + 1, mean_resizing=False)
    tower: dict[str, Any] = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
    whole: dict[str, Any] = {
        "text_config": language.config,
        "vision_config": CLIPVisionConfig(**tower),
        "image_token_id": image_token,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(LlavaConfig(**whole))
    model = model.to(torch.bfloat16)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.save_pretrained(folder)
    tokenizer = lab.tokenizer(task)
    tokenizer.save_pretrained(folder)
    return folder


def _artifact(
    lab: Lab, task: str, tuned: Path, name: str, method: Any, ratio: float | None
) -> Artifact:
    reads = method.calibrates or method.options().get("distill")
    text = lab.calibration(task) if reads else None
    key = hash_of(tuned.name, method.options(), ratio, None if text is None else text.name)
    folder = lab.work / "vlm" / f"delta-{key}"
    if not folder.exists():
        say(f"compressing the vision-language model, {name}")
        size: dict[str, Any] = {"samples": lab.size.rows, "seq_len": lab.size.row_tokens}
        source = None if text is None else str(text)
        deltacome.compress(
            lab.base, tuned, folder, method=method, ratio=ratio, calibration=source, **size,
            resume=True,
        )  # fmt: skip
    return Artifact.open(folder)


def _picture(seed: int) -> Tensor:
    """One to four squares of a colour on grey, (3, SIDE, SIDE) in −1 … 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    picture = torch.zeros(3, SIDE, SIDE)
    for _ in range(1 + draw(4)):
        x, y = draw(SIDE - PATCH), draw(SIDE - PATCH)
        picture[:, y : y + PATCH, x : x + PATCH] = COLOURS[draw(len(COLOURS))][:, None, None]
    return picture


@torch.inference_mode()
def _log_probs(model: Any, rows: list[Row], images: Tensor) -> list[Tensor]:
    """Log-probabilities (positions of the answer, vocabulary) of each question behind its picture."""
    tokens = [model.config.image_token_id] * (SIDE // PATCH) ** 2
    found = []
    for row, image in zip(rows, images, strict=True):
        ids = torch.tensor([[*tokens, *row.ids]], device=device())
        out = model(input_ids=ids, pixel_values=image[None].to(device(), model.dtype))
        first = len(tokens) + row.first
        found.append(torch.log_softmax(out.logits[0, first:].float(), -1).cpu())
    return found
