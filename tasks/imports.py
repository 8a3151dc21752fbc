"""import: completions that exist already, rated or in pairs, into the same store as generated ones.

Rows are read and understood one by one (tasks/forms.py), grouped by prompt on disk, and cut into shards like prompts
are. All completions of a prompt stand together, whoever wrote them; each rating stands as a scorer's rewards. So all
that follows (scoring by models and judges, pair, subset, publish) works as it does on generated completions. A shard is
named by its prompts and completions: a file that has grown keeps the shards it had, and what models made of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from tasks import models
from tasks.config import is_local_path
from tasks.errors import ConfigError, RunError
from tasks.forms import Understood, form_of, ratings_of, understand
from tasks.generate import completions_path
from tasks.ingest import (
    Quarantine,
    ShardWriter,
    all_there,
    check_share,
    example,
    examples_of,
    inputs_digest,
    pointer,
    shards_of,
)
from tasks.progress import Meter, Report, silent
from tasks.records import (
    IMPORTED,
    REWARDS,
    SCHEMA_VERSION,
    Completions,
    Counts,
    PromptSet,
    Rewards,
    Work,
    digest,
    text_digest,
)
from tasks.rows import BadRow
from tasks.samples import existing
from tasks.score import rewards_path
from tasks.sections import ImportConfig
from tasks.sources import read_rows
from tasks.store import Store

_BLOCK = 1000  # rows between two progress reports
_LOOKED_AT = 200  # rows, for a preview
_WORD = re.compile(r"\w+|[^\w\s]")
_MOST_AUTHORS = 1000  # more are no generators but a wrong column
_NAME = "import"  # the generator that imported completions stand under


def import_(config: ImportConfig, store: Store, report: Report = silent) -> Rewards:
    """The completions of a source with their ratings. A source that was imported before is not read again."""
    started = time.monotonic()
    inputs = _inputs(config)
    known = known_import(config, store)
    if known:
        Meter(report, "import", known.completions.counts.into, "completions", reused=known.completions.counts.into)
        return known
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter(report, "import", 0, "completions")
        about, quarantine = _read(config, inputs, store, Path(folder), meter)
        if _inputs(config) != inputs:
            raise RunError(f"import.source {config.source!r} changed while it was read; run again")
        store.create_file(f"prompts/sources/{inputs}.quarantine.parquet", quarantine)
    store.create_json(pointer(inputs), {**about, "source": config.source})
    return _handle(about, Work(shards_made=about["shards"], seconds=time.monotonic() - started))


def known_import(config: ImportConfig, store: Store) -> Rewards | None:
    """What a source that was imported before gave, with the same content and settings."""
    inputs = _inputs(config)
    if not store.exists(pointer(inputs)):
        return None
    about = store.read_object(pointer(inputs))
    try:
        known = _handle(about, Work(shards_reused=about["shards"]))
        parts = {unit: Counts(**about[unit]) for unit in ("rows", "completions") if unit in about}
    except (AttributeError, KeyError, TypeError) as error:
        raise store.damaged(pointer(inputs)) from error
    for unit, counts in parts.items():
        check_share(config, counts, lambda: examples_of(store, inputs), unit)
    return known if _all_there(known, store) else None


def _all_there(known: Rewards, store: Store) -> bool:
    """Whether nobody removed a file, as is advised for damaged ones."""
    if not all_there(store, known.completions.prompts):
        return False
    generator = known.completions.generators[_NAME]
    shards = {shard["prompts"] for shard in shards_of(store, known.completions.prompts)}
    places = [f"completions/{generator}", *(f"rewards/{scorer}/{generator}" for scorer in known.scorers.values())]
    return all(shards <= existing(store, place).keys() for place in places)


def preview(config: ImportConfig, prompts: int = 3) -> dict[str, Any]:
    """The first prompts as they would be imported, and what is wrong with the first rows; nothing is written."""
    count_tokens, unit = _length(config)
    groups: dict[str, dict[str, Any]] = {}
    bad: list[str] = []
    form, columns, number = "", [], 0
    for row, number in itertools.islice(read_rows(config), _LOOKED_AT):
        try:
            understood = understand(row, config)
        except BadRow as error:
            bad.append(example(number, error.reason, error.excerpt))
            continue
        bad += [example(number, error.reason, error.excerpt) for error in understood.bad]
        assert isinstance(row, dict)
        form, columns = form_of(row, config), [_readable(name) for name in row]
        found = groups.setdefault(understood.prompt["prompt_id"], {**understood.prompt, "completions": []})
        found["completions"] += [
            {"generator": c.generator, unit: count_tokens(c.text), "ratings": c.ratings, "text": c.text}
            for c in understood.completions
        ]
    if not groups:
        raise ConfigError(
            f"import.columns: no row at the beginning of {config.source!r} is understood: "
            f"{' | '.join(bad[:3]) or 'it holds none'}"
        )
    shown = list(groups.values())[:prompts]
    return {"form": form, "columns": columns, "prompts": shown, "bad": bad, "looked_at": number}


def _readable(name: Any) -> str:
    """A column's name, whatever stands in it."""
    return str(name).encode(errors="backslashreplace").decode()


