"""From rewards in the store to a top-10 % subset: `pair` and `subset`, beside the same mathematics in plain NumPy.

    .venv/bin/python benchmarks/select.py [--prompts 10000000] [--out FILE]

Writes a store of random completions and rewards (8 samples of one generator per prompt, shards of 131,072 prompts, no
texts), then measures, each in a process of its own:

stage       the two stages as `prefsieve curate` runs them: every prompt's PVar with its error, pair and metrics, and
            the list of the top 10 % by PVar
ranked      by the same functions, but only PVar with its error of every prompt and the list of the top 10 %: what a
            round of adaptive sampling takes
vectorised  the least that any program must do: read the same rewards, and compute PVar of all prompts in one loop over
            vectorised NumPy
all_columns the same, but reading every column that the stages read
python      what `ranked` does, prompt by prompt in plain Python; on one shard, taken up to all
numpy_by_prompt  the same by NumPy expressions prompt by prompt; on one shard, taken up to all

Prints seconds, peak memory and the ratios as JSON. Sizes from a tenth up to the whole show whether time is linear.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its `select` would stand for Python's own

import argparse
import json
import math
import shutil
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import machine, measured
from tasks.ahead import in_order
from tasks.columns import Columns
from tasks.config import PairingConfig, RankStep, SubsetConfig
from tasks.generate import completions_path
from tasks.ingest import read_shard
from tasks.pair import id_bits, pair
from tasks.records import PROMPTS, Completions, Counts, PromptSet, Rewards
from tasks.score import rewards_path
from tasks.selection import ranking
from tasks.selection.pvar import pvar_with_error
from tasks.store import Store
from tasks.subset import subset

SAMPLES = 8
SHARD = 131_072
GENERATOR, SCORER = "generator", "scorer"


def build(folder: Path, prompts: int) -> None:
    """A store with prompts, completions (without texts) and rewards that differ more for some prompts than others."""
    store, rng = Store(folder), np.random.default_rng(0)
    shards = []
    for number, first in enumerate(range(0, prompts, SHARD)):
        rows = min(SHARD, prompts - first)
        name = f"{number:032x}"
        raw = rng.integers(0, 256, (rows, 16), dtype=np.uint8)
        ids = pa.array([value.hex() for value in map(bytes, raw)])
        fixed = pa.array(np.arange(0, rows * SAMPLES + 1, SAMPLES, dtype=np.int32))

        def lists(values: np.ndarray, offsets: pa.Array = fixed) -> pa.ListArray:
            return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))

        spread = rng.gamma(2.0, 0.7, (rows, 1))
        rewards = rng.normal(rng.normal(size=(rows, 1)), spread, (rows, SAMPLES))
        digests = rng.integers(-(2**63), 2**63 - 1, (rows, SAMPLES), dtype=np.int64)
        tokens = rng.integers(20, 2000, (rows, SAMPLES), dtype=np.int32)
        message = pa.array([[{"role": "user", "content": "x"}]], PROMPTS.field("messages").type)
        source = pa.array(["web", "math", "code", "chat"])[0:4].take(pa.array(rng.integers(0, 4, rows)))
        prompt_columns = [ids, message.take(pa.array(np.zeros(rows, np.int64))), source, pa.repeat("{}", rows)]
        store.create_table(f"prompts/shards/{name}.parquet", pa.table(prompt_columns, schema=PROMPTS))
        made = pa.table({"prompt_id": ids, "text_digests": lists(digests), "tokens": lists(tokens)})
        store.create_table(completions_path(GENERATOR, name, (0, SAMPLES)), made)
        rated = pa.table({"prompt_id": ids, "rewards": lists(rewards)})
        store.create_table(rewards_path(SCORER, GENERATOR, name, (0, SAMPLES)), rated)
        shards.append({"digest": name, "prompts": name, "rows": rows})
    store.create_json("prompts/set/manifest.json", {"shards": shards})


def handle(prompts: int) -> Rewards:
    counts = Counts(prompts, prompts)
    completions = Completions(PromptSet("set", counts), SAMPLES, {"policy": GENERATOR}, counts)
    return Rewards(completions, {"reward": SCORER}, counts)


def stage(folder: Path, prompts: int) -> dict[str, Any]:
    store = Store(folder)
    started = time.perf_counter()
    table = pair(PairingConfig(), handle(prompts), store)
    paired = time.perf_counter()
    [taken] = subset(SubsetConfig(name="top", steps=[RankStep(rank="pvar", fraction=0.1)]), table, store)
    ended = time.perf_counter()
    assert taken.counts.out == round(table.counts.out * 0.1)
    return {"pair_seconds": paired - started, "subset_seconds": ended - paired, "seconds": ended - started}


def ranked(folder: Path, prompts: int) -> dict[str, Any]:
    """From the rewards to the list of the top 10 % of the prompts by PVar, with PVar and its error of all; no pairs."""
    started = time.perf_counter()
    store = Store(folder)
    columns = Columns([], handle(prompts), [], store)

    def measure(shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = read_shard(store, shard["digest"], ["prompt_id"])["prompt_id"]
        return *pvar_with_error(columns.read(shard, ["reward"], texts=False).rewards["reward"]), id_bits(ids)

    values, errors, ids = np.empty(prompts), np.empty(prompts), np.empty(prompts, np.uint64)
    done = 0
    for value, error, bits in in_order(measure, columns.shards):
        rows = slice(done, done + len(value))
        values[rows], errors[rows], ids[rows] = value, error, bits
        done = rows.stop
    best = ranking.best(values, ids, 0, ranking.size(len(values), 0.1, None))
    seconds = time.perf_counter() - started
    assert done == prompts and len(best) == prompts // 10
    return {"seconds": seconds}


def vectorised(folder: Path, prompts: int) -> dict[str, Any]:
    started = time.perf_counter()
    store, found = Store(folder), []
    for path in store.list("rewards"):
        lists = pq.read_table(store.full(path), columns=["rewards"], partitioning=None)["rewards"].combine_chunks()
        rewards = np.ascontiguousarray(np.from_dlpack(lists.flatten()).reshape(-1, SAMPLES).T)
        total = np.zeros(rewards.shape[1])
        for i in range(SAMPLES):
            for j in range(i + 1, SAMPLES):
                total += (np.tanh((rewards[i] - rewards[j]) / 2) / 2) ** 2
        found.append(2 * total / (SAMPLES * (SAMPLES - 1)))
    values = np.concatenate(found)
    top = np.argpartition(values, -(len(values) // 10))[-(len(values) // 10) :]
    seconds = time.perf_counter() - started
    assert len(values) == prompts and len(top) == prompts // 10
    return {"seconds": seconds}


def all_columns(folder: Path, prompts: int) -> dict[str, Any]:
    """As `vectorised`, but reading every column that the stages read."""
    started = time.perf_counter()
    store = Store(folder)
    for path in store.list("completions"):
        pq.read_table(store.full(path), columns=["text_digests", "tokens"], partitioning=None)
    for path in store.list("prompts/shards"):
        pq.read_table(store.full(path), columns=["prompt_id", "source"], partitioning=None)
    return {"seconds": time.perf_counter() - started + vectorised(folder, prompts)["seconds"]}


def python(folder: Path, prompts: int) -> dict[str, Any]:
    """Prompt by prompt in plain Python what `ranked` does: PVar, its jackknife error, and the list of the best."""
    started = time.perf_counter()
    found = []
    for rewards in _first_shard(folder):
        n = len(rewards)
        sums = [0.0] * n
        for i in range(n):
            for j in range(i + 1, n):
                term = (1 / (1 + math.exp(rewards[j] - rewards[i])) - 0.5) ** 2
                sums[i] += term
                sums[j] += term
        total = sum(sums)
        left_out = [(total - 2 * one) / ((n - 1) * (n - 2)) for one in sums]
        mean = sum(left_out) / n
        error = math.sqrt((n - 1) / n * sum((one - mean) ** 2 for one in left_out))
        found.append((total / (n * (n - 1)), error))
    return _taken_up(started, found, prompts)


def numpy_by_prompt(folder: Path, prompts: int) -> dict[str, Any]:
    """The same by NumPy expressions on one prompt after the other, as it is written when nobody thinks of millions."""
    started = time.perf_counter()
    found = []
    for rewards in _first_shard(folder):
        values = np.asarray(rewards)
        n = len(values)
        terms = (1 / (1 + np.exp(values[None, :] - values[:, None])) - 0.5) ** 2
        sums = terms.sum(axis=1)
        left_out = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2))
        error = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
        found.append((sums.sum() / (n * (n - 1)), error))
    return _taken_up(started, found, prompts)


def _first_shard(folder: Path) -> list[list[float]]:
    store = Store(folder)
    return store.read_table(store.list("rewards")[0], ["rewards"])["rewards"].to_pylist()


def _taken_up(started: float, found: list[tuple[float, float]], prompts: int) -> dict[str, Any]:
    """The list of the best of one shard, and the seconds that as many shards as hold all prompts would take."""
    best = sorted(range(len(found)), key=lambda row: found[row][0], reverse=True)[: len(found) // 10]
    seconds = time.perf_counter() - started
    assert all(0 <= found[row][0] <= 0.25 for row in best)
    return {"seconds": seconds * prompts / len(found), "measured_on": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the store, several GB")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    sizes = [arguments.prompts // 10, arguments.prompts * 3 // 10, arguments.prompts]
    runs = []
    for prompts in sizes:
        folder = Path(tempfile.mkdtemp(prefix="prefsieve-select-", dir=arguments.folder))
        try:
            build(folder, prompts)
            run = {"prompts": prompts}
            for work in (vectorised, all_columns, ranked, stage, python, numpy_by_prompt):
                run[work.__name__] = measured(work, folder, prompts)
            run["ranked_over_vectorised"] = round(run["ranked"]["seconds"] / run["vectorised"]["seconds"], 2)
            run["stage_over_vectorised"] = round(run["stage"]["seconds"] / run["vectorised"]["seconds"], 2)
            run["stage_over_all_columns"] = round(run["stage"]["seconds"] / run["all_columns"]["seconds"], 2)
            for slow in ("python", "numpy_by_prompt"):
                run[f"{slow}_over_stage"] = round(run[slow]["seconds"] / run["stage"]["seconds"], 1)
                run[f"{slow}_over_ranked"] = round(run[slow]["seconds"] / run["ranked"]["seconds"], 1)
            runs.append(run)
            print(json.dumps(run), file=sys.stderr)
        finally:
            shutil.rmtree(folder)
    first, last = runs[0], runs[-1]
    grown = (last["stage"]["seconds"] / first["stage"]["seconds"]) / (last["prompts"] / first["prompts"])
    result = {"runs": runs, "seconds_over_linear": round(grown, 2), "machine": machine("numpy", "pyarrow")}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
