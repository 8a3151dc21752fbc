"""Why a prompt's pair is in a subset, or out: its metrics and rank, or the step or the rule that dropped it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import ConfigError, RunError
from tasks.pairtable import open_pairs
from tasks.publish import Texts
from tasks.records import PREFERENCES, Completions, Counts, Pairs, PromptSet, Rewards
from tasks.store import Store
from tasks.subset import selection_path
from tasks.versions import find_version, read_manifest

_SHORTEST = 8  # characters of a prompt id
_EXCERPT = 300  # characters of a text
_PLACE = ("row", "chosen_file", "chosen_sample", "rejected_file", "rejected_sample")
_TEXTS = pa.schema([PREFERENCES.field(name) for name in ("prompt", "chosen", "rejected")])


def why(store: Store, wanted: str, prompt_id: str) -> dict[str, Any]:
    """prompt_id: its first 8 characters will do. ConfigError when no prompt, or more than one, is named so."""
    prefix = prompt_id.strip().lower()
    if len(prefix) < _SHORTEST:
        raise ConfigError(
            f"--row {prompt_id!r}: give at least {_SHORTEST} characters of the prompt's id, as `show` and the column "
            "prompt_id have it"
        )
    version = find_version(store, wanted)
    content = read_manifest(store, version)["content"]
    pairs = _pairs(content)
    if not store.exists(f"pairs/{pairs.digest}/manifest.json"):
        raise RunError(
            f"pairs/{pairs.digest}, from which {version} was taken, is not in {store.url}; run curate again to make it"
        )
    with open_pairs(store, pairs) as table:
        ids = pa.chunked_array([batch["prompt_id"] for batch in table.batches(["prompt_id"])], pa.string())
        places = np.flatnonzero(pc.starts_with(ids, prefix).to_numpy())
        rows = table.rows_at(places.tolist())
        metrics = table.metrics
        texts = Texts(store, table)
    drops = store.read_table(f"pairs/{pairs.digest}/drops.parquet")
    dropped = drops.filter(pc.starts_with(drops["prompt_id"], prefix)).to_pylist()
    found = sorted({row["prompt_id"] for row in [*rows.values(), *dropped]})
    if not found:
        raise ConfigError(
            f"--row {prompt_id!r}: no prompt of which {version} could have taken a pair has an id that begins so"
        )
    if len(found) > 1:
        raise ConfigError(f"--row {prompt_id!r} is ambiguous; give more of one of: {', '.join(found[:8])}")
    fates = _fates(store, pairs, content)
    explanation = content.get("explanation") or {}
    return {
        "name": version.name,
        "version": version.version,
        "prompt_id": found[0],
        "texts": _texts(texts, next(iter(rows.values()))) if rows else None,
        "pairs": [{**fates(place), **_told(row, metrics)} for place, row in rows.items()],
        "dropped": {"reason": dropped[0]["reason"], "pvar": dropped[0]["pvar"]} if dropped else None,
        "of": content["summary"]["rows"],
        "ranked_by": None if content.get("control") else explanation.get("ranked_by"),
        "means": {
            name: {side: metric[side] for side in ("inside", "outside")}
            for name, metric in (explanation.get("metrics") or {}).items()
        },
    }


def _pairs(content: dict[str, Any]) -> Pairs:
    """The handle of the table that a version was taken from."""
    parents, none = content["parents"], Counts(0, 0)
    prompts = PromptSet(parents["prompts"], none)
    completions = Completions(prompts, parents["samples"], parents["generators"], none)
    return Pairs(content["pairing"]["name"], parents["pairs"], Rewards(completions, parents["scorers"], none), none)


def _fates(store: Store, pairs: Pairs, content: dict[str, Any]) -> Any:
    """A function from a row of the pairs table to what became of it."""
    selection = content["parents"]["selection"]
    taken = store.read_table(selection_path(pairs, selection))
    chosen, ranks = taken["pair"].to_numpy(), taken["rank"].to_numpy()
    path = selection_path(pairs, selection, "left-out.parquet")
    left = store.read_table(path) if store.exists(path) else None
    steps = (content.get("explanation") or {}).get("steps") or []

    def fate(place: int) -> dict[str, Any]:
        at = int(np.searchsorted(chosen, place))
        if at < len(chosen) and chosen[at] == place:
            return {"taken": True, "rank": int(ranks[at]), "step": None, "reason": None}
        at = int(np.searchsorted(left["pair"].to_numpy(), place)) if left else 0
        reason = left["reason"][at].as_py() if left else "the reason was not recorded"
        step = next((step["step"] for step in steps if reason in step["dropped"]), None)
        return {"taken": False, "rank": None, "step": step, "reason": reason}

    return fate


def _told(row: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    """A pair's own numbers and names."""
    names = {name: row[name] for name in ("source", "chosen_generator", "rejected_generator")}
    return {**names, "metrics": {name: row[name] for name in metrics}}


def _texts(texts: Texts, row: dict[str, Any]) -> dict[str, str]:
    """The beginnings of the prompt and of both sides of one of its pairs."""
    place = pa.Table.from_pylist([{name: row[name] for name in _PLACE}])
    [found] = texts.join(row["shard"], place, _TEXTS).to_pylist()
    return {name: " ".join(message["content"] for message in said)[:_EXCERPT] for name, said in found.items()}
