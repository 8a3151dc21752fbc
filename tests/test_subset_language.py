"""What every kind of step does, in random sequences over random tables of pairs; controls and explanations of them."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.card import control_words
from tasks.config import CurateConfig, FilterStep, RankStep, SubsetConfig
from tasks.describe import describe, describe_step
from tasks.errors import ConfigError, RunError
from tasks.explain import explain, overlap
from tasks.pairtable import open_pairs
from tasks.records import PAIRS, PROMPTS, Completions, Counts, Pairs, PromptSet, Rewards, Selection, digest, rounded
from tasks.selection import ranking
from tasks.store import Store
from tasks.subset import selection_path, subset

METRICS = ("pvar", "margin", "length_difference")


# --- tables of pairs


def row_of(i: int, **values: Any) -> dict[str, Any]:
    """A pair of the i-th prompt."""
    return {
        "prompt_id": digest(i),
        "id_bits": int(digest(i)[:16], 16),
        "source": "a",
        "level": i,
        "pvar": 0.1,
        "margin": 1.0,
        "length_difference": 0,
        "chosen_tokens": 10,
        "rejected_tokens": 10,
        **values,
    }


def table_of(store: Store, rows: list[dict[str, Any]], shard_size: int = 1000) -> Pairs:
    """A table of pairs as `pair` leaves it, with the prompts that it refers to."""
    shards, pairs = [], []
    for index, start in enumerate(range(0, len(rows), shard_size)):
        part = rows[start : start + shard_size]
        prompts = [
            {
                "prompt_id": row["prompt_id"],
                "messages": [{"role": "user", "content": f"prompt {row['prompt_id']}"}],
                "source": row["source"],
                "fields": json.dumps({"level": row["level"]}),
            }
            for row in part
        ]
        name = digest(prompts)
        store.create_table(f"prompts/shards/{name}.parquet", pa.Table.from_pylist(prompts, schema=PROMPTS))
        shards.append({"digest": name, "prompts": name, "rows": len(part)})
        constant = {"shard": index, "chosen_generator": "g", "rejected_generator": "h", "chosen_file": "f"}
        pairs += [{**row, **constant, "row": i} for i, row in enumerate(part)]
    name = digest([rows, shard_size])
    store.create_json(f"prompts/{name}/manifest.json", {"shards": shards})
    store.create_table(f"pairs/{name}/pairs.parquet", pa.Table.from_pylist(pairs, schema=PAIRS))
    counts = Counts(len(rows), len(rows))
    completions = Completions(PromptSet(name, counts), 2, {"import": "x"}, counts, authors=("g", "h"))
    return Pairs("table", name, Rewards(completions, {}, Counts(0, 0)), counts)


def subset_of(*steps: dict[str, Any], **changes: Any) -> SubsetConfig:
    return SubsetConfig.model_validate({"name": "s", "steps": steps, **changes})


def taken(rows: list[dict[str, Any]], store: Store, selection: Selection) -> list[int]:
    """Places in the table of what a selection takes, in the order of taking."""
    table = store.read_table(selection_path(selection.pairs, selection.digest)).to_pydict()
    assert sorted(table["rank"]) == list(range(len(table["rank"])))
    assert table["pair"] == sorted(set(table["pair"]))
    assert set(table["pair"]) <= set(range(len(rows)))
    return [pair for _, pair in sorted(zip(table["rank"], table["pair"], strict=True))]


def left_out(store: Store, selection: Selection) -> dict[int, str]:
    table = store.read_table(selection_path(selection.pairs, selection.digest, "left-out.parquet")).to_pydict()
    assert len(set(table["pair"])) == len(table["pair"])
    return dict(zip(table["pair"], table["reason"], strict=True))


def check_counts(rows: list[dict[str, Any]], store: Store, selection: Selection) -> None:
    """Every pair is taken or left out for one reason, and all counts say so."""
    kept, lost = taken(rows, store, selection), left_out(store, selection)
    assert sorted([*kept, *lost]) == list(range(len(rows)))
    assert (selection.counts.into, selection.counts.out) == (len(rows), len(kept))
    assert selection.counts.dropped == Counter(lost.values())
    steps = store.read_json(selection_path(selection.pairs, selection.digest, "json"))["steps"]
    into, dropped = len(rows), Counter[str]()
    for step in steps:
        assert step["into"] == into == step["out"] + sum(step["dropped"].values())
        into = step["out"]
        dropped.update(step["dropped"])
    assert into == len(kept)
    assert dropped == Counter(lost.values())


numbers = st.none() | st.integers(-3, 3).map(float)
levels = st.none() | st.integers(0, 2) | st.sampled_from(["easy", "hard", "2", "NaN"]) | st.booleans() | st.just([1])


@st.composite
def tables(draw: st.DrawFn, most: int = 25) -> list[dict[str, Any]]:
    return [
        row_of(
            i,
            source=draw(st.sampled_from("aabc")),
            level=draw(levels),
            pvar=draw(st.none() | st.sampled_from([0.0, 0.1, 0.25])),
            margin=draw(numbers),
            length_difference=draw(st.integers(-5, 5)),
            chosen_tokens=draw(st.integers(0, 9)),
            rejected_tokens=draw(st.integers(0, 9)),
        )
        for i in range(draw(st.integers(1, most)))
    ]


metrics = st.sampled_from([*METRICS, "field.level"])
columns = st.sampled_from(["source", "field.level", "chosen_generator"])
bounds = st.none() | st.integers(-3, 3).map(float)
number_filters = st.fixed_dictionaries(
    {"filter": metrics},
    optional={
        "min": st.integers(-3, 0).map(float),
        "max": st.integers(0, 3).map(float),
        "within": st.integers(0, 4).map(float),
        "quantiles": st.sampled_from([(0.0, 0.9), (0.2, 0.8), (0.1, 1.0)]),
    },
).filter(lambda step: len(step) > 1)
text_filters = st.fixed_dictionaries(
    {"filter": columns, "values": st.lists(st.sampled_from(["a", "b", "2", "easy", "g", "true"]), min_size=1)}
)
sizes = (
    st.fixed_dictionaries({"fraction": st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0])})
    | st.fixed_dictionaries({"count": st.integers(1, 30)})
    | st.fixed_dictionaries({"tokens": st.integers(1, 200)})
)
quotas = st.dictionaries(st.sampled_from(["a", "b", "2", "easy", "nowhere"]), st.sampled_from([0.1, 0.25, 0.0]))


@st.composite
def ranks(draw: st.DrawFn) -> dict[str, Any]:
    step = {"rank": draw(metrics | st.just("random")), "keep": draw(st.sampled_from(["top", "bottom"])), **draw(sizes)}
    if draw(st.booleans()):
        step["by"] = draw(columns)
        if "fraction" not in step:
            step["quotas"] = draw(quotas)
    return step


steps_of_any_kind = st.lists(number_filters | text_filters | ranks(), min_size=1, max_size=4)


def possible(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps, without values that no pair has, which are refused."""
    found = []
    for step in steps:
        column = step.get("by") or step.get("filter")
        there = {text_at(row, column) for row in rows} if "values" in step or "quotas" in step else set()
        more: dict[str, Any] = {}
        if "values" in step:
            more["values"] = [value for value in step["values"] if value in there] or [min(there)]
        if "quotas" in step:
            more["quotas"] = {name: share for name, share in step["quotas"].items() if name in there or not share}
        found.append({**step, **more})
    return found


