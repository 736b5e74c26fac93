"""Generated pictures and the right answers to them: how many shapes, of which colour and kind.

Up to four shapes of one kind and colour lie in cells of a grid; each answer names all three ("three red
rings"), so that exact match needs colour, count and shape.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CELL, CELLS = 8, 4
SIDE = CELL * CELLS
NOISE = 12.0
"""Standard deviation, on a scale of 255."""
PROMPT = "What is in the picture?"
COUNTS = ("one", "two", "three", "four")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 230, 40),
    "blue": (40, 40, 230),
    "yellow": (230, 230, 40),
    "white": (230, 230, 230),
}
_Y, _X = np.mgrid[-1 : 1 : CELL * 1j, -1 : 1 : CELL * 1j]
SHAPES = {
    "square": (abs(_X) < 0.8) & (abs(_Y) < 0.8),
    "ring": (_X**2 + _Y**2 > 0.3) & (_X**2 + _Y**2 < 1.1),
    "cross": (abs(_X - _Y) < 0.3) | (abs(_X + _Y) < 0.3),
}


@dataclass(frozen=True)
class Picture:
    """A picture of SIDE × SIDE pixels, and the right answer to PROMPT."""

    image: Image.Image
    answer: str

    def line(self, folder: Path, number: int) -> dict[str, str]:
        """Saves the picture and returns it as a line of a calibration file."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number}.png"
        self.image.save(file)
        return {"image": str(file.resolve()), "prompt": PROMPT, "answer": self.answer}


def picture(seed: int) -> Picture:
    """The picture of a seed."""
    draw = random.Random(seed)
    count = draw.randrange(len(COUNTS))
    colour, shape = draw.choice(list(COLOURS)), draw.choice(list(SHAPES))
    pixels = 128 + NOISE * np.random.default_rng(seed).standard_normal((SIDE, SIDE, 3))
    for cell in draw.sample(range(CELLS**2), count + 1):
        y, x = (CELL * at for at in divmod(cell, CELLS))
        pixels[y : y + CELL, x : x + CELL][SHAPES[shape]] = COLOURS[colour]
    plural = {"cross": "crosses"}.get(shape, f"{shape}s") if count else shape
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Picture(image, f"{COUNTS[count]} {colour} {plural}")
