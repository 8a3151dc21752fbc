"""duel: a pairwise judge compares the samples of two generators, one with one, in both orders.

Sample i of the one meets sample i of the other on the same prompt: n samples cost 2 n requests per prompt. Equal texts
are a tie that nobody is asked about, and a question that comes twice for a prompt is asked once.

duels/<judge>/<one>-<other>/<prompts>.<first>-<last>.parquet holds the grades of samples first..last-1 for the prompts
of one shard. `one` is the generator whose fingerprint sorts first, whichever of them is under test, and grades are its
own: so the same comparison is found again from either side, and more samples or prompts pay for themselves alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from tasks import models
from tasks.cluster import Pool, run_pools
from tasks.config import CompareConfig
from tasks.engines.loop import started
from tasks.errors import RunError
from tasks.generate import completions_path
from tasks.ingest import read_shard
from tasks.judge import ENDPOINT, JUDGE, Duel, Judge
from tasks.progress import Meter, Report, silent
from tasks.records import DUELS, RATED, Completions, Counts, Duels, digest
from tasks.samples import Held, Ints, cover, existing, missing, rows_of, wanted_of
from tasks.score import TooManyMissing, check_missing, settled
from tasks.sections import ScoreConfig, ScorerConfig
from tasks.store import Store

_WHAT = "comparisons by judge"  # in what is said when too many are missing

Texts = list[list[str | None]]  # [prompts][samples]; None where a generator gave none


def duel(
    config: ScoreConfig,
    compare: CompareConfig,
    completions: Completions,
    store: Store,
    report: Report = silent,
    address: str = "local",
) -> Duels:
    """Make the comparisons that are missing, for every pairwise judge among the scorers."""
    started = time.monotonic()
    judges = [models.pinned("score", s, store) for s in config.comparing]
    fingerprints = {j.name: models.remember_facts(models.scorer_facts(j, store), j.model, store) for j in judges}
    models.check_distinct("score.scorers", fingerprints)
    sides = sides_of(compare, completions)
    shards = list(wanted_of(store, completions))
    todo = {j.name: missing_duels(store, fingerprints[j.name], sides, shards) for j in judges}
    total = sum(int(number.sum()) for _, number in shards)
    open_ = sum(item["samples"] for items in todo.values() for item in items)
    meter = Meter(report, "duel", total * len(judges), "comparisons", reused=total * len(judges) - open_)
    totals: Counter[str] = Counter()

    def on_done(name: str, counts: dict[str, Any]) -> None:
        totals["tokens"] += counts["tokens"]
        totals[f"missing from {name}"] += counts["missing"]
        check_missing(config, name, totals[f"missing from {name}"], total, counts["example"], _WHAT)
        meter.add(counts["finished"], f"{totals['tokens'] / meter.seconds:,.0f} tokens/s")

    pools = [
        Pool("duel", DuelWorker, (j, fingerprints[j.name], sides, store.url), todo[j.name], j, partial(on_done, j.name))
        for j in judges
        if todo[j.name]
    ]
    try:
        work = run_pools(pools, address)
        counts = _count(config, fingerprints, sides, shards, store)
    except TooManyMissing:
        settled(lambda: _forget(fingerprints, sides, shards, store))
        raise
    made = sum(map(len, todo.values()))
    work = replace(
        work,
        shards_made=made,
        shards_reused=len(shards) * len(judges) - len({(n, i["shard"]) for n in todo for i in todo[n]}),
        seconds=time.monotonic() - started,
    )
    return Duels(completions, fingerprints, counts, work)


class DuelWorker:
    """Holds one judge; makes one file of comparisons per item."""

    def __init__(
        self, config: ScorerConfig, fingerprint: str, sides: tuple[str, str], store_url: str, run: str
    ) -> None:
        self.store, self.sides, self.fingerprint = Store(store_url), sides, fingerprint
        self.loop = started(config, self.store, f"{run}/{fingerprint}")
        self.judge = Judge(config.judge, fingerprint, self.loop)
        self.paid = config.engine == "openai"

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        first, last = item["first"], item["last"]
        path = duels_path(self.fingerprint, self.sides, item["prompts"], Held(first, last))
        if await asyncio.to_thread(self.store.exists, path):  # by a process that died afterwards, or by another run
            nothing = dict.fromkeys(("requests", "samples", "tokens", "paid_tokens", "retries", "missing"), 0)
            return {**nothing, "finished": item["samples"], "example": ""}
        rows = (await asyncio.to_thread(read_shard, self.store, item["shard"], ["prompt_id", "messages"])).to_pylist()
        number = np.full(len(rows), last, np.int64)
        one, other = [
            [texts[first:] for texts in await asyncio.to_thread(texts_of, self.store, side, item["prompts"], number)]
            for side in self.sides
        ]
        met = [[(a, b) for a, b in zip(*both, strict=True)] for both in zip(one, other, strict=True)]
        asked = [
            (row, a, b) for row, pairs in enumerate(met) for a, b in pairs if a is not None and b is not None and a != b
        ]
        both_orders = [duel for row, a, b in asked for duel in ((row, a, b), (row, b, a))]
        answers, requests, tokens = await self.judge.compare(rows, both_orders)
        made = [_outcomes(row, pairs, answers) for row, pairs in enumerate(met)]
        ids = [row["prompt_id"] for row in rows]
        table = pa.Table.from_pylist([{"prompt_id": i, **m} for i, m in zip(ids, made, strict=True)], schema=DUELS)
        table = table.replace_schema_metadata({RATED: _seal(one, other)})
        await asyncio.to_thread(self.store.create_table, path, table)
        reasons = [reason for outcome in made for reason in outcome["reasons"] if reason]
        return {
            "requests": requests,
            "samples": sum(len(outcome["reasons"]) for outcome in made),
            "tokens": tokens,
            "paid_tokens": tokens if self.paid else 0,
            "retries": self.loop.retries(),
            "finished": item["samples"],
            "missing": len(reasons),
            "example": reasons[0] if reasons else "",
        }


def sides_of(compare: CompareConfig, completions: Completions) -> tuple[str, str]:
    """Fingerprints of the two, in the order in which their comparisons are kept."""
    one, other = sorted(completions.generators[name] for name in (compare.policy, compare.reference))
    return one, other


def duels_path(judge: str, sides: tuple[str, str], prompts: str, held: Held) -> str:
    return f"{_below(judge, sides)}/{prompts}.{held}.parquet"


def missing_duels(
    store: Store, judge: str, sides: tuple[str, str], shards: list[tuple[dict[str, Any], Ints]]
) -> list[dict[str, Any]]:
    """What a judge has not compared yet, as items for the workers."""
    there, rows, items = existing(store, _below(judge, sides)), rows_of(store), []
    for shard, number in shards:
        for first, last, group in missing(there.get(shard["prompts"], []), number, rows):
            assert len(group) == shard["rows"], "both generators have the same samples of every prompt"
            names = {"shard": shard["digest"], "prompts": shard["prompts"]}
            items.append({**names, "first": first, "last": last, "samples": len(group) * (last - first)})
    return items


def read_grades(
    store: Store, duels: Duels, judge: str, compare: CompareConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per shard, the grades of the policy's samples when shown first and second: [prompts, samples], NaN where none."""
    sides = sides_of(compare, duels.completions)
    turned = sides[0] != duels.completions.generators[compare.policy]
    there, rows = existing(store, _below(duels.judges[judge], sides)), rows_of(store)
    for shard, number in wanted_of(store, duels.completions):
        grades = np.full((2, shard["rows"], int(number.max())), np.nan)
        for held, take in cover(there[shard["prompts"]], number, rows)[0]:
            table = store.read_table(duels_path(duels.judges[judge], sides, shard["prompts"], held))
            at, sample = np.nonzero(take)
            for order, name in enumerate(("first", "second")):
                values = table[name].combine_chunks().flatten().cast(pa.float64()).fill_null(np.nan).to_numpy()
                grades[order, at, sample + held.first] = values.reshape(take.shape)[take]
        # The other's grades are the opposite, and it was shown first where the one was shown second.
        yield (-grades[1], -grades[0]) if turned else (grades[0], grades[1])


