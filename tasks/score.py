"""score: one reward per completion and scorer.

A file of rewards lies beside each file of completions, aligned with it row by row. Reward models run in pools of actors
with one engine each; functions run in a pool of plain actors. Where a scorer gives no finite number there is a null and
its reason, never a made-up reward.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import models
from tasks.cluster import Pool, run_pools
from tasks.config import ScoreConfig, ScorerConfig
from tasks.engines import ScoringRequest, reward_engine
from tasks.engines.loop import EngineLoop, Refused
from tasks.errors import RunError
from tasks.generate import Range, completions_path, covering, existing_ranges
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import REWARDS, Completions, Counts, Prompt, Rewards, Work
from tasks.store import Store

_RAISED = "function raised"


class TooManyMissing(RunError):
    """More rewards are missing than the configuration allows."""


def score(
    config: ScoreConfig, completions: Completions, store: Store, report: Report = silent, address: str = "local"
) -> Rewards:
    """Make the rewards that are missing, for every scorer and generator."""
    started = time.monotonic()
    scorers = [models.pinned("score", scorer, store) for scorer in config.scorers]
    fingerprints = {
        s.name: models.remember_facts(models.scorer_facts(s, store), s.model or s.function, store) for s in scorers
    }
    models.check_distinct("score.scorers", fingerprints)
    files = list(files_to_rate(completions, store))
    missing = {s.name: missing_rewards(store, s, fingerprints[s.name], files) for s in scorers}
    in_files = sum(item["samples"] for item in files)  # files may hold more samples than are wanted now
    total = in_files * len(config.scorers)
    todo = sum(item["samples"] for items in missing.values() for item in items)
    meter = Meter(report, "score", total, "rewards", reused=total - todo)
    totals: Counter[str] = Counter()

    def on_done(name: str, counts: dict[str, Any]) -> None:
        totals.update({key: counts[key] for key in ("requests", "samples", "engine_starts")})
        totals[f"missing from {name}"] += counts["missing"]
        _check_missing(config, name, totals[f"missing from {name}"], in_files, counts["example"])
        meter.add(counts["finished"])

    pools = [
        Pool(ScoreWorker, (s, fingerprints[s.name], store.url), missing[s.name], s, partial(on_done, s.name))
        for s in scorers
        if missing[s.name]
    ]
    try:
        engine_seconds = run_pools(pools, address)
        counts = _count(config, fingerprints, files, store)
    except TooManyMissing:
        _forget_raised(scorers, fingerprints, files, store)
        raise
    made = sum(map(len, missing.values()))
    work = Work(
        shards_made=made,
        shards_reused=len(files) * len(config.scorers) - made,
        engine_starts=totals["engine_starts"],
        requests=totals["requests"],
        samples=totals["samples"],
        seconds=time.monotonic() - started,
        engine_seconds=engine_seconds,
    )
    return Rewards(completions, fingerprints, counts, work)


class ScoreWorker:
    """Holds one reward model or function; makes one file of rewards per item."""

    def __init__(self, config: ScorerConfig, fingerprint: str, store_url: str) -> None:
        self.store = Store(store_url)
        self.config, self.fingerprint = config, fingerprint
        if config.type == "function":
            self.function = models.load_function(config)
        else:
            self.loop = EngineLoop(reward_engine(config, models.local(config.model, self.store)))

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        samples = (item["first"], item["last"])
        source = completions_path(item["generator"], item["prompts"], samples)
        prompts = await asyncio.to_thread(read_shard, self.store, item["shard"])
        texts = (await asyncio.to_thread(self.store.read_table, source, ["texts"]))["texts"].to_pylist()
        rows = prompts.to_pylist()
        # A reward is a function of prompt and text: equal texts of one prompt are asked for once.
        places = [(row, text) for row, row_texts in enumerate(texts) for text in row_texts]
        unique = list(dict.fromkeys(places))
        ask = self._by_function if self.config.type == "function" else self._by_model
        answers = dict(zip(unique, await ask(rows, unique), strict=True))
        outcomes = [answers[place] for place in places]
        table = _table([row["prompt_id"] for row in rows], texts, outcomes)
        path = _path(self.config, self.fingerprint, item)
        await asyncio.to_thread(self.store.create_table, path, table)
        reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
        return {
            "requests": len(unique),
            "samples": len(outcomes),
            "finished": item["samples"],  # with those of refused prompts, of which there are none
            "missing": len(reasons),
            "example": reasons[0] if reasons else "",
        }

    async def _by_model(self, rows: list[dict[str, Any]], places: list[tuple[int, str]]) -> list[float | str]:
        requests = [ScoringRequest(rows[row]["messages"], text) for row, text in places]
        answers = await asyncio.wrap_future(self.loop.submit(requests))
        return [answer.reason if isinstance(answer, Refused) else _finite(answer) for answer in answers]

    async def _by_function(self, rows: list[dict[str, Any]], places: list[tuple[int, str]]) -> list[float | str]:
        prompts = [Prompt(row["prompt_id"], row["messages"], row["source"], row["fields"]) for row in rows]
        return await asyncio.to_thread(lambda: [self._call(prompts[row], text) for row, text in places])

    def _call(self, prompt: Prompt, text: str) -> float | str:
        try:
            return _finite(float(self.function(prompt, text)))
        except Exception as error:  # somebody else's code on a hostile text: that reward is missing, the run goes on
            return f"{_RAISED} {type(error).__name__}: {error}"[:500].encode(errors="backslashreplace").decode()


def rewards_path(scorer: str, generator: str, rated: str, samples: Range) -> str:
    """rated: digest of what the scorer saw of the shard's prompts (see `_path`)."""
    return f"rewards/{scorer}/{generator}/{rated}.{samples[0]}-{samples[1]}.parquet"