def number_at(row: dict[str, Any], name: str) -> float:
    value = row["level"] if name == "field.level" else row[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number


def text_at(row: dict[str, Any], name: str) -> str:
    value = {"field.level": row["level"], "source": row["source"], "chosen_generator": "g"}[name]
    return value if isinstance(value, str) else json.dumps(value)


def check_filter(step: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Exactly those inside are kept, in their order."""
    if "values" in step:
        assert after == [row for row in before if text_at(row, step["filter"]) in step["values"]]
        return
    known = [v for row in before if not math.isnan(v := number_at(row, step["filter"]))]
    low, high = step.get("min", -math.inf), step.get("max", math.inf)
    low, high = max(low, -step.get("within", math.inf)), min(high, step.get("within", math.inf))
    if "quantiles" in step and known:
        bottom, top = np.quantile(known, step["quantiles"])
        low, high = max(low, bottom), min(high, top)
    assert after == [row for row in before if low <= number_at(row, step["filter"]) <= high]


def check_rank(step: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The right number of each stratum, and the right end of it."""
    random, sign = step["rank"] == "random", 1 if step["keep"] == "top" else -1

    def value(row: dict[str, Any]) -> float:
        return 0.0 if random else sign * number_at(row, step["rank"])

    ranked = [row for row in before if not math.isnan(value(row))]
    values = [value(row) for row in after]
    assert values == sorted(values, reverse=True)
    strata: dict[str, list[dict[str, Any]]] = {}
    for row in ranked:
        strata.setdefault(text_at(row, step["by"]) if "by" in step else "", []).append(row)
    shares = {name: len(stratum) / len(ranked) for name, stratum in strata.items()}
    if step.get("quotas"):
        shares = {name: step["quotas"].get(name, 0.0) for name in strata}
    for name, stratum in strata.items():
        inside = [row for row in stratum if row in after]
        outside = [row for row in stratum if row not in after]
        if inside and outside:
            assert min(map(value, inside)) >= max(map(value, outside))
        if "fraction" in step:
            assert len(inside) == max(1, round(len(stratum) * step["fraction"]))
        elif "count" in step:
            whole = step["count"] if step.get("quotas") else min(step["count"], len(ranked))
            assert abs(len(inside) - min(whole * shares[name], len(stratum))) < 1
        else:
            spent = sum(row["chosen_tokens"] + row["rejected_tokens"] for row in inside)
            assert spent <= step["tokens"] * shares[name]
            dearest = max([row["chosen_tokens"] + row["rejected_tokens"] for row in outside], default=0)
            assert not outside or spent + dearest > step["tokens"] * shares[name]
    if "count" in step and not step.get("quotas"):
        assert len(after) == min(step["count"], len(ranked))


@settings(max_examples=150)
@given(tables(), steps_of_any_kind, st.integers(0, 3))
def test_every_step_does_what_it_says_and_loses_nothing(
    rows: list[dict[str, Any]], steps: list[dict[str, Any]], seed: int
) -> None:
    steps = possible(steps, rows)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pairs = table_of(store, rows)
        before = rows
        for number in range(1, len(steps) + 1):
            try:
                [selection] = subset(subset_of(*steps[:number], seed=seed), pairs, store)
            except RunError as error:
                assert "would be empty" in str(error)
                return
            check_counts(rows, store, selection)
            after = [rows[i] for i in taken(rows, store, selection)]
            (check_filter if "filter" in steps[number - 1] else check_rank)(steps[number - 1], before, after)
            before = after


@settings(max_examples=40)
@given(tables(), steps_of_any_kind, st.randoms(use_true_random=False), st.integers(1, 7))
def test_what_is_taken_does_not_depend_on_the_order_of_the_table_or_its_shards(
    rows: list[dict[str, Any]], steps: list[dict[str, Any]], random: Any, shard_size: int
) -> None:
    def ids(rows: list[dict[str, Any]], shard_size: int) -> list[list[str]] | str:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            config = subset_of(*steps, controls=["random", "margin_matched"] if ranked else [], seed=1)
            try:
                selections = subset(config, table_of(store, rows, shard_size), store)
            except RunError as error:
                return str(error)
            found = [[rows[i]["prompt_id"] for i in taken(rows, store, selection)] for selection in selections]
            return found if ranked else [sorted(found[0])]  # filters keep the table's order

    steps = possible(steps, rows)
    ranked = any("rank" in step for step in steps)
    assert ids(rows, 1000) == ids(random.sample(rows, len(rows)), shard_size)


# --- single steps


def top_of(store: Store, rows: list[dict[str, Any]], *steps: dict[str, Any], **changes: Any) -> list[int]:
    return [
        rows[i]["level"]
        for i in taken(rows, store, subset(subset_of(*steps, **changes), table_of(store, rows), store)[0])
    ]


def test_the_same_seed_breaks_ties_alike_and_another_does_not(store: Store) -> None:
    rows = [row_of(i) for i in range(60)]
    first, again, other = (top_of(store, rows, {"rank": "margin", "fraction": 0.5}, seed=s) for s in (1, 1, 2))
    assert first == again
    assert 5 < len(set(first) & set(other)) < 25


def test_a_random_step_does_not_favour_pairs_that_a_tie_let_in(store: Store) -> None:
    """100 pairs stand above the cut, 100 more come in by the hash of a tie: a random half takes of both alike."""
    rows = [row_of(i, margin=2.0 if i < 100 else 1.0) for i in range(1100)]
    steps = {"rank": "margin", "count": 200}, {"rank": "random", "fraction": 0.5}
    above = [sum(level < 100 for level in top_of(store, rows, *steps, seed=seed)) for seed in range(20)]
    assert abs(np.mean(above) - 50) < 5  # six deviations


def test_quotas_are_shares_of_the_count_whatever_there_is(store: Store) -> None:
    rows = [row_of(i, source="a" if i < 30 else "b", margin=float(i)) for i in range(40)]
    step = {"rank": "margin", "count": 40, "by": "source", "quotas": {"a": 0.25, "b": 0.75, "nowhere": 0.0}}
    assert Counter(level < 30 for level in top_of(store, rows, step)) == {True: 10, False: 10}
    assert Counter(level < 30 for level in top_of(store, rows, {**step, "count": 100})) == {True: 25, False: 10}


def test_a_value_or_quota_that_no_pair_has_is_said_with_those_there_are(store: Store) -> None:
    rows = [row_of(i, source="b" if i % 2 else "a", level="x" * 100 + f"{i:02}") for i in range(24)]
    few = {"rank": "margin", "count": 4, "by": "source"}
    for quotas in ({"nowhere": 1.0}, {"a": 0.5, "nowhere": 0.5}):
        with pytest.raises(
            ConfigError, match=r"subset 's': rank 'margin': quotas: no pair has 'nowhere'; there are: a, b$"
        ):
            top_of(store, rows, {**few, "quotas": quotas})
    with pytest.raises(ConfigError, match=r"subset 's': filter 'source': values: no pair has 'A'; there are: a, b$"):
        top_of(store, rows, {"filter": "source", "values": ["a", "A"]})
    with pytest.raises(ConfigError, match=r"no pair has 'y'; there are: (x{60}, ){19}x{60} and 4 more$"):
        top_of(store, rows, {"filter": "field.level", "values": ["y"]})


def test_a_value_that_only_earlier_steps_left_out_is_no_mistake(store: Store) -> None:
    rows = [row_of(i, source="b" if i % 2 else "a", margin=float(i % 2)) for i in range(10)]
    first = {"filter": "margin", "min": 1}
    assert top_of(store, rows, first, {"filter": "source", "values": ["a", "b"]}) == [1, 3, 5, 7, 9]
    quotas = {"a": 0.5, "b": 0.5}
    assert len(top_of(store, rows, first, {"rank": "margin", "count": 4, "by": "source", "quotas": quotas})) == 2
    with pytest.raises(RunError, match="subset 's' would be empty"):
        top_of(store, rows, first, {"filter": "source", "values": ["a"]})


def test_a_stratum_of_one_row_keeps_it(store: Store) -> None:
    rows = [row_of(i, source="rare" if i == 7 else "common", margin=-float(i)) for i in range(20)]
    found = top_of(store, rows, {"rank": "margin", "fraction": 0.1, "by": "source"})
    assert found == [0, 1, 7]


def test_pairs_without_the_metric_are_left_out_by_every_step(store: Store) -> None:
    rows = [row_of(i, margin=None if i % 2 else 1.0) for i in range(8)]
    for step in ({"filter": "margin", "min": -9}, {"rank": "margin", "fraction": 1.0}):
        pairs = table_of(store, rows)
        [selection] = subset(subset_of(step), pairs, store)
        assert set(left_out(store, selection).values()) == {"no margin"}
        assert taken(rows, store, selection) != [] and selection.counts.out == 4


def test_kept_fields_are_numbers_or_texts_as_they_are_asked_for(store: Store) -> None:
    levels: list[Any] = [3, "3", 3.0, True, None, "x", [1], "inf", 10**400, float("1e308")]
    rows = [row_of(i, level=level) for i, level in enumerate(levels)]
    with open_pairs(store, table_of(store, rows)) as table:
        np.testing.assert_array_equal(table.numbers("field.level"), [3, 3, 3, 1, *[math.nan] * 5, 1e308])
        codes, names = table.texts("field.level")
    texts = ["3", "3", "3.0", "true", "null", "x", "[1]", "inf", str(10**400), "1e+308"]
    assert [names[code] for code in codes] == texts


def test_what_is_not_there_is_said_with_what_there_is(store: Store) -> None:
    pairs = table_of(store, [row_of(0)])
    with pytest.raises(ConfigError, match=r"pairs 'table' have no column 'margins'; there are: .*margin.*pvar.*source"):
        subset(subset_of({"rank": "margins", "count": 1}), pairs, store)
    with pytest.raises(ConfigError, match=r"pairs 'table' have no 'field\.levels'; kept columns are: field\.level"):
        subset(subset_of({"filter": "field.levels", "values": ["x"]}), pairs, store)


def curate_with(step: dict[str, Any], **changes: Any) -> CurateConfig:
    return CurateConfig.model_validate(
        {
            "import": {"source": "x", "columns": {"keep": ["level"]}, "ratings": [{"name": "stars"}, {"name": "rm"}]},
            "subset": [{"name": "s", "steps": [step], **changes}],
        }
    )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"rank": "pvr", "count": 1},
            r"subset 's': rank: 'pvr' is not one of pvar, .*margin\.rm.*random, field\.level",
        ),
        ({"rank": "margin.other", "count": 1}, r"'margin\.other' is not one of .*margin\.stars, tau\.stars"),
        ({"rank": "source", "count": 1}, "rank: 'source' is not one of"),
        ({"filter": "field.levels", "min": 1}, r"filter: 'field\.levels' is not one of .*field\.level"),
        ({"filter": "source", "min": 1}, "filter: 'source' is not one of pvar"),
        ({"filter": "pvar", "values": ["x"]}, "filter: 'pvar' is not one of source"),
        ({"rank": "pvar", "count": 1, "by": "margin"}, "by: 'margin' is not one of source"),
        ({"rank": "pvar"}, "rank 'pvar': give one of fraction, count and tokens"),
        ({"rank": "pvar", "count": 1, "tokens": 1}, "rank 'pvar': give one of fraction, count and tokens"),
        ({"rank": "pvar", "fraction": 0.1, "quotas": {"a": 1}, "by": "source"}, "quotas share out a count or tokens"),
        ({"rank": "pvar", "count": 1, "quotas": {"a": 1}}, "quotas share out a count or tokens, and need `by`"),
        ({"rank": "pvar", "count": 1, "quotas": {"a": 0.9, "b": 0.2}, "by": "source"}, "add up to more than 1"),
        ({"filter": "pvar"}, "filter 'pvar': give min, max, within, quantiles or values"),
        ({"filter": "pvar", "min": 1, "values": ["a"]}, "values are for text"),
        ({"filter": "pvar", "min": 2, "max": 1}, "min 2 is above max 1"),
        ({"filter": "pvar", "quantiles": [0.8, 0.2]}, r"quantiles \[0.8, 0.2\] must rise within 0 and 1"),
        ({"keep": "top"}, "a step is `filter: METRIC` with"),
        ({"rank": "pvar", "filter": "margin", "count": 1}, "a step is `filter: METRIC` with"),
        ({"filter": "pvar", "max": math.inf}, "finite number"),
    ],
)
def test_a_wrong_step_is_named_with_what_there_is(step: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curate_with(step)


def test_steps_over_all_that_there_is_are_taken() -> None:
    for name in ("pvar", "margin.rm", "tau.stars", "flipped.rm", "field.level", "disagreement"):
        assert curate_with({"rank": name, "fraction": 0.5})
        assert curate_with({"filter": name, "within": 0.5})
    assert curate_with({"filter": "field.level", "values": ["x"]})
    assert curate_with({"rank": "random", "count": 3, "by": "field.level"}, controls=["random"])


# --- controls


def test_controls_need_a_ranking() -> None:
    with pytest.raises(ValueError, match="controls need a `rank` step"):
        subset_of({"filter": "margin", "min": 0}, controls=["random"])
    with pytest.raises(ValueError, match="the control `bottom` needs a `rank` step by a metric"):
        subset_of({"rank": "random", "count": 1}, controls=["bottom"])
    with pytest.raises(ValueError, match="a control is named twice"):
        subset_of({"rank": "pvar", "count": 1}, controls=["random", "random"])


ALL_CONTROLS = ["random", "bottom", "margin_matched", "length_matched"]


@settings(max_examples=40)
@given(tables(most=40), number_filters | st.none(), st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 3))
def test_controls_are_as_many_pairs_of_the_same_pool_taken_in_another_way(
    rows: list[dict[str, Any]], before: dict[str, Any] | None, fraction: float, seed: int
) -> None:
    steps = [*([before] if before else []), {"rank": "pvar", "fraction": fraction}]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pairs = table_of(store, rows)
        try:
            selections = subset(subset_of(*steps, controls=ALL_CONTROLS, seed=seed), pairs, store)
        except RunError as error:
            assert any(words in str(error) for words in ("would be empty", "whole pool", "goes by"))
            return
        for selection in selections:
            check_counts(rows, store, selection)
        top, random, bottom, *matched = (taken(rows, store, selection) for selection in selections)
        assert [s.name for s in selections] == ["s", "s-random", "s-bottom", "s-margin-matched", "s-length-matched"]
        pool = set(range(len(rows)))
        if before:
            pool = set(taken(rows, store, subset(subset_of(before, seed=seed), pairs, store)[0]))
        assert {*top, *random, *bottom, *matched[0], *matched[1]} <= pool
        assert len(top) == len(random) == len(bottom)
        lowest = sorted(rows[i]["pvar"] for i in pool if rows[i]["pvar"] is not None)
        assert [rows[i]["pvar"] for i in bottom] == lowest[: len(top)]
        if 2 * len(top) <= len(lowest):
            assert not set(top) & set(bottom)
        for name, found in zip(("margin", "length_difference"), matched, strict=True):
            assert not set(found) & set(top)
            targets = [i for i in top if rows[i][name] is not None]
            free = [i for i in pool - set(top) if rows[i][name] is not None]
            assert len(found) == min(len(targets), len(free))