def texts_of(
    store: Store, generator: str, prompts: str, number: Ints, there: Mapping[str, list[Held]] | None = None
) -> Texts:
    """The texts of samples 0..number-1 of a generator, for the rows of one shard; there: its files, if known."""
    rows = rows_of(store)
    texts: Texts = [[None] * int(n) for n in number]
    known = existing(store, f"completions/{generator}") if there is None else there
    for held, take in cover(known.get(prompts, []), number, rows)[0]:
        table, mine = store.read_table(completions_path(generator, prompts, held), ["texts"]), rows(held)
        for i, (given, wanted) in enumerate(zip(table["texts"].to_pylist(), take, strict=True)):
            for j in np.flatnonzero(wanted[: len(given)]):
                texts[i if mine is None else int(mine[i])][held.first + int(j)] = given[j]
    return texts


def _seal(one: Texts, other: Texts) -> bytes:
    """Of what is compared: an engine that makes completions again may answer otherwise."""
    return digest([one, other]).encode()


def _below(judge: str, sides: tuple[str, str]) -> str:
    return f"duels/{judge}/{'-'.join(sides)}"


def _outcomes(
    row: int, pairs: list[tuple[str | None, str | None]], answers: dict[Duel, int | str]
) -> dict[str, list[Any]]:
    """Grades in both orders, and reasons; none of them where a generator gave no text."""
    made: dict[str, list[Any]] = {"first": [], "second": [], "reasons": []}
    for a, b in pairs:
        if a is None or b is None:
            first, second, reason = None, None, None
        elif a == b:
            first, second, reason = 0, 0, None
        else:
            shown_first, shown_second = answers[row, a, b], answers[row, b, a]
            if isinstance(shown_first, str) or isinstance(shown_second, str):
                first, second = None, None
                reason = shown_first if isinstance(shown_first, str) else str(shown_second)
            else:
                first, second, reason = shown_first, -shown_second, None
        made["first"].append(first)
        made["second"].append(second)
        made["reasons"].append(reason)
    return made


