"""Engines: the only modules that import vllm, openai or transformers' generation.

An engine takes requests at any time and gives answers as they come:

    add(key, request)        remember a request; ValueError when it can never be answered (then it is refused)
    step() -> [(key, answer)]  work a little; the answers that became ready, a Refused where it turned out later
    close()                  give memory back

`engine_of` finds the one that is asked for. `generator_engine` answers GenerationRequest with Answer, `reward_engine`
answers ScoringRequest with a float, the raw logit, `judge_engine` answers ChatRequest with Reply. tasks/engines/loop.py
drives any kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tasks.sections import GeneratorConfig, ScorerConfig

VLLM_MEMORY = 0.92  # share of a GPU that vLLM takes by default; engines that share one share that


@dataclass(frozen=True)
class GenerationRequest:
    """All samples of one prompt that are still missing, asked for at once so that the prompt is prefilled once."""

    messages: list[dict[str, str]]
    seed: int  # of the prompt; sample i draws from stream seed + i, whatever range it is asked in
    first: int
    samples: int


@dataclass(frozen=True)
class Sample:
    text: str
    finish_reason: str  # stop | length
    tokens: int
    logprob: float  # sum over tokens under the model at temperature 1, the end token included


@dataclass(frozen=True)
class Answer:
    prompt_tokens: int
    samples: list[Sample]


@dataclass(frozen=True)
class ScoringRequest:
    messages: list[dict[str, str]]
    completion: str


@dataclass(frozen=True)
class ChatRequest:
    """One question to a judge, to be answered by a JSON schema."""

    messages: list[dict[str, str]]
    schema: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int  # 0 where an endpoint does not say
    tokens: int


@dataclass(frozen=True)
class Refused:
    """In place of an answer: why the engine cannot take this request."""

    reason: str


class Engine(Protocol):
    def add(self, key: int, request: Any) -> None: ...

    def step(self) -> list[tuple[int, Any]]: ...

    def close(self) -> None: ...


def engine_of(config: GeneratorConfig | ScorerConfig, model: str) -> Engine:
    """The engine that a generator or scorer asks for. `model`: local folder or hub name."""
    if isinstance(config, GeneratorConfig):
        return generator_engine(config, model)
    return judge_engine(config, model) if config.type == "judge" else reward_engine(config, model)


def generator_engine(config: GeneratorConfig, model: str) -> Engine:
    """The engine a generator asks for. `model`: local folder or hub name."""
    if config.engine == "vllm":
        from tasks.engines.vllm import VllmGenerator

        return VllmGenerator(config, model)
    if config.engine == "transformers":
        from tasks.engines.transformers import TransformersGenerator

        return TransformersGenerator(config, model)
    from tasks.engines.fake import FakeGenerator

    return FakeGenerator(config)


def reward_engine(config: ScorerConfig, model: str) -> Engine:
    """The engine a reward model asks for. `model`: local folder or hub name."""
    if config.engine == "vllm":
        from tasks.engines.vllm import VllmRewardModel

        return VllmRewardModel(config, model)
    if config.engine == "transformers":
        from tasks.engines.transformers import TransformersRewardModel

        return TransformersRewardModel(config, model)
    from tasks.engines.fake import FakeRewardModel

    return FakeRewardModel(config)


def judge_engine(config: ScorerConfig, model: str) -> Engine:
    """The engine a judge asks for. `model`: local folder or hub name, or what the endpoint calls it."""
    if config.engine == "vllm":
        from tasks.engines.vllm import VllmJudge

        return VllmJudge(config, model)
    if config.engine == "openai":
        from tasks.engines.openai import OpenAIJudge

        return OpenAIJudge(config)
    from tasks.engines.fake import FakeJudge

    return FakeJudge(config)
