"""From rewards to published subsets: counts, files that others read as they are, and versions that can be checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.shelf import list_subsets, show_subset, verify_subset
from tasks.config import PairingConfig, PublishConfig, RankStep, SubsetConfig
from tasks.errors import ConfigError, RunError
from tasks.generate import completions_path
from tasks.ingest import read_shard, shards_of
from tasks.pair import pair
from tasks.publish import publish
from tasks.records import COMPLETIONS, PAIRS, PREFERENCES, REWARDS, Counts, Pairs, Rewards, Version, text_digest
from tasks.score import rewards_path
from tasks.selection.pvar import PooledScale, pvar
from tasks.store import Store
from tasks.subset import selection_path, subset
from tasks.versions import (
    content_version,
    damage,
    fetch_version,
    find_build,
    find_version,
    publish_folder,
    read_manifest,
    remember_build,
)
from tests.conftest import Curated, copy_store, files_below, read_rows


def by_pvar(fraction: float, **changes: Any) -> SubsetConfig:
    return SubsetConfig(name="s", steps=[RankStep(rank="pvar", fraction=fraction)], **changes)


# --- what the stages were given, read back without their help


def samples_of(run: Curated, generator: str) -> list[dict[str, Any]]:
    """One entry per prompt: its messages, and texts, tokens and rewards of one generator's samples."""
    store, scorer = run.store, next(iter(run.rewards.scorers.values()))
    fingerprint = run.completions.generators[generator]
    entries = []
    for shard in shards_of(store, run.prompts):
        made = store.read_table(completions_path(fingerprint, shard["prompts"], (0, 4))).to_pylist()
        scored = store.read_table(rewards_path(scorer, fingerprint, shard["prompts"], (0, 4))).to_pylist()
        for prompt, completion, reward in zip(
            read_shard(store, shard["digest"]).to_pylist(), made, scored, strict=True
        ):
            entries.append({**prompt, **completion, **reward})
    return entries


