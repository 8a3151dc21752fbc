"""Adaptive rounds through the stages: fewer samples, the same way on a rerun, nothing paid twice by a fixed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.doctor import plan
from flows.markdown import plan_markdown, show_markdown
from flows.shelf import show_subset
from flows.why import why
from tasks.adapt import adapt
from tasks.config import PairingConfig
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.pair import pair
from tasks.publish import publish
from tasks.samples import held_by
from tasks.score import score
from tasks.sections import ScoreConfig
from tasks.store import Store
from tasks.subset import subset
from tasks.versions import read_manifest
from tests.conftest import (
    Curated,
    copy_store,
    curate_config,
    files_below,
    generator,
    prompts,
    read_rows,
    scorer,
    write_jsonl,
)

LADDER, FIXED, PROMPTS = [3, 12], 12, 150


@pytest.fixture(scope="module")
def adapted(local_ray: Any, session_folder: Path) -> Curated:
    """150 prompts in shards of 64; fake engines; 3 samples for all, 12 for the pilot and for those near the cut."""
    folder = session_folder / "adapted"
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    config = curate_config(
        source,
        ingest={"source": str(source), "shard_size": 64},
        generate={"samples": FIXED, "generators": [generator()], "adaptive": {"ladder": LADDER, "quality": 0.97}},
        subset=[{"name": "top", "steps": [{"rank": "pvar_posterior", "fraction": 0.1}]}],
    )
    assert config.ingest and config.generate and config.score
    store = Store(folder / "store")
    prompt_set = ingest(config.ingest, store)
    adapted = adapt(config.generate, config.score, prompt_set, store)
    completions, rewards = adapted.completions, score(config.score, adapted.completions, store).after(adapted)
    table = pair(PairingConfig(), rewards, store)
    selections = subset(config.subset[0], table, store)
    version = publish(config.publish, config.subset[0], selections[0], store)
    return Curated(config, store, prompt_set, completions, rewards, [table], selections, [version])


def pairs_of(run: Curated, digest: str) -> dict[str, dict[str, Any]]:
    return {row["prompt_id"]: row for row in run.store.read_table(f"pairs/{digest}/pairs.parquet").to_pylist()}


def test_prompts_stop_at_steps_of_the_ladder_and_the_rounds_say_how_many(adapted: Curated) -> None:
    rounds = adapted.completions.rounds
    finite = [row["rewards_finite"] for row in pairs_of(adapted, adapted.pairs[0].digest).values()]
    assert len(finite) == PROMPTS and set(finite) == set(LADDER)
    assert sum(finite) == rounds[-1]["completions"] == adapted.completions.work.samples < 0.8 * FIXED * PROMPTS
    assert rounds[-1]["undecided"] == 0 and all(row["undecided"] > 0 for row in rounds[:-1])
    assert rounds[-1]["fixed_completions"] == FIXED * PROMPTS
    assert rounds[-1]["tokens"] == adapted.completions.work.tokens
    assert rounds[-1]["tokens"] / rounds[-1]["completions"] == pytest.approx(
        rounds[-1]["fixed_tokens"] / rounds[-1]["fixed_completions"], rel=0.1
    )
    assert adapted.rewards.counts.out == adapted.rewards.counts.into == sum(finite) == adapted.rewards.work.samples


def test_a_rerun_comes_to_the_same_allotment_without_an_engine(adapted: Curated) -> None:
    config = adapted.config
    assert config.generate and config.score
    again = adapt(config.generate, config.score, adapted.prompts, adapted.store).completions
    assert (again.allotment, again.rounds) == (adapted.completions.allotment, adapted.completions.rounds)
    assert (again.work.engine_starts, again.work.samples) == (0, 0)


def test_the_subset_tells_its_rounds_and_holds_the_texts_it_names(adapted: Curated) -> None:
    content = read_manifest(adapted.store, adapted.versions[0])["content"]
    assert content["adaptive"]["ladder"] == LADDER
    assert content["adaptive"]["rounds"] == [dict(row) for row in adapted.completions.rounds]
    place = adapted.versions[0].place
    assert "Adaptive sampling" in adapted.store.read(f"{place}/README.md").decode()
    assert "Rounds of sampling" in adapted.store.read(f"{place}/report.html").decode()
    rows = adapted.store.read_table(f"{place}/data/train-00000.parquet").to_pylist()
    assert len(rows) == 15 and {row["rewards_finite"] for row in rows} <= set(LADDER)
    for row in rows:  # a fake completion says its reward, but for a little noise
        for side in ("chosen", "rejected"):
            written = float(row[side][0]["content"][1:].split("]")[0])
            assert written == pytest.approx(row[f"score_{side}"], abs=0.6)


def test_ladders_that_end_in_one_allotment_make_two_tables(adapted: Curated) -> None:
    """The prior is fitted on the first round, which has another pilot here."""
    completions = replace(adapted.completions, ladder=(3, 8, 12))
    table = pair(PairingConfig(), replace(adapted.rewards, completions=completions), adapted.store)
    assert table.digest != adapted.pairs[0].digest
    one, other = (
        [row["pvar_posterior"] for row in pairs_of(adapted, digest).values()]
        for digest in (table.digest, adapted.pairs[0].digest)
    )
    assert one != other


def test_a_dry_run_walks_the_rounds_and_shows_the_subset_that_is_then_made(adapted: Curated) -> None:
    folder = Path(adapted.store.url)
    before = files_below(folder)
    result = plan(adapted.config.model_copy(update={"store": adapted.store.url}))
    assert [row["to do"] for row in result["work"]][1:] == ["nothing, all in the store"] * 2
    made = read_manifest(adapted.store, adapted.versions[0])["content"]
    assert result["subsets"] == [{"name": "top", "pairs": 15, "explanation": made["explanation"]}]
    assert "Nothing was written." in plan_markdown(result)
    assert files_below(folder) == before


@pytest.mark.parametrize("gone", ["rewards", "completions"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_dry_run_says_which_round_lacks_what(adapted: Curated, tmp_path: Path, number: int, gone: str) -> None:
    store = copy_store(adapted.store, tmp_path / "store")
    first = adapted.completions.rounds[0]["completions"]
    of_round = first if number == 1 else adapted.completions.rounds[1]["completions"] - first
    for path in store.list(gone):
        if in_round(path) == number:
            store.remove(path)
    extra = ScoreConfig.model_validate({"scorers": [scorer(), scorer("second")]})
    before = files_below(Path(store.url))
    result = plan(adapted.config.model_copy(update={"store": store.url, "score": extra}))
    assert files_below(Path(store.url)) == before and "subsets" not in result
    lacks = f"round {number}: {of_round} {{}} in {6 if number == 1 else 3} files, and what the rounds after it ask for"
    generate, decides, second = [row["to do"] for row in result["work"]][1:]
    assert second == "a reward per sample"
    if gone == "rewards":
        assert (generate, decides) == ("nothing, all in the store", lacks.format("rewards"))
    else:
        assert (generate, decides) == (lacks.format("samples"), "a reward per sample")


def in_round(path: str) -> int:
    """The first makes samples from 0 on, in two files a shard: of the pilot, and of the others. Any later one is 2."""
    return 1 if held_by(path).first == 0 else 2


def test_a_fixed_number_of_samples_afterwards_makes_only_the_others(adapted: Curated) -> None:
    config = adapted.config
    assert config.generate and config.score
    completions = generate(config.generate, adapted.prompts, adapted.store)
    assert completions.work.samples == FIXED * PROMPTS - adapted.completions.work.samples
    rewards = score(config.score, completions, adapted.store)
    assert rewards.work.samples == completions.work.samples
    everything = pairs_of(adapted, pair(PairingConfig(), rewards, adapted.store).digest)
    assert {row["rewards_finite"] for row in everything.values()} == {FIXED}
    for name, row in pairs_of(adapted, adapted.pairs[0].digest).items():
        if row["rewards_finite"] == FIXED:
            assert row["pvar"] == pytest.approx(everything[name]["pvar"])
            assert row["score_chosen"] == everything[name]["score_chosen"]
    top = [
        row["prompt_id"]
        for row in adapted.store.read_table(f"{adapted.versions[0].place}/data/train-00000.parquet").to_pylist()
    ]
    best = sorted((row["pvar"] for row in everything.values()), reverse=True)[: len(top)]
    assert np.mean([everything[name]["pvar"] for name in top]) > 0.85 * np.mean(best)


def test_why_finds_the_texts_of_prompts_whose_samples_lie_in_files_of_some_prompts(adapted: Curated) -> None:
    [version] = adapted.versions
    rows = read_rows(Path(adapted.store.full(version.place)) / "data")
    for row in rows:
        told = why(adapted.store, version.name, row["prompt_id"])
        assert told["pairs"][0]["rank"] == row["rank"]
        for side in ("prompt", "chosen", "rejected"):
            assert told["texts"][side] == row[side][0]["content"]
    assert "Adaptive sampling: " in show_markdown(show_subset(adapted.store, version.name))
