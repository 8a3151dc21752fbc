"""evaluate: win rates by rewards and by pairwise judges, and what becomes of an endpoint's moods."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flows.doctor import plan
from flows.markdown import evaluate_markdown
from tasks.check import checks
from tasks.config import EvaluateConfig
from tasks.duel import duel, read_grades, texts_of
from tasks.errors import RunError
from tasks.evaluate import ENOUGH, evaluate
from tasks.generate import generate
from tasks.ingest import ingest, read_shard
from tasks.records import Completions, Duels, Rewards
from tasks.samples import wanted_of
from tasks.score import TooManyMissing, score
from tasks.selection.lengthcontrol import length_controlled
from tasks.selection.style import markdown_counts
from tasks.store import Store
from tests.conftest import NO_COST, copy_store, files_below, prompts, write_jsonl
from tests.services import JudgeEndpoint, environment, judge_endpoint, prefsieve

KEY = os.environ["JUDGE_KEY"]
PROMPTS, SAMPLES = 80, 3


def judge(name: str = "judge", **about: Any) -> dict[str, Any]:
    engine = {"model": "judge-1"} if "base_url" in about else {"engine": "fake"}
    return {"name": name, "type": "judge", **engine, "judge": {"mode": "pairwise", **about}}


def asked_at(endpoint: JudgeEndpoint, **about: Any) -> dict[str, Any]:
    return judge(base_url=endpoint.url, api_key_env="JUDGE_KEY", retries=1, **about)


def configure(folder: Path, scorers: list[dict[str, Any]], **changes: Any) -> EvaluateConfig:
    generators = [
        {"name": "policy", "engine": "fake", "engine_args": {"quality": 0.5}},
        {"name": "reference", "engine": "fake"},
    ]
    values = {
        "ingest": {
            "source": str(folder / "heldout.jsonl"),
            "shard_size": 32,
            "columns": {"keep": ["answer"]},
        },
        "generate": {"samples": SAMPLES, "generators": generators},
        "score": {"scorers": scorers},
        "store": str(folder / "store"),
        **changes,
    }
    return EvaluateConfig.model_validate(values)


@pytest.fixture(scope="module")
def made(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completions]:
    """A folder with prompts and a store that has all completions; work on copies."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_jsonl(folder / "heldout.jsonl", prompts(PROMPTS))
    config, store = configure(folder, [judge()]), Store(folder / "store")
    return folder, generate(config.generate, ingest(config.ingest, store), store)


@pytest.fixture
def place(made: tuple[Path, Completions], tmp_path: Path) -> Path:
    """A folder of one's own, with the same prompts and completions."""
    shutil.copy(made[0] / "heldout.jsonl", tmp_path)
    copy_store(Store(made[0] / "store"), tmp_path / "store")
    return tmp_path


def compare(config: EvaluateConfig, completions: Completions) -> tuple[dict[str, Any], Rewards, Duels]:
    store = Store(config.store_url)
    rewards = score(config.score.rating, completions, store)
    duels = duel(config.score, config.evaluate, completions, store)
    return evaluate(config.evaluate, rewards, store, duels=duels), rewards, duels


