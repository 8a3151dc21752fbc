"""subset: the pairs that a subset takes, in its ranking's order, and why the others are left out."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from tasks.config import SubsetConfig
from tasks.errors import RunError
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
    table = store.read_table(f"pairs/{pairs.digest}/pairs.parquet", ["prompt_id", "pvar", "margin"])
    meter = Meter(report, "subset", table.num_rows, "pairs")
    ids = table["prompt_id"].to_pylist()
    if config.rank == "random":
        values = hashes(ids, config.seed).astype(np.float64)
    else:
        values = table[config.rank].to_numpy(zero_copy_only=False).astype(np.float64)
    ranked = order(values, ids, config.seed, config.keep)
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
    dropped = {f"no {config.rank}": len(ids) - len(ranked), _outside(config): len(ranked) - len(taken)}
    counts = Counts(len(ids), len(taken), {reason: n for reason, n in dropped.items() if n})
    meter.add(len(ids))
    return Selection(config.name, selection_digest, pairs, counts, Work(seconds=time.monotonic() - started))


def selection_path(pairs: Pairs, selection_digest: str) -> str:
    return f"pairs/{pairs.digest}/selections/{selection_digest}.parquet"


def _outside(config: SubsetConfig) -> str:
    amount = f"{config.fraction:.4g}" if config.fraction is not None else f"{config.count}"
    return "outside random sample" if config.rank == "random" else f"outside {config.keep} {amount} by {config.rank}"
