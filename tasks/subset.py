"""subset: the pairs that a subset takes, step by step, and why each of the others is left out.

A filter keeps the pairs whose metric lies in a range, a ranking keeps one end of an order; each works on what the one
before left. The store keeps the pairs that are taken with their rank, those that are not with the reason, and the
counts of each step. Controls are subsets of equal size to compare with, see tasks/selection/controls.py.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.config import FilterStep, RankStep, SubsetConfig, control_name
from tasks.describe import describe_step
from tasks.errors import ConfigError, RunError
from tasks.pairtable import PairTable, open_pairs
from tasks.progress import Meter, Report, silent
from tasks.records import LEFT_OUT, SCHEMA_VERSION, SELECTION, Counts, Pairs, Selection, Work, digest, rounded
from tasks.selection import controls, ranking
from tasks.store import Store

Ints = NDArray[np.int64]
_CONTROL, _RANDOM = 1, 2  # of draws that say nothing of how ties fell, nor of each other
_NAMED, _LONGEST = 20, 60  # of many values in a message, and their characters
_MATCHED_ON = {"margin_matched": "margin", "length_matched": "length_difference"}


def subset(config: SubsetConfig, pairs: Pairs, store: Store, report: Report = silent) -> list[Selection]:
    """The subset's selection, then those of its controls."""
    meter = Meter(report, "subset", pairs.counts.out * (1 + len(config.controls)), "pairs")
    selections = []
    with open_pairs(store, pairs) as table:
        ids = table.ids()
        started = time.monotonic()
        chosen = _steps(config, table, ids)
        if not len(chosen.rows):
            steps = "; ".join(f"{step['step']}: {step['into']} in, {step['out']} out" for step in chosen.trail)
            raise RunError(
                f"subset {config.name!r} would be empty: {table.rows} pairs ({steps}); dropped before: "
                f"{dict(pairs.counts.dropped)}. Loosen the steps, or use more samples or another rule."
            )
        for control in ("", *config.controls):
            taken = _control(control, config, table, chosen, ids) if control else chosen
            selections.append(_keep(config, control, taken, pairs, store, started))
            meter.add(pairs.counts.out)
            started = time.monotonic()
    return selections


def selection_path(pairs: Pairs, selection_digest: str, what: str = "parquet") -> str:
    return f"pairs/{pairs.digest}/selections/{selection_digest}.{what}"


@dataclass
class _Taken:
    """rows: of the pairs that are taken, in the order of taking; pool: those that the first ranking got; why: number of
    each pair's reason to be left out, -1 where it is taken; trail: what each step did."""

    rows: Ints
    pool: Ints
    why: NDArray[np.int16]
    reasons: list[str] = field(default_factory=list)
    trail: list[dict[str, Any]] = field(default_factory=list)
    match: dict[str, Any] | None = None

    def drop(self, step: str, left: dict[str, Ints], rows: Ints) -> None:
        """Go on with `rows`; `left`: those that are left out now, by reason."""
        dropped = {reason: len(lost) for reason, lost in left.items() if len(lost)}
        Counts(len(self.rows), len(rows), dropped)
        self.trail.append({"step": step, "into": len(self.rows), "out": len(rows), "dropped": dropped})
        for reason in dropped:
            if reason not in self.reasons:
                self.reasons.append(reason)
            self.why[left[reason]] = self.reasons.index(reason)
        self.rows = rows


def _steps(config: SubsetConfig, table: PairTable, ids: ranking.Hashes) -> _Taken:
    rows = np.arange(table.rows)
    taken = _Taken(rows, rows, np.full(table.rows, -1, np.int16))
    ranked = False
    for step in config.steps:
        if isinstance(step, FilterStep):
            _filter(step, table, taken, config.name)
            taken.pool = taken.pool if ranked else taken.rows
        else:
            ranked = True
            _rank(step, table, taken, ids, config)
    return taken