def texts(folder: Path, completions: Completions) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Of policy and reference, and the prompts, in order."""
    store, both, asked = Store(folder / "store"), ([], []), []
    for shard, number in wanted_of(store, completions):
        for side, name in zip(both, ("policy", "reference"), strict=True):
            side += texts_of(store, completions.generators[name], shard["prompts"], number)
        rows = read_shard(store, shard["digest"], ["messages"])["messages"].to_pylist()
        asked += [row[0]["content"] for row in rows]
    return *both, asked


# --- by rewards


def test_by_rewards_every_number_is_what_the_rewards_and_lengths_give(made: Any, place: Path) -> None:
    config = configure(place, [{"name": "reward", "engine": "fake"}], evaluate={"style": True, "difficulty": "answer"})
    found, _, duels = compare(config, made[1])
    assert not duels.judges and duels.work.requests == 0
    result = found["scorers"]["reward"]
    policy, reference, _ = texts(place, made[1])
    # Rewards, from the texts: the fake model reads the number in front, with noise of its own.
    assert result["mean_reward"]["policy"] > result["mean_reward"]["reference"]
    assert 0.5 < result["win_rate"] < 1 and result["prompts"] == PROMPTS
    assert sum(result["verdicts"].values()) == PROMPTS * SAMPLES**2
    lengths = [np.array([[len(t.split()) for t in row] for row in side], float) for side in (policy, reference)]
    assert result["mean_tokens"] == found["mean_tokens"]
    assert found["mean_tokens"]["policy"] == pytest.approx(lengths[0].mean(), abs=1e-6)  # words and an end token
    controlled = result["length_controlled"]
    assert abs(controlled["win_rate"] - result["win_rate"]) < 0.05, "the fake's length has no part in its quality"
    assert controlled["difficulty_effect"] != 0
    assert set(result["style_controlled"]["effects"]) == {"length", "headers", "lists", "bold", "code_blocks"}
    assert result["style_controlled"]["effects"]["headers"] == 0
    parts = result["by_source"]
    assert set(parts) == {"part0", "part1"} and sum(part["prompts"] for part in parts.values()) == PROMPTS
    mean = np.mean([part["win_rate"] for part in parts.values()])  # equal halves
    assert mean == pytest.approx(result["win_rate"], abs=1e-6)
    assert all(part["length_controlled"]["prompts"] == PROMPTS / 2 for part in parts.values())
    assert markdown_counts(policy[0][0]) == (0, 0, 0, 0)


def test_few_prompts_have_a_raw_rate_and_no_controlled_one(local_ray: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "heldout.jsonl", prompts(ENOUGH - 1))
    config, store = configure(tmp_path, [{"name": "reward", "engine": "fake"}, judge()]), Store(tmp_path / "store")
    found, *_ = compare(config, generate(config.generate, ingest(config.ingest, store), store))
    for result in found["scorers"].values():
        assert result["win_rate"] is not None and result["length_controlled"] is None
    assert "too few prompts" in evaluate_markdown({**found, "cost": NO_COST})


def test_a_difficulty_that_is_no_number_or_is_not_kept_is_told(made: Any, place: Path) -> None:
    reward = {"name": "reward", "engine": "fake"}
    with pytest.raises(ValueError, match=r"column 'hard' is not kept; name it in ingest\.columns\.keep"):
        configure(place, [reward], evaluate={"difficulty": "hard"})
    keep = {"source": str(place / "heldout.jsonl"), "shard_size": 32, "columns": {"keep": ["source"]}}
    config, store = configure(place, [reward], ingest=keep, evaluate={"difficulty": "source"}), Store(place / "store")
    completions = generate(config.generate, ingest(config.ingest, store), store)
    assert completions.work.requests == 0, "another kept column does not cost completions"
    with pytest.raises(RunError, match="a prompt has 'part0' in column 'source', which is no number"):
        compare(config, completions)


# --- by a pairwise judge


def longer_wins(data: dict[str, Any], before: int) -> str:
    a, b = len(data["A"]), len(data["B"])
    return json.dumps({"verdict": "tie" if a == b else "A" if a > b else "B"})


def test_a_judge_compares_sample_with_sample_in_both_orders_and_a_rerun_asks_nothing(made: Any, place: Path) -> None:
    policy, reference, asked = texts(place, made[1])
    with judge_endpoint(longer_wins, key=KEY) as endpoint:
        config = configure(place, [asked_at(endpoint)])
        found, _, duels = compare(config, made[1])
        expected = Counter(
            (prompt, *order)
            for prompt, mine, others in zip(asked, policy, reference, strict=True)
            for pair in dict.fromkeys(zip(mine, others, strict=True))
            if pair[0] != pair[1]
            for order in (pair, pair[::-1])
        )
        assert Counter((d["prompt"][0]["content"], d["A"], d["B"]) for d in endpoint.data()) == expected
        assert duels.work.requests == len(endpoint.asked) and duels.counts.out == PROMPTS * SAMPLES
        before = files_below(place / "store")
        again, _, more = compare(config, made[1])
        assert (again, more.work.requests, more.work.engine_starts) == (found, 0, 0)
        assert files_below(place / "store") == before
        turned = configure(place, [asked_at(endpoint)], evaluate={"policy": "reference", "reference": "policy"})
        other, _, more = compare(turned, made[1])
        assert len(endpoint.asked) == sum(expected.values()), "the other way round it is the same comparison"
    result = found["scorers"]["judge"]
    sizes = [np.array([[len(t) for t in row] for row in side], float) for side in (policy, reference)]
    points = 0.5 + 0.5 * np.sign(sizes[0] - sizes[1])
    assert result["win_rate"] == pytest.approx(points.mean(), abs=1e-6)
    assert other["scorers"]["judge"]["win_rate"] == pytest.approx(1 - points.mean(), abs=1e-6)
    assert result["verdicts"] == {
        "wins": int((points == 1).sum()),
        "ties": int((points == 0.5).sum()),
        "losses": int((points == 0).sum()),
    }
    assert result["judge"]["consistency"] == 1.0 and result["judge"]["first_place"] == 0.5
    assert result["arena"]["score"] == pytest.approx(points.mean(), abs=1e-6)
    tokens = [np.array([[len(t.split()) for t in row] for row in side], float) for side in (policy, reference)]
    lc = length_controlled(points, tokens[0] - tokens[1])
    assert result["length_controlled"]["win_rate"] == pytest.approx(lc.rate, abs=1e-6)
    assert lc.effects[0] > 2 and lc.error < 0.1


def test_comparisons_of_texts_that_are_answered_otherwise_now_are_told(made: Any, place: Path) -> None:
    """As an engine may that makes a removed file again."""
    config = configure(place, [judge()])
    store = Store(config.store_url)
    duel(config.score, config.evaluate, made[1], store)
    path, *_ = store.list("completions")
    table = store.read_table(path)
    texts = [[f"{text} or not" for text in row] for row in table["texts"].to_pylist()]
    column = table.schema.get_field_index("texts")
    store.remove_file(path)
    store.create_table(path, table.set_column(column, table.field(column), pa.array(texts, table.field(column).type)))
    with pytest.raises(RunError, match=r"duels/.* compares other texts than there are now; remove it and run again"):
        duel(config.score, config.evaluate, made[1], store)
    for file in store.list("duels"):
        store.remove_file(file)
    assert duel(config.score, config.evaluate, made[1], store).counts.out


def test_more_samples_pay_only_for_themselves(made: Any, place: Path) -> None:
    with judge_endpoint(longer_wins, key=KEY) as endpoint:
        compare(configure(place, [asked_at(endpoint)]), made[1])
        before = len(endpoint.asked)
        generators = [generator.model_dump() for generator in configure(place, [judge()]).generate.generators]
        config = configure(place, [asked_at(endpoint)], generate={"samples": 5, "generators": generators})
        store = Store(place / "store")
        completions = generate(config.generate, ingest(config.ingest, store), store)
        found, _, duels = compare(config, completions)
        assert 0 < len(endpoint.asked) - before == duels.work.requests <= PROMPTS * 2 * 2
        assert duels.work.samples == PROMPTS * 2
    policy, reference, _ = texts(place, completions)
    sizes = [np.array([[len(t) for t in row] for row in side], float) for side in (policy, reference)]
    expected = (0.5 + 0.5 * np.sign(sizes[0] - sizes[1])).mean()
    assert found["scorers"]["judge"]["win_rate"] == pytest.approx(expected, abs=1e-6)


def test_a_judge_that_always_prefers_the_first_place_sees_only_ties(made: Any, place: Path) -> None:
    with judge_endpoint(lambda data, before: '{"verdict": "A>>B"}', key=KEY) as endpoint:
        found, *_ = compare(configure(place, [asked_at(endpoint, verdicts=5)]), made[1])
    result = found["scorers"]["judge"]
    assert (result["win_rate"], result["standard_error"], result["arena"]["score"]) == (0.5, 0.0, 0.5)
    equal = result["judge"]["shown_first"]["tie"]  # equal texts
    assert result["judge"]["shown_first"]["much_better"] == result["judge"]["shown_second"]["much_worse"]
    assert result["judge"]["shown_first"]["much_better"] + equal == PROMPTS * SAMPLES
    assert result["judge"]["first_place"] == pytest.approx(1 - 0.5 * equal / (PROMPTS * SAMPLES), abs=1e-6)


def test_the_fake_judge_prefers_the_better_policy_and_strong_verdicts_show(made: Any, place: Path) -> None:
    found, *_ = compare(configure(place, [judge("five", verdicts=5), judge("three")]), made[1])
    five, three = found["scorers"]["five"], found["scorers"]["three"]
    assert 0.55 < three["win_rate"] < 0.95 and 0.55 < five["win_rate"] < 0.95
    assert three["judge"]["shown_first"]["much_better"] == 0 < five["judge"]["shown_first"]["much_better"]
    low, score_, high = (five["arena"][name] for name in ("low", "score", "high"))
    assert low < score_ < high and five["arena"]["games"] == 2 * PROMPTS * SAMPLES
    shown = evaluate_markdown({**found, "store": "x", "stages": [], "cost": NO_COST})
    assert "Arena score" in shown and "LC win rate" in shown and "Both orders agree in 100.0 %" in shown


def test_what_cannot_be_read_is_asked_once_more_then_counted_and_much_of_it_stops_the_run(
    made: Any, place: Path
) -> None:
    bad = {"what is 3 plus 3", "what is 5 plus 5"}

    def answer(data: dict[str, Any], before: int) -> str:
        question = data["prompt"][0]["content"]
        if question == "what is 7 plus 7" and before == 0:
            return "hm"
        return "neither" if question in bad else longer_wins(data, before)

    with judge_endpoint(answer, key=KEY) as endpoint:
        config = configure(place, [asked_at(endpoint)])
        found, _, duels = compare(config, made[1])
        times = Counter(json.dumps(data) for data in endpoint.data())
        for question, asked in times.items():
            content = json.loads(question)["prompt"][0]["content"]
            assert asked == (2 if content in bad | {"what is 7 plus 7"} else 1)
        lost = duels.counts.dropped["judge: not readable"]
        assert 0 < lost <= 2 * SAMPLES and duels.counts.into == PROMPTS * SAMPLES
        assert found["scorers"]["judge"]["prompts"] >= PROMPTS - 2
        asked_before = len(endpoint.asked)
        strict = configure(place, [asked_at(endpoint)], score={"scorers": [asked_at(endpoint)], "max_missing": 0.01})
        with pytest.raises(TooManyMissing, match=r"of 240 comparisons by judge 'judge' are missing.*not readable"):
            compare(strict, made[1])
        assert len(endpoint.asked) == asked_before


def test_an_endpoint_that_refused_is_asked_again_when_the_run_stopped(made: Any, place: Path) -> None:
    state = {"full": True}

    def answer(data: dict[str, Any], before: int) -> Any:
        return 400 if state["full"] and data["prompt"][0]["content"] < "what is 3" else longer_wins(data, before)

    with judge_endpoint(answer, key=KEY) as endpoint:
        config = configure(place, [asked_at(endpoint)])
        with pytest.raises(TooManyMissing, match="refused: 400"):
            compare(config, made[1])
        state["full"] = False
        found, _, duels = compare(config, made[1])
        assert duels.counts.out == PROMPTS * SAMPLES and found["scorers"]["judge"]["prompts"] == PROMPTS


def test_a_dry_run_says_how_many_comparisons_are_missing_and_a_gone_endpoint_is_no_fault_when_none_are(
    made: Any, place: Path
) -> None:
    with judge_endpoint(longer_wins, key=KEY) as endpoint:
        config = configure(place, [asked_at(endpoint), {"name": "reward", "engine": "fake"}])
        work = {(row["stage"], row["what"]): row["to do"] for row in plan(config)["work"]}
        assert work["duel", "judge"] == "240 comparisons in both orders, in 3 files"
        assert work["score", "reward"].startswith("480 rewards") and ("score", "judge") not in work
        compare(config, made[1])
        work = {(row["stage"], row["what"]): row["to do"] for row in plan(config)["work"]}
        assert work["duel", "judge"] == work["score", "reward"] == "nothing, all in the store"
    assert dict(checks(config))["scorer judge"]() == "openai, not there, and not needed: all is rated"


def test_grades_are_those_of_the_policy_in_the_order_of_the_prompts(made: Any, place: Path) -> None:
    config = configure(place, [judge()])
    _, _, duels = compare(config, made[1])
    first, second = (
        np.concatenate(part)
        for part in zip(*read_grades(Store(place / "store"), duels, "judge", config.evaluate), strict=True)
    )
    policy, reference, _ = texts(place, made[1])
    quality = [np.array([[float(t[1 : t.index("]")]) for t in row] for row in side]) for side in (policy, reference)]
    clear = np.abs(quality[0] - quality[1]) > 0.8
    assert clear.sum() > 50
    for grades in (first, second):
        assert (grades[clear] == np.sign(quality[0] - quality[1])[clear]).all()


# --- the command


def test_the_command_evaluates_with_rewards_and_a_judge(prefect_api: str, place: Path) -> None:
    import yaml

    values = configure(place, [{"name": "reward", "engine": "fake"}, judge(verdicts=5)], evaluate={"style": True})
    path = place / "evaluate.yaml"
    path.write_text(yaml.safe_dump(values.model_dump(by_alias=True)))
    env = environment(PREFECT_API_URL=prefect_api)
    done = prefsieve("evaluate", str(path), "--json", env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["stage"] for row in report["stages"]] == ["ingest", "generate", "score", "duel"]
    assert set(report["scorers"]) == {"reward", "judge"} and "harness" not in report
    assert report["scorers"]["judge"]["arena"]["bootstraps"] >= 100
    shown = prefsieve("evaluate", str(path), env=env)
    assert shown.returncode == 0 and "LC win rate" in shown.stdout and "Arena score" in shown.stdout
