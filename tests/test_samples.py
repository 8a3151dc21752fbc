"""Which samples there are, which are read, and which are made: nothing twice, nothing forgotten."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import RunError
from tasks.generate import completions_path, generate, missing_completions
from tasks.models import generator_fingerprint
from tasks.records import COMPLETIONS, PROMPTS, Counts, PromptSet, digest
from tasks.samples import Held, cover, existing, held_by, missing, name_part, rows_of
from tasks.sections import GenerateConfig, GeneratorConfig
from tasks.store import Store

ROWS = 5
PARTS = {"": None, "a": np.array([0, 2, 3]), "b": np.array([1, 4]), "c": np.array([3])}


def look_up(held: Held) -> np.ndarray | None:
    return PARTS[held.part]


@pytest.mark.parametrize(
    ("ranges", "samples", "gaps"),
    [
        ([], 4, [(0, 4)]),
        ([(0, 4)], 4, []),
        ([(0, 4)], 8, [(4, 8)]),
        ([(0, 8)], 4, []),
        ([(4, 8)], 8, [(0, 4)]),
        ([(0, 2), (4, 6)], 8, [(2, 4), (6, 8)]),
        ([(0, 4), (0, 8)], 8, []),
        ([(0, 4), (2, 6)], 8, [(6, 8)]),
        ([(6, 8)], 4, [(0, 4)]),
    ],
)
def test_only_the_missing_samples_of_a_shard_are_made(
    ranges: list[tuple[int, int]], samples: int, gaps: list[tuple[int, int]]
) -> None:
    held = sorted(Held(*range_) for range_ in ranges)
    made = list(missing(held, np.full(ROWS, samples), look_up))
    assert [(first, last) for first, last, _ in made] == gaps
    assert all(group.tolist() == list(range(ROWS)) for _, _, group in made)


helds = st.tuples(st.integers(0, 6), st.integers(1, 6), st.sampled_from(sorted(PARTS))).map(
    lambda t: Held(t[0], t[0] + t[1], t[2])
)


@given(st.lists(helds, max_size=6), st.lists(st.integers(0, 9), min_size=ROWS, max_size=ROWS))
def test_with_what_is_missing_every_row_has_each_wanted_sample_once(held: list[Held], wanted: list[int]) -> None:
    number = np.array(wanted)
    made = list(missing(sorted(held), number, look_up))
    groups: dict[str, np.ndarray | None] = dict(PARTS)
    there = np.zeros((ROWS, 16), dtype=bool)
    for one in held:
        rows = look_up(one)
        there[:, one.first : one.last][slice(None) if rows is None else rows] = True
    for i, (first, last, group) in enumerate(made):
        groups[f"made{i}"] = group
        held = [*held, Held(first, last, f"made{i}")]
        assert not there[group, first:last].all(axis=0).any()  # some of it was missing
        there[group, first:last] = True
    parts, reached = cover(sorted(held), number, lambda one: groups[one.part])
    assert reached.tolist() == wanted
    seen = np.zeros((ROWS, 16), dtype=int)
    for one, take in parts:
        rows = groups[one.part]
        for i, row in enumerate(range(ROWS) if rows is None else rows):
            seen[row, one.first : one.last] += take[i]
    assert seen.tolist() == [[int(sample < n) for sample in range(16)] for n in wanted]


def test_names_of_files_say_what_they_hold(store: Store) -> None:
    part = name_part(store, np.array([1, 3]), 4)
    for held in (Held(0, 4), Held(4, 16, part)):
        path = completions_path("g", "p", held)
        assert held_by(path) == held
        store.create(path, b"")
    assert existing(store, "completions") == {"p": [Held(0, 4), Held(4, 16, part)]}
    rows = rows_of(store)(Held(4, 16, part))
    assert rows is not None and rows.tolist() == [1, 3]
    assert name_part(store, np.arange(4), 4) == "" and rows_of(store)(Held(0, 4)) is None


def test_rows_are_final_with_their_last_missing_file(store: Store) -> None:
    shard = {"digest": "s", "prompts": "p", "rows": 16}
    store.create(completions_path("g", "p", (4, 8)), b"")
    items = missing_completions(store, "g", [(shard, np.full(16, 8))])
    assert [(i["first"], i["last"], i["final"], i["part"]) for i in items] == [(0, 4, 16, "")]
    items = missing_completions(store, "g", [(shard, np.array([12] * 4 + [2] * 12))])
    assert [(i["first"], i["last"], i["rows"], i["final"]) for i in items] == [
        (0, 2, 12, 12),
        (0, 4, 4, 0),
        (8, 12, 4, 4),
    ]


def refusals(store: Store, files: list[tuple[Held, list[int], list[int]]], most: float = 1.0) -> dict[str, int]:
    """What generate counts of four prompts, 8 samples each, once these files are there: with rows, those refused."""
    ids = [digest(i) for i in range(4)]
    if not store.list("prompts/shards"):
        prompts = [{"prompt_id": i, "messages": [], "source": "s", "fields": "{}"} for i in ids]
        store.create_table("prompts/shards/rows.parquet", pa.Table.from_pylist(prompts, PROMPTS))
        store.create_json("prompts/set/manifest.json", {"shards": [{"digest": "rows", "prompts": "p", "rows": 4}]})
    config = GenerateConfig(samples=8, generators=[GeneratorConfig(name="g", engine="fake")], max_refused=most)
    fingerprint = generator_fingerprint(config.generators[0], store)
    for held, rows, refused in files:
        table = [{"prompt_id": ids[row], "refused": "too long: 9" if row in refused else None} for row in rows]
        store.create_table(completions_path(fingerprint, "p", held), pa.Table.from_pylist(table, COMPLETIONS))
    return dict(generate(config, PromptSet("set", Counts(4, 4)), store).counts.dropped)


def test_refusals_are_counted_in_every_file_and_once_per_prompt(store: Store) -> None:
    pilot, others = [1], [0, 2, 3]
    parts = [(Held(0, 8, name_part(store, np.array(rows), 4)), rows, [1, 3]) for rows in (pilot, others)]
    assert refusals(store, parts) == {"refused: too long": 2}
    assert refusals(store, [(Held(0, 2), [0, 1, 2, 3], [1, 3])]) == {"refused: too long": 2}


def test_prompts_that_are_refused_for_later_samples_only_are_counted_too(store: Store) -> None:
    """An engine may die over a prompt when more samples of it are asked for."""
    every = [0, 1, 2, 3]
    assert refusals(store, [(Held(0, 4), every, [3]), (Held(4, 8), every, [2, 3])]) == {"refused: too long": 2}
    with pytest.raises(RunError, match="2 of 4 prompts were refused by 'g', more than max_refused 25%"):
        refusals(store, [], most=0.25)
