"""The nouns of prefsieve: the rows in the store (Arrow schemas) and the small handles that stages pass on.

Rows live in Parquet files in the store; handles hold only digests and counts, so they travel cheaply through
Prefect and Ray. A change of a schema's meaning raises SCHEMA_VERSION, which is part of every fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from tasks.errors import RunError

SCHEMA_VERSION = 4

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

FILE = pa.dictionary(pa.int32(), pa.string())  # a path in the store, the same for many rows

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),  # digest of the messages
        ("messages", MESSAGES),
        ("source", pa.string()),  # where the row came from, for shares and strata
        ("fields", pa.string()),  # JSON object of the columns kept for function scorers
    ]
)

QUARANTINE = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("excerpt", pa.string())])

COMPLETIONS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("refused", pa.string()),  # why the engine refused the prompt; then the lists are empty
        ("prompt_tokens", pa.int32()),
        ("texts", pa.list_(pa.string())),
        ("text_digests", pa.list_(pa.int64())),  # lets `pair` see identical texts without reading them
        ("finish_reasons", pa.list_(pa.string())),  # stop | length
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),  # sum over the sample's tokens, natural log, temperature 1
    ]
)

# Completions that were imported stand together, whoever wrote them.
IMPORTED = COMPLETIONS.append(pa.field("generators", pa.list_(pa.string())))

REWARDS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("rewards", pa.list_(pa.float64())),  # null where the scorer gave no finite number
        ("reasons", pa.list_(pa.string())),  # null where there is a reward
    ]
)

DIMENSION = "dimension."  # a judge's rewards have a column of this name for each dimension, aligned with `rewards`


RATED = b"prefsieve.rated"  # where a table of rewards keeps the seal of the texts that were rated
PAIRED = b"prefsieve.paired"  # where a table of pairs keeps, by file of completions, the seals of its texts


def texts_seal(digests: pa.ChunkedArray) -> bytes:
    """Of the column `text_digests` of a file of completions: an engine that makes it again may answer otherwise."""
    return hashlib.sha256(digests.combine_chunks().flatten().to_numpy().tobytes()).hexdigest().encode()


def rewards_schema(dimensions: Sequence[str] = ()) -> pa.Schema:
    """REWARDS, and a column of numbers per dimension: null where there is no reward."""
    return pa.schema([*REWARDS, *((DIMENSION + name, pa.list_(pa.float64())) for name in dimensions)])


# One side's grades, above 0 where the judge preferred it; both null where there is no comparison, with a reason where
# the judge is why.
DUELS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("first", pa.list_(pa.int8())),  # shown first, as A
        ("second", pa.list_(pa.int8())),  # shown second, as B
        ("reasons", pa.list_(pa.string())),
    ]
)

NAME = pa.dictionary(pa.int32(), pa.string())  # one of few

PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("id_bits", pa.uint64()),  # its first 64 bits: what ties and draws go by
        ("shard", pa.int32()),  # index of the prompt shard, then the row in it
        ("row", pa.int32()),
        ("source", NAME),
        ("chosen_generator", NAME),
        ("chosen_file", FILE),  # of completions; the sample is the chosen_sample-th of the generator's
        ("chosen_sample", pa.int32()),
        ("rejected_generator", NAME),
        ("rejected_file", FILE),
        ("rejected_sample", pa.int32()),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("margin", pa.float64()),  # score_chosen - score_rejected: below 0 where a label says otherwise
        ("pvar", pa.float64()),
        ("pvar_error", pa.float64()),  # jackknife standard error over the prompt's samples
        ("pvar_posterior", pa.float64()),  # shrunk towards what the data set says; mean and standard deviation
        ("pvar_posterior_error", pa.float64()),
        ("rewards_finite", pa.int32()),  # how many rewards PVar was computed from
        ("generator_delta", pa.float64()),  # of the two generators, over all prompts that both answered
        ("disagreement", pa.float64()),  # of an ensemble's members, mean over the prompt's samples
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("length_difference", pa.int32()),  # chosen - rejected
    ]
)


def with_scorers(schema: pa.Schema, scorers: Sequence[str]) -> pa.Schema:
    """PAIRS or PREFERENCES with what every further scorer says of a pair and its prompt.

    margin.S: chosen minus rejected by S; tau.S, flipped.S: its agreement with the scorer that decides.
    """
    metrics = [f"{metric}.{scorer}" for scorer in scorers for metric in ("margin", "tau", "flipped")]
    return pa.schema([*schema, *(pa.field(name, pa.float64()) for name in metrics)])


DROPS = pa.schema([("prompt_id", pa.string()), ("reason", NAME), ("pvar", pa.float64())])

SELECTION = pa.schema([("pair", pa.int64()), ("rank", pa.int64())])  # pair: row number in the pairs table

LEFT_OUT = pa.schema([("pair", pa.int64()), ("reason", NAME)])  # the pairs that a selection does not take

PREFERENCES = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("margin", pa.float64()),
        ("pvar", pa.float64()),
        ("pvar_error", pa.float64()),
        ("pvar_posterior", pa.float64()),
        ("pvar_posterior_error", pa.float64()),
        ("rewards_finite", pa.int32()),
        ("generator_delta", pa.float64()),
        ("disagreement", pa.float64()),
        ("rank", pa.int64()),  # 0 is the first that the subset's ranking would take
        ("chosen_generator", pa.string()),
        ("rejected_generator", pa.string()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("length_difference", pa.int32()),
    ]
)


def digest(value: Any) -> str:
    """Hex digest (32 characters of SHA-256) of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def rounded(value: float) -> float:
    """A finite number as manifests and reports have it: to six decimals, and a small one to six digits.

    At most 15 decimals, so that the rounding of a sum that should be 0 does not look like a number.
    """
    value = float(value)
    small = 0 < abs(value) < 1
    return round(value, min(15, 5 - math.floor(math.log10(abs(value)))) if small else 6)


