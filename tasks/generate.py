"""generate: samples of each generator for each prompt.

Pools of actors, each with one engine, work through the shards that miss samples. A file holds a range of samples of one
shard (tasks/samples.py), so asking for more samples later makes only the further ones; which exist is read from the
store's listing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from tasks import models
from tasks.ahead import in_order
from tasks.cluster import IN_FLIGHT, Pool, run_pools
from tasks.costs import SPENT, Speed, remember_speed
from tasks.engines import Answer, GenerationRequest, Refused
from tasks.engines.loop import started
from tasks.errors import RunError
from tasks.ingest import read_shard
from tasks.progress import Meter, Report, silent
from tasks.records import COMPLETIONS, Completions, Counts, PromptSet, text_digest
from tasks.samples import Held, Ints, Mask, cover, existing, missing, name_part, rows_of, wanted
from tasks.sections import GenerateConfig, GeneratorConfig
from tasks.store import Store

Shards = list[tuple[dict[str, Any], Ints]]  # each with the samples that are wanted per row


def generate(
    config: GenerateConfig,
    prompts: PromptSet,
    store: Store,
    report: Report = silent,
    address: str = "local",
    allotment: str = "",
    in_turn: bool = False,
) -> Completions:
    """Make what is missing of samples 0..config.samples-1 of every generator; or of what each prompt is allotted.

    in_turn: generators that differ in little but their model share a pool, whose processes load one after the other:
    for many small policies, starting a process each would take longer than all the rest.
    """
    started = time.monotonic()
    shards = list(wanted(store, prompts, config.samples, allotment))
    generators = [models.pinned("generate", g, store) for g in config.generators]
    fingerprints = {g.name: models.remember_facts(models.generator_facts(g, store), g.model, store) for g in generators}
    models.check_distinct("generate.generators", fingerprints)
    todo = {g.name: missing_completions(store, fingerprints[g.name], shards) for g in generators}
    total = prompts.counts.out * len(config.generators)
    open_ = sum(item["final"] for items in todo.values() for item in items)
    meter = Meter(report, "generate", total, "prompts", reused=total - open_)
    totals: Counter[str] = Counter()
    spent: defaultdict[str, Counter[str]] = defaultdict(Counter)
    answered: set[str] = set()  # files that were made now, with an answer to every prompt

    def on_done(name: str, counts: dict[str, Any]) -> None:
        totals["tokens"] += counts["tokens"]
        spent[name].update({key: counts[key] for key in SPENT})
        answered.update([counts["file"]] if counts["file"] and not counts["refused"] else [])
        totals[f"refused by {name}"] += counts["refused"] if counts["final"] else 0
        _check_refused(config, name, totals[f"refused by {name}"], prompts.counts.out, counts["example"])
        meter.add(counts["final"], f"{totals['tokens'] / meter.seconds:,.0f} tokens/s")

    open_generators = [g for g in generators if todo[g.name]]
    alone = [g for g in open_generators if not in_turn or g.engine == "vllm"]  # its memory is free when a process ends
    pools = [
        Pool("generate", GenerateWorker, (g, fingerprints[g.name], store.url), items, g, partial(on_done, g.name))
        for g in alone
        if (items := todo[g.name])
    ]
    if shared := [g for g in open_generators if g not in alone]:
        arguments = ({g.name: (g, fingerprints[g.name]) for g in shared}, store.url)
        items = [{"generator": g.name, "items": json.dumps(todo[g.name])} for g in shared]
        pools.append(
            Pool("generate", InTurnWorker, arguments, items, shared[0], lambda done: on_done(done["generator"], done))
        )
    work = run_pools(pools, address)
    counts = _count(config, prompts, fingerprints, shards, store, answered)
    for name, took in spent.items():
        remember_speed(store, "generate", fingerprints[name], Speed(**took))
    made = sum(map(len, todo.values()))
    work = replace(
        work,
        shards_made=made,
        shards_reused=len(shards) * len(config.generators) - len({(n, i["shard"]) for n in todo for i in todo[n]}),
        seconds=time.monotonic() - started,
    )
    return Completions(prompts, config.samples, fingerprints, counts, work, allotment)


class GenerateWorker:
    """Holds one engine; makes one file of completions per item."""

    def __init__(self, config: GeneratorConfig, fingerprint: str, store_url: str, run: str) -> None:
        self.store = Store(store_url)
        self.config, self.fingerprint = config, fingerprint
        self.loop = started(config, self.store, f"{run}/{fingerprint}")

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        held = Held(item["first"], item["last"], item.get("part", ""))
        path = completions_path(self.fingerprint, item["prompts"], held)
        if await asyncio.to_thread(self.store.exists, path):  # by a process that died afterwards, or by another run
            nothing = dict.fromkeys(("requests", "samples", "tokens", "retries", "refused"), 0)
            return {**nothing, "final": item["final"], "example": "", "file": ""}
        prompts = await asyncio.to_thread(read_rows_of, self.store, item["shard"], held, ["prompt_id", "messages"])
        ids = prompts["prompt_id"].to_pylist()
        requests = [
            GenerationRequest(messages, prompt_seed(self.fingerprint, prompt_id), held.first, held.last - held.first)
            for prompt_id, messages in zip(ids, prompts["messages"].to_pylist(), strict=True)
        ]
        answers = await self.loop.answers(requests)
        table = _table(ids, answers)
        made = await asyncio.to_thread(self.store.create_table, path, table)
        refused = [answer.reason for answer in answers if isinstance(answer, Refused)]
        given = [answer for answer in answers if isinstance(answer, Answer)]
        return {
            "requests": len(requests),
            "samples": sum(len(answer.samples) for answer in given),
            "tokens": sum(sample.tokens for answer in given for sample in answer.samples),
            "retries": self.loop.retries(),
            "final": item["final"],
            "refused": len(refused),
            "example": refused[0] if refused else "",
            "file": path if made else "",  # another run was first
        }


class InTurnWorker:
    """Holds one engine at a time; makes all the files of one generator per item."""

    def __init__(self, generators: dict[str, tuple[GeneratorConfig, str]], store_url: str, run: str) -> None:
        self.generators, self.store_url, self.run = generators, store_url, run
        self.turn = asyncio.Lock()

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        async with self.turn:
            about = self.generators[item["generator"]]
            worker = await asyncio.to_thread(GenerateWorker, *about, self.store_url, self.run)
            at_once = asyncio.Semaphore(IN_FLIGHT)

            async def one(part: dict[str, Any]) -> dict[str, Any]:
                async with at_once:
                    return await worker.work(part)

            try:
                done = await asyncio.gather(*map(one, json.loads(item["items"])))
            finally:
                await asyncio.to_thread(worker.loop.close)
        counted = ("requests", "samples", "tokens", "retries", "final")
        summed = {key: sum(part[key] for part in done) for key in counted}
        summed["refused"] = sum(part["refused"] for part in done if part["final"])
        example = next((part["example"] for part in done if part["example"]), "")
        return {**summed, "example": example, "file": "", "generator": item["generator"]}


def prompt_seed(fingerprint: str, prompt_id: str) -> int:
    """Start of a prompt's range of seeds with one generator, in [0, 2^48)."""
    raw = hashlib.blake2b(f"{fingerprint}:{prompt_id}".encode(), digest_size=6).digest()
    return int.from_bytes(raw, "little")