def _filter(step: FilterStep, table: PairTable, taken: _Taken, subset: str) -> None:
    words, rows = describe_step(step.model_dump()), taken.rows
    if step.values is not None:
        numbers, names = table.texts(step.filter)
        _check_known(f"subset {subset!r}: filter {step.filter!r}: values", step.values, names)
        inside = np.isin(numbers[rows], [i for i, name in enumerate(names) if name in step.values])
        taken.drop(words, {f"not {words}": rows[~inside]}, rows[inside])
        return
    side = ranking.in_range(table.numbers(step.filter)[rows], step.min, step.max, step.within, step.quantiles)
    left = {
        f"no {step.filter}": rows[side == 2],
        f"{step.filter} too low ({words})": rows[side == -1],
        f"{step.filter} too high ({words})": rows[side == 1],
    }
    taken.drop(words, left, rows[side == 0])


def _check_known(where: str, wanted: Iterable[str], there: list[str]) -> None:
    """there: the values of all pairs, so that what earlier steps left out is no mistake."""
    for value in wanted:
        if there and value not in there:
            shown = ", ".join(name[:_LONGEST] for name in sorted(there)[:_NAMED])
            more = f" and {len(there) - _NAMED:,} more" if len(there) > _NAMED else ""
            raise ConfigError(f"{where}: no pair has {value!r}; there are: {shown}{more}")


def _rank(step: RankStep, table: PairTable, taken: _Taken, ids: ranking.Hashes, config: SubsetConfig) -> None:
    ids, seed = ids[taken.rows], config.seed
    if step.rank == "random":
        values = ranking.hashes(ranking.hashes(ids, seed), _RANDOM).astype(np.float64)
    else:
        values = table.numbers(step.rank)[taken.rows]
    known = np.flatnonzero(~np.isnan(values))
    picked = [np.empty(0, np.int64)]
    for at, number in _strata(step, table, taken.rows, values, known, ids, config):
        picked.append(at[ranking.best(values[at], ids[at], seed, number, step.keep)])
    inside = np.concatenate(picked)
    inside = inside[ranking.order(values[inside], ids[inside], seed, step.keep)]
    outside = ~np.isnan(values)
    outside[inside] = False
    words = describe_step(step.model_dump(), seed)
    left = {f"no {step.rank}": taken.rows[np.isnan(values)], f"outside {words}": taken.rows[outside]}
    taken.drop(words, left, taken.rows[inside])


def _strata(
    step: RankStep,
    table: PairTable,
    rows: Ints,
    values: NDArray[np.float64],
    known: Ints,
    ids: ranking.Hashes,
    config: SubsetConfig,
) -> Iterator[tuple[Ints, int]]:
    """Which of the rows a step ranks together, by their place, and how many of them it takes.

    rows, values, ids: of what the step gets; known: places of those that have a value.
    """
    strata = {"": known}
    if step.by:
        numbers, names = table.texts(step.by)
        asked = [name for name, share in step.quotas.items() if share]
        _check_known(f"subset {config.name!r}: rank {step.rank!r}: quotas", asked, names)
        numbers = numbers[rows[known]]
        strata = {name: known[numbers == i] for i, name in enumerate(names)}
    sizes = {name: len(at) for name, at in strata.items() if len(at)}
    whole = sum(sizes.values())
    if step.count is not None:
        count = step.count if step.quotas else min(step.count, whole)
        sizes = ranking.shares(sizes, count, step.quotas)
    for name, size in sizes.items():
        at = strata[name]
        if step.fraction is not None:
            size = ranking.size(len(at), step.fraction, None)
        if step.tokens is not None:
            tokens = (table.numbers("chosen_tokens") + table.numbers("rejected_tokens"))[rows[at]].astype(np.int64)
            ordered = tokens[ranking.order(values[at], ids[at], config.seed, step.keep)]
            share = step.quotas.get(name, 0.0) if step.quotas else size / whole
            size = ranking.within_budget(ordered, step.tokens * share)
        yield at, size


