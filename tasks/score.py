"""score: one reward per completion and scorer.

A file of rewards lies beside each file of completions, aligned with it row by row. Reward models and judges run in
pools of actors with one engine each; functions run in a pool of plain actors. Where a scorer gives no finite number
there is a null and its reason, never a made-up reward. A judge's ratings are kept per dimension too.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import models, rubric
from tasks.ahead import in_order
from tasks.cluster import Pool, run_pools
from tasks.costs import SPENT, Speed, remember_speed
from tasks.engines import Refused, ScoringRequest
from tasks.engines.loop import EngineLoop, started
from tasks.errors import RunError
from tasks.generate import completions_path, read_rows_of
from tasks.judge import ENDPOINT, JUDGE, Judge, Rating
from tasks.progress import Meter, Report, silent
from tasks.records import DIMENSION, RATED, Completions, Counts, Prompt, Rewards, rewards_schema, texts_seal
from tasks.samples import Held, Mask, cover, existing, rows_of, wanted_of
from tasks.sections import ScoreConfig, ScorerConfig
from tasks.store import Store

_RAISED = "function raised"

_ENDING = 2.0  # seconds, of an actor

Outcome = float | Rating | str  # a reward, a judge's with its dimensions, or why there is none


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
    wanted = list(files_to_rate(completions, store))
    files = [item for item, _ in wanted]
    missing = {s.name: missing_rewards(store, s, fingerprints[s.name], files) for s in scorers}
    in_files = sum(item["samples"] for item in files)  # files may hold more samples than are wanted now
    total = in_files * len(config.scorers)
    todo = sum(item["samples"] for items in missing.values() for item in items)
    meter = Meter(report, "score", total, "rewards", reused=total - todo)
    totals: Counter[str] = Counter()
    spent: defaultdict[str, Counter[str]] = defaultdict(Counter)
    rated: dict[str, int] = {}  # files that were made now, with a reward for every completion, and how many

    def on_done(name: str, counts: dict[str, Any]) -> None:
        totals["tokens"] += counts["tokens"]
        spent[name].update({key: counts[key] for key in SPENT})
        rated.update({counts["file"]: counts["samples"]} if counts["file"] and not counts["missing"] else {})
        totals[f"missing from {name}"] += counts["missing"]
        check_missing(config, name, totals[f"missing from {name}"], in_files, counts["example"])
        note = f"{totals['tokens'] / meter.seconds:,.0f} tokens/s" if totals["tokens"] else ""
        meter.add(counts["finished"], note)

    pools = [
        Pool("score", ScoreWorker, (s, fingerprints[s.name], store.url), missing[s.name], s, partial(on_done, s.name))
        for s in scorers
        if missing[s.name]
    ]
    try:
        work = run_pools(pools, address)
        counts = _count(config, fingerprints, wanted, store, rated)
    except TooManyMissing:
        settled(lambda: _forget(scorers, fingerprints, files, store))
        raise
    for name, took in spent.items():
        remember_speed(store, "score", fingerprints[name], Speed(**took))
    made = sum(map(len, missing.values()))
    work = replace(
        work,
        shards_made=made,
        shards_reused=len(files) * len(config.scorers) - made,
        seconds=time.monotonic() - started,
    )
    return Rewards(completions, fingerprints, counts, work)


class ScoreWorker:
    """Holds one reward model, judge or function; makes one file of rewards per item."""

    def __init__(self, config: ScorerConfig, fingerprint: str, store_url: str, run: str) -> None:
        self.store = Store(store_url)
        self.config, self.fingerprint = config, fingerprint
        self.loop: EngineLoop | None = None
        if config.type == "function":
            self.function = models.load_function(config)
            return
        self.loop = started(config, self.store, f"{run}/{fingerprint}")
        if config.type == "judge":
            self.judge = Judge(config.judge, fingerprint, self.loop)

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        held = Held(item["first"], item["last"], item.get("part", ""))
        path = _path(self.config, self.fingerprint, item)
        if await asyncio.to_thread(self.store.exists, path):  # by a process that died afterwards, or by another run
            nothing = dict.fromkeys(("requests", "samples", "tokens", "paid_tokens", "retries", "missing"), 0)
            return {**nothing, "finished": item["samples"], "example": "", "file": ""}
        source = completions_path(item["generator"], item["prompts"], held)
        prompts = await asyncio.to_thread(read_rows_of, self.store, item["shard"], held)
        completions = await asyncio.to_thread(self.store.read_table, source, ["texts", "text_digests"])
        texts = completions["texts"].to_pylist()
        rows = prompts.to_pylist()
        # A reward is a function of prompt and text: equal texts of one prompt are asked for once.
        places = [(row, text) for row, row_texts in enumerate(texts) for text in row_texts]
        unique = list(dict.fromkeys(places))
        answers: dict[tuple[int, str], Outcome]
        requests, tokens = len(unique), 0
        if self.config.type == "judge":
            answers, requests, tokens = await self.judge.rate(rows, texts)
        else:
            ask = self._by_function if self.config.type == "function" else self._by_model
            answers = dict(zip(unique, await ask(rows, unique), strict=True))
        outcomes = [answers[place] for place in places]
        table = _table([row["prompt_id"] for row in rows], texts, outcomes, dimensions_of(self.config))
        table = table.replace_schema_metadata({RATED: texts_seal(completions["text_digests"])})
        made = await asyncio.to_thread(self.store.create_table, path, table)
        reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
        return {
            "requests": requests,
            "samples": len(outcomes),
            "tokens": tokens,
            "paid_tokens": tokens if self.config.engine == "openai" else 0,
            "retries": self.loop.retries() if self.loop else 0,
            "finished": item["samples"],  # with those of refused prompts, of which there are none
            "missing": len(reasons),
            "example": reasons[0] if reasons else "",
            "file": path if made else "",  # another run was first
        }

    async def _by_model(self, rows: list[dict[str, Any]], places: list[tuple[int, str]]) -> list[float | str]:
        requests = [ScoringRequest(rows[row]["messages"], text) for row, text in places]
        assert self.loop
        answers = await self.loop.answers(requests)
        return [answer.reason if isinstance(answer, Refused) else _finite(answer) for answer in answers]

    async def _by_function(self, rows: list[dict[str, Any]], places: list[tuple[int, str]]) -> list[float | str]:
        prompts = [Prompt(row["prompt_id"], row["messages"], row["source"], row["fields"]) for row in rows]
        return await asyncio.to_thread(lambda: [self._call(prompts[row], text) for row, text in places])

    def _call(self, prompt: Prompt, text: str) -> float | str:
        try:
            return _finite(float(self.function(prompt, text)))
        except Exception as error:  # somebody else's code on a hostile text: that reward is missing, the run goes on
            return f"{_RAISED} {type(error).__name__}: {error}"[:500].encode(errors="backslashreplace").decode()


def rewards_path(scorer: str, generator: str, rated: str, held: tuple[int, int] | Held) -> str:
    """rated: digest of what the scorer saw of the shard's prompts (see `_path`)."""
    return f"rewards/{scorer}/{generator}/{rated}.{Held(*held)}.parquet"