def _count(
    config: ScoreConfig,
    fingerprints: dict[str, str],
    sides: tuple[str, str],
    shards: list[tuple[dict[str, Any], Ints]],
    store: Store,
) -> Counts:
    """Comparisons of two texts in, those with both grades out, over all judges, from the files themselves."""
    into, dropped, rows = 0, Counter[str](), rows_of(store)
    made = [existing(store, f"completions/{side}") for side in sides]
    for name, fingerprint in fingerprints.items():
        seen, reasons = 0, list[str]()
        there = existing(store, _below(fingerprint, sides))
        for shard, number in shards:
            for held, take in cover(there[shard["prompts"]], number, rows)[0]:
                path = duels_path(fingerprint, sides, shard["prompts"], held)
                table = store.read_table(path, ["first", "reasons"])
                until = np.full(shard["rows"], held.last, np.int64)
                one, other = [
                    [texts[held.first :] for texts in texts_of(store, side, shard["prompts"], until, there)]
                    for side, there in zip(sides, made, strict=True)
                ]
                seal = _seal(one, other)
                if (table.schema.metadata or {}).get(RATED, seal) != seal:
                    raise RunError(f"{path} compares other texts than there are now; remove it and run again")
                for grades, why, wanted in zip(
                    *(table[c].to_pylist() for c in ("first", "reasons")), take, strict=True
                ):
                    mine = [(g, r) for g, r, w in zip(grades, why, wanted, strict=True) if w]
                    seen += sum(g is not None or r is not None for g, r in mine)
                    reasons += [r for _, r in mine if r is not None]
        check_missing(config, name, len(reasons), seen, reasons[0] if reasons else "", _WHAT)
        dropped.update(f"{name}: {reason.removeprefix(JUDGE).split(':')[0]}" for reason in reasons)
        into += seen
    return Counts(into, into - sum(dropped.values()), dict(dropped))


def _forget(
    fingerprints: dict[str, str], sides: tuple[str, str], shards: list[tuple[dict[str, Any], Ints]], store: Store
) -> None:
    """Have endpoints asked again where they gave no answer or refused; see tasks/score.py."""
    for fingerprint in fingerprints.values():
        there = existing(store, _below(fingerprint, sides))
        for shard, _ in shards:
            for held in there.get(shard["prompts"], []):
                path = duels_path(fingerprint, sides, shard["prompts"], held)
                reasons = store.read_table(path, ["reasons"])["reasons"].combine_chunks().flatten()
                if any(reason.startswith(ENDPOINT) for reason in reasons.drop_null().to_pylist()):
                    store.remove_file(path)