def _control(control: str, config: SubsetConfig, table: PairTable, chosen: _Taken, ids: ranking.Hashes) -> _Taken:
    """As many pairs of the subset's pool, taken in another way."""
    pool, number = chosen.pool, len(chosen.rows)
    if number == len(pool):
        raise RunError(
            f"subset {config.name!r}: the control {control!r} would be the subset itself, since that takes its whole "
            "pool; take less, or remove the control"
        )
    # By name too: controls of two subsets are to be independent draws.
    named = int.from_bytes(hashlib.blake2b(config.name.encode(), digest_size=6).digest(), "big")
    draws = ranking.hashes(ranking.hashes(ranking.hashes(ids, config.seed), _CONTROL), named)
    match = None
    if control == "random":
        rows = pool[np.argsort(draws[pool])][:number]
    elif control == "bottom":
        step = [s for s in config.steps if isinstance(s, RankStep) and s.rank != "random"][-1]
        other = "bottom" if step.keep == "top" else "top"
        rows = pool[ranking.order(table.numbers(step.rank)[pool], ids[pool], config.seed, other)][:number]
    else:
        rows, match = _matched(_MATCHED_ON[control], table, chosen, draws)
    if not len(rows):
        raise RunError(f"subset {config.name!r}: no pair has what the control {control!r} goes by; remove the control")
    before = len(list(itertools.takewhile(lambda step: isinstance(step, FilterStep), config.steps)))
    taken = _Taken(pool, pool, chosen.why.copy(), list(chosen.reasons), chosen.trail[:before], match)
    in_pool, inside = np.zeros(table.rows, np.bool_), np.zeros(table.rows, np.bool_)
    in_pool[pool], inside[rows] = True, True
    taken.why[in_pool] = -1
    words = f"{len(rows):,} of the same pool: {control.replace('_', ' ')}"
    taken.drop(words, {f"outside the {control.replace('_', ' ')} control": pool[~inside[pool]]}, rows)
    return taken


def _matched(metric: str, table: PairTable, chosen: _Taken, draws: NDArray[np.uint64]) -> tuple[Ints, dict[str, Any]]:
    """Pairs that the subset does not take, as near as possible to its own in a metric; and how near they came."""
    values = table.numbers(metric)
    outside = np.setdiff1d(chosen.pool, chosen.rows)
    outside = outside[~np.isnan(values[outside])]
    outside = outside[np.argsort(draws[outside])]  # equal values fall by the draw, not by their place in the table
    targets = chosen.rows[~np.isnan(values[chosen.rows])]
    targets = targets[np.lexsort((values[targets], draws[targets]))]
    rows = outside[controls.matched(values[targets], values[outside])]
    pool = values[chosen.pool]
    near = controls.close(values[targets], values[rows], pool[~np.isnan(pool)])
    match = {
        "matched_on": metric,
        "target_mean": _mean(values[targets]),
        "mean": _mean(values[rows]),
        "close": None if np.isnan(near) else round(near, 6),
    }
    if len(rows) < len(chosen.rows):
        match |= {"pairs": len(rows), "target_pairs": len(chosen.rows)}
    return rows, match


def _mean(values: NDArray[np.float64]) -> float | None:
    return rounded(values.mean()) if len(values) else None


def _keep(config: SubsetConfig, control: str, taken: _Taken, pairs: Pairs, store: Store, started: float) -> Selection:
    """Write a selection, what it leaves out, and what its steps did."""
    about = {
        "schema": SCHEMA_VERSION,
        "stage": "subset",
        **config.model_dump(include={"steps", "seed"}),
        "control": [config.name, control] if control else "",
    }
    name = digest(about)
    positions = np.argsort(taken.rows)  # in the order of the pairs table, with the rank beside
    outside = np.flatnonzero(taken.why >= 0)
    reasons = pa.DictionaryArray.from_arrays(
        pa.array(taken.why[outside].astype(np.int32)), pa.array(taken.reasons, pa.string())
    )
    selected = pa.table([pa.array(taken.rows[positions]), pa.array(positions)], schema=SELECTION)
    store.create_table(selection_path(pairs, name, "left-out.parquet"), pa.table([outside, reasons], schema=LEFT_OUT))
    store.create_json(selection_path(pairs, name, "json"), {"steps": taken.trail, "match": taken.match})
    store.create_table(selection_path(pairs, name), selected)
    number = np.bincount(taken.why[outside], minlength=len(taken.reasons))
    dropped = {reason: int(n) for reason, n in zip(taken.reasons, number, strict=True) if n}
    counts = Counts(len(taken.why), len(taken.rows), dropped)
    label = control_name(config.name, control) if control else config.name
    return Selection(label, name, pairs, counts, Work(seconds=time.monotonic() - started), control)