def _handle(about: dict[str, Any], work: Work) -> Rewards:
    prompts = PromptSet(about["set"], Counts(about["prompts"], about["prompts"]))
    completions = Completions(
        prompts,
        about["samples"],
        {_NAME: about["generator"]},
        Counts(**about["counts"]),
        work,
        authors=tuple(about["authors"]),
        length_unit=about["length_unit"],
    )
    return Rewards(completions, about["scorers"], Counts(**about["ratings"]))


def _read(config: ImportConfig, inputs: str, store: Store, folder: Path, meter: Meter) -> tuple[dict[str, Any], Path]:
    """Import everything; what is known about it, and a local file with the quarantined rows."""
    quarantine = Quarantine(folder / "quarantine.parquet")
    groups = _Groups(folder / "groups.sqlite", config.repeats)
    bad_rows, bad_completions = Counter[str](), Counter[str]()  # of rows: of which nothing can be used
    examples: list[str] = []
    into = kept = number = 0  # completions; number: rows
    forms: set[str] = set()
    for row, number in read_rows(config):
        try:
            understood = understand(row, config)
        except BadRow as bad:
            bad_rows[bad.reason] += 1
            found = [bad]
        else:
            assert isinstance(row, dict)
            forms.add(form_of(row, config))
            new = groups.add(understood, together="pairs" in forms)
            into, kept = into + len(understood.completions), kept + new
            bad_completions.update(bad.reason for bad in understood.bad)
            found = understood.bad
        for one in found:
            quarantine.add(number, one)
            if len(examples) < 3:
                examples.append(example(number, one.reason, one.excerpt))
        if len(groups.authors) > _MOST_AUTHORS:
            raise ConfigError(
                f"import.columns.generator: {config.columns.generator!r} names more than {_MOST_AUTHORS:,} generators; "
                "name the column that says who wrote a completion"
            )
        if number % _BLOCK == 0:
            meter.add(_BLOCK)
    asked = into + bad_completions.total()
    meter.add(max(0, asked + bad_rows.total() - meter.done))
    if "pairs" in forms and len(forms) > 1:
        raise ConfigError(
            f"import.source {config.source!r} holds pairs and other rows; import them one by one, by `form`"
        )
    rows = Counts(number, number - bad_rows.total(), dict(bad_rows))
    check_share(config, rows, lambda: examples)
    completions = Counts(asked, into, dict(bad_completions))
    check_share(config, completions, lambda: examples, "completions")
    # Counts are of completions; how many a row had that cannot be used is not known: it counts as one.
    unit = "" if forms == {"long"} else " (whole row)"
    whole = {f"{reason}{unit}": n for reason, n in bad_rows.items()}
    again = {"duplicate" if "pairs" in forms else "rated again": into - kept} if into > kept else {}
    counts = Counts(asked + bad_rows.total(), kept, {**whole, **bad_completions, **again})
    count_tokens, unit = _length(config)
    facts = {"schema": SCHEMA_VERSION, "stage": "import", "lengths": _tokenizer(config.tokenizer)}
    generator = models.remember_facts(facts, "import", store)
    names = groups.ratings()
    scorers = {
        rating.name: models.remember_facts(
            {"schema": SCHEMA_VERSION, "stage": "import", "rating": rating.model_dump(), "inputs": inputs},
            rating.name,
            store,
        )
        for rating in ratings_of(config)
        if rating.name in names
    }
    for rating in config.ratings:
        if rating.name not in names:
            raise ConfigError(
                f"import.ratings: no row has a number in {rating.column or rating.name!r}, for rating {rating.name!r}; "
                "see `prefsieve import CONFIG --dry-run` for the columns there are"
            )
    writer = _CompletionWriter(store, config.shard_size, generator, scorers, count_tokens)
    for prompt in groups.prompts():
        writer.add(prompt)
    about = {
        "set": writer.close(),
        "prompts": writer.rows,
        "samples": max(shard["samples"] for shard in writer.shards),
        "shards": len(writer.shards),
        "generator": generator,
        "authors": list(writer.authors),
        "length_unit": unit,
        "scorers": scorers,
        "counts": asdict(counts),
        "repeated": 0 if "pairs" in forms else groups.repeated,
        "rows": asdict(rows),
        "completions": asdict(completions),
        "ratings": writer.rated(),
    }
    return about, quarantine.close()


