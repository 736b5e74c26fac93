"""Small vision-language models, with what each is given for a picture."""

import json
import shutil
from pathlib import Path

import torch
from families import make, make_vision, moved
from tiny_pairs import rewrite, weights_of
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3Config,
    LlavaProcessor,
    Qwen2VLConfig,
)

from deltacome.rows import Row

SIZE, TOKENS = 28, 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
IMAGE, BEGIN, END = 290, 291, 292
CONFIGS = {
    # Positions in three dimensions, given by a grid for each picture.
    "Qwen2VLForConditionalGeneration": lambda: Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        },
        image_token_id=IMAGE, vision_start_token_id=BEGIN, vision_end_token_id=END,
        video_token_id=293,
    ),
    # A picture's tokens attend to each other in both directions; a value for each token marks them.
    "Gemma3ForConditionalGeneration": lambda: Gemma3Config(
        text_config={**TEXT, **WINDOWS, "head_dim": 32, "query_pre_attn_scalar": 32},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIZE, "patch_size": 7,
        },
        mm_tokens_per_image=TOKENS, image_token_id=IMAGE, boi_token_id=BEGIN, eoi_token_id=END,
    ),
}  # fmt: skip


def make_llava(folder: Path) -> tuple[Path, Path]:
    """A text base, and a vision-language model made from it, with its processor."""
    base, tuned = make_vision(folder)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    square = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(tuned)
    config = json.loads((tuned / "config.json").read_text())
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    (tuned / "config.json").write_text(json.dumps(config))
    return base, tuned


def make_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """A base of a vision-language family, and a tuned model."""
    base = make(name, CONFIGS[name](), folder / "base")
    tuned = Path(shutil.copytree(base, folder / "tuned"))
    rewrite(tuned, moved(weights_of(base)), None)
    return base, tuned


def made_by_hand(name):
    """Rows with a picture, of several lengths, and rows without."""
    draw = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(2, 280, (count,), generator=draw).tolist()

    rows = [Row(words(12)), Row(words(5))]
    for count in (3, 20, 9):
        ids = [*words(3), BEGIN, *[IMAGE] * TOKENS, END, *words(count)]
        kinds = torch.tensor([[int(i == IMAGE) for i in ids]])
        if name.startswith("Qwen"):
            pixels = torch.randn(4 * TOKENS, 3 * 2 * 14 * 14, generator=draw)
            grid = torch.tensor([[1, 4, 4]])
            seen = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
        else:
            pixels = torch.randn(1, 3, SIZE, SIZE, generator=draw)
            seen = {"pixel_values": pixels, "token_type_ids": kinds}
        rows.append(Row(ids, seen))
    return rows