def dimensions_of(config: ScorerConfig) -> list[str]:
    """Names of what a scorer keeps beside its rewards; a judge alone does."""
    return rubric.dimensions(config.judge) if config.type == "judge" else []


def files_to_rate(completions: Completions, store: Store) -> Iterator[tuple[dict[str, Any], Mask]]:
    """The files of completions that hold the wanted samples, as items for the workers; and which samples those are."""
    rows = rows_of(store)
    for generator in completions.generators.values():
        there = existing(store, f"completions/{generator}")
        for shard, number in wanted_of(store, completions):
            for held, take in cover(there[shard["prompts"]], number, rows)[0]:
                names = {"generator": generator, "shard": shard["digest"], "prompts": shard["prompts"]}
                yield {**names, **held._asdict(), "samples": take.size}, take


def missing_rewards(
    store: Store, scorer: ScorerConfig, fingerprint: str, files: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those of the files that a scorer has not rated yet."""
    there = set(store.list(f"rewards/{fingerprint}"))
    return [item for item in files if _path(scorer, fingerprint, item) not in there]


def _path(scorer: ScorerConfig, fingerprint: str, item: dict[str, Any]) -> str:
    """A model sees a prompt's messages alone; a function also its source and fields, so it rates a shard's rows."""
    rated = item["shard"] if scorer.type == "function" else item["prompts"]
    return rewards_path(fingerprint, item["generator"], rated, Held(item["first"], item["last"], item.get("part", "")))


def settled(forget: Callable[[], None]) -> None:
    """Remove what must not stay; and once more, what an actor that was just told to end has written meanwhile."""
    forget()
    time.sleep(_ENDING)
    forget()


def _forget(
    scorers: list[ScorerConfig], fingerprints: dict[str, str], files: list[dict[str, Any]], store: Store
) -> None:
    """Have functions asked again where they raised, and endpoints where they gave no answer or refused: what was wrong
    there may be mended then. A model would say the same."""
    for scorer in scorers:
        passing = {"function": (_RAISED,), "judge": ENDPOINT}.get(scorer.type, ())
        there = set(store.list(f"rewards/{fingerprints[scorer.name]}")) if passing else set()
        for path in {_path(scorer, fingerprints[scorer.name], item) for item in files} & there:
            reasons = store.read_table(path, ["reasons"])["reasons"].combine_chunks().flatten()
            if any(reason.startswith(passing) for reason in reasons.drop_null().to_pylist()):
                store.remove_file(path)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else f"not finite: {value}"


def _table(ids: list[str], texts: list[list[str]], outcomes: list[Outcome], dimensions: list[str]) -> pa.Table:
    """Outcomes, in the order of the texts, as one row per prompt."""
    rows, start = [], 0
    for prompt_id, row_texts in zip(ids, texts, strict=True):
        mine = outcomes[start : start + len(row_texts)]
        start += len(row_texts)
        row: dict[str, Any] = {
            "prompt_id": prompt_id,
            "rewards": [_reward(outcome) for outcome in mine],
            "reasons": [outcome if isinstance(outcome, str) else None for outcome in mine],
        }
        for name in dimensions:
            row[DIMENSION + name] = [o.dimensions[name] if isinstance(o, Rating) else None for o in mine]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=rewards_schema(dimensions))


def _reward(outcome: Outcome) -> float | None:
    if isinstance(outcome, Rating):
        return outcome.reward
    return None if isinstance(outcome, str) else outcome


def _count(
    config: ScoreConfig,
    fingerprints: dict[str, str],
    wanted: list[tuple[dict[str, Any], Mask]],
    store: Store,
    rated: dict[str, int],
) -> Counts:
    """Completions in and rewards out, over all scorers, from the files themselves; those of other runs not counted.

    rated: files that need not be read again, since whoever just made them had a reward for each of so many completions.
    """
    into, dropped = 0, Counter[str]()
    for scorer in config.scorers:
        name, mine, example, seen = scorer.name, 0, "", 0

        def look(one: tuple[dict[str, Any], Mask], scorer: ScorerConfig = scorer) -> tuple[int, list[str]]:
            path, take = _path(scorer, fingerprints[scorer.name], one[0]), one[1]
            if path in rated and take.all():
                return rated[path], []
            reasons = _taken(store.read_table(path, ["reasons"])["reasons"].combine_chunks(), take)
            return len(reasons), reasons.drop_null().to_pylist()

        for number, reasons in in_order(look, wanted):
            seen += number
            for reason in reasons:
                dropped[f"{name}: {reason.removeprefix(JUDGE).split(':')[0]}"] += 1
                mine, example = mine + 1, reason
        check_missing(config, name, mine, seen, example)
        into += seen
    return Counts(into, into - sum(dropped.values()), dict(dropped))


def _taken(lists: pa.ListArray, take: Mask) -> pa.Array:
    """The entries of lists [rows, samples at most] that are taken."""
    if take.all():
        return lists.flatten()
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    there = np.arange(take.shape[1]) < lengths[:, None]
    return lists.flatten().filter(pa.array(take[there]))


def check_missing(
    config: ScoreConfig, name: str, missing: int, of: float, example: str, what: str = "rewards of scorer"
) -> None:
    if missing > config.max_missing * of:
        raise TooManyMissing(
            f"score: {missing} of {of:,.0f} {what} {name!r} are missing, more than max_missing "
            f"{config.max_missing:.0%}: {example}. The completions are kept; mend the scorer and run again."
        )