def files_to_rate(completions: Completions, store: Store) -> Iterator[dict[str, Any]]:
    """The files of completions that hold the wanted samples, as items for the workers."""
    shards = shards_of(store, completions.prompts)
    for generator in completions.generators.values():
        there = existing_ranges(store, f"completions/{generator}")
        for shard in shards:
            for (first, last), part in covering(there[shard["prompts"]], shard.get("samples", completions.samples)):
                yield {
                    "generator": generator,
                    "shard": shard["digest"],
                    "prompts": shard["prompts"],
                    "first": first,
                    "last": last,
                    "wanted_from": part.start,  # of the file's samples; others were made for another run
                    "wanted_to": part.stop,
                    "samples": shard["rows"] * (last - first),
                }


def missing_rewards(
    store: Store, scorer: ScorerConfig, fingerprint: str, files: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those of the files that a scorer has not rated yet."""
    there = set(store.list(f"rewards/{fingerprint}"))
    return [item for item in files if _path(scorer, fingerprint, item) not in there]


def _path(scorer: ScorerConfig, fingerprint: str, item: dict[str, Any]) -> str:
    """A model sees a prompt's messages alone; a function also its source and fields, so it rates a shard's rows."""
    rated = item["shard"] if scorer.type == "function" else item["prompts"]
    return rewards_path(fingerprint, item["generator"], rated, (item["first"], item["last"]))


def _forget_raised(
    scorers: list[ScorerConfig], fingerprints: dict[str, str], files: list[dict[str, Any]], store: Store
) -> None:
    """Have functions asked again where they raised: what they lacked may be there then. A model would say the same."""
    for scorer in scorers:
        there = set(store.list(f"rewards/{fingerprints[scorer.name]}")) if scorer.type == "function" else set()
        for path in {_path(scorer, fingerprints[scorer.name], item) for item in files} & there:
            reasons = store.read_table(path, ["reasons"])["reasons"].combine_chunks().flatten()
            if any(reason.startswith(_RAISED) for reason in reasons.drop_null().to_pylist()):
                store.remove(path)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else f"not finite: {value}"


def _table(ids: list[str], texts: list[list[str]], outcomes: list[float | str]) -> pa.Table:
    """Outcomes, in the order of the texts, as one row per prompt."""
    rows, start = [], 0
    for prompt_id, row_texts in zip(ids, texts, strict=True):
        mine = outcomes[start : start + len(row_texts)]
        start += len(row_texts)
        rewards = [None if isinstance(outcome, str) else outcome for outcome in mine]
        reasons = [outcome if isinstance(outcome, str) else None for outcome in mine]
        rows.append({"prompt_id": prompt_id, "rewards": rewards, "reasons": reasons})
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _count(config: ScoreConfig, fingerprints: dict[str, str], files: list[dict[str, Any]], store: Store) -> Counts:
    """Completions in and rewards out, over all scorers, from the files themselves."""
    into, dropped = 0, Counter[str]()
    for scorer in config.scorers:
        name, mine, example, seen = scorer.name, 0, "", 0
        for item in files:
            path = _path(scorer, fingerprints[name], item)
            column = store.read_table(path, ["reasons"])["reasons"].combine_chunks()
            reasons = pc.list_slice(column, item["wanted_from"], item["wanted_to"]).flatten()
            seen += len(reasons)
            for reason in reasons.drop_null().to_pylist():
                dropped[f"{name}: {reason.split(':')[0]}"] += 1
                mine, example = mine + 1, reason
        _check_missing(config, name, mine, seen, example)
        into += seen
    return Counts(into, into - sum(dropped.values()), dict(dropped))


def _check_missing(config: ScoreConfig, name: str, missing: int, of: float, example: str) -> None:
    if missing > config.max_missing * of:
        raise TooManyMissing(
            f"score: {missing} of {of:,.0f} rewards of scorer {name!r} are missing, more than max_missing "
            f"{config.max_missing:.0%}: {example}. The completions are kept; mend the scorer and run again."
        )
