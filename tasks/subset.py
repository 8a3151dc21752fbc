"""subset: the pairs that a subset takes, in its ranking's order, and why the others are left out."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.config import SubsetConfig
from tasks.errors import RunError
from tasks.pair import iter_pairs
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, SELECTION, Counts, Pairs, Selection, Work, digest
from tasks.selection.ranking import hashes, order, size
from tasks.store import Store


def subset(config: SubsetConfig, pairs: Pairs, store: Store, report: Report = silent) -> Selection:
    """Rank the pairs and take one end of the order."""
    started = time.monotonic()
    selection_digest = digest(
        {"schema": SCHEMA_VERSION, "stage": "subset", **config.model_dump(exclude={"name", "pairs"})}
    )
    meter = Meter(report, "subset", pairs.counts.out, "pairs")
    values, ties = _values(config, pairs, store)
    ranked = order(values, ties, config.keep)
    taken = ranked[: size(len(ranked), config.fraction, config.count)]
    if not len(taken):
        raise RunError(
            f"subset {config.name!r} would be empty: {pairs.counts.out} pairs, dropped before: "
            f"{dict(pairs.counts.dropped)}. Use more samples or another rule."
        )
    positions = np.argsort(taken)  # in the order of the pairs table, with the rank beside
    store.create_table(
        selection_path(pairs, selection_digest),
        pa.table([pa.array(taken[positions]), pa.array(positions)], schema=SELECTION),
    )
    dropped = {f"no {config.rank}": len(values) - len(ranked), _outside(config): len(ranked) - len(taken)}
    counts = Counts(len(values), len(taken), {reason: n for reason, n in dropped.items() if n})
    meter.add(len(values))
    return Selection(config.name, selection_digest, pairs, counts, Work(seconds=time.monotonic() - started))


def _values(config: SubsetConfig, pairs: Pairs, store: Store) -> tuple[NDArray[np.float64], NDArray[np.uint64]]:
    """What pairs are ranked by, and the hashes that break ties: all that is held of a pair, 16 bytes."""
    values: list[NDArray[np.float64]] = [np.empty(0)]
    ties: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    with tempfile.TemporaryDirectory() as room:
        for batch in iter_pairs(store, pairs, Path(room), ["prompt_id", "pvar", "margin"]):
            ties.append(hashes(batch["prompt_id"].to_pylist(), config.seed))
            ranked_by = ties[-1] if config.rank == "random" else batch[config.rank].to_numpy(zero_copy_only=False)
            values.append(ranked_by.astype(np.float64))
    return np.concatenate(values), np.concatenate(ties)


def selection_path(pairs: Pairs, selection_digest: str) -> str:
    return f"pairs/{pairs.digest}/selections/{selection_digest}.parquet"


def _outside(config: SubsetConfig) -> str:
    amount = f"{config.fraction:.4g}" if config.fraction is not None else f"{config.count}"
    return "outside random sample" if config.rank == "random" else f"outside {config.keep} {amount} by {config.rank}"
