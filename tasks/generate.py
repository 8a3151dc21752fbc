"""generate: samples of each generator for each prompt.

Pools of actors, each with one engine, work through the shards that miss samples. A file holds a range of samples of one
shard, so asking for more samples later makes only the further ones; which exist is read from the store's listing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, defaultdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import models
from tasks.cluster import Pool, run_pools
from tasks.engines import Answer, GenerationRequest, generator_engine
from tasks.engines.loop import EngineLoop, Refused
from tasks.errors import RunError
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import COMPLETIONS, Completions, Counts, PromptSet, Work, text_digest
from tasks.sections import GenerateConfig, GeneratorConfig
from tasks.store import Store

Range = tuple[int, int]  # first sample, last sample + 1


def generate(
    config: GenerateConfig, prompts: PromptSet, store: Store, report: Report = silent, address: str = "local"
) -> Completions:
    """Make what is missing of samples 0..config.samples-1 of every generator."""
    started = time.monotonic()
    shards = shards_of(store, prompts)
    generators = [models.pinned("generate", g, store) for g in config.generators]
    fingerprints = {g.name: models.remember_facts(models.generator_facts(g, store), g.model, store) for g in generators}
    models.check_distinct("generate.generators", fingerprints)
    missing = {g.name: missing_ranges(store, fingerprints[g.name], shards, config.samples) for g in generators}
    total = prompts.counts.out * len(config.generators)
    todo = sum(item["rows"] for items in missing.values() for item in items if item["final"])
    meter = Meter(report, "generate", total, "prompts", reused=total - todo)
    totals: Counter[str] = Counter()

    def on_done(name: str, counts: dict[str, Any]) -> None:
        totals.update({key: counts[key] for key in ("requests", "samples", "tokens", "engine_starts")})
        totals[f"refused by {name}"] += counts["refused"] if counts["final"] else 0
        _check_refused(config, name, totals[f"refused by {name}"], prompts.counts.out, counts["example"])
        meter.add(counts["finished"], f"{totals['tokens'] / meter.seconds:,.0f} tokens/s")

    pools = [
        Pool(GenerateWorker, (g, fingerprints[g.name], store.url), missing[g.name], g, partial(on_done, g.name))
        for g in generators
        if missing[g.name]
    ]
    engine_seconds = run_pools(pools, address)
    counts = _count(config, prompts, fingerprints, shards, store)
    made = sum(map(len, missing.values()))
    work = Work(
        shards_made=made,
        shards_reused=len(shards) * len(config.generators)
        - len({(n, i["shard"]) for n in missing for i in missing[n]}),
        engine_starts=totals["engine_starts"],
        requests=totals["requests"],
        samples=totals["samples"],
        tokens=totals["tokens"],
        seconds=time.monotonic() - started,
        engine_seconds=engine_seconds,
    )
    return Completions(prompts, config.samples, fingerprints, counts, work)


class GenerateWorker:
    """Holds one engine; makes one file of completions per item."""

    def __init__(self, config: GeneratorConfig, fingerprint: str, store_url: str) -> None:
        self.store = Store(store_url)
        self.config, self.fingerprint = config, fingerprint
        self.loop = EngineLoop(generator_engine(config, models.local(config.model, self.store)))

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        prompts = await asyncio.to_thread(read_shard, self.store, item["shard"], ["prompt_id", "messages"])
        ids = prompts["prompt_id"].to_pylist()
        requests = [
            GenerationRequest(
                messages, prompt_seed(self.fingerprint, prompt_id), item["first"], item["last"] - item["first"]
            )
            for prompt_id, messages in zip(ids, prompts["messages"].to_pylist(), strict=True)
        ]
        answers = await asyncio.wrap_future(self.loop.submit(requests))
        table = _table(ids, answers)
        path = completions_path(self.fingerprint, item["prompts"], (item["first"], item["last"]))
        await asyncio.to_thread(self.store.create_table, path, table)
        refused = [answer.reason for answer in answers if isinstance(answer, Refused)]
        given = [answer for answer in answers if isinstance(answer, Answer)]
        return {
            "requests": len(requests),
            "samples": sum(len(answer.samples) for answer in given),
            "tokens": sum(sample.tokens for answer in given for sample in answer.samples),
            "final": item["final"],
            "finished": item["rows"] if item["final"] else 0,
            "refused": len(refused),
            "example": refused[0] if refused else "",
        }


def prompt_seed(fingerprint: str, prompt_id: str) -> int:
    """Start of a prompt's range of seeds with one generator, in [0, 2^48)."""
    raw = hashlib.blake2b(f"{fingerprint}:{prompt_id}".encode(), digest_size=6).digest()
    return int.from_bytes(raw, "little")