def _length(config: ImportConfig) -> tuple[Callable[[str], int], str]:
    """How long a text is, and in which unit."""
    if not config.tokenizer:
        return lambda text: len(_WORD.findall(text)), "words"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"import.tokenizer: {config.tokenizer!r} cannot be loaded: {error}") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens"


def _inputs(config: ImportConfig) -> str:
    """Digest of all that decides what is imported, a tokenizer's content too."""
    inputs = inputs_digest(config)
    return digest([inputs, _tokenizer(config.tokenizer)]) if config.tokenizer else inputs


def _tokenizer(name: str) -> str:
    """What a tokenizer is by content: a folder's digest, or a hub name's commit."""
    if not name:
        return "words"
    if not is_local_path(name):
        return models.hub_commit("import.tokenizer", name)
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        raise ConfigError(f"import.tokenizer: {name!r} cannot be loaded: there is no such folder; check the path")
    return models.folder_digest(folder)


class _CompletionWriter(ShardWriter):
    """Writes, beside each shard of prompts, its completions and one file per rating."""

    def __init__(
        self, store: Store, shard_size: int, generator: str, scorers: dict[str, str], count_tokens: Callable[[str], int]
    ) -> None:
        super().__init__(store, shard_size)
        self.generator, self.scorers, self.count_tokens = generator, scorers, count_tokens
        self.authors: dict[str, None] = {}
        self.missing: Counter[str] = Counter()
        self.completions = 0

    def key(self, row: dict[str, Any]) -> str:
        return digest([row["prompt_id"], [[c["generator"], c["text"]] for c in row["completions"]]])

    def beside(self, shard: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        shard["samples"] = max(len(row["completions"]) for row in rows)
        place = (self.generator, shard["prompts"], (0, shard["samples"]))
        table = pa.Table.from_pylist([self._completions(row) for row in rows], schema=IMPORTED)
        self.store.create_table(completions_path(*place), table)
        for name, scorer in self.scorers.items():
            rated = pa.Table.from_pylist([self._ratings(row, name) for row in rows], schema=REWARDS)
            self.store.create_table(rewards_path(scorer, *place), rated)

    def _completions(self, row: dict[str, Any]) -> dict[str, Any]:
        texts = [c["text"] for c in row["completions"]]
        self.authors |= dict.fromkeys(c["generator"] for c in row["completions"])
        self.completions += len(texts)
        return {
            "prompt_id": row["prompt_id"],
            "refused": None,
            "prompt_tokens": self.count_tokens(row["messages"][-1]["content"]),
            "texts": texts,
            "text_digests": [text_digest(text) for text in texts],
            "finish_reasons": ["stop"] * len(texts),
            "tokens": [self.count_tokens(text) for text in texts],
            "logprobs": [None] * len(texts),
            "generators": [c["generator"] for c in row["completions"]],
        }

    def _ratings(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        ratings = [c["ratings"].get(name, "no rating") for c in row["completions"]]
        reasons = [rating if isinstance(rating, str) else None for rating in ratings]
        self.missing.update(f"{name}: {reason.split(':')[0]}" for reason in reasons if reason)
        return {
            "prompt_id": row["prompt_id"],
            "rewards": [None if isinstance(rating, str) else rating for rating in ratings],
            "reasons": reasons,
        }

    def rated(self) -> dict[str, Any]:
        """Counts of the ratings."""
        into = self.completions * len(self.scorers)
        return {"into": into, "out": into - self.missing.total(), "dropped": dict(self.missing)}


class _Groups:
    """Completions by prompt, in order of appearance; on disk, so that memory stays flat."""

    def __init__(self, path: Path, again: str = "samples") -> None:
        """again: what a text is that a generator has twice for a prompt, see ImportConfig.repeats."""
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript(
            """
            PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;
            CREATE TABLE prompts (number INTEGER PRIMARY KEY, id TEXT UNIQUE, row TEXT);
            CREATE TABLE completions (prompt INTEGER, key TEXT, place INTEGER, row TEXT);
            CREATE INDEX by_prompt ON completions (prompt, key);
            BEGIN
            """
        )
        self.again = again
        self.place = self.repeated = 0
        self.rated: set[str] = set()
        self.authors: set[str] = set()

    def add(self, understood: Understood, together: bool) -> int:
        """How many of the completions are new; `together`: they are a pair, of which equal ones count once."""
        prompt = understood.prompt
        self.db.execute(
            "INSERT OR IGNORE INTO prompts (id, row) VALUES (?, ?)", (prompt["prompt_id"], json.dumps(prompt))
        )
        number = self.db.execute("SELECT number FROM prompts WHERE id = ?", (prompt["prompt_id"],)).fetchone()[0]
        texts = [[c.generator, c.text] for c in understood.completions]
        new = 0
        for i, completion in enumerate(understood.completions):
            key = digest([i, texts] if together else texts[i])
            row = {"generator": completion.generator, "text": completion.text, "ratings": completion.ratings}
            seen = self.db.execute("SELECT 1 FROM completions WHERE prompt = ? AND key = ?", (number, key)).fetchone()
            self.repeated += bool(seen)
            new += not seen or (self.again == "samples" and not together)
            if seen and together:
                continue
            self.place += 1
            self.db.execute("INSERT INTO completions VALUES (?, ?, ?, ?)", (number, key, self.place, json.dumps(row)))
            self.authors.add(completion.generator)
            self.rated |= {name for name, rating in completion.ratings.items() if not isinstance(rating, str)}
        return new

    def ratings(self) -> set[str]:
        """Names of the ratings that some completion has."""
        return self.rated

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Rows of PROMPTS, each with its `completions`."""
        rows = self.db.execute(
            # CROSS keeps this order of the two: prompt by prompt, instead of all texts through a sort.
            "SELECT number, prompts.row, completions.row FROM prompts CROSS JOIN completions ON prompt = number "
            "ORDER BY number, place"
        )
        for _, group in itertools.groupby(rows, key=lambda row: row[0]):
            found = list(group)
            completions = [json.loads(completion) for _, _, completion in found]
            if self.again == "ratings":
                completions = _averaged(completions)
            yield {**json.loads(found[0][1]), "completions": completions}


def _averaged(completions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each text of a generator once, with the mean of each rating's numbers, or why there is none."""
    groups: dict[tuple[str, str], list[dict[str, float | str]]] = {}
    for one in completions:
        groups.setdefault((one["generator"], one["text"]), []).append(one["ratings"])
    merged = []
    for (generator, text), ratings in groups.items():
        mean: dict[str, float | str] = {}
        for name in ratings[0]:
            numbers = [value for rated in ratings if not isinstance(value := rated[name], str)]
            mean[name] = fmean(numbers) if numbers else ratings[0][name]
        merged.append({"generator": generator, "text": text, "ratings": mean})
    return merged
