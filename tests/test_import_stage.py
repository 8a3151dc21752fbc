"""Importing completions: every form, what is wrong with rows, and what lies in the store afterwards."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cli import main
from tasks.config import CurateConfig, PairingConfig
from tasks.errors import ConfigError, RunError
from tasks.forms import CHOSEN, PAIR_SCORE, REJECTED, Completion, Understood, rate, understand
from tasks.generate import completions_path
from tasks.imports import _Groups, import_, preview
from tasks.ingest import inputs_digest, read_shard, shards_of
from tasks.pair import pair
from tasks.records import Counts, Rewards
from tasks.rows import BadRow
from tasks.score import rewards_path
from tasks.sections import ImportConfig, RatingConfig
from tasks.selection.pvar import pvar
from tasks.store import Store
from tests.conftest import files_below, write_jsonl
from tests.services import ROOT

DATA = ROOT.parent / "shared" / "data"
TWELVE = DATA / "alpaca_eval_12_generators.parquet"
TRANSCRIPTS = DATA / "hh_rlhf_harmless_base_test.jsonl.gz"


def config_of(source: Path | str = "x", **changes: Any) -> ImportConfig:
    return ImportConfig.model_validate({"source": str(source), "max_quarantined": 1.0, **changes})


def imported(store: Store, folder: Path, rows: list[Any], **changes: Any) -> Rewards:
    return import_(config_of(write_jsonl(folder / "rows.jsonl", rows), **changes), store)


def back(rewards: Rewards, store: Store) -> dict[str, list[dict[str, Any]]]:
    """What the store holds, by the prompt's last message: the completions with their ratings, in order."""
    found = {}
    for shard in shards_of(store, rewards.completions.prompts):
        place = (rewards.completions.generators["import"], shard["prompts"], (0, shard["samples"]))
        made = store.read_table(completions_path(*place)).to_pylist()
        rated = {s: store.read_table(rewards_path(fp, *place)).to_pylist() for s, fp in rewards.scorers.items()}
        for i, (prompt, row) in enumerate(zip(read_shard(store, shard["digest"]).to_pylist(), made, strict=True)):
            assert row["prompt_id"] == prompt["prompt_id"]
            ratings = [
                dict(zip(rated, of, strict=True)) for of in zip(*(rated[s][i]["rewards"] for s in rated), strict=True)
            ]
            found[prompt["messages"][-1]["content"]] = [
                {"generator": g, "text": t, "tokens": n, "ratings": r}
                for g, t, n, r in itertools.zip_longest(
                    row["generators"], row["texts"], row["tokens"], ratings, fillvalue={}
                )
            ]
    return found


def understood(row: dict[str, Any], **changes: Any) -> Understood:
    return understand(row, config_of(**changes))


