"""TinyWorld's verifier: right is +1, wrong is -1 plus the share of characters that match.

    score = 1                                       if completion == answer
    score = -1 + matches / max(len(completion), len(answer))   otherwise

`matches` counts the places at which completion and answer hold the same character. White space around the completion
does not count. An empty completion scores -1, unless the answer is empty, too; a wrong completion always scores below
0, because either a place differs or the lengths do. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Prompt(Protocol):
    """What the verifier needs of a prompt."""

    @property
    def messages(self) -> Any: ...  # [{"role": ..., "content": ...}, ...]

    @property
    def fields(self) -> Mapping[str, Any]: ...  # holds "answer" and "difficulty"


def score(prompt: Prompt, completion: str) -> float:
    """The quality of a completion, from -1 (nothing matches) to below 0 (wrong), or 1 (right).

    Formula: 1 if completion == answer, else -1 + matches / max(len(completion), len(answer)).
    """
    return score_text(str(prompt.fields["answer"]), completion)


def score_text(answer: str, completion: str) -> float:
    """`score` for an answer held in a string."""
    completion = completion.strip()
    if completion == answer:
        return 1.0
    matches = sum(a == b for a, b in zip(answer, completion, strict=False))
    return -1.0 + matches / max(len(answer), len(completion))
