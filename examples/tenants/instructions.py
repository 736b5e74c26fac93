"""Short instructions with one right way to follow them: the chat-like task.

A program makes the instruction together with the only answer that obeys it, so exact match is a
check of obedience, not of taste.
"""

from random import Random

from deltacome.evals.tasks import Question

_WORDS = (
    "apple river stone cloud bread music paper horse table green light house money night world "
    "water smile train chair ocean sugar tiger lemon piano grass metal snake wheel dream field"
)
COUNTS = {"two": 2, "three": 3, "four": 4}
MARKS = {"commas": ", ", "dashes": "-", "semicolons": "; ", "spaces": " "}
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS, NUMBERS, TENS = _WORDS.split(), _NUMBERS.split(), _TENS.split()


def instruction(seed: int) -> Question:
    """The question of a seed, e.g. `Say apple two times, separated by dashes.`: `apple-apple`."""
    draw = Random(seed)
    return draw.choice(SHAPES)(draw)


def _some(draw: Random, low: int = 3, high: int = 5) -> list[str]:
    return draw.sample(WORDS, draw.randint(low, high))


def _repeat(draw: Random) -> Question:
    word, count, mark = draw.choice(WORDS), draw.choice(list(COUNTS)), draw.choice(list(MARKS))
    verb = draw.choice(["Repeat the word", "Say", "Write"])
    answer = MARKS[mark].join([word] * COUNTS[count])
    return Question(f"{verb} {word} {count} times, separated by {mark}.", answer)


def _case(draw: Random) -> Question:
    words = _some(draw, 1, 3)
    how = draw.choice(["in capital letters", "with a capital first letter each"])
    said = [word.upper() if "letters" in how else word.title() for word in words]
    return Question(f"Write {' '.join(words)} {how}.", " ".join(said))


def _reverse(draw: Random) -> Question:
    words = _some(draw, 2, 4)
    return Question(f"Say these words in reverse order: {' '.join(words)}.", " ".join(words[::-1]))


def _pick(draw: Random) -> Question:
    words = _some(draw)
    which = draw.choice(["first", "second", "last"])
    word = words[{"first": 0, "second": 1, "last": -1}[which]]
    return Question(f"Answer with only the {which} word: {' '.join(words)}.", word)


def _alphabet(draw: Random) -> Question:
    words = _some(draw, 2, 4)
    mark = draw.choice(list(MARKS))
    prompt = f"Put in alphabetical order, separated by {mark}: {' '.join(words)}."
    return Question(prompt, MARKS[mark].join(sorted(words)))


def _without(draw: Random) -> Question:
    words = _some(draw)
    left = draw.choice(words)
    kept = " ".join(word for word in words if word != left)
    return Question(f"Say these words but leave out {left}: {' '.join(words)}.", kept)


def _count(draw: Random) -> Question:
    words = _some(draw, 2, 6)
    prompt = f"How many words are here? Answer with one word: {' '.join(words)}."
    return Question(prompt, NUMBERS[len(words)].title())


def _contains(draw: Random) -> Question:
    words, word = _some(draw), draw.choice(WORDS)
    if draw.random() < 0.5:
        word = draw.choice(words)
    answer = "Yes" if word in words else "No"
    return Question(f"Answer yes or no: is {word} among {' '.join(words)}?", answer)


def _spoken(draw: Random) -> Question:
    number = draw.randint(0, 99)
    tens, ones = divmod(number, 10)
    said = (
        NUMBERS[number] if number < 20 else TENS[tens - 2] + (f"-{NUMBERS[ones]}" if ones else "")
    )
    ask = draw.choice(["Write {} in words.", "Spell out the number {}.", "Say {} in words."])
    return Question(ask.format(number), said)


SHAPES = [_repeat, _case, _reverse, _pick, _alphabet, _without, _count, _contains, _spoken]
