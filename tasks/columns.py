"""Completions and rewards of one prompt shard side by side, as arrays.

A column is one sample: of generated completions column g * samples + i is sample i of the g-th generator; imported ones
stand in the order they came, each with its author. A scorer is called NAME, or NAME:DIMENSION for one of a judge's.
Texts are not read: completions carry digests of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.errors import ConfigError, RunError
from tasks.generate import completions_path
from tasks.ingest import shards_of
from tasks.records import DIMENSION, RATED, Rewards, texts_seal
from tasks.samples import Held, Ints, cover, existing, rows_of, wanted_of
from tasks.score import rewards_path
from tasks.sections import EnsembleConfig
from tasks.selection.delta import Moments, ensemble
from tasks.selection.pairing import ABSENT
from tasks.store import Store

_NAMED = 20  # of many generators, in a message

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ShardColumns:
    """All [prompts, columns], but for samples: which of its generator's each column is, [columns].

    rewards: by scorer, NaN where there is none; disagreement: of ensembles, by name; texts: digests; tokens: lengths;
    authors: number in Columns.authors, ABSENT where there is no sample; files: of completions, number in `names`;
    seals: of the texts in each of them.
    """

    rewards: dict[str, NDArray[np.float64]]
    disagreement: dict[str, NDArray[np.float64]]
    texts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    authors: NDArray[np.int16]
    files: NDArray[np.int32]
    names: list[str]
    seals: list[str]
    samples: NDArray[np.int32]

    @property
    def present(self) -> NDArray[np.bool_]:
        return self.authors != ABSENT


class Columns:
    """Reads shards. `scorers` are all that can be read; ensembles need the moments of their members first."""

    def __init__(self, wanted: list[str], rewards: Rewards, ensembles: list[EnsembleConfig], store: Store) -> None:
        """wanted: generators or authors whose samples take part; empty takes all."""
        completions = rewards.completions
        self.store, self.rewards, self.ensembles = store, rewards, ensembles
        self.imported = bool(completions.authors)
        known = list(completions.authors or completions.generators)
        missing = [name for name in wanted if name not in known]
        if missing:
            more = f" and {len(known) - _NAMED:,} more" if len(known) > _NAMED else ""
            raise ConfigError(f"pair: generators: {missing[0]!r} is not one of {', '.join(known[:_NAMED])}{more}")
        self.authors = list(wanted) or known
        self.moments: dict[str, Moments] = {}
        self.generators = dict(completions.generators)
        if not self.imported:
            self.generators = {name: completions.generators[name] for name in self.authors}
        self.rated = {
            fingerprint: [existing(store, f"rewards/{s}/{fingerprint}") for s in rewards.scorers.values()]
            or [existing(store, f"completions/{fingerprint}")]
            for fingerprint in self.generators.values()
        }
        self.rows_of = rows_of(store)
        self.wanted = {shard["digest"]: number for shard, number in wanted_of(store, completions)}
        self.shards = shards_of(store, completions.prompts)
        self.singles = list(self._references())

    @property
    def scorers(self) -> list[str]:
        return [*self.singles, *(e.name for e in self.ensembles)]

    def _references(self) -> Any:
        """Every scorer, each followed by its dimensions."""
        for name, fingerprint in self.rewards.scorers.items():
            yield name
            there = self.store.list(f"rewards/{fingerprint}")
            for column in self.store.columns(there[0]) if there else []:
                if column.startswith(DIMENSION):
                    yield f"{name}:{column.removeprefix(DIMENSION)}"

    def read(self, shard: dict[str, Any], scorers: list[str] | None = None, texts: bool = True) -> ShardColumns:
        """scorers: those wanted, all by default; ensembles need `moments`. texts: also digests and lengths."""
        wanted = self.scorers if scorers is None else scorers
        members = [member for mixed in self.ensembles if mixed.name in wanted for member in mixed.members]
        singles = [s for s in self.singles if s in wanted or s in members]
        made = [
            self._generator(shard, self.wanted[shard["digest"]], g, fingerprint, singles, texts)
            for g, fingerprint in enumerate(self.generators.values())
        ]
        rewards = {s: _beside([one["rewards"][s] for one in made]) for s in singles}
        numbered = list(zip(made, np.cumsum([0, *(len(one["names"]) for one in made)]), strict=False))
        disagreement = {}
        for mixed in [mixed for mixed in self.ensembles if mixed.name in wanted]:
            z = [self.moments[member].z(rewards[member]) for member in mixed.members]
            rewards[mixed.name], disagreement[mixed.name] = ensemble(z)
        return ShardColumns(
            rewards={s: rewards[s] for s in wanted if s in rewards},
            disagreement=disagreement,
            texts=_beside([one["texts"] for one in made]),
            tokens=_beside([one["tokens"] for one in made]),
            authors=_beside([one["authors"] for one in made]),
            files=_beside([one["files"] + start if start else one["files"] for one, start in numbered]),
            names=[name for one in made for name in one["names"]],
            seals=[seal for one in made for seal in one["seals"]],
            samples=np.concatenate([np.arange(one["texts"].shape[1], dtype=np.int32) for one in made]),
        )

    def _generator(
        self, shard: dict[str, Any], number: Ints, generator: int, fingerprint: str, scorers: list[str], texts: bool
    ) -> dict[str, Any]:
        """The wanted samples of one generator, [prompts, most that a prompt of the shard has]."""
        rated = [_of_shard(held, shard) for held in self.rated[fingerprint]]
        places = {name: place for name, (place, _) in zip(self.rewards.scorers, rated, strict=False)}
        shared = sorted(set.intersection(*(set(held) for _, held in rated)))
        parts, _ = cover(shared, number, self.rows_of)
        shape = (shard["rows"], int(number.max()))
        whole = len(parts) == 1 and parts[0][1].shape == shape and bool(parts[0][1].all())
        found: dict[str, Any] = {"names": [], "seals": []}
        found |= (
            {}
            if whole
            else {
                "authors": np.full(shape, ABSENT, np.int16),
                "texts": np.zeros(shape, np.int64),
                "tokens": np.zeros(shape, np.int32),
                "files": np.zeros(shape, np.int32),
                "rewards": {scorer: np.full(shape, np.nan) for scorer in scorers},
            }
        )
        for held, take in parts:
            file, rows = completions_path(fingerprint, shard["prompts"], held), self.rows_of(held)
            width = held.last - held.first
            columns, seal = self._completions(file, take.shape, generator, texts)
            values: dict[str, Floats] = {}
            for scorer in scorers:
                name, _, dimension = scorer.partition(":")
                column = f"{DIMENSION}{dimension}" if dimension else "rewards"
                path = rewards_path(self.rewards.scorers[name], fingerprint, places[name], held)
                table = self.store.read_table(path, [column])
                if seal and (table.schema.metadata or {}).get(RATED, seal) != seal:
                    raise RunError(f"{path} rates other texts than those of {file} now; remove it and run again")
                values[scorer] = dense(table[column], width, np.nan)
                if self.imported:
                    values[scorer] = np.where(columns["authors"] == ABSENT, np.nan, values[scorer])
            columns["files"] = np.broadcast_to(np.int32(len(found["names"])), take.shape)
            found["names"].append(file)
            found["seals"].append(seal.decode())
            if whole:
                return {**columns, **found, "rewards": values}
            at, samples = np.nonzero(take)
            place = (at if rows is None else rows[at], samples + held.first)
            for name, array in columns.items():
                found[name][place] = array[take]
            for scorer, array in values.items():
                found["rewards"][scorer][place] = array[take]
        return found

    def _completions(
        self, file: str, shape: tuple[int, int], generator: int, texts: bool
    ) -> tuple[dict[str, NDArray[Any]], bytes]:
        """Authors, digests and lengths of one file, and the seal of its texts; shape: [prompts, samples]."""
        if not texts and not self.imported:
            nothing: NDArray[Any] = np.zeros((), np.int64)
            same = {"authors": np.full((), generator, np.int16), "texts": nothing, "tokens": nothing.astype(np.int32)}
            return {name: np.broadcast_to(value, shape) for name, value in same.items()}, b""
        width = shape[1]
        made = self.store.read_table(file, ["tokens", "text_digests", *(["generators"] if self.imported else [])])
        lengths = pc.list_value_length(made["tokens"]).fill_null(0).to_numpy()
        there = np.arange(width) < lengths[:, None]
        authors = np.where(there, np.int16(generator), np.int16(ABSENT))
        if self.imported:
            names = made["generators"].combine_chunks().flatten().dictionary_encode()
            numbers = {name: number for number, name in enumerate(self.authors)}
            codes = np.array([numbers.get(name, ABSENT) for name in names.dictionary.to_pylist()], np.int16)
            authors[there] = codes[names.indices.to_numpy()]
        digests, tokens = dense(made["text_digests"], width, 0), dense(made["tokens"], width, 0)
        return {"authors": authors, "texts": digests, "tokens": tokens}, texts_seal(made["text_digests"])


def _beside(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.hstack(arrays) if len(arrays) > 1 else arrays[0]


def _of_shard(ranges: dict[str, list[Held]], shard: dict[str, Any]) -> tuple[str, list[Held]]:
    """A scorer names its files by the prompts' digest or the rows'; see tasks/score.py."""
    rated = shard["prompts"] if shard["prompts"] in ranges else shard["digest"]
    return rated, ranges[rated]


def dense(lists: pa.ChunkedArray, width: int, fill: Any) -> NDArray[Any]:
    """A column of lists, none longer than width, as an array [rows, width]; the rest of a shorter list is `fill`."""
    array = lists.combine_chunks()
    flat = array.flatten()
    values = np.from_dlpack(flat.fill_null(fill) if flat.null_count else flat)  # to_numpy would first import pandas
    if len(values) == len(array) * width:
        return values.reshape(-1, width)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy()
    result = np.full((len(array), width), fill, dtype=values.dtype)
    result[np.arange(width) < lengths[:, None]] = values
    return result
