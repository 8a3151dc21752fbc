"""What a selection is, in numbers: its steps with examples, and every metric inside against outside.

Goes into the version's manifest, from which the report, the data set card and `prefsieve show` are written. Metrics are
read one at a time, so memory grows with the pairs by two columns of numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.config import RankStep, SubsetConfig
from tasks.describe import describe
from tasks.ingest import read_shard, shards_of
from tasks.pairtable import PairTable, open_pairs
from tasks.records import Selection, rounded
from tasks.store import Store
from tasks.subset import selection_path

_EXAMPLES = 3  # per reason
_BINS = 20
_SHOWN = ("pvar", "margin", "length_difference")  # metrics of an example
_EXCERPT = 200  # characters

Floats = NDArray[np.float64]


def explain(subset: SubsetConfig, selection: Selection, store: Store) -> dict[str, Any]:
    """Plain data, the same for the same selection."""
    kept = store.read_object(selection_path(selection.pairs, selection.digest, "json"), "steps", "match")
    with open_pairs(store, selection.pairs) as table:
        inside = np.zeros(table.rows, np.bool_)
        inside[store.read_table(selection_path(selection.pairs, selection.digest))["pair"].to_numpy()] = True
        metrics: dict[str, Any] = {}
        difference = np.full(table.rows, np.nan)
        for name in table.metrics:
            values = table.numbers(name)
            if not np.isnan(values).all():
                metrics[name] = _compare(values[inside], values[~inside])
            if name == "length_difference":
                difference = values
        examples = _examples(selection, table, store)
        sources = _sources(table, inside)
    steps = [{**step, "examples": {r: examples[r] for r in step["dropped"] if r in examples}} for step in kept["steps"]]
    control = selection.control and {"of": subset.name, "kind": selection.control, **(kept["match"] or {})}
    words = describe(subset.model_dump())
    return {
        "description": f"the {selection.control.replace('_', '-')} control of {subset.name} ({words})"
        if control
        else words,
        "ranked_by": ranked_by(subset),
        "steps": steps,
        "metrics": metrics,
        "sources": sources,
        "length_correlation": _correlation(inside, difference),
        **_shift(inside, difference),
        "control": control or None,
    }


def ranked_by(subset: SubsetConfig) -> str | None:
    """The metric of the last ranking; None when there is none but random ones."""
    ranks = [step.rank for step in subset.steps if isinstance(step, RankStep) and step.rank != "random"]
    return ranks[-1] if ranks else None


def overlap(selections: list[Selection], store: Store) -> list[dict[str, Any]]:
    """Of each two selections: how many prompts they share, and the share that is of the smaller one."""
    prompts: dict[str, NDArray[np.uint64]] = {}
    ids: dict[str, NDArray[np.uint64]] = {}
    for selection in selections:
        if selection.pairs.digest not in ids:
            with open_pairs(store, selection.pairs) as table:
                ids[selection.pairs.digest] = table.ids()
        rows = store.read_table(selection_path(selection.pairs, selection.digest), ["pair"])["pair"].to_numpy()
        prompts[selection.name] = np.unique(ids[selection.pairs.digest][rows])
    return overlaps(prompts)


def overlaps(prompts: dict[str, NDArray[np.uint64]]) -> list[dict[str, Any]]:
    """prompts: different prompt ids of each subset, by its name."""
    names = list(prompts)
    rows = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = len(np.intersect1d(prompts[one], prompts[other], assume_unique=True))
            smaller = min(len(prompts[one]), len(prompts[other]))
            rows.append({"subset": one, "other": other, "shared": shared, "of_smaller": _round(shared / smaller)})
    return rows


def _compare(inside: Floats, outside: Floats) -> dict[str, Any]:
    """Means and counts by bin. Bins are equal, from the 0.5 % to the 99.5 % quantile; the outer ones take the rest."""
    inside, outside = inside[~np.isnan(inside)], outside[~np.isnan(outside)]
    low, high = map(rounded, np.quantile(np.concatenate([inside, outside]), [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    return {
        "inside": _mean(inside),
        "outside": _mean(outside),
        "histogram": {
            "edges": [rounded(edge) for edge in edges],
            "inside": np.histogram(np.clip(inside, low, high), edges)[0].tolist(),
            "outside": np.histogram(np.clip(outside, low, high), edges)[0].tolist(),
        },
    }


def _examples(selection: Selection, table: PairTable, store: Store) -> dict[str, list[dict[str, Any]]]:
    """The first pairs that were left out, by reason, with the beginning of their prompts."""
    left = store.read_table(selection_path(selection.pairs, selection.digest, "left-out.parquet"))
    pairs, reasons = left["pair"].to_numpy(), left["reason"].combine_chunks().dictionary_encode()
    numbers, names = reasons.indices.to_numpy(), reasons.dictionary.to_pylist()
    wanted = {name: pairs[np.flatnonzero(numbers == i)[:_EXAMPLES]] for i, name in enumerate(names)}
    rows = table.rows_at(sorted({int(pair) for some in wanted.values() for pair in some}))
    shards = shards_of(store, selection.pairs.rewards.completions.prompts)
    for row in rows.values():
        messages = read_shard(store, shards[row["shard"]]["digest"], ["messages"])["messages"]
        row["prompt"] = " ".join(message["content"] for message in messages[row["row"]].as_py())[:_EXCERPT]
    return {
        reason: [
            {
                "prompt_id": rows[int(pair)]["prompt_id"],
                "prompt": rows[int(pair)]["prompt"],
                "metrics": {name: rows[int(pair)][name] for name in _SHOWN},
            }
            for pair in some
        ]
        for reason, some in wanted.items()
    }


def _sources(table: PairTable, inside: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    numbers, names = table.texts("source")
    within, without = Counter(numbers[inside].tolist()), Counter(numbers[~inside].tolist())
    return {
        name: {"inside": within[i], "outside": without[i]} for i, name in sorted(enumerate(names), key=lambda x: x[1])
    }


def _correlation(inside: NDArray[np.bool_], values: Floats) -> float | None:
    """Pearson's, between being taken and a number; None where either does not vary."""
    known = ~np.isnan(values)
    taken, values = inside[known].astype(np.float64), values[known]
    if not len(values) or taken.std() == 0 or values.std() == 0:
        return None
    return _round(np.corrcoef(taken, values)[0, 1])


def _shift(inside: NDArray[np.bool_], values: Floats) -> dict[str, float | None]:
    """Mean inside minus mean outside, in standard deviations of all, and its standard error.

    Unlike r it does not shrink with the subset's share.
    """
    known = ~np.isnan(values)
    taken, left = values[known & inside], values[known & ~inside]
    deviation = float(values[known].std()) if known.any() else 0.0
    if not len(taken) or not len(left) or deviation == 0:
        return {"length_shift": None, "length_shift_error": None}
    error = np.sqrt(1 / len(taken) + 1 / len(left))
    return {"length_shift": _round((taken.mean() - left.mean()) / deviation), "length_shift_error": _round(error)}


def _mean(values: Floats) -> float | None:
    return rounded(values.mean()) if len(values) else None


def _round(value: float) -> float:
    """Of what has a scale of its own: shares, correlations, deviations."""
    return round(float(value), 6)
