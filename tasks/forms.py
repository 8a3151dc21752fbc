"""How a row of each form is understood: a prompt, and its completions with who wrote them and how they were rated.

long     a row per completion: prompt, generator, text, ratings. TRL's unpaired form (prompt, completion, label) is one;
         so is a row of `messages` that ends with the assistant's answer.
nested   a row per prompt: a list of completions, each with its generator, text and ratings (UltraFeedback), or parallel
         lists of texts, generators and ratings.
pairs    chosen and rejected: texts or messages beside a prompt; whole conversations that part at the last answer (TRL's
         implicit prompt; transcripts of HH-RLHF, "\\n\\nHuman: ... \\n\\nAssistant: ..."); with or without scores.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from tasks.config import PAIR_SCORE
from tasks.prompts import LONGEST_LABEL, check_unicode, prompt_row
from tasks.rows import BadRow
from tasks.sections import ImportConfig, RatingConfig, check_pair_ratings

CHOSEN, REJECTED = "chosen", "rejected"  # who wrote the sides of a pair
_UNKNOWN = "unknown"
_LARGEST = 1e100  # a rating beyond it: no sum of squares may overflow
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Completion:
    """ratings: by name, a number, or in words why there is none."""

    generator: str
    text: str
    ratings: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Understood:
    """prompt: a row of PROMPTS; bad: what is wrong with those of its completions that cannot be used."""

    prompt: dict[str, Any]
    completions: list[Completion]
    bad: list[BadRow] = field(default_factory=list)


def form_of(row: dict[str, Any], config: ImportConfig) -> str:
    """long, nested or pairs, by the columns of a row."""
    columns = config.columns
    if config.form != "auto":
        return config.form
    if columns.chosen in row and columns.rejected in row:
        return "pairs"
    if isinstance(row.get(columns.completions), list):
        return "nested"
    texts = row.get(columns.text)
    return "nested" if isinstance(texts, list) and texts and isinstance(texts[0], str) else "long"


def understand(row: dict[str, Any] | BadRow, config: ImportConfig) -> Understood:
    """BadRow says what is wrong with a row."""
    if isinstance(row, BadRow):
        raise row
    try:
        return {"long": _long, "nested": _nested, "pairs": _pair}[form_of(row, config)](row, config)
    except RecursionError:
        raise BadRow("nested too deeply", "") from None


def ratings_of(config: ImportConfig) -> list[RatingConfig]:
    """Those of the configuration; of pairs their scores."""
    return config.ratings or [RatingConfig(name=PAIR_SCORE)]


def _long(row: dict[str, Any], config: ImportConfig) -> Understood:
    columns = config.columns
    prompt = row.get(columns.prompt, row.get("messages"))
    if columns.text in row:
        text = _text(row[columns.text], config)
    elif isinstance(prompt, list) and prompt and _role(prompt[-1]) == "assistant":
        prompt, text = prompt[:-1], _text(prompt[-1:], config)
    else:
        raise BadRow("no text column", _names(row))
    ratings = {rating.name: rate(rating, _at(row, rating.column or rating.name)) for rating in config.ratings}
    generator = _generator(_at(row, columns.generator))
    return Understood(_prompt(prompt, row, config), [Completion(generator, text, ratings)])


def _nested(row: dict[str, Any], config: ImportConfig) -> Understood:
    columns = config.columns
    elements = row.get(columns.completions)
    if elements is None:
        elements = _side_by_side(row, config)
    if not isinstance(elements, list) or not elements:
        raise BadRow("no completions", repr(elements))
    understood = Understood(_prompt(row.get(columns.prompt), row, config), [])
    for element in elements:
        try:
            understood.completions.append(_element(element, config))
        except BadRow as bad:
            understood.bad.append(bad)
    if not understood.completions:
        raise understood.bad[0]
    return understood


def _element(element: Any, config: ImportConfig) -> Completion:
    """One of several completions in a row."""
    columns = config.columns
    if not isinstance(element, dict):
        element = {columns.text: element}
    text = _text(_at(element, columns.text), config)
    ratings = {rating.name: rate(rating, _at(element, rating.column or rating.name)) for rating in config.ratings}
    return Completion(_generator(_at(element, columns.generator)), text, ratings)


def _side_by_side(row: dict[str, Any], config: ImportConfig) -> list[dict[str, Any]]:
    """Parallel lists as a list of completions; what is no list holds for all of them."""
    texts = row.get(config.columns.text)
    if not isinstance(texts, list):
        raise BadRow("no completions", _names(row))
    names = [
        config.columns.text,
        config.columns.generator,
        *(rating.column or rating.name for rating in config.ratings),
    ]
    lists = {}
    for name in names:
        values = row.get(name)
        if isinstance(values, list) and len(values) != len(texts):
            raise BadRow("lists of different lengths", f"{name}: {len(values)}, {config.columns.text}: {len(texts)}")
        lists[name] = values if isinstance(values, list) else [values] * len(texts)
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _pair(row: dict[str, Any], config: ImportConfig) -> Understood:
    columns = config.columns
    check_pair_ratings(config.ratings)
    if columns.chosen not in row or columns.rejected not in row:
        raise BadRow("no chosen and rejected", _names(row))
    sides = [row[columns.chosen], row[columns.rejected]]
    prompt = row.get(columns.prompt)
    if all(isinstance(side, str) and _TURN.match(side) for side in sides):
        sides = [_transcript(side) for side in sides]
    if all(isinstance(side, list) and len(side) > 1 for side in sides):
        prompt = sides[0][:-1]
        if _plain(prompt) != _plain(sides[1][:-1]):
            raise BadRow("chosen and rejected part before the last answer", repr(sides[1][:-1]))
        if any(_role(side[-1]) != "assistant" for side in sides):
            raise BadRow("the last turn is not the assistant's", repr(sides[0][-1]))
        sides = [side[-1:] for side in sides]
    elif prompt is None and all(isinstance(side, str) for side in sides):
        prompt, sides = _shared(*sides)
    scores = [row.get(columns.chosen_score), row.get(columns.rejected_score)]
    completions = [
        Completion(name, _text(side, config), {rating.name: rate(rating, score) for rating in ratings_of(config)})
        for name, side, score in zip((CHOSEN, REJECTED), sides, scores, strict=True)
    ]
    return Understood(_prompt(prompt, row, config), completions)


def _transcript(text: str) -> list[dict[str, str]]:
    """Turns of "\\n\\nHuman: ... \\n\\nAssistant: ..." as messages."""
    parts = _TURN.split(text)[1:]
    return [
        {"role": _ROLE[role], "content": words.strip()} for role, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def _shared(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """What two texts begin with alike, up to the end of a word, and what each goes on with."""
    alike = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    length = sum(1 for _ in alike)
    cut = max(chosen.rfind(" ", 0, length), chosen.rfind("\n", 0, length))
    if chosen[length : length + 1].isspace() and rejected[length : length + 1].isspace():
        cut = length
    if cut < 1:
        raise BadRow("no prompt", "chosen and rejected begin differently, and there is no prompt column")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _prompt(prompt: Any, row: dict[str, Any], config: ImportConfig) -> dict[str, Any]:
    if prompt is None:
        raise BadRow("no prompt", f"no column {config.columns.prompt!r}; {_names(row)}")
    return prompt_row(prompt, row, config)


def _text(value: Any, config: ImportConfig) -> str:
    """A completion as text, a message, or a conversation of one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str):
        raise BadRow("completion is no text", repr(value))
    if not value.strip():
        raise BadRow("empty completion", "")
    check_unicode(value)
    if len(value) > config.max_chars:
        raise BadRow("completion too long", f"{len(value)} characters")
    return value