def test_the_random_control_of_a_fully_tied_ranking_differs_from_it(store: Store) -> None:
    rows = [row_of(i) for i in range(60)]
    config = subset_of({"rank": "pvar", "fraction": 0.5}, controls=["random", "bottom"])
    top, random, bottom = (set(taken(rows, store, s)) for s in subset(config, table_of(store, rows), store))
    assert 5 < len(top & random) < 25
    assert not top & bottom


def test_matched_pairs_are_the_nearest_that_are_free(store: Store) -> None:
    rows = [row_of(i, pvar=float(i % 7), margin=float((i * 37) % 50)) for i in range(200)]
    pairs = table_of(store, rows)
    top, matched = subset(subset_of({"rank": "pvar", "count": 40}, controls=["margin_matched"]), pairs, store)
    ours, theirs = taken(rows, store, top), taken(rows, store, matched)
    assert len(theirs) == 40
    margins = np.array([row["margin"] for row in rows])
    assert abs(margins[ours].mean() - margins[theirs].mean()) < 0.5
    match = store.read_json(selection_path(pairs, matched.digest, "json"))["match"]
    assert match["matched_on"] == "margin"
    assert (match["target_mean"], match["mean"]) == pytest.approx((margins[ours].mean(), margins[theirs].mean()))
    assert match["close"] == 1.0