def completions_path(fingerprint: str, prompts: str, held: tuple[int, int] | Held) -> str:
    """prompts: digest of the shard's prompt ids."""
    return f"completions/{fingerprint}/{prompts}.{Held(*held)}.parquet"


def read_rows_of(store: Store, shard: str, held: Held, columns: list[str] | None = None) -> pa.Table:
    """The prompts of a shard that a file is about."""
    prompts = read_shard(store, shard, columns)
    rows = rows_of(store)(held)
    return prompts if rows is None else prompts.take(rows)


def missing_completions(store: Store, fingerprint: str, shards: Shards) -> list[dict[str, Any]]:
    """The files to be made, as items for the workers; `final`: how many rows have all that is wanted with it."""
    there = existing(store, f"completions/{fingerprint}")
    rows, items = rows_of(store), []
    for shard, number in shards:
        open_ = np.zeros(shard["rows"], np.bool_)
        mine = []
        for first, last, group in reversed(list(missing(there.get(shard["prompts"], []), number, rows))):
            part = name_part(store, group, shard["rows"])
            names = {"shard": shard["digest"], "prompts": shard["prompts"], "part": part, "rows": len(group)}
            mine.append({**names, "first": first, "last": last, "final": int((~open_[group]).sum())})
            open_[group] = True
        items += reversed(mine)
    return items


