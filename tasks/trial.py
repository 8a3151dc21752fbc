"""trial: every model of a configuration is loaded where a run would load it, and asked a little.

A reward model is asked for the rewards of right and wrong answers to a few plain questions. Served by vLLM its rewards
must be those of transformers, which loads the published head as it is; a head that one of them does not know comes out
as other numbers, and nothing else would tell. A judge is asked to rate the same answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from tasks import models
from tasks.check import Check
from tasks.cluster import Pool, run_pools
from tasks.config import CurateConfig, EvaluateConfig, RunConfig, TrainConfig, is_dashboard
from tasks.engines import GenerationRequest, Refused, ScoringRequest, engine_of
from tasks.engines.loop import EngineLoop
from tasks.errors import RunError
from tasks.experiments import ExperimentConfig
from tasks.faults import EngineDied, Faults
from tasks.judge import Judge, Rating
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store
from tasks.training import PolicyConfig

# Question, right answer, wrong answer: short, for small models read letter by letter and take few.
GOLDEN = (
    ("What is 12 + 7?", "19", "24"),
    ("Capital of France?", "Paris", "Rome"),
    ("Opposite of hot?", "cold", "banana banana"),
    ("Name a colour.", "red", "no, go away"),
)
_TOLERANCE = 0.05  # of the spread of the rewards: half precision differs by less, another head by more

Model = GeneratorConfig | ScorerConfig | PolicyConfig


def models_of(config: RunConfig) -> Iterator[tuple[str, Model]]:
    """All that a run of this configuration asks or trains, by what it is there."""
    if isinstance(config, ExperimentConfig):
        if config.curate:
            yield from models_of(config.curate)
        yield "reference", config.evaluate.reference
        for scorer in config.evaluate.score.scorers:
            yield f"held-out scorer {scorer.name}", scorer
    if isinstance(config, CurateConfig | EvaluateConfig):
        for generator in config.generate.generators if config.generate else []:
            yield f"generator {generator.name}", generator
        for scorer in config.score.scorers if config.score else []:
            yield f"scorer {scorer.name}", scorer
    if isinstance(config, ExperimentConfig | TrainConfig):
        yield f"policy {config.policy.model}", config.policy


def trials(config: RunConfig) -> Iterator[Check]:
    """Of each model that a run would ask or train; of what is not tried, why."""
    store = Store(config.store_url)
    for what, model in models_of(config):
        if isinstance(model, PolicyConfig):
            yield f"{what} not tried", partial(str, "only training loads it; a run with train.max_steps: 1 would tell")
        elif reason := _left_out(model, config.ray_address):
            yield f"{what} not tried", partial(str, reason)
        else:
            yield f"{what} loaded", partial(_loaded, model, store, config.ray_address)


def _left_out(config: GeneratorConfig | ScorerConfig, address: str) -> str:
    """Why it is not tried; empty where it is."""
    if isinstance(config, ScorerConfig) and config.type == "function":
        return "a function, which the checks above have imported"
    if config.engine == "openai":
        return "an endpoint, which the checks above have asked"
    if is_dashboard(address):
        return (
            f"a run would be a job of the cluster at {address}; `prefsieve submit` one of few prompts (limit: 8), or "
            "run this there, with ray_address: auto"
        )
    return ""


def _loaded(config: GeneratorConfig | ScorerConfig, store: Store, address: str) -> str:
    if isinstance(config, ScorerConfig) and config.type == "reward_model":
        return golden_rewards(config, store, address)
    answer = _asked(config, store, address)
    ready = f"ready after {answer['loaded']:.0f} s"
    if isinstance(config, GeneratorConfig):
        return f"{ready}; {answer['tokens']:,} tokens in {answer['seconds']:.1f} s"
    return f"{ready}; {len(answer['rewards'])} of {2 * len(GOLDEN)} answers rated"


def golden_rewards(config: ScorerConfig, store: Store, address: str) -> str:
    answer = _asked(config, store, address)
    rewards = answer["rewards"]
    if not all(map(math.isfinite, rewards)):
        raise RunError(f"golden rewards: not all are finite: {rewards}")
    right = sum(good > bad for good, bad in zip(rewards[::2], rewards[1::2], strict=True))
    found = f"ready after {answer['loaded']:.0f} s; {right} of {len(GOLDEN)} right answers above wrong ones"
    if config.engine != "vllm":
        return found
    if config.gpus > 1 or config.engine_args:
        why = "does not split a model over GPUs" if config.gpus > 1 else "would not take engine_args as vLLM does"
        return f"{found}; not held against transformers, which {why}"
    theirs = _asked(config.model_copy(update={"engine": "transformers"}), store, address)["rewards"]
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
        self.faults = Faults(Store(store_url), run)
        with self.faults.attempt("start", config.start_deadline):
            engine = engine_of(config, models.local(config.model, self.faults.store))
        self.config, self.loop = config, EngineLoop(engine, deadline=config.deadline)
        self.loaded = time.monotonic() - started

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        try:
            with self.faults.attempt("trial"):
                found = await self._ask()
        except EngineDied as died:  # as it is, it would have Ray start one process after the other
            raise RunError(f"the engine hangs: {died}") from died
        found |= {"loaded": self.loaded, "seconds": time.monotonic() - started}
        await asyncio.to_thread(self.loop.close)
        return {"answer": json.dumps(found)}

    async def _ask(self) -> dict[str, Any]:
        chats = [[{"role": "user", "content": question}] for question, *_ in GOLDEN]
        texts = [[right, wrong] for _, right, wrong in GOLDEN]
        if isinstance(self.config, GeneratorConfig):
            answers = await self._answers([GenerationRequest(chat, seed=0, first=0, samples=1) for chat in chats])
            return {"tokens": sum(sample.tokens for answer in answers for sample in answer.samples)}
        if self.config.type == "judge":
            rows = [{"prompt_id": chat[0]["content"], "messages": chat} for chat in chats]
            said = (await Judge(self.config.judge, "", self.loop).rate(rows, texts))[0].values()
            rewards = [one.reward for one in said if isinstance(one, Rating)]
            if not rewards:
                raise RunError(f"no answer is rated: {next(iter(said))}")
            return {"rewards": rewards}
        pairs = zip(chats, texts, strict=True)
        return {"rewards": await self._answers([ScoringRequest(chat, text) for chat, both in pairs for text in both])}

    async def _answers(self, requests: list[Any]) -> list[Any]:
        answers = await self.loop.answers(requests)
        for answer in answers:
            if isinstance(answer, Refused):
                raise RunError(answer.reason)
        return answers