def test_matches_of_equal_value_do_not_favour_the_beginning_of_the_table(store: Store) -> None:
    rows = [row_of(i, pvar=float(i % 2)) for i in range(400)]
    config = subset_of({"rank": "pvar", "count": 50}, controls=["margin_matched"])
    _, matched = subset(config, table_of(store, rows), store)
    assert 120 < np.mean(taken(rows, store, matched)) < 280  # 200 on average, deviation 15


def test_a_control_that_would_be_the_subset_itself_is_refused(store: Store) -> None:
    pairs = table_of(store, [row_of(i) for i in range(5)])
    for control in ALL_CONTROLS:
        config = subset_of({"rank": "margin", "fraction": 1.0}, controls=[control])
        with pytest.raises(RunError, match=f"the control '{control}' would be the subset itself"):
            subset(config, pairs, store)


def test_a_match_on_what_no_pair_has_is_refused(store: Store) -> None:
    pairs = table_of(store, [row_of(i, margin=None) for i in range(5)])
    with pytest.raises(RunError, match="no pair has what the control 'margin_matched' goes by"):
        subset(subset_of({"rank": "pvar", "count": 2}, controls=["margin_matched"]), pairs, store)


def test_fewer_matches_than_asked_for_are_counted_as_they_are(store: Store) -> None:
    rows = [row_of(i) for i in range(10)]
    config = subset_of({"rank": "pvar", "count": 8}, controls=["length_matched"])
    _, matched = subset(config, table_of(store, rows), store)
    assert matched.counts.out == 2
    [step] = store.read_json(selection_path(matched.pairs, matched.digest, "json"))["steps"]
    assert step["step"] == "2 of the same pool: length matched"
    assert "2 pairs against 8 there, for no more were left" in control_words(explain(config, matched, store)["control"])


