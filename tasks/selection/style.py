"""How an answer is dressed: its length and its markdown, counted, and the difference of two answers.

After the style control of Chatbot Arena and Arena-Hard: length in tokens, headers, list items, bold spans; code blocks
are added here. Of two counts a and b the difference is (a - b) / (a + b), 0 where both are 0, divided by its standard
deviation over all comparisons. Unlike there, the mean is not taken off: zero is to mean equal dress, not usual dress.

Headers are lines of 1-6 `#` and a space; list items begin with -, *, + or a number with a dot or bracket; bold is
**...** or __...__ on one line; what stands in a fenced code block is code and none of these.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEATURES = ("length", "headers", "lists", "bold", "code_blocks")

_CODE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+?(?<=\S)\*\*|(?<!\w)__(?=\S)[^_\n]+?(?<=\S)__(?!\w)")


def markdown_counts(text: str) -> tuple[int, int, int, int]:
    """Headers, list items, bold spans and code blocks of a text."""
    rest, blocks = _CODE.subn("", text)
    return len(_HEADER.findall(rest)), len(_ITEM.findall(rest)), len(_BOLD.findall(rest)), blocks


def differences(policy: Floats, reference: Floats) -> Floats:
    """Scaled differences, in the shape of both: counts [..., features], NaN where there is no text."""
    total = policy + reference
    share = np.where(
        total > 0, (policy - reference) / np.where(total > 0, total, 1), np.where(np.isnan(total), np.nan, 0)
    )
    known = share[np.isfinite(share).all(axis=-1)]
    scale = known.std(axis=0) if len(known) else np.ones(share.shape[-1])
    return share / np.where(scale > 0, scale, 1.0)
