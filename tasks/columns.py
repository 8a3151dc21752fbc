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

from tasks.config import EnsembleConfig
from tasks.errors import ConfigError
from tasks.generate import completions_path, covering, existing_ranges
from tasks.records import Rewards
from tasks.score import rewards_path
from tasks.selection.delta import Moments, ensemble
from tasks.selection.pairing import ABSENT
from tasks.store import Store

_NAMED = 20  # of many generators, in a message
_DIMENSION = "dimension."  # before the name of a judge's dimension in a file of rewards


@dataclass(frozen=True)
class ShardColumns:
    """All [prompts, columns], but for samples: which of its generator's each column is, [columns].

    rewards: by scorer, NaN where there is none; disagreement: of ensembles, by name; texts: digests; tokens: lengths;
    authors: number in Columns.authors, ABSENT where there is no sample; files: of completions, number in `names`.
    """

    rewards: dict[str, NDArray[np.float64]]
    disagreement: dict[str, NDArray[np.float64]]
    texts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    authors: NDArray[np.int16]
    files: NDArray[np.int32]
    names: list[str]
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
            fingerprint: [existing_ranges(store, f"rewards/{s}/{fingerprint}") for s in rewards.scorers.values()]
            or [existing_ranges(store, f"completions/{fingerprint}")]
            for fingerprint in self.generators.values()
        }
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
                if column.startswith(_DIMENSION):
                    yield f"{name}:{column.removeprefix(_DIMENSION)}"

    def read(self, shard: dict[str, Any], scorers: list[str] | None = None, texts: bool = True) -> ShardColumns:
        """scorers: those wanted, all by default; ensembles need `moments`. texts: also digests and lengths."""
        wanted = self.scorers if scorers is None else scorers
        members = [member for mixed in self.ensembles if mixed.name in wanted for member in mixed.members]
        singles = [s for s in self.singles if s in wanted or s in members]
        parts = [
            part for g, fp in enumerate(self.generators.values()) for part in self._parts(shard, g, fp, singles, texts)
        ]
        rewards = {s: np.hstack([part["rewards"][s] for part in parts]) for s in singles}
        files = [np.full(part["authors"].shape, i, np.int32) for i, part in enumerate(parts)]
        disagreement = {}
        for mixed in [mixed for mixed in self.ensembles if mixed.name in wanted]:
            z = [self.moments[member].z(rewards[member]) for member in mixed.members]
            rewards[mixed.name], disagreement[mixed.name] = ensemble(z)
        return ShardColumns(
            rewards={s: rewards[s] for s in wanted if s in rewards},
            disagreement=disagreement,
            texts=np.hstack([part["texts"] for part in parts]),
            tokens=np.hstack([part["tokens"] for part in parts]),
            authors=np.hstack([part["authors"] for part in parts]),
            files=np.hstack(files),
            names=[part["file"] for part in parts],
            samples=np.concatenate([part["samples"] for part in parts]),
        )

    def _parts(self, shard: dict[str, Any], generator: int, fingerprint: str, scorers: list[str], texts: bool) -> Any:
        """What each file holds of the wanted samples of a shard."""
        rated = [_of_shard(ranges, shard) for ranges in self.rated[fingerprint]]
        places = {name: place for name, (place, _) in zip(self.rewards.scorers, rated, strict=False)}
        shared = sorted(set.intersection(*(set(ranges) for _, ranges in rated)))
        for (first, last), part in covering(shared, shard.get("samples", self.rewards.completions.samples)):
            file = completions_path(fingerprint, shard["prompts"], (first, last))
            authors, digests, tokens = self._completions(file, (shard["rows"], last - first), generator, texts)
            rewards = {}
            for scorer in scorers:
                name, _, dimension = scorer.partition(":")
                column = f"{_DIMENSION}{dimension}" if dimension else "rewards"
                path = rewards_path(self.rewards.scorers[name], fingerprint, places[name], (first, last))
                values = dense(self.store.read_table(path, [column])[column], last - first, np.nan)
                rewards[scorer] = (np.where(authors == ABSENT, np.nan, values) if self.imported else values)[:, part]
            yield {
                "file": file,
                "samples": np.arange(first, last, dtype=np.int32)[part],
                "authors": authors[:, part],
                "texts": digests[:, part],
                "tokens": tokens[:, part],
                "rewards": rewards,
            }

    def _completions(
        self, file: str, shape: tuple[int, int], generator: int, texts: bool
    ) -> tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.int32]]:
        """Authors, digests and lengths of one file; shape: [prompts, samples]."""
        if not texts and not self.imported:
            return np.full(shape, generator, np.int16), np.zeros(shape, np.int64), np.zeros(shape, np.int32)
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
        return authors, dense(made["text_digests"], width, 0), dense(made["tokens"], width, 0)


def _of_shard(ranges: dict[str, list[tuple[int, int]]], shard: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """A scorer names its files by the prompts' digest or the rows'; see tasks/score.py."""
    rated = shard["prompts"] if shard["prompts"] in ranges else shard["digest"]
    return rated, ranges[rated]


def dense(lists: pa.ChunkedArray, width: int, fill: Any) -> NDArray[Any]:
    """A column of lists, none longer than width, as an array [rows, width]; the rest of a shorter list is `fill`."""
    array = lists.combine_chunks()
    flat = array.flatten()
    values = (flat.fill_null(fill) if flat.null_count else flat).to_numpy(zero_copy_only=False)
    if len(values) == len(array) * width:
        return values.reshape(-1, width)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy()
    result = np.full((len(array), width), fill, dtype=values.dtype)
    result[np.arange(width) < lengths[:, None]] = values
    return result