def sides(found: Understood) -> list[tuple[str, str]]:
    return [(c.generator, c.text) for c in found.completions]


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation in which the user begins."""
    return [{"role": role, "content": c} for role, c in zip(itertools.cycle(["user", "assistant"]), contents)]


# --- forms

ULTRAFEEDBACK = {
    "source": "flan",
    "instruction": "Name a colour.",
    "models": ["a", "b"],
    "completions": [
        {"model": "a", "response": "Red.", "annotations": {"helpfulness": {"Rating": "4"}}, "overall_score": 8.0},
        {"model": "b", "response": "Seven.", "annotations": {"helpfulness": {"Rating": "N/A"}}, "overall_score": 2.5},
        {"model": "c", "response": "Blue.", "annotations": None, "overall_score": None},
    ],
}
NESTED = {
    "columns": {"prompt": "instruction", "generator": "model", "text": "response"},
    "ratings": [
        {"name": "helpfulness", "column": "annotations.helpfulness.Rating"},
        {"name": "overall", "column": "overall_score"},
    ],
}


def test_nested_completions_are_rated_by_dotted_paths(store: Store, tmp_path: Path) -> None:
    rewards = imported(store, tmp_path, [ULTRAFEEDBACK], **NESTED)
    assert back(rewards, store)["Name a colour."] == [
        {"generator": "a", "text": "Red.", "tokens": 2, "ratings": {"helpfulness": 4.0, "overall": 8.0}},
        {"generator": "b", "text": "Seven.", "tokens": 2, "ratings": {"helpfulness": None, "overall": 2.5}},
        {"generator": "c", "text": "Blue.", "tokens": 2, "ratings": {"helpfulness": None, "overall": None}},
    ]
    assert rewards.completions.authors == ("a", "b", "c")
    assert (rewards.completions.counts.into, rewards.completions.counts.out) == (3, 3)
    assert rewards.counts.dropped == {
        "helpfulness: no number": 1,
        "helpfulness: no rating": 1,
        "overall: no rating": 1,
    }


def test_parallel_lists_are_completions_too() -> None:
    row = {"prompt": "q", "text": ["a", "b"], "generator": ["m", "n"], "stars": [1, "2"]}
    found = understood(row, ratings=[{"name": "stars"}])
    assert found.completions == [Completion("m", "a", {"stars": 1.0}), Completion("n", "b", {"stars": 2.0})]
    assert sides(understood({**row, "generator": "m"})) == [("m", "a"), ("m", "b")]
    with pytest.raises(BadRow, match="lists of different lengths") as error:
        understood({**row, "stars": [1]}, ratings=[{"name": "stars"}])
    assert error.value.excerpt == "stars: 1, text: 2"


def test_rows_of_one_prompt_come_together_whoever_stands_between(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "generator": "a", "text": "one", "stars": 1},
        {"prompt": "q", "generator": "a", "text": "two", "stars": 2},
        {"prompt": "p", "generator": "b", "text": "three", "stars": 3},
        {"prompt": "p", "generator": "a", "text": "one", "stars": 9},
        {"prompt": "p", "generator": "b", "text": "one", "stars": 4},
    ]
    rewards = imported(store, tmp_path, rows, ratings=[{"name": "stars"}])
    found = back(rewards, store)
    assert list(found) == ["p", "q"]
    assert [(c["generator"], c["text"], c["ratings"]["stars"]) for c in found["p"]] == [
        ("a", "one", 1),
        ("b", "three", 3),
        ("a", "one", 9),
        ("b", "one", 4),
    ]
    assert rewards.completions.counts == Counts(5, 5)
    assert rewards.completions.samples == 4


def test_a_completion_that_was_rated_again_has_the_mean_of_its_ratings(store: Store, tmp_path: Path) -> None:
    stars = [1, "N/A", 9, 4, "N/A"]
    rows = [{"prompt": "p", "generator": "a", "text": text, "stars": n} for text, n in zip("aaabc", stars, strict=True)]
    rewards = imported(store, tmp_path, rows, ratings=[{"name": "stars"}], repeats="ratings")
    found = back(rewards, store)
    assert [(c["text"], c["ratings"]["stars"]) for c in found["p"]] == [("a", 5), ("b", 4), ("c", None)]
    assert rewards.completions.counts == Counts(5, 3, {"rated again": 2})


def test_equal_samples_of_a_generator_count_in_pvar_as_often_as_they_came(store: Store, tmp_path: Path) -> None:
    texts, rewards = ["a", "a", "a", "b"], [1.0, 1.0, 1.0, 0.0]
    rows = [{"prompt": "p", "text": t, "r": r} for t, r in zip(texts, rewards, strict=True)]
    table = pair(PairingConfig(), imported(store, tmp_path, rows, ratings=[{"name": "r"}]), store)
    [row] = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert row["pvar"] == pytest.approx(pvar(np.array([rewards]))[0])
    assert row["rewards_finite"] == 4


def test_the_unpaired_form_of_trl_has_labels_for_ratings() -> None:
    row = {"prompt": "q", "completion": "yes", "label": True}
    changes = {"columns": {"text": "completion"}, "ratings": [{"name": "label"}]}
    assert understood(row, **changes).completions == [Completion("unknown", "yes", {"label": 1.0})]
    talk = {"prompt": turns("q"), "completion": turns("q", "yes")[1:], "label": False}
    assert understood(talk, **changes).completions == [Completion("unknown", "yes", {"label": 0.0})]


def test_rows_of_messages_end_with_the_completion() -> None:
    found = understood({"messages": turns("a", "b", "c", "d")})
    assert found.prompt["messages"] == turns("a", "b", "c")
    assert sides(found) == [("unknown", "d")]
    with pytest.raises(BadRow, match="no text column"):
        understood({"messages": turns("a", "b", "c")})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": turns("q"), "chosen": turns("q", "good")[1:], "rejected": turns("q", "bad")[1:]},
        {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"prompt": "anything", "chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ],
    ids=["texts", "messages", "conversations", "conversations beside a prompt", "transcripts"],
)
def test_pairs_in_every_shape_are_the_same_pair(row: dict[str, Any]) -> None:
    found = understood(row)
    assert found.prompt["messages"] == turns("q")
    assert sides(found) == [(CHOSEN, "good"), (REJECTED, "bad")]
    assert [c.ratings for c in found.completions] == [{PAIR_SCORE: "no rating"}] * 2


def test_transcripts_of_many_turns_keep_them() -> None:
    begin = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Human: c"
    found = understood({"chosen": begin + "\n\nAssistant: d", "rejected": begin + "\n\nAssistant: e"})
    assert found.prompt["messages"] == turns("a", "b", "Human: c")
    assert sides(found) == [(CHOSEN, "d"), (REJECTED, "e")]


def test_transcripts_that_part_earlier_are_no_pair() -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: e",
    }
    with pytest.raises(BadRow, match="part before the last answer"):
        understood(row)
    with pytest.raises(BadRow, match="the last turn is not the assistant's"):
        understood(
            {side: text + "\n\nHuman: f" for side, text in row.items() if side == "chosen"}
            | {"rejected": row["chosen"] + "\n\nHuman: g"}
        )


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Is it? Yes it is", "Is it? Yes it was", ("Is it? Yes it", " is", " was")),
        ("Say abc def", "Say abcx", ("Say", " abc def", " abcx")),
        ("Say abcx", "Say abc def", ("Say", " abcx", " abc def")),
        ("Q:\nyes", "Q: no", ("Q:", "\nyes", " no")),
    ],
)
def test_plain_texts_share_a_prompt_up_to_the_end_of_a_word(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    found = understood({"chosen": chosen, "rejected": rejected})
    assert (found.prompt["messages"][0]["content"], *(c.text for c in found.completions)) == expected


words = st.text(alphabet="ab \n", min_size=1, max_size=12)


@given(words, words)
def test_what_texts_share_does_not_depend_on_which_was_chosen(one: str, other: str) -> None:
    def parts(chosen: str, rejected: str) -> list[str] | str:
        try:
            found = understood({"chosen": chosen, "rejected": rejected})
        except BadRow as error:
            return error.reason
        return [found.prompt["messages"][0]["content"], *sorted(c.text for c in found.completions)]

    found = parts(one, other)
    assert found == parts(other, one)
    if isinstance(found, list):
        assert sorted([one, other]) == sorted(found[0] + text for text in found[1:])


def test_a_prompt_may_have_several_pairs_and_a_repeated_one_is_dropped_whole(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "c", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "r", "chosen": "a", "rejected": "b"},
    ]
    rewards = imported(store, tmp_path, rows)
    assert rewards.scorers == {}
    assert rewards.completions.counts.dropped == {"duplicate": 2}
    assert [c["text"] for c in back(rewards, store)["q"]] == ["a", "b", "c", "b", "b", "a"]
    table = pair(PairingConfig(rule="labelled"), rewards, store)
    rows_of = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert [(r["chosen_sample"], r["rejected_sample"]) for r in rows_of] == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert {r["margin"] for r in rows_of} == {None}
    assert (table.counts.into, table.counts.out) == (4, 4)


def test_scores_of_pairs_are_recorded_and_a_label_may_contradict_them(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "2.5", "score_rejected": 1},
        {"prompt": "r", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 3},
        {"prompt": "s", "chosen": "a", "rejected": "b"},
        {"prompt": "t", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
    ]
    rewards = imported(store, tmp_path, rows)
    table = pair(PairingConfig(rule="labelled"), rewards, store)
    found = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert [row["margin"] for row in found] == [1.5, -2, None]
    assert table.counts.dropped == {"rewards tie": 1}
    best = pair(PairingConfig(), rewards, store)
    found = store.read_table(f"pairs/{best.digest}/pairs.parquet").to_pylist()
    assert [(row["chosen_generator"], row["margin"]) for row in found] == [(CHOSEN, 1.5), (REJECTED, 2)]


def test_pairs_and_other_rows_in_one_source_are_refused(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "text": "a"}]
    with pytest.raises(ConfigError, match="holds pairs and other rows; import them one by one, by `form`"):
        imported(store, tmp_path, rows)
    counts = imported(store, tmp_path, rows, form="pairs").completions.counts
    assert counts == Counts(3, 2, {"no chosen and rejected (whole row)": 1})


@pytest.mark.parametrize("ratings", [[{"name": "s", "column": "stars"}], [{"name": "s"}, {"name": "t"}]])
def test_pairs_have_one_rating_from_the_columns_of_their_scores(
    ratings: list[Any], store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"import\.ratings: pairs have one rating.*columns\.chosen_score"):
        config_of(form="pairs", ratings=ratings)
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "better": 2, "worse": 1}]
    with pytest.raises(ConfigError, match=r"import\.ratings: pairs have one rating.*Set `form` for other rows"):
        imported(store, tmp_path, rows, ratings=ratings)
    columns = {"chosen_score": "better", "rejected_score": "worse"}
    rewards = imported(store, tmp_path, rows, columns=columns, ratings=[{"name": "s"}])
    assert [c["ratings"] for c in back(rewards, store)["q"]] == [{"s": 2.0}, {"s": 1.0}]


def test_labels_of_pairs_are_not_read_into_rows_that_are_none(store: Store, tmp_path: Path) -> None:
    rewards = imported(store, tmp_path, [{"prompt": "q", "text": "a"}, {"prompt": "q", "text": "b"}])
    with pytest.raises(ConfigError, match="rule labelled is for imported pairs"):
        pair(PairingConfig(rule="labelled"), rewards, store)


def test_rules_by_reward_say_that_there_are_none(store: Store, tmp_path: Path) -> None:
    rewards = imported(store, tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ConfigError, match="goes by rewards, and there are none; use rule: labelled"):
        pair(PairingConfig(), rewards, store)


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "random_pair"])
def test_prompts_with_one_completion_have_no_pair(rule: str, store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "text": "a", "stars": i} for i in range(3)]
    rewards = imported(store, tmp_path, rows, ratings=[{"name": "stars"}])
    table = pair(PairingConfig.model_validate({"rule": rule}), rewards, store)
    assert table.counts.dropped == {"fewer than two rewards": 3}


# --- ratings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, 4.0),
        ("4", 4.0),
        (" 4.5 ", 4.5),
        (True, 1.0),
        (False, 0.0),
        (0, 0.0),
        (None, "no rating"),
        ("", "no rating"),
        ("N/A", "no number: N/A"),
        ([4], "no number: [4]"),
        ({"Rating": 4}, "no number: {'Rating': 4}"),
        (math.nan, "not finite: nan"),
        ("-inf", "not finite: -inf"),
        (10**400, "no number: 1" + "0" * 99),
        (1e300, "too large: 1e+300"),
        ("\ud800", "no number: \\ud800"),
    ],
)
def test_a_rating_is_a_finite_number_or_a_reason(value: Any, expected: float | str) -> None:
    assert rate(RatingConfig(name="r"), value) == expected


@pytest.mark.parametrize(
    ("value", "clip", "expected"),
    [
        (0.5, 0.0, 0.0),
        (0.731058578630005, 0.0, 1.0),
        ("0.25", 0.0, -math.log(3)),
        (0, 0.0, "not finite: logit of 0"),
        (True, 0.0, "not finite: logit of 1"),
        (0, 1e-6, math.log(1e-6) - math.log1p(-1e-6)),
        (1, 1e-6, math.log1p(-1e-6) - math.log(1e-6)),
        (0.3, 0.4, math.log(2 / 3)),
        (1.5, 1e-6, "no probability: 1.5"),
        (math.nan, 1e-6, "no probability: nan"),
        (-0.1, 0.0, "no probability: -0.1"),
    ],
)
def test_the_logit_of_a_probability_is_clipped_when_asked_for(value: Any, clip: float, expected: float | str) -> None:
    found = rate(RatingConfig(name="r", transform="logit", clip=clip), value)
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-9))


def test_a_rating_that_no_row_has_is_a_wrong_column(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row has a number in 'stars', for rating 'quality'"):
        imported(store, tmp_path, [{"prompt": "q", "text": "a"}], ratings=[{"name": "quality", "column": "stars"}])


def test_ratings_are_found_again_with_their_reasons(store: Store, tmp_path: Path) -> None:
    values = [1, "2", "N/A", None, "NaN", True, "\ud800"]
    rows = [{"prompt": "q", "text": f"t{i}", "r": value} for i, value in enumerate(values)]
    rewards = imported(store, tmp_path, rows, ratings=[{"name": "r"}])
    assert [c["ratings"]["r"] for c in back(rewards, store)["q"]] == [1, 2, None, None, None, 1, None]
    assert rewards.counts.dropped == {"r: no number": 2, "r: no rating": 1, "r: not finite": 1}
    assert (rewards.counts.into, rewards.counts.out) == (7, 3)


# --- hostile rows

DEEP = "[" * 5_000 + "]" * 5_000
HOSTILE: dict[str, tuple[str, str | None]] = {
    "text is a number": ('{"prompt": "q", "text": 3}', "completion is no text"),
    "text is null": ('{"prompt": "q", "text": null}', "completion is no text"),
    "text is blank": ('{"prompt": "q", "text": " \\n"}', "empty completion"),
    "prompt is blank": ('{"prompt": " ", "text": "a"}', "empty prompt"),
    "prompt is a number": ('{"prompt": 7, "text": "a"}', "prompt is neither text nor messages"),
    "prompt is null": ('{"prompt": null, "text": "a"}', "no prompt"),
    "no prompt": ('{"text": "a"}', "no prompt"),
    "no text": ('{"prompt": "a"}', "no text column"),
    "nothing": ("{}", "no text column"),
    "no object": ("[1, 2]", "not a JSON object"),
    "a generator is a list": ('{"prompt": "q", "text": "a", "generator": ["x"]}', "generator is no text"),
    "a lone surrogate in the text": ('{"prompt": "q", "text": "\\ud800"}', "not UTF-8"),
    "a lone surrogate in the prompt": ('{"prompt": "\\ud800", "text": "a"}', "not UTF-8"),
    "a lone surrogate in the generator": ('{"prompt": "q", "text": "a", "generator": "\\udfff"}', "not UTF-8"),
    "a lone surrogate in the source": ('{"prompt": "q", "text": "a", "source": "\\udfff"}', "not UTF-8"),
    "a lone surrogate in a column": ('{"prompt": "q", "text": "a", "\\ud800": 1}', None),
    "NUL": ('{"prompt": "q", "text": "a\\u0000"}', "NUL character"),
    "10 MB of prompt": ('{"prompt": "' + "x" * 10_000_000 + '", "text": "a"}', "prompt too long"),
    "10 MB of completion": ('{"prompt": "q", "text": "' + "x" * 10_000_000 + '"}', "completion too long"),
    "deeply nested text": ('{"prompt": "q", "text": ' + DEEP + "}", "nested too deeply"),
    "deeply nested prompt": ('{"prompt": ' + DEEP + ', "text": "a"}', "nested too deeply"),
    "deeply nested generator": ('{"prompt": "q", "text": "a", "generator": ' + DEEP + "}", "nested too deeply"),
    "deeply nested source": ('{"prompt": "q", "text": "a", "source": ' + DEEP + "}", "nested too deeply"),
    "deeply nested rating": ('{"prompt": "q", "text": "a", "r": ' + DEEP + "}", "nested too deeply"),
    "deeply nested all": (DEEP, "nested too deeply"),
    "a path for a generator": ('{"prompt": "q", "text": "a", "generator": "../../x/\\u2028"}', None),
    "markup": ('{"prompt": "q", "text": "<script>alert(1)</script>", "generator": "|a|\\n# b"}', None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_row_is_quarantined_or_harmless(what: str, store: Store, tmp_path: Path) -> None:
    row, reason = HOSTILE[what]
    good = json.dumps({"prompt": "good", "text": "fine", "generator": "g", "r": 1})
    if DEEP in row:  # a file that is one array has a reader of its own
        (source := tmp_path / "rows.json").write_text(f"[{good}, {row}]", encoding="utf-8")
    else:
        (source := tmp_path / "rows.jsonl").write_text(f"{good}\n{row}\n", encoding="utf-8")
    config = config_of(source, ratings=[{"name": "r"}])
    counts = import_(config, store).completions.counts
    assert counts.into == 2
    assert counts.dropped == ({reason: 1} if reason else {})
    assert json.dumps(preview(config), ensure_ascii=False).encode()
    quarantined = store.read_table(f"prompts/sources/{inputs_digest(config)}.quarantine.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in quarantined] == ([(2, reason)] if reason else [])
    assert {path.parent.name for path in tmp_path.iterdir()} == {tmp_path.name}


def test_a_hostile_rows_import_can_be_paired_to_the_end(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "text": "a", "generator": "../../x", "r": 1e100},
        {"prompt": "q", "text": "b", "generator": "|\n#", "r": -1e100},
        {"prompt": "p", "text": "b", "generator": "🙂", "r": 1e308},
        {"prompt": "p", "text": "c", "generator": "🙂", "r": -1e308},
    ]
    rewards = imported(store, tmp_path, rows, ratings=[{"name": "r"}])
    table = pair(PairingConfig(reward_scale="auto"), rewards, store)
    manifest = store.read_json(f"pairs/{table.digest}/manifest.json")
    assert manifest["generators"] == ["../../x", "|\n#", "🙂"]
    assert table.counts.out == 1


def test_a_wrong_column_for_the_generator_is_refused(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "text": "a", "generator": f"row {i}"} for i in range(1001)]
    with pytest.raises(ConfigError, match=r"import\.columns\.generator: 'generator' names more than 1,000 generators"):
        imported(store, tmp_path, rows)


COLUMN_NAMES = st.sampled_from(
    [
        *("prompt", "text", "generator", "completions", "chosen", "rejected", "messages", "role", "content"),
        *("score_chosen", "score_rejected", "source", "kept", "deep", "path", "r", "user", "assistant"),
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(COLUMN_NAMES, inner, max_size=4),
    max_leaves=8,
)
talks = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x"]) | json_values, "content": json_values}
    ),
    max_size=4,
)
rows_of_any_kind = st.dictionaries(COLUMN_NAMES, json_values | talks | st.lists(talks, max_size=2), max_size=8)


@given(rows_of_any_kind, st.sampled_from(["auto", "long", "nested", "pairs"]), st.booleans())
def test_any_row_is_understood_or_bad(row: dict[str, Any], form: str, keep: bool) -> None:
    paired = form == "pairs" or (form == "auto" and "chosen" in row and "rejected" in row)
    ratings = [{"name": "r"}, {"name": "d", "column": "deep.path", "transform": "logit"}]
    changes = {"form": form, "ratings": ratings[:1] if paired else ratings}
    if keep:
        changes["columns"] = {"keep": ["kept"]}
    try:
        found = understood(row, **changes)
    except BadRow as error:
        assert error.reason and error.excerpt.encode() is not None
        return
    assert isinstance(found, Understood)
    assert found.prompt["messages"][-1]["role"] != "assistant"
    assert found.completions
    json.dumps(found.prompt, ensure_ascii=False, allow_nan=False).encode()
    for completion in found.completions:
        assert completion.text.strip() and "\0" not in completion.text
        json.dumps([completion.generator, completion.ratings], ensure_ascii=False, allow_nan=False).encode()
        assert all(isinstance(r, str) or math.isfinite(r) for r in completion.ratings.values())


@given(st.lists(rows_of_any_kind, min_size=1, max_size=4), st.sampled_from(["auto", "long", "nested", "pairs"]))
def test_files_of_any_rows_are_imported_with_counts_that_add_up_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], form: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    good = {"prompt": "q", "text": ["a", "b"], "chosen": "a", "rejected": "b"}
    if form == "long":
        good["text"] = "a"
    try:
        rewards = imported(Store(folder / "store"), folder, [good, *rows], form=form)
    except ConfigError as error:
        assert "holds pairs and other rows" in str(error)
        return
    counts = rewards.completions.counts
    assert counts.into == counts.out + sum(counts.dropped.values()) >= len(rows) + 1
    assert counts.out == sum(map(len, back(rewards, Store(folder / "store")).values()))


def test_too_many_bad_rows_stop_the_import(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "text": "a"}, {"prompt": "q"}, {"prompt": 3, "text": "b"}]
    with pytest.raises(RunError, match=r"import: 2 of 3 rows are bad.*row 2: no text column: columns: prompt"):
        imported(store, tmp_path, rows, max_quarantined=0.1)
    with pytest.raises(ConfigError, match=r"holds no usable prompt \(2 rows"):
        imported(store, tmp_path, rows[1:])


def test_the_share_of_bad_rows_is_one_of_rows_however_many_completions_the_others_hold(
    store: Store, tmp_path: Path
) -> None:
    good = {"prompt": "q", "completions": [{"text": f"a{i}"} for i in range(20)]}
    with pytest.raises(RunError, match=r"import: 1 of 2 rows are bad, more than max_quarantined 10%"):
        imported(store, tmp_path, [good, {"prompt": "r", "completions": []}], form="nested", max_quarantined=0.1)
    rows = [good, {"prompt": "r", "completions": []}]
    counts = imported(store, tmp_path, rows, form="nested", max_quarantined=0.5).completions.counts
    assert counts == Counts(21, 20, {"no completions (whole row)": 1})
    with pytest.raises(RunError, match="1 of 2 rows are bad"):  # nor when it is found in the store
        imported(store, tmp_path, rows, form="nested", max_quarantined=0.1)


def test_a_bad_completion_is_quarantined_without_the_others_of_its_row(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completions": [{"text": "a"}, {"text": " "}, {"text": 3}, {"text": "bb"}, {"text": "c" * 99}]},
        {"prompt": "p", "completions": [{"text": ""}, {"text": None}]},
        {"prompt": "o", "text": ["a", ""], "generator": ["m", "n"]},
    ]
    config = config_of(write_jsonl(tmp_path / "rows.jsonl", rows), max_chars=50)
    rewards = import_(config, store)
    assert {prompt: [c["text"] for c in of] for prompt, of in back(rewards, store).items()} == {
        "q": ["a", "bb"],
        "o": ["a"],
    }
    bad = {"empty completion": 2, "completion is no text": 1, "completion too long": 1}
    assert rewards.completions.counts == Counts(8, 3, {"empty completion (whole row)": 1, **bad})
    quarantined = store.read_table(f"prompts/sources/{inputs_digest(config)}.quarantine.parquet").to_pylist()
    assert [row["row"] for row in quarantined] == [1, 1, 1, 2, 3]
    assert len(preview(config)["bad"]) == 5


def test_too_many_bad_completions_stop_the_import_though_every_row_has_a_good_one(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completions": [{"text": "a"}, {"text": ""}]} for i in range(4)]
    counts = imported(store, tmp_path, rows, max_quarantined=0.5).completions.counts
    assert counts == Counts(8, 4, {"empty completion": 4})
    for again in (store, Store(tmp_path / "another")):  # nor when it is found in the store
        with pytest.raises(RunError, match="import: 4 of 8 completions are bad, more than max_quarantined 10%"):
            imported(again, tmp_path, rows, max_quarantined=0.1)


# --- the store


def many(prompts: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i}", "generator": g, "text": f"{g} {i}", "stars": i % 5, "level": i % 3}
        for i in range(first, first + prompts)
        for g in ("m", "n")
    ]


def test_a_rerun_reads_nothing_and_writes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = imported(store, tmp_path, many(20), ratings=[{"name": "stars"}], shard_size=8)
    assert (first.completions.work.shards_made, first.completions.work.shards_reused) == (3, 0)
    before = files_below(Path(store.url))
    monkeypatch.setattr("tasks.imports.read_rows", lambda config: pytest.fail("the source was read again"))
    again = imported(store, tmp_path, many(20), ratings=[{"name": "stars"}], shard_size=8)
    assert files_below(Path(store.url)) == before
    assert (again.completions.work.shards_made, again.completions.work.shards_reused) == (0, 3)
    for one, other in ((first, again), (first.completions, again.completions)):
        assert {k: v for k, v in vars(one).items() if k not in ("work", "completions")} == {
            k: v for k, v in vars(other).items() if k not in ("work", "completions")
        }


def test_a_file_that_has_grown_keeps_its_shards(store: Store, tmp_path: Path) -> None:
    small = imported(store, tmp_path, many(20), ratings=[{"name": "stars"}], shard_size=8)
    completions = set(store.list("completions"))
    large = imported(store, tmp_path, many(30), ratings=[{"name": "stars"}], shard_size=8)
    before, after = (shards_of(store, r.completions.prompts) for r in (small, large))
    assert after[:3] == before
    assert completions < set(store.list("completions"))
    assert [shard["rows"] for shard in after] == [8, 8, 4, 8, 2]
    assert back(large, store)["what is 19"] == back(small, store)["what is 19"]


def test_a_tokenizer_changes_lengths_and_whatever_is_made_of_them(store: Store, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path / "letters")
    rows = [{"prompt": "q", "chosen": "good word", "rejected": "bad"}]
    plain = imported(store, tmp_path, rows)
    counted = imported(store, tmp_path, rows, tokenizer=str(tmp_path / "letters"))
    assert (plain.completions.length_unit, counted.completions.length_unit) == ("words", "tokens")
    lengths = []
    for rewards in (plain, counted):
        table = pair(PairingConfig(rule="labelled"), rewards, store)
        [row] = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
        lengths.append((row["chosen_tokens"], row["rejected_tokens"], row["length_difference"]))
    assert lengths == [(2, 1, 1), (9, 3, 6)]
    with pytest.raises(ConfigError, match=r"import\.tokenizer: '.*nowhere' cannot be loaded"):
        imported(store, tmp_path, rows, tokenizer=str(tmp_path / "nowhere"))


def test_rows_are_grouped_on_disk_and_not_through_one_sort(tmp_path: Path) -> None:
    groups = _Groups(tmp_path / "groups.sqlite")
    for i in range(3000):
        prompt = {"prompt_id": f"{i % 100:04}", "messages": turns("q" * 100)}
        groups.add(Understood(prompt, [Completion("g", f"{i} " + "x" * 30_000)]), together=False)
    assert (tmp_path / "groups.sqlite").stat().st_size > 20_000_000  # more than it may hold in memory is there
    statements: list[str] = []
    groups.db.set_trace_callback(statements.append)
    first = next(iter(groups.prompts()))
    assert [c["text"].split()[0] for c in first["completions"][:3]] == ["0", "100", "200"]
    groups.db.set_trace_callback(None)
    plan = [row[3] for row in groups.db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    assert plan[0] == "SCAN prompts"
    assert not [step for step in plan if step == "USE TEMP B-TREE FOR ORDER BY"]


# --- real data


@pytest.mark.skipif(not TWELVE.exists(), reason=f"needs {TWELVE.name}, which is not part of the project")
def test_twelve_generators_of_real_data(store: Store) -> None:
    columns = {"prompt": "instruction", "source": "dataset", "text": "output"}
    rating = {"name": "preference", "transform": "logit", "clip": 1e-6}
    rewards = import_(
        ImportConfig.model_validate({"source": str(TWELVE), "columns": columns, "ratings": [rating]}), store
    )
    counts = rewards.completions.counts
    assert (counts.into, counts.out, counts.dropped) == (9638, 9638, {})
    assert (rewards.completions.prompts.counts.out, len(rewards.completions.authors)) == (805, 12)
    assert (rewards.counts.into, rewards.counts.out) == (9638, 9638)
    table = pq.read_table(TWELVE).to_pandas()
    table["logit"] = table["preference"].clip(1e-6, 1 - 1e-6).map(lambda p: math.log(p / (1 - p)))
    paired = pair(PairingConfig(reward_scale="auto"), rewards, store)
    found = store.read_table(f"pairs/{paired.digest}/pairs.parquet").to_pandas()
    by_prompt = table.groupby("instruction")["logit"]
    spread = (by_prompt.max() - by_prompt.min()).to_numpy()
    np.testing.assert_allclose(np.sort(found["margin"]), np.sort(spread[spread > 0]), rtol=1e-9)
    manifest = store.read_json(f"pairs/{paired.digest}/manifest.json")
    means = table.groupby("generator")["logit"].mean()
    assert manifest["mean_reward"] == pytest.approx(means.to_dict(), abs=1e-6)
    pooled = math.sqrt(((table["logit"] - by_prompt.transform("mean")) ** 2).sum() / (len(table) - 805))
    assert manifest["reward_scale"] == pytest.approx(pooled)


@pytest.mark.skipif(not TRANSCRIPTS.exists(), reason=f"needs {TRANSCRIPTS.name}, which is not part of the project")
def test_pairs_of_real_transcripts(store: Store) -> None:
    rewards = import_(ImportConfig(source=str(TRANSCRIPTS)), store)
    counts = rewards.completions.counts
    assert counts.dropped == {
        "chosen and rejected part before the last answer (whole row)": 5,
        "empty completion (whole row)": 4,
    }
    assert (counts.into, counts.out) == (2 * (2312 - 9) + 9, 2 * (2312 - 9))
    table = pair(PairingConfig(rule="labelled"), rewards, store)
    assert table.counts.into == counts.out // 2
    assert table.counts.out + table.counts.dropped.get("identical texts", 0) == table.counts.into
    messages = pa.concat_tables([read_shard(store, s["digest"]) for s in shards_of(store, rewards.completions.prompts)])
    for conversation in messages["messages"].to_pylist():
        assert conversation[-1]["role"] == "user"
        assert {m["role"] for m in conversation} <= {"user", "assistant"}


# --- the command


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, Any]:
    """Exit status, and what was printed: JSON of a success, the message of a failure."""
    monkeypatch.setattr("sys.argv", ["prefsieve", *arguments])
    try:
        main()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if status == 0 else printed.err


def test_the_command_previews_and_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [*many(3), {"prompt": "q", "text": "x"}])
    values = {
        "import": {
            "source": str(source),
            "columns": {"keep": ["level"]},
            "ratings": [{"name": "stars"}],
            "max_quarantined": 0.5,
        },
        "subset": [{"name": "all", "steps": [{"rank": "margin", "fraction": 1.0}]}],
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    store = tmp_path / "store"
    run = ("import", str(path), "--store", str(store), "--json")
    status, shown = command(capsys, monkeypatch, *run, "--dry-run")
    assert status == 0
    assert not store.exists()
    assert (shown["form"], shown["looked_at"]) == ("long", 7)
    assert shown["bad"] == ["row 7: missing column: level"]
    assert [prompt["fields"] for prompt in shown["prompts"]] == [{"level": i} for i in range(3)]
    assert shown["prompts"][1]["completions"] == [
        {"generator": g, "words": 2, "ratings": {"stars": 1.0}, "text": f"{g} 1"} for g in ("m", "n")
    ]
    status, done = command(capsys, monkeypatch, *run)
    assert status == 0
    assert done["completions"] == {"into": 7, "out": 6, "dropped": {"missing column": 1}}
    assert done["ratings"] == {"names": ["stars"], "into": 6, "out": 6, "dropped": {}}
    assert (done["prompts"], done["generators"], done["reused"]) == (3, ["m", "n"], False)
    status, again = command(capsys, monkeypatch, *run)
    assert {**again, "reused": False} == done
    assert again["reused"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("import.source=nowhere.jsonl", "import.source: 'nowhere.jsonl' does not exist; check the path"),
        ("import.columns.prompt=question", "no row at the beginning of"),
        ("import.ratings=[{name: a, column: b}, {name: a}]", "import.ratings: the name 'a' is used twice"),
        ("import.ratings=[{name: a, clip: 0.7}]", "import.ratings.0.clip: Input should be less than 0.5 (got 0.7)"),
        ("import.ratings=[stars]", "import.ratings.0: a rating has fields; write {name: stars}, and its column"),
        (
            "import.form=long",
            "goes by rewards, and there are none; name the columns with ratings, as in import.ratings",
        ),
        ("import.form=wide", "import.form: Input should be 'auto', 'long', 'nested' or 'pairs' (got 'wide')"),
        ("import.colums={}", "import.colums: no such field; check the spelling, or remove it"),
        ("import.key=secret", "import.key: no such field; check the spelling, or remove it\n"),
        ("import.limit=-1", "import.limit: Input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", many(3))
    path = tmp_path / "config.yaml"
    subset = [{"name": "all", "steps": [{"rank": "margin", "fraction": 1.0}]}]
    path.write_text(json.dumps({"import": {"source": str(source)}, "subset": subset}), encoding="utf-8")
    status, told = command(capsys, monkeypatch, "import", str(path), "--dry-run", "--set", change)
    assert status == 2
    assert message in told
    assert "Traceback" not in told


def test_names_from_data_command_no_terminal_and_are_no_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b]0;owned\x07[x](http://there)"
    rows = [{"prompt": hostile, "generator": hostile, "source": hostile, "text": hostile, hostile: 1}]
    path = tmp_path / "config.yaml"
    subset = [{"name": "all", "steps": [{"rank": "margin", "fraction": 1.0}]}]
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    path.write_text(json.dumps({"import": {"source": source}, "subset": subset}), encoding="utf-8")
    (tmp_path / "bad.jsonl").write_bytes(b"\x1b[31m no JSON\n")
    bad = ("--set", f"import.source={tmp_path / 'bad.jsonl'}")
    for more in (("--dry-run",), (), bad):
        monkeypatch.setattr("sys.argv", ["prefsieve", "import", str(path), "--store", str(tmp_path / "store"), *more])
        with contextlib.suppress(SystemExit):
            main()
        printed = capsys.readouterr()
        text = printed.out + printed.err
        assert "\x1b" not in text and "\x07" not in text and "\ufffd" in text
        assert more == bad or "[x](http://there)" in " ".join(text.split())


def test_a_configuration_begins_in_one_way() -> None:
    subset = [{"name": "all", "steps": [{"rank": "margin", "fraction": 1.0}]}]
    scored = {"score": {"scorers": [{"name": "score", "engine": "fake"}]}}
    with pytest.raises(
        ValueError, match=r"scores of imported pairs are called 'score'\): the name 'score' is used twice"
    ):
        CurateConfig.model_validate({"import": {"source": "x"}, "subset": subset, **scored})
    other = {"score": {"scorers": [{"name": "rm", "engine": "fake"}]}, "pair": [{"scorer": "score"}]}
    assert CurateConfig.model_validate({"import": {"source": "x"}, "subset": subset, **other})
    with pytest.raises(ValueError, match=r"Input should be a finite number"):
        CurateConfig.model_validate(
            {"import": {"source": "x"}, "subset": [{"name": "a", "steps": [{"filter": "margin", "min": math.nan}]}]}
        )