def _generator(value: Any) -> str:
    if isinstance(value, list | dict):
        raise BadRow("generator is no text", repr(value))
    name = _UNKNOWN if value in (None, "") else str(value)
    check_unicode(name)
    if len(name) > LONGEST_LABEL:
        raise BadRow("generator too long", name)
    return name


def rate(rating: RatingConfig, value: Any) -> float | str:
    """A rating as a finite number, or why there is none."""
    if value is None or value == "":
        return "no rating"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"no number: {str(value)[:100].encode(errors='backslashreplace').decode()}"
    if rating.transform == "logit":
        if not 0 <= number <= 1:
            return f"no probability: {number:g}"
        number = min(max(number, rating.clip), 1 - rating.clip)
        if number in (0, 1):
            return f"not finite: logit of {number:g}"
        return math.log(number) - math.log1p(-number)
    if not math.isfinite(number):
        return f"not finite: {number}"
    return number if abs(number) <= _LARGEST else f"too large: {number:g}"


def _at(row: Any, path: str) -> Any:
    """What stands at a column, or at a dotted path into nested ones; None where nothing does."""
    if isinstance(row, dict) and path in row:
        return row[path]
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _plain(messages: list[Any]) -> list[Any]:
    return [(_role(message), message.get("content")) if isinstance(message, dict) else message for message in messages]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _names(row: dict[str, Any]) -> str:
    return f"columns: {', '.join(map(str, row))}"
