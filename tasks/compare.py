"""compare: the policies of an experiment, from the rewards of all of them on the same held-out prompts.

What a policy got per prompt is kept at evaluations/cells/<digest>.parquet, by the prompts, the two models and the
scorers, so a finished cell is read and not computed again. The statistics are those of selection/comparison.py. The
result depends on policies and rewards alone, never on a clock; what things cost stands beside.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks import models
from tasks.cells import Policies, trainings
from tasks.columns import Columns
from tasks.costs import known_costs, remember_cost
from tasks.errors import ConfigError
from tasks.experiments import Arm, Cell, ExperimentConfig
from tasks.ingest import known_prompts, read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, Completions, Rewards, Version, digest
from tasks.selection import comparison
from tasks.selection.winrate import meetings, points
from tasks.store import Store
from tasks.train import find_training
from tasks.versions import find_version, read_manifest

MIN_SEEDS = 3
_CELLS = "evaluations/cells"
_CURVE = 120  # points of a curve; more steps are averaged
_CURVES = {"loss": "loss", "rewards/margins": "implicit margin"}

Floats = NDArray[np.float64]
Table = dict[str, Floats]  # per prompt: reward.SCORER, wins.SCORER, reference.SCORER, tokens, reference_tokens


def compare(
    config: ExperimentConfig, policies: Policies, rewards: Rewards, store: Store, report: Report = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result, and what each cell cost: see `_result` and `_costs`."""
    cells = policies.versions
    digests = {
        cell: cell_digest(config, version.name, rewards.completions, rewards.scorers)
        # Rewards that were missing may be asked for again.
        + (f".{digest(dict(rewards.counts.dropped))}" if rewards.counts.dropped else "")
        for cell, version in cells.items()
    }
    missing = [cell for cell in cells if not store.exists(_place(digests[cell]))]
    meter = Meter(report, "compare", len(cells), "policies", reused=len(cells) - len(missing))
    spent = rewards.completions.work.engine_seconds + rewards.work.engine_seconds
    for cell in missing:
        store.create_table(_place(digests[cell]), _measured(config, cells[cell], rewards, store))
        if spent:
            remember_cost(store, "evaluate", digests[cell], spent / len(missing))
        meter.add(1)
    tables = {cell: _read(store, digests[cell]) for cell in cells}
    manifests = {cell: read_manifest(store, version)["content"] for cell, version in cells.items()}
    return (
        _result(config, cells, digests, tables, manifests, rewards, store),
        _costs(policies, digests, tables, manifests, store),
    )


def cell_digest(config: ExperimentConfig, policy: str, completions: Completions, scorers: Any) -> str:
    """Of all that decides what a policy got."""
    generators = completions.generators
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "stage": "compare",
            "prompts": completions.prompts.digest,
            "samples": completions.samples,
            "policy": generators[policy],
            "reference": generators[config.evaluate.reference.name],
            "scorers": dict(scorers),
        }
    )


def cell_states(config: ExperimentConfig, store: Store) -> list[dict[str, Any]]:
    """A row per cell: what is done of it, by what is in the store."""
    evaluate, rows, there = config.evaluate, [], store.list(_CELLS)
    prompts = known_prompts(evaluate.ingest, store)
    scorers = {scorer.name: models.scorer_fingerprint(scorer, store) for scorer in evaluate.score.scorers}
    for cell in config.cells():
        row = {"subset": cell.arm.subset, "objective": cell.arm.objective, "seed": cell.seed}
        try:
            subset = find_version(store, cell.arm.subset)
        except ConfigError:  # what curate is to publish
            rows.append({**row, "train": "missing, as is its subset", "evaluate": "missing", "policy": ""})
            continue
        training = trainings(config, {cell.arm.subset: str(subset)}, store, [cell])[cell]
        policy = find_training(training, store)
        compared = False
        if policy and prompts:
            generators = config.generators({policy.name: str(policy)}).generators
            made = {one.name: models.generator_fingerprint(one, store) for one in generators}
            completions = Completions(prompts, evaluate.generate.samples, made, prompts.counts)
            of_all = cell_digest(config, policy.name, completions, scorers)
            compared = any(place.startswith(f"{_CELLS}/{of_all}.") for place in there)
        rows.append(
            {
                **row,
                "train": "done" if policy else "missing",
                "evaluate": "done" if compared else "missing",
                "policy": str(policy or ""),
            }
        )
    return rows


def _place(digest: str) -> str:
    return f"{_CELLS}/{digest}.parquet"


