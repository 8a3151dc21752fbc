"""What runs do, as Prometheus series. Ray exposes them, with its own, on the metrics port of every node.

    ray_prefsieve_shards            gauge    files that a pool of engines is to make, while it is at work
    ray_prefsieve_shards_open       gauge    those that are not made yet
    ray_prefsieve_shards_done       counter  those that are
    ray_prefsieve_requests, _samples, _tokens, _paid_tokens, _retries, _engine_starts, _engine_restarts, _gpu_seconds
                                    counters, as in Work; samples are completions, rewards or comparisons, by stage
    ray_prefsieve_dropped           counter  rows that a stage did not pass on, by reason
    ray_prefsieve_cost              counter  of runs that have ended, at their prices, by flow and currency
    ray_prefsieve_cost_per_pair     gauge    of the last run that paid for any, by subset and currency

All but the last three are labelled by stage and model, and come while a stage goes on; drops, and the GPU seconds of a
training, come when it ends. The name
of a counter ends in _total there. A run's own report has the same numbers; nothing is read back from here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

_STAGE = ("stage", "model")
_early: list[tuple[str, float, dict[str, str]]] = []  # counted before this process had Ray


class PoolSeries:
    """Of one pool of engines; for a process that has Ray."""

    def __init__(self, stage: str, model: str, shards: int) -> None:
        self.tags = {"stage": stage, "model": model}
        self.open = shards
        _series("Gauge", "prefsieve_shards", _STAGE).set(shards, self.tags)
        _series("Gauge", "prefsieve_shards_open", _STAGE).set(self.open, self.tags)
        while _early:
            _count(*_early.pop())

    def add(self, counted: Mapping[str, float], model: str = "") -> None:
        """One more file. counted: what was done for it, by the names of Work. model: of a pool that has several."""
        tags = {**self.tags, "model": model} if model else self.tags
        for name, number in {**counted, "shards_done": 1}.items():
            if number > 0:
                _series("Counter", f"prefsieve_{name}", _STAGE).inc(number, tags)
        self.open -= 1
        _series("Gauge", "prefsieve_shards_open", _STAGE).set(self.open, self.tags)


def show_trained(policy: str, gpu_seconds: float) -> None:
    """What a training held."""
    _count("prefsieve_gpu_seconds", gpu_seconds, {"stage": "train", "model": policy})


def show_dropped(stage: str, dropped: Mapping[str, int]) -> None:
    """Rows that a stage dropped, by reason."""
    for reason, number in dropped.items():
        _count("prefsieve_dropped", number, {"stage": stage, "reason": reason})


def show_cost(flow: str, amount: float | None, currency: str) -> None:
    """What a run cost, where it has a price."""
    _count("prefsieve_cost", amount or 0.0, {"flow": flow, "currency": currency})


def show_cost_per_pair(subset: str, amount: float | None, currency: str) -> None:
    """What each pair of a subset cost in the last run that had to pay for any."""
    ray = sys.modules.get("ray")
    if amount and ray and ray.is_initialized():
        tags = {"subset": subset, "currency": currency}
        _series("Gauge", "prefsieve_cost_per_pair", tuple(tags)).set(amount, tags)


def _count(name: str, number: float, tags: dict[str, str]) -> None:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # of a run that finds all in the store there is nothing to see
        _early.append((name, number, tags))
    elif number > 0:
        _series("Counter", name, tuple(tags)).inc(number, tags)


@cache  # of one name there is one series per process
def _series(kind: str, name: str, tags: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, description=name.replace("_", " "), tag_keys=tags)