def completions_path(fingerprint: str, prompts: str, samples: Range) -> str:
    """prompts: digest of the shard's prompt ids."""
    return f"completions/{fingerprint}/{prompts}.{samples[0]}-{samples[1]}.parquet"


def samples_in(path: str) -> Range:
    """The range of samples that a file of completions or rewards holds."""
    first, _, last = path.split(".")[-2].partition("-")
    return int(first), int(last)


def existing_ranges(store: Store, below: str) -> dict[str, list[Range]]:
    """Shard -> ranges of samples that have a file below a prefix, in order."""
    ranges = defaultdict(list)
    for path in store.list(below):
        ranges[path.rsplit("/", 1)[-1].partition(".")[0]].append(samples_in(path))
    return {shard: sorted(found) for shard, found in ranges.items()}


def missing_ranges(store: Store, fingerprint: str, shards: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """The files to be made, as items for the workers; `final` marks the last of a shard."""
    there = existing_ranges(store, f"completions/{fingerprint}")
    items = []
    for shard in shards:
        gaps = gaps_in(there.get(shard["prompts"], []), samples)
        for first, last in gaps:
            names = {"shard": shard["digest"], "prompts": shard["prompts"], "rows": shard["rows"]}
            items.append({**names, "first": first, "last": last, "final": (first, last) == gaps[-1]})
    return items


def gaps_in(ranges: list[Range], samples: int) -> list[Range]:
    """The parts of 0..samples that sorted ranges leave open."""
    gaps, reached = [], 0
    for first, last in ranges:
        if reached < min(first, samples):
            gaps.append((reached, min(first, samples)))
        reached = max(reached, last)
    if reached < samples:
        gaps.append((reached, samples))
    return gaps


def covering(ranges: list[Range], samples: int) -> list[tuple[Range, slice]]:
    """Which of sorted ranges to read samples 0..samples-1 from, and which part of each list; no sample twice."""
    parts, reached = [], 0
    for first, last in ranges:
        if first <= reached < min(last, samples):
            parts.append(((first, last), slice(reached - first, min(last, samples) - first)))
            reached = last
    assert reached >= samples, f"samples from {reached} on are missing"
    return parts


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
    config: GenerateConfig, prompts: PromptSet, fingerprints: dict[str, str], shards: list[dict[str, Any]], store: Store
) -> Counts:
    """Prompts in and answered, over all generators, from the files themselves."""
    into = prompts.counts.out * len(fingerprints)
    dropped: Counter[str] = Counter()
    for name, fingerprint in fingerprints.items():
        mine: Counter[str] = Counter()
        there = existing_ranges(store, f"completions/{fingerprint}")
        for shard in shards:
            samples, _ = covering(there[shard["prompts"]], config.samples)[0]
            refused = store.read_table(completions_path(fingerprint, shard["prompts"], samples), ["refused"])["refused"]
            for entry in pc.value_counts(refused.drop_null()).to_pylist():
                mine[f"refused: {entry['values'].split(':')[0]}"] += entry["counts"]
        _check_refused(config, name, mine.total(), prompts.counts.out, str(dict(mine)))
        dropped += mine
    return Counts(into, into - dropped.total(), dict(dropped))


def _check_refused(config: GenerateConfig, name: str, refused: int, of: int, example: str) -> None:
    if refused > int(config.max_refused * of):
        raise RunError(
            f"generate: {refused} of {of:,} prompts were refused by {name!r}, more than max_refused "
            f"{config.max_refused:.0%}: {example}"
        )