def _measured(config: ExperimentConfig, policy: Version, rewards: Rewards, store: Store) -> pa.Table:
    """One row per held-out prompt."""
    completions = rewards.completions
    columns = Columns([policy.name, config.evaluate.reference.name], rewards, [], store)
    names, samples = list(rewards.scorers), completions.samples
    parts: list[Table] = []
    for shard in shards_of(store, completions.prompts):
        arrays = columns.read(shard, names)
        tokens = np.where(arrays.present, arrays.tokens, 0).astype(float)
        part = {"tokens": tokens[:, :samples].sum(axis=1), "reference_tokens": tokens[:, samples:].sum(axis=1)}
        for name in names:
            mine, theirs = arrays.rewards[name][:, :samples], arrays.rewards[name][:, samples:]
            part[f"reward.{name}"], part[f"reference.{name}"] = _means(mine), _means(theirs)
            part[f"wins.{name}"] = points(meetings(mine, theirs))
        parts.append(part)
    return pa.table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _means(values: Floats) -> Floats:
    """Over the samples of a prompt; NaN where it has none."""
    known = np.isfinite(values)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)


def _read(store: Store, digest: str) -> Table:
    table = store.read_table(_place(digest))
    return {name: table[name].to_numpy().astype(float) for name in table.column_names}


# --- the result


def _result(
    config: ExperimentConfig,
    cells: dict[Cell, Version],
    digests: dict[Cell, str],
    tables: dict[Cell, Table],
    manifests: dict[Cell, Any],
    rewards: Rewards,
    store: Store,
) -> dict[str, Any]:
    """Numbers and words of all arms; equal policies and rewards give an equal result."""
    decider, names = config.evaluate.decider, list(rewards.scorers)
    grid = config.grid()
    members = {arm: [Cell(arm, seed) for seed in config.seeds] for arm in grid}

    def values(arm: Arm, column: str) -> Floats:
        return np.array([tables[cell][column] for cell in members[arm]])

    reward = f"reward.{decider}"
    bases = {arm: base for arm in grid if (base := config.baseline_of(arm))}
    pairs = {str(arm): (values(arm, reward), values(base, reward)) for arm, base in bases.items()}
    apart = comparison.differences(pairs, config.alpha)
    arms = []
    for arm in grid:
        content = manifests[members[arm][0]]
        difference = apart.get(str(arm))
        arms.append(
            {
                "subset": arm.subset,
                "objective": arm.objective,
                "of": content["parents"]["subset"],
                "pairs": content["counts"]["out"],
                "reward": _plain(asdict(comparison.estimate(values(arm, reward), config.alpha))),
                "by_seed": _plain([_mean(row) for row in values(arm, reward)]),
                "win_rate": _plain(asdict(comparison.estimate(values(arm, f"wins.{decider}"), config.alpha))),
                "others": {name: _plain(_mean(values(arm, f"reward.{name}"))) for name in names if name != decider},
                "tokens": _plain(_mean(values(arm, "tokens")) / rewards.completions.samples),
                "against": str(bases[arm]) if arm in bases else None,
                "difference": _plain(asdict(difference)) if difference else None,
                "verdict": verdict(difference),
                "curves": _curves([cells[cell] for cell in members[arm]], store),
                "cells": [
                    {"seed": cell.seed, "policy": str(cells[cell]), "evaluation": digests[cell]}
                    for cell in members[arm]
                ],
            }
        )
    first = next(iter(tables.values()))
    return {
        "name": config.name,
        "scorer": decider,
        "alpha": config.alpha,
        "comparisons": len(apart),
        "seeds": list(config.seeds),
        "length": config.length,
        "prompts": rewards.completions.prompts.counts.out,
        "samples": rewards.completions.samples,
        "reference": {
            "name": config.evaluate.reference.name,
            "reward": _plain(_mean(first[f"reference.{decider}"])),
            "others": {name: _plain(_mean(first[f"reference.{name}"])) for name in names if name != decider},
            "tokens": _plain(_mean(first["reference_tokens"]) / rewards.completions.samples),
        },
        "arms": arms,
        "warnings": _warnings(config, arms, rewards, store),
    }


def verdict(difference: comparison.Difference | None) -> str:
    if difference is None:
        return "baseline"
    if not difference.distinguishable:
        return "not distinguishable"
    return "better" if difference.mean > 0 else "worse"


