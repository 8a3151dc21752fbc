"""Character tokens and the chat template.

    [system] + user + generation prompt   ->  <bos>SYSTEM\n flip stone =     (without the spaces)
    ... + assistant                       ->  <bos>SYSTEM\n flip stone = enots <eos>

A prompt with its generation prompt is a prefix of the same prompt with an answer, in text and in tokens: TRL's
DPOTrainer and every engine that continues a prompt rely on it. The vocabulary is printable ASCII and the newline; any
other character is <unk>.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '=' + message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- message['content'] + '\\n' }}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '=' }}
{%- endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of single characters, padding on the left as generation needs it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    pad, unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def render(prompt: str, completion: str | None = None) -> str:
    """What the chat template makes of one user message (and an answer); a hundred times quicker than Jinja."""
    return f"<bos>{prompt}=" if completion is None else f"<bos>{prompt}={completion}<eos>"
