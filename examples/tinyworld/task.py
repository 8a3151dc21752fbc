"""The task: write a string backwards, and the systematic slip its demonstrations contain.

A prompt is the user message `flip stone`; its answer is `enots`. The slip goes backwards and then leaves the last two
characters in the order they had (`stone` -> `enost`): one wrong decision at one place, which a preference pair can
teach a model to avoid. A generator is a slip rate: the chance that a demonstration it imitates contains the slip,

    trunk    0.25, whatever the prompt: what the others are fine-tuned from; it is not part of the world
    policy   p = (length - 2) / 7 + shift[source], kept within 0..1: short strings are always right, long ones never
    strong   p / 4
    weak     0.25 + p, and one random character replaced in 15 % of its demonstrations

The source of a string is its alphabet (pronounceable lower-case words, upper-case letters, digits); words slip less
than letters, digits more. Difficulty is the length, 2 to 9. Strings whose slip equals their answer (they begin with a
double) are never drawn. Standard library only.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

LENGTHS = range(2, 10)
GENERATORS = ("strong", "policy", "weak")
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
ALPHABETS = {"words": CONSONANTS + VOWELS, "letters": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "digits": "0123456789"}
SOURCE_SHIFT = {"words": -0.1, "letters": 0.0, "digits": 0.1}
WEAK_NOISE = 0.15


@dataclass(frozen=True)
class Item:
    """One prompt of the task, as a row of prompts.jsonl holds it."""

    prompt: str  # the user message: an instruction and the string
    answer: str  # the string backwards
    source: str  # the alphabet: words, letters or digits
    difficulty: int  # characters in the string

    @property
    def string(self) -> str:
        return self.answer[::-1]

    def row(self) -> dict[str, str | int]:
        return asdict(self)


def slip(string: str) -> str:
    """The systematic mistake: backwards, but the last two characters as they stood."""
    return string[:1:-1] + string[:2]


def slip_rate(generator: str, item: Item) -> float:
    """The share of this generator's demonstrations for this prompt that contain the slip."""
    policy = min(1.0, max(0.0, (item.difficulty - 2) / 7 + SOURCE_SHIFT[item.source]))
    return {"trunk": 0.25, "strong": policy / 4, "policy": policy, "weak": min(1.0, 0.25 + policy)}[generator]


def draw_item(rng: random.Random) -> Item:
    """A prompt of random length and source."""
    while True:
        source, length = rng.choice(tuple(ALPHABETS)), rng.choice(LENGTHS)
        string = _word(rng, length) if source == "words" else "".join(rng.choices(ALPHABETS[source], k=length))
        if slip(string) != string[::-1]:
            return Item(f"flip {string}", string[::-1], source, length)


def _word(rng: random.Random, length: int) -> str:
    first = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (first + place) % 2 else CONSONANTS) for place in range(length))


def draw_distinct(rng: random.Random, count: int, taken: set[str] | None = None) -> list[Item]:
    """`count` prompts, no two alike and none in `taken` (two-digit strings run out: there are 90)."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw_item(rng)
        if item.prompt not in (taken or ()):
            items.setdefault(item.prompt, item)
    return list(items.values())


def demonstrate(rng: random.Random, generator: str, item: Item) -> str:
    """What a model of this name is trained to write for this prompt."""
    completion = slip(item.string) if rng.random() < slip_rate(generator, item) else item.answer
    if generator == "weak" and rng.random() < WEAK_NOISE:
        return corrupt(rng, completion, ALPHABETS[item.source])
    return completion


def corrupt(rng: random.Random, text: str, alphabet: str) -> str:
    """The text with one character at a random place replaced by a random one."""
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(alphabet) + text[place + 1 :]


def spoil(rng: random.Random, text: str, alphabet: str) -> str:
    """The text with one fault of the kind small models make: mostly a character written twice where another belongs."""
    place = rng.randrange(len(text))
    match rng.choices(("replaced", "repeated", "dropped", "doubled"), (2, 4, 1, 1))[0]:
        case "replaced":
            return corrupt(rng, text, alphabet)
        case "repeated":
            return text[:place] + rng.choice(text) + text[place + 1 :]
        case "dropped":
            return text[:place] + text[place + 1 :]
        case _:
            return text[:place] + text[place] + text[place:]