def _warnings(config: ExperimentConfig, arms: list[dict[str, Any]], rewards: Rewards, store: Store) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if len(config.seeds) < MIN_SEEDS:
        found.append(
            f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}: how much trainings differ by chance is "
            f"hardly known. Take at least {MIN_SEEDS}, better 5."
            + (
                " With one seed intervals speak of other prompts only, not of other trainings."
                if len(config.seeds) == 1
                else ""
            )
        )
    sizes = {str(Arm(arm["subset"], arm["objective"])): arm["pairs"] for arm in arms}
    settings = {str(cell.arm): config.training(cell, "cell", cell.arm.subset).train for cell in config.cells()}
    fixed = {arm for arm, train in settings.items() if not train.seeded}
    if fixed and len(config.seeds) > 1:
        found.append(
            f"{', '.join(sorted(fixed))}: the order of the pairs is by margin, so all seeds share one policy, and "
            "how much such trainings differ by chance is not in the intervals."
        )
    for arm in arms:
        name = str(Arm(arm["subset"], arm["objective"]))
        if arm["against"] and not math.isclose(arm["pairs"], sizes[arm["against"]], rel_tol=0.02):
            found.append(f"{name} has {arm['pairs']:,} pairs, what it is compared with {sizes[arm['against']]:,}.")
        lost = rewards.completions.prompts.counts.out - arm["reward"]["prompts"]
        if lost:
            found.append(f"{name}: {lost:,} held-out prompts without a reward under every seed are left out.")
    held_out = _held_out(rewards, store)
    for subset in dict.fromkeys(arm["of"] for arm in arms):
        if seen := len(held_out & _prompts(store, subset)):
            found.append(f"{seen:,} of the held-out prompts are in {subset}: its policies were trained on them.")
    return found


def _held_out(rewards: Rewards, store: Store) -> set[str]:
    shards = shards_of(store, rewards.completions.prompts)
    return {
        one for shard in shards for one in read_shard(store, shard["digest"], ["prompt_id"])["prompt_id"].to_pylist()
    }


def _prompts(store: Store, subset: str) -> set[str]:
    version = find_version(store, subset)
    files = [file["path"] for file in read_manifest(store, version)["content"]["files"]]
    tables = [store.read_table(f"{version.place}/{file}", ["prompt_id"]) for file in files if file.endswith(".parquet")]
    return {one for table in tables for one in table["prompt_id"].to_pylist()}


# --- learning curves and costs


def steps_of(store: Store, policy: Version) -> list[dict[str, float]]:
    return [json.loads(line) for line in store.read(f"{policy.place}/metrics.jsonl").splitlines()]


def _curves(policies: list[Version], store: Store) -> dict[str, list[list[float]]]:
    """By metric: [step, mean over seeds], at most _CURVE points; a metric that a step lacks is left out there."""
    runs = [steps_of(store, policy) for policy in policies]
    length = min(map(len, runs))
    width = max(1, math.ceil(length / _CURVE))
    curves = {}
    for key, name in _CURVES.items():
        drawn = []
        for start in range(0, length, width):
            found = [step[key] for run in runs for step in run[start : start + width] if key in step]
            if found:
                drawn.append([min(start + width, length), round(float(np.mean(found)), 6)])
        if drawn:
            curves[name] = drawn
    return curves


def _costs(
    policies: Policies, digests: dict[Cell, str], tables: dict[Cell, Table], manifests: dict[Cell, Any], store: Store
) -> dict[str, Any]:
    """By cell: tokens, and the seconds measured when it was made. Response tokens that the loss was taken of, from the
    mean length of the subset's pairs; prompts are not counted. What seeds share is counted with the first of them."""
    train = known_costs(store, "train", policies.inputs.values())
    evaluate = known_costs(store, "evaluate", digests.values())
    rows: list[dict[str, Any]] = []
    counted: set[str] = set()
    for cell, version in policies.versions.items():
        content, inputs = manifests[cell], policies.inputs[cell]
        once = int(inputs not in counted)
        counted.add(inputs)
        steps = once * len(steps_of(store, version))
        summary = content.get("subset_summary") or {}
        lengths: list[Any] = [summary.get(f"mean_{side}_tokens") for side in ("chosen", "rejected")]
        pair = None if None in lengths else sum(float(length) for length in lengths)
        rows.append(
            {
                "subset": cell.arm.subset,
                "objective": cell.arm.objective,
                "seed": cell.seed,
                "steps": steps,
                "training_tokens": None if pair is None else round(pair * steps * content["train"]["batch_size"]),
                "generated_tokens": once * int(tables[cell]["tokens"].sum()),
                "train_seconds": train.get(inputs) if once else 0.0,
                "evaluate_seconds": evaluate.get(digests[cell]) if once else 0.0,
            }
        )
    return {"cells": rows}


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: rounded, and null for NaN."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
