"""Tiny Python programs and what they print: the code-like task.

A program is drawn from a few shapes, and its answer is what Python prints when it runs it, so no
answer can be wrong. Only programs that were made here are run.
"""

import contextlib
import io
from random import Random

from deltacome.evals.tasks import Question

WORDS = "ant bee cat cow dog fox hen owl pig rat bird bear crab deer duck fish frog goat lion wolf"


def snippet(seed: int) -> Question:
    """The question of a seed: `Python: x = 7; print(x + 4)` with the answer `11`."""
    draw = Random(seed)
    program = draw.choice(SHAPES)(draw)
    return Question(f"Python: {program}", _printed(program))


def _printed(program: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


def _numbers(draw: Random, low: int = 3, high: int = 5) -> list[int]:
    return [draw.randint(0, 20) for _ in range(draw.randint(low, high))]


def _word(draw: Random) -> str:
    return draw.choice(WORDS.split())


def _assign(draw: Random) -> str:
    x, y = draw.randint(1, 30), draw.randint(1, 30)
    return f"x = {x}; y = {y}; print(x {draw.choice('+-')} y)"


def _compare(draw: Random) -> str:
    operator = draw.choice(["<", ">", "==", "<="])
    return f"print({draw.randint(0, 20)} {operator} {draw.randint(0, 20)})"


def _reduce(draw: Random) -> str:
    return f"print({draw.choice(['max', 'min', 'len'])}({_numbers(draw)}))"


def _sort(draw: Random) -> str:
    return f"print(sorted({_numbers(draw, 3, 4)}))"


def _index(draw: Random) -> str:
    numbers = _numbers(draw)
    return f"x = {numbers}; print(x[{draw.randint(-1, len(numbers) - 1)}])"


def _slice(draw: Random) -> str:
    return (
        f"x = {_numbers(draw, 4, 5)}; print(x[{draw.choice(['1:', ':2', ':-1', '::-1', '1:3'])}])"
    )


def _append(draw: Random) -> str:
    return f"x = {_numbers(draw)}; x.append({draw.randint(0, 20)}); print(x)"


def _loop(draw: Random) -> str:
    return (
        f"print([i {draw.choice('+*')} {draw.randint(1, 5)} for i in range({draw.randint(2, 5)})])"
    )


def _text(draw: Random) -> str:
    how = draw.choice([".upper()", "[0]", "[-1]", " * 2", "[1:]", ".title()", " + 's'"])
    return f"print({_word(draw)!r}{how})"


def _branch(draw: Random) -> str:
    yes, no = draw.sample(WORDS.split(), 2)
    return f"x = {draw.randint(0, 20)}; print({yes!r} if x > {draw.randint(3, 17)} else {no!r})"


def _join(draw: Random) -> str:
    words = draw.sample(WORDS.split(), draw.randint(2, 3))
    return f"print({draw.choice(['-', '+', ', '])!r}.join({words}))"


SHAPES = [_assign, _compare, _reduce, _sort, _index, _slice, _append, _loop, _text, _branch, _join]