def text_digest(text: str) -> int:
    """Signed 64-bit digest of a text, for equality checks."""
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


@dataclass(frozen=True)
class Prompt:
    """One prompt as function scorers see it."""

    prompt_id: str
    messages: list[dict[str, str]]
    source: str
    fields_json: str = "{}"

    @cached_property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.fields_json)


@dataclass(frozen=True)
class Counts:
    """What went in and came out of a stage. Nothing disappears: into = out + everything dropped by reason."""

    into: int
    out: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.into != self.out + sum(self.dropped.values()):
            raise RunError(f"rows were lost: {self.into} in, {self.out} out, dropped {dict(self.dropped)}")


@dataclass(frozen=True)
class Work:
    """What a stage had to do this time; all zero on a rerun."""

    shards_made: int = 0
    shards_reused: int = 0
    engine_starts: int = 0
    requests: int = 0  # calls into an engine: one per prompt (generate) or different completion (score), more by judges
    samples: int = 0
    tokens: int = 0  # of completions (generate), of judges' prompts and replies (score)
    paid_tokens: int = 0  # of these, by endpoints, which are paid by the token
    retries: int = 0  # requests asked again: an endpoint gave no answer, or an engine died over their shard
    engine_restarts: int = 0  # processes of engines that took the place of one that died
    gpu_seconds: float = 0.0  # GPUs that were held times seconds, from an engine's start to its last answer
    seconds: float = 0.0  # of the stage, on the clock
    engine_seconds: float = 0.0  # from the first engine being ready to the last shard being stored

    def plus(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts, split into shards; its manifest is at prompts/<digest>/manifest.json."""

    digest: str
    counts: Counts
    work: Work = Work()


@dataclass(frozen=True)
class Completions:
    """samples 0..samples-1 of each generator for each prompt of a set; or what was imported, as it came."""

    prompts: PromptSet
    samples: int  # of imported ones: of the prompt that has most
    generators: Mapping[str, str]  # name -> fingerprint
    counts: Counts
    work: Work = Work()
    allotment: str = ""  # how many samples each prompt has, when not all have the same; see tasks/samples.py
    ladder: tuple[int, ...] = ()  # of adaptive sampling: the numbers of samples that prompts stop at
    rounds: tuple[dict[str, Any], ...] = ()  # of adaptive sampling: what each left, and what was expected of the rest
    authors: tuple[str, ...] = ()  # of imported ones: who wrote them, in order of appearance
    length_unit: str = "tokens"


@dataclass(frozen=True)
class Rewards:
    """One reward per completion and scorer."""

    completions: Completions
    scorers: Mapping[str, str]  # name -> fingerprint; none for pairs that came without scores
    counts: Counts
    work: Work = Work()

    def after(self, earlier: Rewards) -> Rewards:
        """These, with the work that was done for some of them before."""
        return replace(self, work=earlier.work.plus(self.work))

    def joined(self, other: Rewards) -> Rewards:
        """These and those of further scorers for the same completions."""
        dropped = {**self.counts.dropped, **other.counts.dropped}
        counts = Counts(self.counts.into + other.counts.into, self.counts.out + other.counts.out, dropped)
        return replace(other, scorers={**self.scorers, **other.scorers}, counts=counts)


@dataclass(frozen=True)
class Duels:
    """Comparisons of two generators' samples by pairwise judges."""

    completions: Completions
    judges: Mapping[str, str]  # name -> fingerprint
    counts: Counts
    work: Work = Work()


@dataclass(frozen=True)
class Pairs:
    """One table of pairs, at pairs/<digest>/."""

    name: str
    digest: str
    rewards: Rewards
    counts: Counts
    work: Work = Work()


@dataclass(frozen=True)
class Selection:
    """The rows of a pairs table that a subset takes, at pairs/<pairs digest>/selections/<digest>.parquet."""

    name: str
    digest: str
    pairs: Pairs
    counts: Counts
    work: Work = Work()
    control: str = ""  # which control of the subset it is


@dataclass(frozen=True)
class Version:
    """A published subset or a trained policy: <kind>/<name>/<version>/ in the store, never changed."""

    name: str
    version: str
    counts: Counts
    work: Work = Work()
    kind: str = "subsets"

    @property
    def place(self) -> str:
        return f"{self.kind}/{self.name}/{self.version}"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"
