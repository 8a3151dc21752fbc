"""trial: every model of a configuration is loaded where a run would load it, and asked a little.

A reward model is asked for the rewards of right and wrong answers to a few plain questions. Served by vLLM its rewards
must be those of transformers, which loads the published head as it is; a head that one of them does not know comes out
as other numbers, and nothing else would tell.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from tasks import models
from tasks.cluster import Pool, run_pools
from tasks.config import CurateConfig, EvaluateConfig, RunConfig
from tasks.engines import GenerationRequest, Refused, ScoringRequest, generator_engine, reward_engine
from tasks.engines.loop import EngineLoop
from tasks.errors import RunError
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store

# Question, right answer, wrong answer: short, for small models read letter by letter and take few.
GOLDEN = (
    ("What is 12 + 7?", "19", "24"),
    ("Capital of France?", "Paris", "Rome"),
    ("Opposite of hot?", "cold", "banana banana"),
    ("Name a colour.", "red", "no, go away"),
)
_TOLERANCE = 0.05  # of the spread of the rewards: half precision differs by less, another head by more

Trial = tuple[str, Any]  # what is tried; finds out, or raises RunError or ConfigError


def trials(config: RunConfig) -> Iterator[Trial]:
    """The models that a run of curate or evaluate would load; an endpoint is asked by the checks already."""
    if not isinstance(config, CurateConfig | EvaluateConfig):
        return
    store = Store(config.store_url)
    for generator in config.generate.generators if config.generate else []:
        yield f"generator {generator.name} loaded", lambda one=generator: _generates(one, store, config.ray_address)
    for scorer in config.score.scorers if config.score else []:
        if scorer.type == "reward_model":
            yield f"scorer {scorer.name} loaded", lambda one=scorer: golden_rewards(one, store, config.ray_address)


def _generates(config: GeneratorConfig, store: Store, address: str) -> str:
    answer = _asked(config, store, address)
    return f"ready after {answer['loaded']:.0f} s; {answer['tokens']:,} tokens in {answer['seconds']:.1f} s"


def golden_rewards(config: ScorerConfig, store: Store, address: str) -> str:
    answer = _asked(config, store, address)
    rewards = answer["rewards"]
    if not all(map(math.isfinite, rewards)):
        raise RunError(f"golden rewards: not all are finite: {rewards}")
    right = sum(good > bad for good, bad in zip(rewards[::2], rewards[1::2], strict=True))
    found = f"ready after {answer['loaded']:.0f} s; {right} of {len(GOLDEN)} right answers above wrong ones"
    if config.engine != "vllm":
        return found
    theirs = _asked(config.model_copy(update={"engine": "transformers", "engine_args": {}}), store, address)["rewards"]
    apart = max(abs(one - other) for one, other in zip(rewards, theirs, strict=True))
    spread = max(theirs) - min(theirs)
    if apart > _TOLERANCE * spread:
        raise RunError(
            f"golden rewards: vLLM's and transformers' differ by up to {apart:.3g}, and spread over {spread:.3g}; this "
            "model's head is not what vLLM takes it for: use engine: transformers"
        )
    return f"{found}; as by transformers, within {apart:.2g} of a spread of {spread:.3g}"


def _asked(config: GeneratorConfig | ScorerConfig, store: Store, address: str) -> dict[str, Any]:
    config = models.pinned("model", config, store).model_copy(update={"workers": 1, "max_workers": 0})
    found: dict[str, Any] = {}
    run_pools([Pool("doctor", TrialWorker, (config, store.url), [{"item": 0}], config, found.update)], address)
    answer: dict[str, Any] = json.loads(found["answer"])
    return answer


class TrialWorker:
    """Holds one engine, and asks it what all are asked."""

    def __init__(self, config: GeneratorConfig | ScorerConfig, store_url: str, run: str) -> None:
        started = time.monotonic()
        model = models.local(config.model, Store(store_url))
        if isinstance(config, GeneratorConfig):
            self.loop = EngineLoop(generator_engine(config, model), deadline=config.deadline)
        else:
            self.loop = EngineLoop(reward_engine(config, model), deadline=config.deadline)
        self.generates, self.loaded = isinstance(config, GeneratorConfig), time.monotonic() - started

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        asked: list[Any] = []
        for question, *golden in GOLDEN:
            messages = [{"role": "user", "content": question}]
            if self.generates:
                asked.append(GenerationRequest(messages, seed=0, first=0, samples=1))
            else:
                asked += [ScoringRequest(messages, text) for text in golden]
        answers = await self.loop.answers(asked)
        for answer in answers:
            if isinstance(answer, Refused):
                raise RunError(answer.reason)
        found: dict[str, Any] = {"loaded": self.loaded, "seconds": time.monotonic() - started}
        if self.generates:
            found["tokens"] = sum(sample.tokens for answer in answers for sample in answer.samples)
        else:
            found["rewards"] = answers
        await asyncio.to_thread(self.loop.close)
        return {"answer": json.dumps(found)}
