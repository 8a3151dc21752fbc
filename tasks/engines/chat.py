"""Chat messages to token ids, and drawn ids to text, the same for every engine.

Text rendered by a chat template is never tokenised a second time: a template writes its own BOS, and the tokenizer
would add another.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

Messages = list[dict[str, str]]


def prompt_ids(tokenizer: Any, messages: Messages, system_prompt: str = "") -> list[int]:
    """Token ids up to where the model's answer begins.

    A tokenizer without a chat template (a base model) gets a single user message as plain text; anything else raises
    ValueError, and so does what a template refuses, such as a system message.
    """
    if tokenizer.chat_template:
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return _by_template(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(system_prompt + _single_text(messages))["input_ids"]


def scored_ids(tokenizer: Any, messages: Messages, completion: str) -> list[int]:
    """Token ids of a prompt together with its completion, as a reward model reads them."""
    if tokenizer.chat_template:
        whole = [*messages, {"role": "assistant", "content": completion}]
        return _by_template(tokenizer, whole, add_generation_prompt=False)
    return tokenizer(_single_text(messages) + completion)["input_ids"]


def written(tokenizer: Any, drawn: list[int], finish_reason: str) -> str:
    """The text of a sample's token ids.

    The token that ended it is left out, whether the tokenizer calls that special or not. A sample that was cut may end
    within a character of several bytes; what there is of that says nothing, and is left out too.
    """
    ids = drawn[:-1] if finish_reason == "stop" else drawn
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}") if finish_reason == "length" else text


def _by_template(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> list[int]:
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from error


def _single_text(messages: Messages) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise ValueError("the tokenizer has no chat template, so only a single user message can be rendered")
    return messages[0]["content"]