def _table(ids: list[str], answers: list[Answer | Refused]) -> pa.Table:
    rows = []
    for prompt_id, answer in zip(ids, answers, strict=True):
        samples = answer.samples if isinstance(answer, Answer) else []
        rows.append(
            {
                "prompt_id": prompt_id,
                "refused": answer.reason if isinstance(answer, Refused) else None,
                "prompt_tokens": answer.prompt_tokens if isinstance(answer, Answer) else None,
                "texts": [sample.text for sample in samples],
                "text_digests": [text_digest(sample.text) for sample in samples],
                "finish_reasons": [sample.finish_reason for sample in samples],
                "tokens": [sample.tokens for sample in samples],
                "logprobs": [sample.logprob for sample in samples],
            }
        )
    return pa.Table.from_pylist(rows, schema=COMPLETIONS)


def _count(
    config: GenerateConfig,
    prompts: PromptSet,
    fingerprints: dict[str, str],
    shards: Shards,
    store: Store,
    answered: set[str],
) -> Counts:
    """Prompts in and answered, over all generators, from the files themselves.

    answered: files that need not be read again, since whoever just made them had nothing refused.
    """
    into = prompts.counts.out * len(fingerprints)
    dropped: Counter[str] = Counter()
    rows = rows_of(store)
    for name, fingerprint in fingerprints.items():
        mine: Counter[str] = Counter()
        there = existing(store, f"completions/{fingerprint}")
        unread = (
            [
                (path, take, rows(held))
                for held, take in cover(there[shard["prompts"]], number, rows)[0]
                if (path := completions_path(fingerprint, shard["prompts"], held)) not in answered
            ]
            for shard, number in shards
        )
        for reasons in in_order(lambda files: _refused(store, files), unread):
            mine.update(reasons)
        _check_refused(config, name, mine.total(), prompts.counts.out, str(dict(mine)))
        dropped += mine
    return Counts(into, into - dropped.total(), dict(dropped))


def _refused(store: Store, files: list[tuple[str, Mask, Ints | None]]) -> Counter[str]:
    """Why prompts of a shard were refused: each once, also where that was for its later samples only.

    files: with what is wanted of each, and its rows of the shard.
    """
    why: dict[int, str] = {}
    for path, take, rows in files:
        reasons = store.read_table(path, ["refused"])["refused"]
        for at in np.flatnonzero(take.any(axis=1) & reasons.is_valid().to_numpy()):
            why.setdefault(int(at if rows is None else rows[at]), reasons[int(at)].as_py())
    return Counter(f"refused: {reason.split(':')[0]}" for reason in why.values())


def _check_refused(config: GenerateConfig, name: str, refused: int, of: int, example: str) -> None:
    if refused > int(config.max_refused * of):
        raise RunError(
            f"generate: {refused} of {of:,} prompts were refused by {name!r}, more than max_refused "
            f"{config.max_refused:.0%}: {example}"
        )
