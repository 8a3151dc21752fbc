"""Completions rated by several scorers and an ensemble of them: every column, up to the published files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.doctor import plan
from tasks.config import CurateConfig
from tasks.errors import ConfigError
from tasks.imports import import_
from tasks.ingest import read_shard, shards_of
from tasks.pair import pair
from tasks.publish import publish
from tasks.records import Pairs
from tasks.selection.pvar import pvar
from tasks.store import Store
from tasks.subset import subset
from tasks.versions import fetch_version, read_manifest
from tests.conftest import files_below, read_rows, write_jsonl
from tests.test_selection import agreement_by_hand

GENERATORS = ("m", "n", "o", "p")


def rated(prompts: int, seed: int = 0) -> list[dict[str, Any]]:
    """Four completions a prompt; ratings of very different scale that agree by and large, some missing."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(prompts):
        quality = random.normal(size=len(GENERATORS))
        for generator, q in zip(GENERATORS, quality, strict=True):
            stars = int(np.clip(round(3 + q), 1, 5))
            chance = 1 / (1 + math.exp(-q - random.normal()))
            row = {"prompt": f"what is {i}", "generator": generator, "text": f"{generator} {i} " * (stars + i % 3)}
            row |= {"stars": None if random.random() < 0.1 else stars, "chance": "N/A" if q > 1.5 else chance}
            rows.append({**row, "source": "ab"[i % 2], "level": i % 4})
    return rows


def config_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> CurateConfig:
    return CurateConfig.model_validate(
        {
            "import": {
                "source": str(write_jsonl(folder / "rows.jsonl", rows)),
                "columns": {"keep": ["level"]},
                "ratings": [{"name": "stars"}, {"name": "chance", "transform": "logit"}],
                "shard_size": 16,
            },
            "ensembles": [{"name": "both", "members": ["stars", "chance"]}],
            "pair": [{"name": "by-stars"}, {"name": "by-both", "scorer": "both", "reward_scale": "auto"}],
            "subset": [
                {"name": "stars", "steps": [{"rank": "margin", "fraction": 0.5}], "controls": ["random"]},
                {
                    "name": "agreed",
                    "pairs": "by-both",
                    "steps": [
                        {"filter": "flipped.stars", "max": 0.2},
                        {"rank": "disagreement", "keep": "bottom", "count": 12, "by": "field.level"},
                    ],
                },
            ],
            "store": str(folder / "store"),
            **changes,
        }
    )


def tables_of(config: CurateConfig, store: Store) -> list[Pairs]:
    assert config.import_
    rewards = import_(config.import_, store)
    return [pair(rule, rewards, store, ensembles=config.ensembles) for rule in config.pair]


