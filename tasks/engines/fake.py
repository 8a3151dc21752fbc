"""A deterministic, instant engine for dry runs and for tests of everything around an engine.

Answers depend only on the generator's name, the prompt and the sample's seed, so a run that was killed and run again
ends with the same digests. `engine_args: {quality: 1.0}` shifts a fake generator's rewards, `{nan: true}` makes a fake
reward model return NaN. A fake judge goes by the same numbers as a fake reward model, with noise per dimension.

`{faults: FILE}` makes it fail as real engines do. The file, read at every request if it is there, is JSON: what part of
a prompt does what, which is one of `raise`, `hang`, `exit` (the process is gone), `raise once`, `exit once` and
`sleep SECONDS`; "" stands in every prompt, and `start` for the start of the engine.

`{log: FILE}` makes generators and reward models say what they are asked: a line of JSON per request, which is a list of
the engine's name, the prompt, and the first sample or the completion to rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tasks import rubric
from tasks.engines import Answer, ChatRequest, GenerationRequest, Reply, Sample, ScoringRequest
from tasks.sections import GeneratorConfig, ScorerConfig

_GRADED = {number: {grade: word for word, grade in grades.items()} for number, grades in rubric.GRADES.items()}
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "juniper", "kelp", "larch")


class FakeGenerator:
    def __init__(self, config: GeneratorConfig) -> None:
        _fail(config, "start")
        self.config = config
        self.quality = float(config.engine_args.get("quality", 0.0))
        self.queue: list[tuple[int, GenerationRequest]] = []

    def add(self, key: int, request: GenerationRequest) -> None:
        self.queue.append((key, request))

    def step(self) -> list[tuple[int, Answer]]:
        done = [(key, self._answer(request)) for key, request in self.queue]
        self.queue = []
        return done

    def close(self) -> None:
        self.queue = []

    def _answer(self, request: GenerationRequest) -> Answer:
        prompt = " ".join(message["content"] for message in request.messages)
        _log(self.config, prompt, request.first)
        _fail(self.config, prompt)
        samples = [self._sample(prompt, request.seed + request.first + i) for i in range(request.samples)]
        return Answer(prompt_tokens=len(prompt.split()), samples=samples)

    def _sample(self, prompt: str, seed: int) -> Sample:
        rng = _rng(self.config.name, prompt, seed)
        spread = _rng("spread", prompt).random()  # prompts differ in how much their answers differ
        quality = round(self.quality + spread * rng.gauss(0, 1), 2)
        words = rng.choices(_WORDS, k=min(rng.randint(3, 12), self.config.sampling.max_tokens))
        return Sample(f"[{quality}] {' '.join(words)}", "stop", len(words) + 1, -2.0 * len(words))


class FakeRewardModel:
    """The number in brackets that a fake generator wrote, or a digest of any other text."""

    def __init__(self, config: ScorerConfig) -> None:
        _fail(config, "start")
        self.config = config
        self.queue: list[tuple[int, ScoringRequest]] = []

    def add(self, key: int, request: ScoringRequest) -> None:
        self.queue.append((key, request))

    def step(self) -> list[tuple[int, float]]:
        for _, request in self.queue:
            prompt = " ".join(message["content"] for message in request.messages)
            _log(self.config, prompt, request.completion)
            _fail(self.config, prompt)
        done = [(key, self._score(request.completion)) for key, request in self.queue]
        self.queue = []
        return done

    def close(self) -> None:
        self.queue = []

    def _score(self, text: str) -> float:
        if self.config.engine_args.get("nan"):
            return math.nan
        return _quality(self.config.name, text)


class FakeJudge:
    """Rates by the number in brackets, from the middle of the scale on; compares by it, close ones as ties."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.queue: list[tuple[int, ChatRequest]] = []

    def add(self, key: int, request: ChatRequest) -> None:
        self.queue.append((key, request))

    def step(self) -> list[tuple[int, Reply]]:
        done = [(key, self._reply(request)) for key, request in self.queue]
        self.queue = []
        return done

    def close(self) -> None:
        self.queue = []

    def _reply(self, request: ChatRequest) -> Reply:
        data = json.loads(request.messages[-1]["content"])
        answer: dict[str, Any] = {}
        for name, wanted in request.schema["properties"].items():
            scale = wanted["enum"]
            if wanted["type"] == "integer":
                quality = _quality(f"{self.config.name} {name}", data["response"])
                place = (len(scale) - 1) * (0.5 + 0.25 * quality)
                answer[name] = scale[min(max(round(place), 0), len(scale) - 1)]
            else:
                ahead = _quality(self.config.name, data["A"]) - _quality(self.config.name, data["B"])
                grade = 0 if abs(ahead) < 0.1 else 1 if abs(ahead) < 1 or len(scale) == 3 else 2
                answer[name] = _GRADED[len(scale)][grade if ahead > 0 else -grade]
        words = sum(len(message["content"].split()) for message in request.messages)
        return Reply(json.dumps(answer), words, 2 * len(answer))


def _log(config: GeneratorConfig | ScorerConfig, prompt: str, what: int | str) -> None:
    """One write at the file's end: lines of several processes do not mix."""
    if log := config.engine_args.get("log"):
        with open(log, "ab", buffering=0) as file:
            file.write(json.dumps([config.name, prompt, what]).encode() + b"\n")


def _fail(config: GeneratorConfig | ScorerConfig, prompt: str) -> None:
    """Do what the file of faults says of a prompt."""
    faults = config.engine_args.get("faults")
    if not faults or not (file := Path(faults)).is_file():
        return
    for part, what in json.loads(file.read_text()).items():
        if prompt != part if "start" in (part, prompt) else part not in prompt:
            continue
        kind, _, rest = what.partition(" ")
        if rest == "once":
            try:
                file.with_name(f"{file.name}.{_rng(part).getrandbits(64):016x}").touch(exist_ok=False)
            except FileExistsError:
                continue
        if kind == "sleep":
            time.sleep(float(rest))
        elif kind == "hang":
            threading.Event().wait()
        elif kind == "exit":
            print(f"made to end at {part!r}", file=sys.stderr, flush=True)
            os._exit(1)
        else:
            raise RuntimeError(f"made to fail at {part!r}")


def _quality(judge: str, text: str) -> float:
    """The number that a fake generator wrote in front, or a digest of any other text; with noise of the judge's own."""
    noise = 0.1 * _rng(judge, text).gauss(0, 1)
    written = re.match(r"\[(-?\d+(?:\.\d+)?)\]", text)
    return float(written[1]) + noise if written else 10 * noise


def _rng(*parts: Any) -> random.Random:
    return random.Random(hashlib.sha256("\x00".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest())
