"""Publishing many pairs of real-sized text: does memory stay flat, and how fast is it?

    .venv/bin/python benchmarks/publish.py [--pairs 1000000] [--folder DIR] [--out FILE]

Writes a store of prompts with two completions each, of 500 to 3,500 characters of English-like words, pairs them, takes
all pairs, and measures `publish` (data, report, card and manifest) in a process of its own: seconds, pairs per second,
and peak resident memory, for a tenth of the pairs and for all. A plain copy of the same completions, read and written
by Parquet file, stands beside it in the same run.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its `select` would stand for Python's own

import argparse
import json
import shutil
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import machine, measured
from tasks.config import PairingConfig, PublishConfig, RankStep, SubsetConfig
from tasks.generate import completions_path
from tasks.pair import pair
from tasks.publish import publish
from tasks.records import COMPLETIONS, MESSAGES, PROMPTS, REWARDS, Completions, Counts, PromptSet, Rewards
from tasks.score import rewards_path
from tasks.store import Store
from tasks.subset import subset

SHARD = 4096  # prompts
SAMPLES = 2
GENERATOR, SCORER = "generator", "scorer"
ALL = SubsetConfig(name="all", steps=[RankStep(rank="margin", fraction=1.0)])


def words(rng: np.random.Generator, length: int) -> str:
    """Words of 2 to 9 letters, the short ones more often, like a text's."""
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    text = letters[np.minimum(rng.geometric(0.12, length) - 1, 25)].copy()
    text[np.cumsum(rng.integers(3, 10, length // 6))[: length // 8] % length] = ord(" ")
    return text.tobytes().decode()


def build(folder: Path, prompts: int) -> None:
    store, rng = Store(folder), np.random.default_rng(0)
    corpus = words(rng, 8 << 20)
    shards = []

    def texts(number: int, low: int, high: int) -> list[str]:
        starts, lengths = rng.integers(0, len(corpus) - high, number), rng.integers(low, high, number)
        return [corpus[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]

    def lists(values: Any, kind: pa.DataType, rows: int) -> pa.ListArray:
        offsets = pa.array(np.arange(0, rows * SAMPLES + 1, SAMPLES, dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    for number, first in enumerate(range(0, prompts, SHARD)):
        rows, name = min(SHARD, prompts - first), f"{number:032x}"
        ids = pa.array([value.hex() for value in map(bytes, rng.integers(0, 256, (rows, 16), dtype=np.uint8))])
        messages = pa.array([[{"role": "user", "content": text}] for text in texts(rows, 50, 600)], MESSAGES)
        table = pa.table([ids, messages, pa.repeat("web", rows), pa.repeat("{}", rows)], schema=PROMPTS)
        store.create_table(f"prompts/shards/{name}.parquet", table)
        flat = rows * SAMPLES
        made = {
            "prompt_id": ids,
            "refused": pa.nulls(rows, pa.string()),
            "prompt_tokens": pa.repeat(pa.scalar(50, pa.int32()), rows),
            "texts": lists(texts(flat, 500, 3500), pa.string(), rows),
            "text_digests": lists(rng.integers(-(2**63), 2**63 - 1, flat), pa.int64(), rows),
            "finish_reasons": lists(["stop"] * flat, pa.string(), rows),
            "tokens": lists(rng.integers(100, 800, flat), pa.int32(), rows),
            "logprobs": lists(rng.normal(size=flat), pa.float64(), rows),
        }
        store.create_table(completions_path(GENERATOR, name, (0, SAMPLES)), pa.table(made, schema=COMPLETIONS))
        rated = [ids, lists(rng.normal(size=flat), pa.float64(), rows), lists([None] * flat, pa.string(), rows)]
        store.create_table(rewards_path(SCORER, GENERATOR, name, (0, SAMPLES)), pa.table(rated, schema=REWARDS))
        shards.append({"digest": name, "prompts": name, "rows": rows})
    store.create_json("prompts/set/manifest.json", {"shards": shards})
    for name in (GENERATOR, SCORER):
        store.create_json(f"fingerprints/{name}.json", {"called": name})


def handle(prompts: int) -> Rewards:
    counts = Counts(prompts, prompts)
    completions = Completions(PromptSet("set", counts), SAMPLES, {"policy": GENERATOR}, counts)
    return Rewards(completions, {"reward": SCORER}, counts)


def published(folder: Path, prompts: int) -> dict[str, Any]:
    store = Store(folder)
    table = pair(PairingConfig(), handle(prompts), store)
    [taken] = subset(ALL, table, store)
    started = time.perf_counter()
    version = publish(PublishConfig(), ALL, taken, store)
    seconds = time.perf_counter() - started
    assert version.counts.out == prompts
    gib = sum(file.stat().st_size for file in Path(store.full(version.place)).rglob("*.parquet")) / 2**30
    return {"seconds": seconds, "pairs_per_second": prompts / seconds, "published_gib": gib}


def copied(folder: Path, prompts: int) -> dict[str, Any]:
    store, started = Store(folder), time.perf_counter()
    with pq.ParquetWriter(folder / "copy.parquet", COMPLETIONS, compression="zstd") as writer:
        for path in store.list("completions"):
            writer.write_table(store.read_table(path))
    return {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the store, several GB")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    runs = []
    for pairs in (arguments.pairs // 10, arguments.pairs):
        folder = Path(tempfile.mkdtemp(prefix="prefsieve-publish-", dir=arguments.folder))
        try:
            build(folder, pairs)
            run: dict[str, Any] = {"pairs": pairs}
            for work in (copied, published):
                run[work.__name__] = measured(work, folder, pairs)
            runs.append(run)
            print(json.dumps(run), file=sys.stderr)
        finally:
            shutil.rmtree(folder)
    growth = runs[-1]["published"]["peak_gib"] / runs[0]["published"]["peak_gib"]
    result = {"runs": runs, "memory_growth": round(growth, 2), "machine": machine("numpy", "pyarrow")}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
