"""A judge as a scorer: asks an engine what tasks/rubric.py says, and makes rewards of the answers.

Pointwise: every different response to a prompt is rated alone; its reward is the mean of its dimensions.

Pairwise: every two different responses to a prompt that lie in one file of completions are compared, in both orders; a
response's reward is its win share (tasks/selection/roundrobin.py). The limits of that: n samples cost n (n-1) requests;
a reward says how a sample does among its siblings in that file, so it compares neither generators, nor prompts, nor
samples that were added in a later run; a file with a single sample gives no rewards. Two generators are compared by
tasks/duel.py, through the same judge.

An answer that cannot be read is asked for once more, with another seed and a reminder. What then has none is missing,
with a reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from tasks import rubric
from tasks.engines import ChatRequest, Refused
from tasks.engines.loop import EngineLoop
from tasks.sections import JudgeConfig
from tasks.selection.roundrobin import win_shares

JUDGE = "judge: "  # begins every reason
ENDPOINT = (f"{JUDGE}no answer", f"{JUDGE}refused")  # reasons of tasks/engines/openai.py, which may pass

Place = tuple[int, str]  # row of the prompt, text
Duel = tuple[int, str, str]  # row of the prompt, text shown as A, text shown as B


@dataclass(frozen=True)
class Rating:
    reward: float
    dimensions: dict[str, float | None]


@dataclass(frozen=True)
class _Question:
    prompt_id: str
    messages: rubric.Messages


class Judge:
    def __init__(self, config: JudgeConfig, fingerprint: str, loop: EngineLoop) -> None:
        self.config, self.fingerprint, self.loop = config, fingerprint, loop

    async def rate(
        self, rows: list[dict[str, Any]], texts: list[list[str]]
    ) -> tuple[dict[Place, float | Rating | str], int, int]:
        """A rating, or why there is none, for each text of each row; how many requests and tokens that took.

        rows: prompts with `prompt_id` and `messages`; texts: the samples of one file for each of them.
        """
        rate = self._by_comparisons if self.config.mode == "pairwise" else self._by_ratings
        spent: Counter[str] = Counter()
        return await rate(rows, texts, spent), spent["requests"], spent["tokens"]

    async def _by_ratings(
        self, rows: list[dict[str, Any]], texts: list[list[str]], spent: Counter[str]
    ) -> dict[Place, float | Rating | str]:
        places = list(dict.fromkeys((row, text) for row, mine in enumerate(texts) for text in mine))
        questions = [
            _Question(rows[row]["prompt_id"], rubric.rating_messages(self.config, rows[row]["messages"], text))
            for row, text in places
        ]
        answers = await self._ask(questions, lambda answer: rubric.read_ratings(self.config, answer), spent)
        return {
            place: answer if isinstance(answer, str) else Rating(fmean(answer.values()), answer)
            for place, answer in zip(places, answers, strict=True)
        }

    async def _by_comparisons(
        self, rows: list[dict[str, Any]], texts: list[list[str]], spent: Counter[str]
    ) -> dict[Place, float | Rating | str]:
        different = [Counter(mine) for mine in texts]
        duels = [(row, a, b) for row, mine in enumerate(different) for a in mine for b in mine if a != b]
        answers = await self._grades(rows, duels, spent)
        outcomes: dict[Place, float | Rating | str] = {}
        for row, mine in enumerate(different):
            names = list(mine)
            points = np.full((len(names), len(names)), np.nan)
            for i, a in enumerate(names):
                for j, b in enumerate(names):
                    answer = answers.get((row, a, b))
                    if isinstance(answer, int):
                        points[i, j] = 0.5 + 0.5 * np.sign(answer)
            shares, consistency = win_shares(points, np.array([mine[name] for name in names], dtype=np.int64))
            for i, name in enumerate(names):
                if np.isfinite(shares[i]):
                    kept = float(consistency[i]) if np.isfinite(consistency[i]) else None
                    outcomes[row, name] = Rating(float(shares[i]), {"position_consistency": kept})
                else:
                    pairs = [(row, name, other) for other in names] + [(row, other, name) for other in names]
                    why = [answer for pair in pairs if isinstance(answer := answers.get(pair), str)]
                    outcomes[row, name] = why[0] if why else f"{JUDGE}nothing to compare with: one sample in its file"
        return outcomes

    async def compare(
        self, rows: list[dict[str, Any]], duels: Sequence[Duel]
    ) -> tuple[dict[Duel, int | str], int, int]:
        """A grade for each (row, shown as A, shown as B), or why there is none; how many requests and tokens it took.

        Equal duels are asked for once; the other order is a duel of its own.
        """
        spent: Counter[str] = Counter()
        return await self._grades(rows, list(dict.fromkeys(duels)), spent), spent["requests"], spent["tokens"]

    async def _grades(
        self, rows: list[dict[str, Any]], duels: Sequence[Duel], spent: Counter[str]
    ) -> dict[Duel, int | str]:
        questions = [
            _Question(rows[row]["prompt_id"], rubric.comparison_messages(self.config, rows[row]["messages"], a, b))
            for row, a, b in duels
        ]
        answers = await self._ask(questions, lambda answer: rubric.read_verdict(self.config, answer), spent)
        return dict(zip(duels, answers, strict=True))

    async def _ask(
        self, questions: Sequence[_Question], read: Callable[[str], Any], spent: Counter[str]
    ) -> list[Any | str]:
        """What `read` makes of the answers, in order of the questions; a reason where there is none."""
        answers = await self._once(questions, 0, read, spent)
        again = [i for i, answer in enumerate(answers) if isinstance(answer, _Unreadable)]
        reminded = [_Question(questions[i].prompt_id, rubric.reminded(questions[i].messages)) for i in again]
        for i, answer in zip(again, await self._once(reminded, 1, read, spent), strict=True):
            answers[i] = str(answer) if isinstance(answer, _Unreadable) else answer
        return answers

    async def _once(
        self, questions: Sequence[_Question], attempt: int, read: Callable[[str], Any], spent: Counter[str]
    ) -> list[Any]:
        schema = rubric.schema(self.config)
        requests = [ChatRequest(q.messages, schema, self._seed(q, attempt)) for q in questions]
        replies = await self.loop.answers(requests)
        answers: list[Any] = []
        for reply in replies:
            if isinstance(reply, Refused):
                answers.append(f"{JUDGE}{reply.reason}")
                continue
            spent["tokens"] += reply.prompt_tokens + reply.tokens
            try:
                answers.append(read(reply.text))
            except ValueError as error:
                excerpt = reply.text.encode(errors="backslashreplace").decode()[:120]
                answers.append(_Unreadable(f"{JUDGE}not readable: {error}: {excerpt!r}"))
        spent["requests"] += len(requests)
        return answers

    def _seed(self, question: _Question, attempt: int) -> int:
        """In [0, 2^31): of the judge, the question and the attempt, whatever else is asked beside."""
        named = f"{self.fingerprint}:{question.prompt_id}:{attempt}:{question.messages[-1]['content']}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=4).digest(), "little") >> 1


@dataclass(frozen=True)
class _Unreadable:
    reason: str

    def __str__(self) -> str:
        return self.reason
