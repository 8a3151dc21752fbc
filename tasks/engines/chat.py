"""Chat messages to token ids, and drawn ids to text, the same for every engine.

Text rendered by a chat template is never tokenised a second time: a template writes its own BOS, and the tokenizer
would add another.

Special tokens are the template's alone. A message that writes one ("<|im_end|>") would end its turn and begin another
in somebody else's name; it becomes plain text instead, letters and punctuation, and everything else in it is tokenised
as ever. Where a tokenizer cannot do so the request is refused. Some tokenizers do not call the tokens special that
their template puts between turns (DeepSeek's), so a conversation is looked at for them. A template that marks its turns
by ordinary words has nothing that could be told apart.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

Messages = list[dict[str, str]]


def prompt_ids(tokenizer: Any, messages: Messages, system_prompt: str = "") -> list[int]:
    """Token ids up to where the model's answer begins.

    A tokenizer without a chat template (a base model) gets a single user message as plain text; anything else raises
    ValueError, and so does what a template refuses, such as a system message.
    """
    messages, hidden = _hide_marks(tokenizer, messages)
    if tokenizer.chat_template:
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return _by_template(tokenizer, messages, hidden, add_generation_prompt=True)
    return _plain(tokenizer, system_prompt + _single_text(messages), hidden)


def scored_ids(tokenizer: Any, messages: Messages, completion: str) -> list[int]:
    """Token ids of a prompt together with its completion, as a reward model reads them."""
    whole, hidden = _hide_marks(tokenizer, [*messages, {"role": "assistant", "content": completion}])
    if tokenizer.chat_template:
        return _by_template(tokenizer, whole, hidden, add_generation_prompt=False)
    return _plain(tokenizer, _single_text(whole[:-1]) + whole[-1]["content"], hidden)


def written(tokenizer: Any, drawn: list[int], finish_reason: str) -> str:
    """The text of a sample's token ids.

    The token that ended it is left out, whether the tokenizer calls that special or not. A sample that was cut may end
    within a character of several bytes; what there is of that says nothing, and is left out too.
    """
    ids = drawn[:-1] if finish_reason == "stop" else drawn
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}") if finish_reason == "length" else text


def writes_marks(tokenizer: Any, texts: Iterable[str]) -> bool:
    """Whether one of the texts writes a special token of the tokenizer."""
    marks = _marks(tokenizer)
    return any(marks.search(text) for text in texts)


@lru_cache(maxsize=16)
def _added(tokenizer: Any) -> dict[int, str]:
    """The added tokens that are special, or that the chat template puts around the turns of a conversation.

    Not those that it writes for its answer alone, such as "<think>", which texts may well hold.
    """
    added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if str(token)}
    turns = [{"role": role, "content": "0"} for role in ("user", "assistant", "user")]
    shown = ""
    if tokenizer.chat_template and not all(token.special for token in added.values()):
        with contextlib.suppress(TemplateError):
            shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    return {id: str(token) for id, token in added.items() if token.special or str(token) in shown}


@lru_cache(maxsize=16)
def _marks(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokenizer's special tokens in a text, the longest first."""
    tokens = {*map(str, tokenizer.all_special_tokens), *_added(tokenizer).values()}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or "(?!)")


@lru_cache(maxsize=16)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Of all special tokens but the one for what is unknown, which may stand for any letter."""
    return frozenset({*tokenizer.all_special_ids, *_added(tokenizer)} - {tokenizer.unk_token_id})


def _hide_marks(tokenizer: Any, messages: Messages) -> tuple[Messages, dict[str, str]]:
    """The messages with a stand-in for each special token that their texts write; and what each stands for."""
    marks = _marks(tokenizer)
    if not any(marks.search(message["content"]) for message in messages):
        return messages, {}
    texts = "".join(message["content"] for message in messages)
    private = next((letter for letter in map(chr, range(0xE000, 0xF8FF)) if letter not in texts), "")
    if not private:
        raise ValueError("the text writes a special token, and every letter that could stand in for it")
    hidden: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        name = f"{private}{len(hidden)}{private}"
        hidden[name] = found[0]
        return name

    return [{**message, "content": marks.sub(hide, message["content"])} for message in messages], hidden


def _by_template(tokenizer: Any, messages: Messages, hidden: dict[str, str], add_generation_prompt: bool) -> list[int]:
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "return_dict": False}
    try:
        if not hidden:
            return tokenizer.apply_chat_template(messages, tokenize=True, **options)
        return _revealed(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, **options), hidden)
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from error


def _plain(tokenizer: Any, text: str, hidden: dict[str, str]) -> list[int]:
    """Of a base model: with the BOS that its tokenizer puts in front, if it does."""
    if not hidden:
        return tokenizer(text)["input_ids"]
    front = tokenizer("")["input_ids"]
    if len(front) > 1:
        raise ValueError("the text writes a special token, and the tokenizer puts more than a BOS around texts")
    return [*front, *_revealed(tokenizer, text, hidden)]


def _revealed(tokenizer: Any, text: str, hidden: dict[str, str]) -> list[int]:
    """Token ids of a text, with what is hidden in it as plain letters."""
    parts = re.split("(" + "|".join(hidden) + ")", text)
    if missing := [token for name, token in hidden.items() if name not in parts]:
        raise ValueError(f"the text writes the special token {missing[0]!r}, and the chat template changes texts")
    ids: list[int] = []
    for part in parts:
        ids += _letters(tokenizer, hidden[part]) if part in hidden else _tokens(tokenizer, part)
    return ids


def _tokens(tokenizer: Any, text: str, **options: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, **options)["input_ids"] if text else []


def _letters(tokenizer: Any, token: str) -> list[int]:
    ids = _tokens(tokenizer, token, split_special_tokens=True)
    if _special_ids(tokenizer).intersection(ids):  # those that are not called special are not split
        ids = _tokens(tokenizer, token[:1]) + _tokens(tokenizer, token[1:])
    if _special_ids(tokenizer).intersection(ids):
        raise ValueError(f"the text writes the special token {token!r}, which this tokenizer cannot take as letters")
    return ids


def _single_text(messages: Messages) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise ValueError("the tokenizer has no chat template, so only a single user message can be rendered")
    return messages[0]["content"]