# --- explanations


@settings(max_examples=40)
@given(tables(), steps_of_any_kind)
def test_an_explanation_adds_up_to_all_pairs(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        config = subset_of(*possible(steps, rows))
        try:
            [selection] = subset(config, table_of(store, rows), store)
        except RunError:
            return
        explained = explain(config, selection, store)
        json.dumps(explained, allow_nan=False)
        inside = set(taken(rows, store, selection))
        for name in (*METRICS, "chosen_tokens"):
            values = {i: row[name] for i, row in enumerate(rows) if row[name] is not None}
            assert (name in explained["metrics"]) == bool(values)
            for side, part in (("inside", inside), ("outside", set(values) - inside)):
                known = [values[i] for i in part if i in values]
                if values:
                    found = explained["metrics"][name]
                    assert sum(found["histogram"][side]) == len(known)
                    assert found[side] == (pytest.approx(np.mean(known), abs=1e-6) if known else None)
        by_source = Counter((row["source"], i in inside) for i, row in enumerate(rows))
        for name, sides in explained["sources"].items():
            assert (sides["inside"], sides["outside"]) == (by_source[name, True], by_source[name, False])
        reasons = left_out(store, selection)
        for step in explained["steps"]:
            assert set(step["examples"]) == set(step["dropped"])
            for reason, examples in step["examples"].items():
                assert 1 <= len(examples) <= 3
                for found in examples:
                    [i] = [i for i, row in enumerate(rows) if row["prompt_id"] == found["prompt_id"]]
                    assert reasons[i] == reason
                    assert found["prompt"] == f"prompt {found['prompt_id']}"
                    assert found["metrics"] == {name: rows[i][name] for name in METRICS}
        assert explained["description"] == describe(config.model_dump())


def test_the_correlation_with_length_is_pearsons(store: Store) -> None:
    rows = [row_of(i, margin=float(i), length_difference=(i * 7) % 11) for i in range(30)]
    config = subset_of({"rank": "margin", "count": 10})
    [selection] = subset(config, table_of(store, rows), store)
    expected = np.corrcoef([i >= 20 for i in range(30)], [row["length_difference"] for row in rows])[0, 1]
    assert explain(config, selection, store)["length_correlation"] == pytest.approx(expected, abs=1e-6)


def test_a_subset_that_takes_everything_is_explained(store: Store) -> None:
    rows = [row_of(i) for i in range(4)]
    config = subset_of({"filter": "margin", "min": 0})
    [selection] = subset(config, table_of(store, rows), store)
    explained = explain(config, selection, store)
    assert explained["steps"] == [{"step": "margin at least 0", "into": 4, "out": 4, "dropped": {}, "examples": {}}]
    assert explained["metrics"]["margin"]["outside"] is None
    assert explained["length_correlation"] is None
    assert explained["ranked_by"] is None
    assert (explained["sources"], explained["control"]) == ({"a": {"inside": 4, "outside": 0}}, None)


def test_small_numbers_keep_their_digits_in_an_explanation(store: Store) -> None:
    """PVar of rewards a thousandth apart is about 1e-7."""
    rows = [row_of(i, pvar=1.23456789e-7 * (i + 1)) for i in range(10)]
    config = subset_of({"rank": "pvar", "count": 1})
    [selection] = subset(config, table_of(store, rows), store)
    told = explain(config, selection, store)["metrics"]["pvar"]
    assert (told["inside"], told["outside"]) == (1.23457e-06, 6.17284e-07)
    edges = told["histogram"]["edges"]
    assert len(set(edges)) == len(edges) and edges == sorted(edges)
    assert sum(told["histogram"]["outside"]) == 9


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1234.56789012, 1234.56789),
        (0.123456789, 0.123457),
        (-0.00123456789, -0.00123457),
        (9.9999999e-5, 1e-4),
        (2.5e-12, 2.5e-12),
        (5.6e-17, 0.0),  # what 0.1 + 0.2 - 0.3 leaves
        (0.0, 0.0),
        (1.0, 1.0),
        (np.float64(0.5), 0.5),
    ],
)
def test_numbers_of_reports_have_six_decimals_or_six_digits(value: float, expected: float) -> None:
    assert rounded(value) == expected and type(rounded(value)) is float