def by_prompt(rows: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Rewards of each prompt's completions by scorer, with z-scores of the whole data set and their mean."""

    def stars(row: dict[str, Any]) -> float:
        return math.nan if row["stars"] is None else row["stars"]

    def chance(row: dict[str, Any]) -> float:
        return math.nan if row["chance"] == "N/A" else math.log(row["chance"] / (1 - row["chance"]))

    raw = {"stars": np.array([stars(row) for row in rows]), "chance": np.array([chance(row) for row in rows])}
    z = np.stack([(v - np.nanmean(v)) / np.nanstd(v, ddof=1) for v in raw.values()])
    every = {**raw, "both": z.mean(axis=0), "apart": z.std(axis=0)}
    prompts = dict.fromkeys(row["prompt"] for row in rows)
    places = {prompt: [i for i, row in enumerate(rows) if row["prompt"] == prompt] for prompt in prompts}
    return {prompt: {name: values[at] for name, values in every.items()} for prompt, at in places.items()}


def prompts_of(table: Pairs, store: Store) -> dict[str, str]:
    shards = shards_of(store, table.rewards.completions.prompts)
    rows = [row for shard in shards for row in read_shard(store, shard["digest"]).to_pylist()]
    return {row["prompt_id"]: row["messages"][0]["content"] for row in rows}


@pytest.mark.parametrize("deciding", ["stars", "both"])
def test_every_scorer_has_its_columns(deciding: str, store: Store, tmp_path: Path) -> None:
    rows = rated(50)
    expected = by_prompt(rows)
    table = tables_of(config_of(tmp_path, rows), store)[0 if deciding == "stars" else 1]
    found = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    manifest = store.read_json(f"pairs/{table.digest}/manifest.json")
    names = prompts_of(table, store)
    assert len(found) == table.counts.out > 30
    others = [name for name in ("stars", "chance", "both") if name != deciding]
    for row in found:
        of = expected[names[row["prompt_id"]]]
        rewards = of[deciding]
        best, worst = np.nanargmax(rewards), np.nanargmin(rewards)
        assert (row["chosen_sample"], row["rejected_sample"]) == (best, worst)
        assert row["margin"] == pytest.approx(rewards[best] - rewards[worst])
        scale = manifest["reward_scale"]
        assert row["pvar"] == pytest.approx(pvar(rewards[None, :], scale)[0])
        assert row["rewards_finite"] == np.isfinite(rewards).sum()
        assert row["disagreement"] == (pytest.approx(np.nanmean(of["apart"])) if deciding == "both" else None)
        for other in others:
            margin = of[other][best] - of[other][worst]
            tau, flipped = agreement_by_hand(rewards, of[other])
            for name, value in ((f"margin.{other}", margin), (f"tau.{other}", tau), (f"flipped.{other}", flipped)):
                assert row[name] == (None if math.isnan(value) else pytest.approx(value)), name
    assert not {f"margin.{deciding}", f"tau.{deciding}"} & set(found[0])
    taus = {o: [agreement_by_hand(of[deciding], of[o])[0] for of in expected.values()] for o in others}
    assert [(a["scorers"], a["kendall_tau"], a["prompts"]) for a in manifest["agreement"]] == [
        ([deciding, o], pytest.approx(np.nanmean(taus[o]), abs=1e-6), int(np.isfinite(taus[o]).sum())) for o in others
    ]
    assert manifest["ensembles"] == [{"name": "both", "members": ["stars", "chance"]}]


def test_generators_are_compared_by_the_scorer_that_decides(store: Store, tmp_path: Path) -> None:
    rows = rated(40)
    rule = {"name": "delta", "rule": "generator_delta", "generators": ["n", "m"], "scorer": "chance"}
    config = config_of(tmp_path, rows, pair=[rule], subset=[{"name": "s", "steps": [{"rank": "margin", "count": 1}]}])
    [table] = tables_of(config, store)
    every = by_prompt(rows).values()
    apart = [of["chance"][1] - of["chance"][0] for of in every]
    known = [value for value in apart if not math.isnan(value)]
    manifest = store.read_json(f"pairs/{table.digest}/manifest.json")
    assert manifest["generator_delta"] == {
        "stronger": "n",
        "weaker": "m",
        "delta": pytest.approx(np.mean(known), abs=1e-6),
        "standard_error": pytest.approx(np.std(known, ddof=1) / math.sqrt(len(known)), abs=1e-6),
        "prompts": len(known),
    }
    found = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert len(found) == 40  # a rating that is missing does not keep a pair back
    assert [row["generator_delta"] for row in found] == pytest.approx([np.mean(known)] * 40)
    assert {(row["chosen_generator"], row["rejected_generator"]) for row in found} == {("n", "m")}
    assert [row["margin"] for row in found] == [None if math.isnan(v) else pytest.approx(v) for v in apart]
    # Only the two that were asked for take part in PVar.
    assert max(row["rewards_finite"] for row in found) == 2


def test_an_ensemble_of_what_is_not_there_is_refused(store: Store, tmp_path: Path) -> None:
    rows = rated(3)
    with pytest.raises(ValueError, match="ensemble 'both': members: 'rm' is not one of stars, chance"):
        config_of(tmp_path, rows, ensembles=[{"name": "both", "members": ["stars", "rm"]}])
    config = config_of(tmp_path, rows, ensembles=[{"name": "both", "members": ["stars", "chance:tone"]}])
    with pytest.raises(ConfigError, match="ensembles: member 'chance:tone' is not one of stars, chance"):
        tables_of(config, store)
    unknown = {"name": "x", "rule": "generator_delta", "generators": ["m", "z"]}
    with pytest.raises(ConfigError, match="pair: generators: 'z' is not one of m, n, o, p"):
        tables_of(config_of(tmp_path, rows, pair=[unknown], subset=[{"name": "s", "steps": STEPS}]), store)
    crowd = [{**row, "generator": f"g{i}"} for i, row in enumerate(rated(10))]
    with pytest.raises(ConfigError, match=r"'m' is not one of g0, .*, g19 and 20 more$"):
        tables_of(config_of(tmp_path, crowd, pair=[unknown], subset=[{"name": "s", "steps": STEPS}]), store)


STEPS = [{"rank": "margin", "count": 1}]


def test_a_dry_run_writes_nothing_and_tells_what_the_run_then_does(tmp_path: Path) -> None:
    import datasets

    rows = rated(50)
    config = config_of(tmp_path, rows)
    store = Store(config.store)
    first = plan(config)
    assert not Path(store.url).exists()
    tables = {table.name: table for table in tables_of(config, store)}
    before = files_below(Path(store.url))
    assert plan(config)["subsets"] == first["subsets"]
    assert files_below(Path(store.url)) == before

    selections = [
        s for wanted in config.subset for s in subset(wanted, tables[wanted.pairs or config.pair[0].name], store)
    ]
    versions = [
        publish(config.publish, wanted, selection, store)
        for wanted, selection in zip(config.subset_of_each_name(), selections, strict=True)
    ]
    counted = [{key: row[key] for key in ("name", "into", "out", "dropped")} for row in first["pairings"]]
    assert counted == [{"name": name, **asdict(table.counts)} for name, table in tables.items()]
    assert [(row["name"], row["pairs"]) for row in first["subsets"]] == [(v.name, v.counts.out) for v in versions]
    assert [v.name for v in versions] == ["stars", "stars-random", "agreed"]
    for row, version in zip(first["subsets"], versions, strict=True):
        assert read_manifest(store, version)["content"]["explanation"] == json.loads(json.dumps(row["explanation"]))
    after = files_below(Path(store.url))
    assert plan(config)["subsets"] == first["subsets"]
    assert files_below(Path(store.url)) == after

    for version, selection in zip(versions, selections, strict=True):
        folder = fetch_version(store, version, "data/", tmp_path / version.name)
        files = [str(file) for file in sorted(folder.glob("*.parquet"))]
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        others = ["chance", "both"] if selection.pairs.name == "by-stars" else ["stars", "chance"]
        further = [f"{metric}.{other}" for other in others for metric in ("margin", "tau", "flipped")]
        assert loaded.column_names[-len(further) :] == further
        assert loaded.to_list() == read_rows(folder)
        source = store.read_table(f"pairs/{selection.pairs.digest}/pairs.parquet").to_pylist()
        pairs = {row["prompt_id"]: row for row in source}
        texts = {(row["prompt"], row["generator"]): row["text"] for row in rows}
        for row in loaded:
            assert {name: row[name] for name in further} == {name: pairs[row["prompt_id"]][name] for name in further}
            for side in ("chosen", "rejected"):
                text = texts[row["prompt"][0]["content"], row[f"{side}_generator"]]
                assert row[side] == [{"role": "assistant", "content": text}]
    agreed = read_rows(tmp_path / "agreed")
    assert all(row["flipped.stars"] <= 0.2 for row in agreed)
    assert len(agreed) == 12
