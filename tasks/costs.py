"""What things cost: seconds measured when a thing was made, and what a run's GPUs and endpoints come to.

    amount = GPU seconds / 3600 * price of a GPU hour + paid tokens / 10^6 * price of a million tokens

What has no price, a price of 0, is told beside the amount.
In the store, costs/<what>/<digest>.json holds the seconds, and costs/<stage>/<fingerprint>/ what a model's engines took
in each run, which dry runs estimate by. None of it is ever part of a version.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from tasks.errors import RunError
from tasks.progress import duration
from tasks.sections import ModelConfig, PricesConfig
from tasks.store import Store

_SEEN = 50  # runs that are looked at


def amount(gpu_seconds: float, paid_tokens: float, prices: PricesConfig) -> float:
    """In the currency of the prices."""
    return gpu_seconds / 3600 * prices.gpu_hour + paid_tokens / 1e6 * prices.million_tokens


def cost_of(stages: Iterable[dict[str, Any]], pairs: dict[str, int], prices: PricesConfig) -> dict[str, Any]:
    """What a run cost, and each pair of a subset if there were no other. Amounts are null where nothing has a price.

    stages: rows with gpu_seconds and paid_tokens. pairs: how many each subset accepted.
    """
    rows = list(stages)
    seconds = sum(row["gpu_seconds"] for row in rows)
    tokens = sum(row["paid_tokens"] for row in rows)
    whole = amount(seconds, tokens, prices) if prices.gpu_hour or prices.million_tokens else None
    per_pair = {
        name: {"gpu_seconds": seconds / number, "amount": None if whole is None else whole / number}
        for name, number in pairs.items()
        if number
    }
    return {
        "gpu_seconds": round(seconds, 2),
        "paid_tokens": tokens,
        "amount": whole,
        "unpriced": [
            what
            for what, number, price in (
                ("GPU hours", seconds, prices.gpu_hour),
                ("tokens of endpoints", tokens, prices.million_tokens),
            )
            if number and not price
        ],
        "currency": prices.currency,
        "per_pair": per_pair,
    }


@dataclass(frozen=True)
class Speed:
    """Of a model's engines in earlier runs: what so many samples took."""

    samples: int
    tokens: int
    busy_seconds: float  # that engines were held, once they had started
    engine_starts: int
    start_seconds: float  # of all starts together

    def estimate(self, samples: int, files: int, config: ModelConfig) -> str:
        """For so many samples in so many files, in words. Each engine starts once, and takes whole files."""
        share, engines = samples / self.samples, max(1, min(config.workers, files))
        start, busy = self.start_seconds / max(1, self.engine_starts), share * self.busy_seconds
        words = [f"{share * self.tokens:,.0f} tokens"] if self.tokens else []
        words.append(f"{duration(start + busy / engines)} with {engines} engine{'s' * (engines > 1)}")
        words += [f"{(engines * start + busy) * config.gpus / 3600:.2g} GPU hours"] if config.gpus else []
        return f"about {', '.join(words)}"


SPENT = tuple(field.name for field in fields(Speed))


def remember_speed(store: Store, stage: str, fingerprint: str, speed: Speed) -> None:
    """After each run that made something; the fastest way to know what the next one takes is to have seen one."""
    if speed.samples:
        store.create_json(f"costs/{stage}/{fingerprint}/{uuid.uuid4().hex}.json", asdict(speed))


def known_speed(store: Store, stage: str, fingerprint: str) -> Speed | None:
    """Over all that was seen."""
    files = store.list(f"costs/{stage}/{fingerprint}")[:_SEEN]
    seen = [spent for path in files if (spent := _numbers(store, path, SPENT))]
    speed = Speed(*map(sum, zip(*seen, strict=True))) if seen else None
    return speed if speed and speed.samples else None


def remember_cost(store: Store, what: str, digest: str, seconds: float) -> None:
    store.create_json(_place(what, digest), {"seconds": round(seconds, 2)})


def known_costs(store: Store, what: str, digests: Iterable[str]) -> dict[str, float]:
    """Seconds by digest, of those that were measured."""
    there = set(store.list(f"costs/{what}"))
    wanted = {digest: path for digest in digests if (path := _place(what, digest)) in there}
    found = {digest: _numbers(store, path, ("seconds",)) for digest, path in wanted.items()}
    return {digest: spent[0] for digest, spent in found.items() if spent}


def _numbers(store: Store, path: str, keys: Iterable[str]) -> list[float]:
    """Empty where a file holds something else: an estimate is not worth a run."""
    try:
        told = store.read_object(path, *keys)
    except RunError:
        return []
    numbers = [told[key] for key in keys]
    return numbers if all(type(one) in (int, float) and 0 <= one < math.inf for one in numbers) else []


def _place(what: str, digest: str) -> str:
    return f"costs/{what}/{digest}.json"