def test_overlaps_count_prompts_across_tables(store: Store) -> None:
    rows = [row_of(i, margin=float(i)) for i in range(10)]
    twice = [*rows, row_of(9, margin=99.0)]  # two pairs of the last prompt
    top = subset(subset_of({"rank": "margin", "count": 4}, name="top"), table_of(store, rows), store)[0]
    few = subset(subset_of({"rank": "margin", "count": 3}, name="few"), table_of(store, twice), store)[0]
    low = subset(subset_of({"rank": "margin", "keep": "bottom", "count": 2}, name="low"), table_of(store, rows), store)[
        0
    ]
    assert overlap([top, few, low], store) == [
        {"subset": "top", "other": "few", "shared": 2, "of_smaller": 1.0},
        {"subset": "top", "other": "low", "shared": 0, "of_smaller": 0.0},
        {"subset": "few", "other": "low", "shared": 0, "of_smaller": 0.0},
    ]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (FilterStep(filter="margin", min=0.5), "margin at least 0.5"),
        (FilterStep(filter="margin", max=2000), "margin at most 2,000"),
        (FilterStep(filter="margin", min=0, max=2), "margin from 0 to 2"),
        (FilterStep(filter="length_difference", within=200), "|length_difference| at most 200"),
        (FilterStep(filter="pvar", quantiles=(0.2, 0.8)), "pvar between its quantiles 0.2 and 0.8"),
        (FilterStep(filter="source", values=["a", "b"]), "source a or b"),
        (FilterStep(filter="margin", min=0, within=3), "margin at least 0 and |margin| at most 3"),
        (RankStep(rank="pvar", fraction=0.1), "the top 10 % by pvar"),
        (RankStep(rank="pvar", keep="bottom", count=1500), "the bottom 1,500 by pvar"),
        (RankStep(rank="margin", tokens=1_000_000), "the top pairs by margin within 1,000,000 tokens"),
        (RankStep(rank="random", fraction=0.5), "a random 50 % (seed 7)"),
        (RankStep(rank="random", tokens=10), "random pairs within 10 tokens (seed 7)"),
        (RankStep(rank="pvar", fraction=0.1, by="source"), "the top 10 % by pvar within each source"),
        (
            RankStep(rank="pvar", count=9, by="source", quotas={"a": 0.75, "b": 0.25}),
            "the top 9 by pvar (source: a 75 %, b 25 %)",
        ),
    ],
)
def test_a_step_has_words(step: FilterStep | RankStep, expected: str) -> None:
    assert describe_step(step.model_dump(), 7) == expected