def published(run: Curated, name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of a published subset."""
    return read_rows(fetch_version(run.store, find_version(run.store, name), "data/", tmp_path / name))


def test_counts_add_up_at_every_stage(fake_run: Curated) -> None:
    all_counts = [
        fake_run.prompts.counts,
        fake_run.completions.counts,
        fake_run.rewards.counts,
        *(table.counts for table in fake_run.pairs),
        *(taken.counts for taken in fake_run.selections),
        *(version.counts for version in fake_run.versions),
    ]
    for counts in all_counts:
        assert counts.into == counts.out + sum(counts.dropped.values())
    assert [table.counts.into for table in fake_run.pairs] == [40, 40]
    for taken in fake_run.selections:
        assert taken.counts.into == taken.pairs.counts.out
    for version, taken in zip(fake_run.versions, fake_run.selections, strict=True):
        assert version.counts.out == taken.counts.out
    with pytest.raises(RunError, match="rows were lost: 3 in, 1 out"):
        Counts(3, 1, {"tie": 1})


# --- pair


def test_best_against_worst_of_every_prompt(fake_run: Curated) -> None:
    table = fake_run.store.read_table(f"pairs/{fake_run.pairs[0].digest}/pairs.parquet")
    assert table.schema.equals(PAIRS)
    rows = {row["prompt_id"]: row for row in table.to_pylist()}
    drops = fake_run.store.read_table(f"pairs/{fake_run.pairs[0].digest}/drops.parquet").to_pylist()
    assert len(rows) == table.num_rows == fake_run.pairs[0].counts.out
    assert Counter(row["reason"] for row in drops) == Counter(fake_run.pairs[0].counts.dropped)
    entries = samples_of(fake_run, "weak")
    assert {*rows, *(row["prompt_id"] for row in drops)} == {entry["prompt_id"] for entry in entries}
    for entry in entries:
        if entry["prompt_id"] not in rows:
            continue
        row, rewards = rows[entry["prompt_id"]], entry["rewards"]
        assert (row["score_chosen"], row["score_rejected"]) == (max(rewards), min(rewards))
        assert row["chosen_sample"] == rewards.index(max(rewards))
        assert row["rejected_sample"] == rewards.index(min(rewards))
        assert row["margin"] == max(rewards) - min(rewards)
        assert row["pvar"] == pytest.approx(pvar(np.array([rewards]))[0])
        assert row["rewards_finite"] == 4
        assert row["chosen_tokens"] == entry["tokens"][row["chosen_sample"]]
        assert row["rejected_tokens"] == entry["tokens"][row["rejected_sample"]]
        assert row["source"] == entry["source"]
        assert (row["chosen_generator"], row["rejected_generator"]) == ("weak", "weak")


def test_the_stronger_generators_first_sample_against_the_weakers(fake_run: Curated) -> None:
    strong, weak = samples_of(fake_run, "strong"), samples_of(fake_run, "weak")
    rows = fake_run.store.read_table(f"pairs/{fake_run.pairs[1].digest}/pairs.parquet").to_pylist()
    by_id = {entry["prompt_id"]: i for i, entry in enumerate(strong)}
    assert len(rows) == 40
    for row in rows:
        i = by_id[row["prompt_id"]]
        assert row["score_chosen"] == strong[i]["rewards"][0]
        assert row["score_rejected"] == weak[i]["rewards"][0]
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        assert (row["chosen_sample"], row["rejected_sample"]) == (0, 0)
    manifest = fake_run.store.read_json(f"pairs/{fake_run.pairs[1].digest}/manifest.json")
    means = {name: np.mean([entry["rewards"] for entry in samples_of(fake_run, name)]) for name in ("strong", "weak")}
    assert manifest["mean_reward"] == pytest.approx(means, abs=1e-6)
    assert manifest["mean_reward"]["strong"] > manifest["mean_reward"]["weak"]


def test_a_reward_scale_of_zero_takes_the_pooled_deviation(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    table = pair(PairingConfig(name="auto", generators=["weak"], reward_scale="auto"), fake_run.rewards, store)
    pooled = PooledScale()
    pooled.add(np.array([entry["rewards"] for entry in samples_of(fake_run, "weak")]))
    manifest = store.read_json(f"pairs/{table.digest}/manifest.json")
    assert manifest["reward_scale"] == pytest.approx(pooled.value)
    assert table.digest != fake_run.pairs[0].digest


def test_all_generators_take_part_unless_some_are_named(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    table = pair(PairingConfig(), fake_run.rewards, store)
    rows = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert {row[side] for row in rows for side in ("chosen_generator", "rejected_generator")} == {"strong", "weak"}
    assert {row["rewards_finite"] for row in rows} == {8}


ODD_ROWS: list[tuple[list[str], list[float | None], str | None]] = [
    (["a", "b", "c"], [1.0, 2.0, 3.0], None),
    (["a", "b", "c"], [1.0, 1.0, 1.0], "rewards tie"),
    (["a", "a", "a"], [1.0, 1.0, 1.0], "identical texts"),
    (["a", "b", "a"], [3.0, 2.0, 1.0], "identical texts"),
    (["a", "b", "c"], [None, 2.0, None], "fewer than two rewards"),
    (["a", "b", "c"], [None, None, None], "fewer than two rewards"),
    (["a", "b", "c"], [None, 2.0, 1.0], None),
    ([], [], "fewer than two rewards"),  # refused by the engine
]


def odd_rewards(fake_run: Curated, store: Store) -> Rewards:
    """Rewards of eight prompts with everything that can be odd about them, in one shard."""
    shard = shards_of(fake_run.store, fake_run.prompts)[2]
    prompts = read_shard(fake_run.store, shard["digest"])
    ids = prompts["prompt_id"].to_pylist()
    store.create_table(f"prompts/shards/{shard['digest']}.parquet", prompts)
    store.create_json("prompts/odd/manifest.json", {"shards": [shard]})
    rows, scored = [], []
    for prompt_id, (texts, rewards, _) in zip(ids, ODD_ROWS, strict=True):
        n = len(texts)
        rows.append(
            {
                "prompt_id": prompt_id,
                "refused": None if texts else "prompt too long: 9 tokens",
                "prompt_tokens": 5,
                "texts": texts,
                "text_digests": [text_digest(text) for text in texts],
                "finish_reasons": ["stop"] * n,
                "tokens": [len(text) for text in texts],
                "logprobs": [-1.0] * n,
            }
        )
        reasons = [None if reward is not None else "not finite: nan" for reward in rewards]
        scored.append({"prompt_id": prompt_id, "rewards": rewards, "reasons": reasons})
    store.create_table(completions_path("g", shard["prompts"], (0, 3)), pa.Table.from_pylist(rows, schema=COMPLETIONS))
    store.create_table(rewards_path("s", "g", shard["prompts"], (0, 3)), pa.Table.from_pylist(scored, schema=REWARDS))
    prompt_set = dataclasses.replace(fake_run.prompts, digest="odd", counts=Counts(8, 8))
    completions = dataclasses.replace(fake_run.completions, prompts=prompt_set, samples=3, generators={"g": "g"})
    return dataclasses.replace(fake_run.rewards, completions=completions, scorers={"s": "s"})


def test_prompts_without_a_pair_are_dropped_for_the_right_reason(fake_run: Curated, store: Store) -> None:
    table = pair(PairingConfig(), odd_rewards(fake_run, store), store)
    drops = store.read_table(f"pairs/{table.digest}/drops.parquet").to_pylist()
    assert [row["reason"] for row in drops] == [reason for _, _, reason in ODD_ROWS if reason]
    assert [row["pvar"] for row in drops[:2]] == [0, 0]
    assert [row["pvar"] for row in drops[3:]] == [None, None, None]
    kept = store.read_table(f"pairs/{table.digest}/pairs.parquet").to_pylist()
    assert [(row["score_chosen"], row["score_rejected"]) for row in kept] == [(3.0, 1.0), (2.0, 1.0)]
    assert table.counts == Counts(8, 2, {"rewards tie": 1, "identical texts": 2, "fewer than two rewards": 3})
    took_part = store.read_json(f"pairs/{table.digest}/manifest.json")["took_part"]
    assert took_part == [
        {"stage": "generate", "into": 8, "out": 7, "dropped": {"refused": 1}},
        {"stage": "score", "into": 21, "out": 15, "dropped": {"no reward": 6}},
    ]


def test_a_second_pairing_of_the_same_rewards_is_found_again(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    again = pair(fake_run.config.pair[0], fake_run.rewards, store)
    assert (again.digest, again.counts) == (fake_run.pairs[0].digest, fake_run.pairs[0].counts)
    assert (again.work.shards_made, again.work.shards_reused) == (0, 3)
    assert files_below(Path(store.url)) == before


# --- subset


def test_a_subset_takes_its_end_of_the_order_and_says_what_it_left_out(fake_run: Curated) -> None:
    store = fake_run.store
    values = store.read_table(f"pairs/{fake_run.pairs[0].digest}/pairs.parquet")["pvar"].to_numpy()
    top, random, bottom, _ = fake_run.selections
    for taken, expected in ((top, np.sort(values)[::-1]), (bottom, np.sort(values))):
        table = store.read_table(selection_path(taken.pairs, taken.digest)).to_pandas()
        number = round(len(values) * 0.25)
        assert taken.counts.out == len(table) == number
        assert table["pair"].is_monotonic_increasing
        ranked = table.sort_values("rank")
        assert ranked["rank"].tolist() == list(range(number))
        assert values[ranked["pair"]].tolist() == expected[:number].tolist()
    assert top.counts.dropped == {"outside the top 25 % by pvar": 30}
    assert bottom.counts.dropped == {"outside the bottom 25 % by pvar": 30}
    assert random.counts.dropped == {"outside a random 25 % (seed 0)": 30}


def test_mean_pvar_falls_from_top_over_random_to_bottom(fake_run: Curated) -> None:
    top, random, bottom, _ = [
        read_manifest(fake_run.store, version)["content"]["summary"]["mean_pvar"] for version in fake_run.versions
    ]
    assert 0.25 >= top > random > bottom >= 0


def test_pairs_without_a_value_to_rank_by_are_left_out_and_counted(fake_run: Curated, store: Store) -> None:
    rewards = odd_rewards(fake_run, store)
    table = pair(PairingConfig(), rewards, store)
    blank = store.read_table(f"pairs/{table.digest}/pairs.parquet")
    blank = blank.set_column(blank.schema.get_field_index("pvar"), "pvar", pa.array([None, 0.1], pa.float64()))
    other = Pairs("blank", "blank", rewards, table.counts)
    store.create_table("pairs/blank/pairs.parquet", blank)
    [taken] = subset(by_pvar(1.0), other, store)
    assert taken.counts == Counts(2, 1, {"no pvar": 1})


def test_a_subset_that_would_be_empty_stops_the_run(fake_run: Curated, store: Store) -> None:
    table = pair(PairingConfig(), odd_rewards(fake_run, store), store)
    store.create_table("pairs/none/pairs.parquet", PAIRS.empty_table())
    nothing = dataclasses.replace(table, digest="none", counts=Counts(8, 0, {"rewards tie": 8}))
    with pytest.raises(RunError, match=r"subset 's' would be empty: 0 pairs .*; dropped before: \{'rewards tie': 8\}"):
        subset(by_pvar(0.5), nothing, store)


# --- publish


def test_a_published_subset_is_read_by_datasets_as_it_is(fake_run: Curated, tmp_path: Path) -> None:
    import datasets

    version = fake_run.versions[0]
    folder = fetch_version(fake_run.store, version, "data/", tmp_path / "data")
    files = [str(file) for file in sorted(folder.glob("*.parquet"))]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == PREFERENCES.names
    assert len(loaded) == version.counts.out == 10
    assert loaded.to_list() == read_rows(folder)
    for row in loaded:
        assert [message["role"] for message in row["prompt"]] == ["user"]
        for side in ("chosen", "rejected"):
            assert [set(message) for message in row[side]] == [{"role", "content"}]
            assert row[side][0]["role"] == "assistant"


def test_published_texts_are_those_of_the_samples_that_were_chosen(fake_run: Curated, tmp_path: Path) -> None:
    entries = {name: {entry["prompt_id"]: entry for entry in samples_of(fake_run, name)} for name in ("strong", "weak")}
    for name, chosen, rejected in (("top", "weak", "weak"), ("delta", "strong", "weak")):
        rows = published(fake_run, name, tmp_path)
        assert sorted(row["rank"] for row in rows) == list(range(len(rows)))
        for row in rows:
            assert (row["chosen_generator"], row["rejected_generator"]) == (chosen, rejected)
            best, worst = entries[chosen][row["prompt_id"]], entries[rejected][row["prompt_id"]]
            assert row["prompt"] == best["messages"]
            i = best["rewards"].index(row["score_chosen"])
            j = worst["rewards"].index(row["score_rejected"])
            assert row["chosen"] == [{"role": "assistant", "content": best["texts"][i]}]
            assert row["rejected"] == [{"role": "assistant", "content": worst["texts"][j]}]
            assert row["margin"] == row["score_chosen"] - row["score_rejected"]
            assert (row["chosen_tokens"], row["rejected_tokens"]) == (best["tokens"][i], worst["tokens"][j])


def test_the_means_of_a_summary_are_those_of_the_rows(fake_run: Curated, tmp_path: Path) -> None:
    for version in fake_run.versions:
        summary = read_manifest(fake_run.store, version)["content"]["summary"]
        rows = published(fake_run, version.name, tmp_path)
        assert summary["rows"] == len(rows)
        for name in ("pvar", "margin", "score_chosen", "score_rejected", "chosen_tokens", "rejected_tokens"):
            assert summary[f"mean_{name}"] == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-6)


def test_many_rows_are_spread_over_several_files_in_order(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    config, selection = fake_run.config.subset[3], fake_run.selections[3]
    version = publish(PublishConfig(rows_per_file=5), config, selection, store)
    folder = fetch_version(store, version, "data/", tmp_path / "data")
    files = sorted(folder.glob("*.parquet"))
    assert [file.name for file in files] == [f"train-0000{i}.parquet" for i in range(3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [5, 5, 2]
    assert version.version != fake_run.versions[3].version
    assert read_rows(folder) == published(fake_run, "delta", tmp_path)


def test_the_readme_is_a_card_that_the_hub_reads(fake_run: Curated) -> None:
    for version in fake_run.versions:
        text = fake_run.store.read(f"{version.place}/README.md").decode()
        _, front, body = text.split("---\n", 2)
        front_matter = yaml.safe_load(front)
        assert front_matter["license"] == "other"
        assert front_matter["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
        assert front_matter["size_categories"] == ["n<1K"]
        assert f"# {version.name}" in body
        for stage in ("ingest", "generate", "score", "pair", "subset"):
            assert f"| {stage} |" in body


def test_the_manifest_lists_every_file_with_its_digest_and_the_way_of_the_rows(fake_run: Curated) -> None:
    for version, taken in zip(fake_run.versions, fake_run.selections, strict=True):
        manifest = read_manifest(fake_run.store, version)
        content = manifest["content"]
        root = Path(fake_run.store.url) / version.place
        files = {path for path in files_below(root) if path != "manifest.json"}
        assert {file["path"] for file in content["files"]} == files
        for file in content["files"]:
            data = (root / file["path"]).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
            assert file["bytes"] == len(data)
        assert manifest["version"] == version.version == content_version(content)
        stages = [step["stage"] for step in content["funnel"]]
        assert stages == ["ingest", "generate", "score", "pair", "subset"]
        for step in content["funnel"]:
            assert step["into"] == step["out"] + sum(step["dropped"].values())
        assert content["funnel"][-1]["out"] == content["counts"]["out"] == content["summary"]["rows"]
        assert content["parents"]["selection"] == taken.digest
        assert content["parents"]["scorers"] == dict(fake_run.rewards.scorers)
        used = {"on-policy": ["weak"], "delta": ["strong", "weak"]}[content["pairing"]["name"]]
        assert list(content["parents"]["generators"]) == used == content["pairing"]["generators"]


# --- versions


def test_publishing_again_gives_the_same_version_and_changes_nothing(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    for config, selection, version in zip(fake_run.config.subset, fake_run.selections, fake_run.versions, strict=True):
        assert str(publish(fake_run.config.publish, config, selection, store)) == str(version)
    assert files_below(Path(store.url)) == before


def test_two_makings_give_the_same_bytes_under_the_same_version(fake_run: Curated, tmp_path: Path) -> None:
    """Everything from pairs on is made again in another store; only the time in the manifests may differ."""
    store = copy_store(fake_run.store, tmp_path / "store")
    for folder in ("pairs", "subsets"):
        for path in store.list(folder):
            Path(store.full(path)).unlink()
    again = [pair(rule, fake_run.rewards, store) for rule in fake_run.config.pair]
    tables = {table.name: table for table in again}
    for wanted, version in zip(fake_run.config.subset, fake_run.versions, strict=True):
        assert wanted.pairs
        remade = publish(fake_run.config.publish, wanted, subset(wanted, tables[wanted.pairs], store)[0], store)
        assert str(remade) == str(version)
        for path in store.list(version.place):
            if not path.endswith("/manifest.json"):
                assert store.read(path) == fake_run.store.read(path)


def test_a_version_that_was_removed_is_made_again(fake_run: Curated, tmp_path: Path) -> None:
    import shutil

    store = copy_store(fake_run.store, tmp_path / "store")
    version = fake_run.versions[0]
    shutil.rmtree(store.full(version.place))
    assert str(publish(PublishConfig(), fake_run.config.subset[0], fake_run.selections[0], store)) == str(version)
    assert damage(store, version) == []


def test_what_is_made_instead_of_a_removed_version_is_found_although_it_has_another_name(
    store: Store, tmp_path: Path
) -> None:
    """Training on another kind of machine gives other weights."""

    def make(text: str) -> Version:
        folder = tmp_path / text
        folder.mkdir()
        (folder / "weights").write_text(text)
        version = publish_folder(store, "policies", "p", folder, {"counts": {"into": 1, "out": 1, "dropped": {}}})
        remember_build(store, version, "inputs")
        return version

    assert find_build(store, "policies", "p", "inputs") is None
    first = make("one")
    assert find_build(store, "policies", "p", "inputs") == first
    store.remove(first.place)
    assert find_build(store, "policies", "p", "inputs") is None
    assert (second := make("two")) != first
    assert find_build(store, "policies", "p", "inputs") == second


def test_of_two_runs_that_make_the_same_the_first_is_gone_on_from(store: Store, tmp_path: Path) -> None:
    made = []
    for text in ("one", "two"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "weights").write_text(text)
        content = {"counts": {"into": 1, "out": 1, "dropped": {}}}
        made.append(publish_folder(store, "policies", "p", folder, content))
    for version in made:
        remember_build(store, version, "inputs")
    assert find_build(store, "policies", "p", "inputs") == find_version(store, "p", "policies") == made[0]


def test_latest_names_the_version_that_was_published_last(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    first, wanted = fake_run.versions[0], fake_run.config.subset[0]
    assert store.read_json("subsets/top/latest.json") == {"version": first.version}
    half = wanted.model_copy(update={"steps": [RankStep(rank="pvar", fraction=0.5)]})
    second = publish(PublishConfig(), half, subset(half, fake_run.pairs[0], store)[0], store)
    assert find_version(store, "top").version == second.version != first.version
    listed = {row["version"]: row["latest"] for row in list_subsets(store)["subsets"] if row["name"] == "top"}
    assert listed == {first.version: False, second.version: True}
    publish(PublishConfig(), wanted, fake_run.selections[0], store)
    assert find_version(store, "top").version == first.version


def test_versions_are_found_by_name_and_by_the_beginning_of_their_digest(fake_run: Curated) -> None:
    version = fake_run.versions[0]
    for wanted in ("top", f"top@{version.version}", f"top@{version.version[:8]}"):
        found = find_version(fake_run.store, wanted)
        assert (found.name, found.version, found.counts) == (version.name, version.version, version.counts)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("absent", "no subset 'absent' in .*; there are: bottom, delta, random, top"),
        ("top@00000000", "subset top@00000000 does not exist; there are: [0-9a-f]{16}"),
        ("absent@00000000", "subset absent@00000000 does not exist; there are: none"),
        ("", "no subset ''"),
    ],
)
def test_an_unknown_version_is_refused_with_those_that_there_are(fake_run: Curated, wanted: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_version(fake_run.store, wanted)


def test_an_empty_store_has_no_subsets(store: Store) -> None:
    assert list_subsets(store)["subsets"] == []
    with pytest.raises(ConfigError, match="there are: none yet"):
        find_version(store, "top")


# --- verify


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(bytes(data))


def test_a_published_subset_verifies(fake_run: Curated) -> None:
    for version in fake_run.versions:
        result = verify_subset(fake_run.store, str(version))
        assert (result["problems"], result["files"]) == ([], 3)


@pytest.mark.parametrize("file", ["data/train-00000.parquet", "README.md", "report.html"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_in_a_file_is_found(fake_run: Curated, tmp_path: Path, file: str, share: float) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    path = Path(store.full(f"{fake_run.versions[0].place}/{file}"))
    flip(path, int(share * (path.stat().st_size - 1)))
    assert verify_subset(store, "top")["problems"] == [f"{file}: sha256 differs from the manifest's"]
    with pytest.raises(ConfigError, match="is damaged"):
        fetch_version(store, fake_run.versions[0], "data/" if file.startswith("data/") else "", tmp_path / "fetched")


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    path = Path(store.full(f"{fake_run.versions[0].place}/manifest.json"))
    original = path.read_bytes()
    for at in range(0, len(original), 5):
        flip(path, at)
        problems = verify_subset(store, str(fake_run.versions[0]))["problems"]
        assert len(problems) == 1 and problems[0].startswith("manifest.json: "), original[max(0, at - 20) : at + 20]
        path.write_bytes(original)
    assert verify_subset(store, "top")["problems"] == []


def test_missing_and_strange_files_are_found(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    place = fake_run.versions[0].place
    Path(store.full(f"{place}/README.md")).unlink()
    store.create(f"{place}/data/train-00001.parquet", b"not ours")
    problems = verify_subset(store, "top")["problems"]
    assert problems == ["README.md: missing", "data/train-00001.parquet: not in the manifest"]


def test_a_damaged_manifest_or_pointer_is_said_and_not_stumbled_over(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    manifest = Path(store.full(f"{fake_run.versions[0].place}/manifest.json"))
    original = manifest.read_bytes()
    looks: list[Callable[[], Any]] = [
        lambda: find_version(store, "top"),
        lambda: list_subsets(store),
        lambda: show_subset(store, "top"),
    ]
    for broken in (b"", b"\xff\xfe", b"{", b"[]", b'{"content": {}}', b'{"content": {"counts": {"into": 1}}}'):
        manifest.write_bytes(broken)
        for look in looks:
            with pytest.raises(RunError, match=r"manifest\.json in .* is damaged; remove that folder and run again"):
                look()
    manifest.write_bytes(original)
    store.replace("subsets/top/latest.json", b"{")
    with pytest.raises(RunError, match=r"latest\.json in .* is damaged; run again"):
        find_version(store, "top")
    publish(PublishConfig(), fake_run.config.subset[0], fake_run.selections[0], store)
    assert find_version(store, "top").version == fake_run.versions[0].version


def test_subsets_are_listed_also_when_a_run_died_before_it_pointed_to_its_version(
    fake_run: Curated, tmp_path: Path
) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    Path(store.full("subsets/top/latest.json")).unlink()
    assert {row["name"]: row["latest"] for row in list_subsets(store)["subsets"]}["top"] is False


def test_what_is_shown_is_json(fake_run: Curated) -> None:
    shown = show_subset(fake_run.store, "delta")
    assert len(shown["examples"]) == 3
    assert math.isfinite(shown["examples"][0]["margin"])
    json.dumps([shown, list_subsets(fake_run.store)], allow_nan=False)