def test_steps_are_told_in_their_order_around_the_last_ranking() -> None:
    filters = {"filter": "margin", "min": 0}, {"filter": "source", "values": ["a"]}
    rank = {"rank": "pvar", "fraction": 0.1}

    def told(*steps: dict[str, Any]) -> str:
        return describe(subset_of(*steps).model_dump())

    assert told(rank) == "the top 10 % by pvar"
    assert told(*filters, rank) == "the top 10 % by pvar, after margin at least 0 and source a"
    assert told(rank, filters[0]) == "the top 10 % by pvar, then margin at least 0"
    assert told(*filters) == "all pairs with margin at least 0 and source a"
    assert told(rank, {"rank": "random", "count": 5}) == "a random 5 (seed 0), after the top 10 % by pvar"


def test_selections_are_found_under_digests_of_what_decides_them(store: Store) -> None:
    pairs = table_of(store, [row_of(i, margin=float(i)) for i in range(6)])
    step = {"rank": "margin", "count": 2}
    first = subset(subset_of(step), pairs, store)[0]
    files = store.list("pairs")
    same = subset(subset_of(step, name="other"), dataclasses.replace(pairs, name="renamed"), store)[0]
    assert (same.digest, store.list("pairs")) == (first.digest, files)
    assert subset(subset_of(step, seed=1), pairs, store)[0].digest != first.digest


def test_hashes_of_ids_say_how_ties_fall(store: Store) -> None:
    rows = [row_of(i) for i in range(20)]
    pairs = table_of(store, rows)
    found = taken(rows, store, subset(subset_of({"rank": "margin", "count": 20}, seed=5), pairs, store)[0])
    ids = np.array([int(row["prompt_id"][:16], 16) for row in rows], np.uint64)
    assert found == np.argsort(ranking.hashes(ids, 5))[::-1].tolist()
