"""The configuration: what is refused, and in which words; and everything that ships is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from flows.cli import FLOWS, describe_errors, load_values, parse
from tasks.config import DEFAULT_STORE, CurateConfig, EvaluateConfig, RunConfig, TrainConfig
from tasks.errors import ConfigError
from tests.conftest import curate_values, generator, scorer
from tests.services import ROOT

PATH = Path("run.yaml")


RANKED = {"rank": "pvar", "count": 1}


def subset(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"name": "s", "steps": list(steps), **changes}


def refusal(values: dict[str, Any], flow: str = "curate") -> str:
    """What the user reads when these values are refused."""
    with pytest.raises(ConfigError) as caught:
        parse(flow, values, PATH)
    return str(caught.value)


def curate_with(**changes: Any) -> dict[str, Any]:
    return curate_values("prompts.jsonl", **changes)


def evaluate_values(**changes: Any) -> dict[str, Any]:
    return {
        "ingest": {"source": "heldout.jsonl"},
        "generate": {"generators": [generator("policy"), generator("reference")]},
        "score": {"scorers": [scorer()]},
        **changes,
    }


def train_values(**changes: Any) -> dict[str, Any]:
    return {"name": "dpo", "subset": "top", "policy": {"model": "models/base"}, **changes}


def test_a_small_configuration_of_each_flow_is_accepted() -> None:
    assert isinstance(parse("curate", curate_with(), PATH), CurateConfig)
    assert isinstance(parse("evaluate", evaluate_values(), PATH), EvaluateConfig)
    assert isinstance(parse("train", train_values(), PATH), TrainConfig)


@pytest.mark.parametrize(
    "address", ["local", "auto", "head:6379", "[::1]:6379", "http://head:8265", "https://ray.lab/"]
)
def test_where_a_flow_may_run(address: str) -> None:
    assert CurateConfig(**curate_with(), ray_address=address).ray_address == address


@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", "http://me:secret@head:8265", "head:6379/x"])
def test_an_address_that_ray_cannot_be_found_at_is_refused(address: str) -> None:
    said = refusal(curate_with(ray_address=address))
    assert "ray_address: give local, auto, HOST:PORT of a cluster to join, or http://HEAD:8265" in said


@pytest.mark.parametrize(
    ("gpus", "sizes", "words"),
    [
        (4, {"tensor_parallel_size": 2}, "gpus: 4, but tensor_parallel_size 2 x pipeline_parallel_size 1 takes 2"),
        (2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "takes 4; set gpus: 4"),
        (3, {"pipeline_parallel_size": 2}, "takes 2; set gpus: 2"),
        (0.5, {"tensor_parallel_size": 2}, "takes 2; set gpus: 2"),
        (1.5, {}, "gpus: 1.5 is neither a part of one GPU nor a number of whole ones"),
        (2, {"tensor_parallel_size": 0}, "whole numbers above 0"),
        (2, {"pipeline_parallel_size": "2"}, "whole numbers above 0"),
    ],
)
def test_a_model_in_parts_that_are_not_its_gpus_is_refused(gpus: float, sizes: dict[str, Any], words: str) -> None:
    split = {"engine": "vllm", "model": "m", "gpus": gpus, "engine_args": sizes}
    assert words in refusal(curate_with(generate={"generators": [generator(**split)]}))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_is_accepted(path: Path) -> None:
    by_folder = {"import": ["curate"], "experiments": ["experiment"]}
    parts = by_folder.get(path.parent.name) or [path.stem, *path.stem.split("-")]
    flow = next((part for part in parts if part in FLOWS), None)
    assert flow, f"name {path.name} after its flow"
    parse(flow, load_values(path, [], ""), path)


def test_the_store_is_the_field_then_the_environment_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunConfig().store_url == DEFAULT_STORE
    monkeypatch.setenv("PREFSIEVE_STORE", "s3://bucket/place")
    assert RunConfig().store_url == "s3://bucket/place"
    assert RunConfig(store="elsewhere").store_url == "elsewhere"


# --- one field


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ingest": {}}, ["ingest.source: this field is required"]),
        ({"ingest": {"source": "x", "shard_sise": 8}}, ["ingest.shard_sise: no such field", "check the spelling"]),
        ({"ingest": {"source": "x", "shard_size": 0}}, ["ingest.shard_size", "greater than or equal to 1", "got 0"]),
        ({"ingest": {"source": "x", "format": "xml"}}, ["ingest.format", "jsonl", "got 'xml'"]),
        ({"ingest": {"source": "x", "max_quarantined": 2}}, ["ingest.max_quarantined", "less than or equal to 1"]),
        ({"ingest": {"source": "x", "columns": {"promt": "q"}}}, ["ingest.columns.promt: no such field"]),
        ({"generate": {"generators": []}}, ["generate.generators", "at least 1 item"]),
        (
            {"generate": {"samples": "many", "generators": [generator()]}},
            ["generate.samples", "valid integer", "got 'many'"],
        ),
        ({"generate": {"samples": 0, "generators": [generator()]}}, ["generate.samples", "got 0"]),
        (
            {"generate": {"generators": [generator(sampling={"temperature": -1})]}},
            ["generate.generators.0.sampling.temperature", "got -1"],
        ),
        ({"generate": {"generators": [generator(engine="vlm")]}}, ["generate.generators.0.engine", "got 'vlm'"]),
        ({"generate": {"generators": [generator("a/b")]}}, ["generate.generators.0.name", "got 'a/b'"]),
        ({"generate": {"generators": [generator(seed=2**31)]}}, ["generate.generators.0.seed", "less than"]),
        ({"subset": []}, ["subset", "at least 1 item"]),
        ({"subset": [subset({"rank": "pvar", "fraction": 1.5})]}, ["subset.0.steps.0.rank.fraction", "got 1.5"]),
        ({"subset": [subset({"rank": "pvar", "count": 0})]}, ["subset.0.steps.0.rank.count", "got 0"]),
        ({"subset": [subset({"rank": "delta", "count": 1})]}, ["subset 's': rank: 'delta' is not one of pvar"]),
        ({"subset": [subset({"rank": "pvar", "count": 1}, seed=2**64)]}, ["subset.0.seed", "less than"]),
        ({"subset": [subset({"count": 1})]}, ["subset.0.steps.0: a step is `filter: METRIC` with min"]),
        ({"subset": [subset({"filter": "pvar"})]}, ["filter 'pvar': give min, max, within, quantiles or values"]),
        ({"subset": [subset({"filter": "pvar", "min": 2, "max": 1})]}, ["min 2 is above max 1"]),
        ({"subset": [subset({"filter": "source", "min": 1})]}, ["filter: 'source' is not one of pvar"]),
        ({"subset": [subset({"filter": "pvar", "values": ["a"]})]}, ["filter: 'pvar' is not one of source"]),
        (
            {"subset": [subset({"rank": "random", "count": 1}, controls=["bottom"])]},
            ["needs a `rank` step by a metric"],
        ),
        ({"subset": [subset({"rank": "pvar", "count": 1, "quotas": {"a": 0.5}})]}, ["quotas share out a count"]),
        ({"subset": [subset({"rank": "pvar", "count": 1, "by": "colour"})]}, ["by: 'colour' is not one of source"]),
        ({"publish": {"rows_per_file": 0}}, ["publish.rows_per_file", "got 0"]),
        ({"subsets": []}, ["subsets: no such field"]),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_value(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(curate_with(**changes))
    assert message.startswith("run.yaml: ")
    for word in words:
        assert word in message


def test_all_wrong_fields_are_said_at_once_each_on_a_line() -> None:
    message = refusal(curate_with(ingest={"sorce": "x"}, publish={"rows_per_file": 0}))
    assert len(message.splitlines()) == 3
    for field in ("ingest.source", "ingest.sorce", "publish.rows_per_file"):
        assert field in message


def test_descriptions_of_errors_leave_out_pydantics_own_words() -> None:
    with pytest.raises(ValidationError) as caught:
        CurateConfig.model_validate(curate_with(generate={"generators": [{"name": "a"}]}, extra=1))
    text = describe_errors(caught.value.errors())
    assert "Value error" not in text
    assert "errors.pydantic.dev" not in text
    assert "generate.generators.0: generator 'a': engine 'transformers' needs `model`: a folder or a hub name" in text


# --- fields that must fit each other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"generate": {"generators": [{"name": "big"}]}},
            ["generator 'big'", "engine 'transformers' needs `model`", "a folder or a hub name"],
        ),
        ({"generate": {"generators": [generator("a"), generator("a")]}}, ["generators", "'a' is used twice"]),
        ({"score": {"scorers": [scorer("r"), scorer("r")]}}, ["scorers", "'r' is used twice", "must differ"]),
        ({"score": {"scorers": [{"name": "r"}]}}, ["scorer 'r'", "reward_model needs `model`"]),
        (
            {"score": {"scorers": [{"name": "v", "type": "function", "function": "checks.py"}]}},
            ["scorer 'v'", "needs `function`", "checks/answers.py:score"],
        ),
        ({"pair": [{"name": "p"}, {"name": "p"}]}, ["pair", "'p' is used twice"]),
        ({"pair": [{"generators": ["nobody"]}]}, ["pair 'pairs'", "generators", "'nobody' is not one of policy"]),
        ({"pair": [{"scorer": "nothing"}]}, ["pair 'pairs'", "scorer", "'nothing' is not one of reward"]),
        (
            {"pair": [{"rule": "generator_delta", "generators": ["policy"]}]},
            ["pairing 'pairs'", "generator_delta needs `generators: [stronger, weaker]`"],
        ),
        (
            {"pair": [{"rule": "generator_delta", "generators": ["policy", "policy"]}]},
            ["pairing 'pairs'", "generators", "'policy' is used twice"],
        ),
        (
            {"generate": {"samples": 1, "generators": [generator()]}},
            ["pair 'pairs'", "best_vs_worst needs generate.samples >= 2"],
        ),
        (
            {"subset": [subset(RANKED), subset(RANKED)]},
            ["subset", "'s' is used twice", "names must differ"],
        ),
        (
            {"subset": [subset(RANKED, controls=["random"]), {**subset(RANKED), "name": "s-random"}]},
            ["subset", "'s-random' is used twice"],
        ),
        ({"subset": [subset(RANKED, pairs="other")]}, ["subset 's'", "'other' is not one of pairs"]),
        ({"subset": [subset({"rank": "pvar"})]}, ["rank 'pvar'", "give one of fraction, count and tokens"]),
        ({"subset": [subset({**RANKED, "fraction": 0.5})]}, ["give one of fraction, count and tokens"]),
        ({"ensembles": [{"name": "e", "members": ["reward", "x"]}]}, ["ensemble 'e'", "'x' is not one of reward"]),
        ({"pair": [{"rule": "labelled"}]}, ["pair 'pairs'", "rule labelled is for imported pairs"]),
        ({"pair": [{"reward_scale": -1}]}, ["pair.0.reward_scale", "greater than or equal to 0"]),
        ({"import": {"source": "x"}}, ["give either `ingest`, for prompts, or `import`"]),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused_with_what_to_do(
    changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(curate_with(**changes))
    for word in words:
        assert word in message


def test_one_sample_of_two_generators_is_enough_for_best_vs_worst() -> None:
    parse("curate", curate_with(generate={"samples": 1, "generators": [generator("a"), generator("b")]}), PATH)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"policy": "nobody"}, ["evaluate: policy", "'nobody' is not one of policy, reference"]),
        ({"reference": "nobody"}, ["evaluate: reference", "'nobody' is not one of policy, reference"]),
        ({"policy": "reference"}, ["policy and reference must be different generators"]),
    ],
)
def test_an_evaluation_of_unknown_or_equal_generators_is_refused(evaluate: dict[str, str], words: list[str]) -> None:
    message = refusal(evaluate_values(evaluate=evaluate), "evaluate")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subset": "data/pairs.parquet"}, ["subset", "got 'data/pairs.parquet'"]),
        ({"subset": "top@1234"}, ["subset", "got 'top@1234'"]),
        ({"policy": {}}, ["policy.model: this field is required"]),
        ({"train": {"batch_size": 6, "micro_batch_size": 4}}, ["micro_batch_size 4 must divide batch_size 6"]),
        ({"train": {"beta": 0}}, ["train.beta", "greater than 0", "got 0"]),
    ],
)
def test_a_wrong_training_configuration_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(train_values(**changes), "train")
    for word in words:
        assert word in message


# --- files and --set


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    for content, words in [
        (b"ingest: [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- a\n- b\n", "mapping"),
        (b"", "mapping"),
    ]:
        path = tmp_path / "c.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words) as caught:
            load_values(path, [], "")
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    for missing in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read.*check the path"):
            load_values(missing, [], "")


def test_set_changes_values_by_place_and_makes_sections(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(curate_with()))
    changes = [
        "generate.samples=16",
        "generate.generators.0.sampling.temperature=0.5",
        "ingest.source=a=b.jsonl",
        "subset.0.name=other",
        "publish.license=mit",
    ]
    config = parse("curate", load_values(path, changes, "s3://b/p"), path)
    assert config.generate.samples == 16
    assert config.generate.generators[0].sampling.temperature == 0.5
    assert config.ingest.source == "a=b.jsonl"
    assert config.subset[0].name == "other"
    assert config.publish.license == "mit"
    assert config.store == "s3://b/p"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("generate.samples", "write field=value"),
        ("generate.generators.7.seed=1", "no such place"),
        ("generate.generators.first.seed=1", "no such place"),
        ("generate.samples.more=1", "no such place"),
        ("generate.samples=[", "no such place"),
    ],
)
def test_set_names_the_change_that_it_cannot_make(tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(curate_with()))
    with pytest.raises(ConfigError, match=words) as caught:
        load_values(path, [change], "")
    assert repr(change.partition("=")[0]) in str(caught.value), "the value may be a secret"


def test_merged_mappings_are_as_yaml_has_them(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "base: &base {k: 0, j: 1}\n"
        "x: {y: &inner {<<: *base, k: 1}}\n"  # made after `e`, which writes it out
        "e: {<<: *inner, z: 3}\n"
        "f: {z: 1, <<: [*base, {k: 5, l: 5}]}\n"
        "g: {<<: *base, <<: {l: 2}}\n"
    )
    merged = {name: value for name, value in load_values(path, [], "").items() if name in "efg"}
    assert merged == {
        "e": {"k": 1, "j": 1, "z": 3},
        "f": {"k": 0, "j": 1, "l": 5, "z": 1},
        "g": {"k": 0, "j": 1, "l": 2},
    }


def test_an_unknown_flow_is_refused_with_the_known_ones() -> None:
    assert "no flow 'cure'; there are: curate, train, evaluate, experiment" in refusal(curate_with(), "cure")


def test_adaptive_rounds_go_by_a_scorer_that_rates_each_sample_alone() -> None:
    both = {"scorers": [scorer("a"), scorer("b")]}
    sampling = {"samples": 4, "generators": [generator()]}
    mixed = curate_with(
        generate={**sampling, "adaptive": {"scorer": "both"}},
        score=both,
        ensembles=[{"name": "both", "members": ["a", "b"]}],
    )
    assert "generate.adaptive: scorer: 'both' is not one of a, b" in refusal(mixed)
    duels = scorer("duel", type="judge", judge={"mode": "pairwise"})
    compared = curate_with(generate={**sampling, "adaptive": {}}, score={"scorers": [duels]})
    assert "scorer 'duel' compares within a round only" in refusal(compared)
    brought = {"import": {"source": "x", "form": "long"}, "generate": {**sampling, "adaptive": {}}}
    assert "remove `generate`" in refusal({**brought, "subset": [subset(RANKED)]})
    evaluated = evaluate_values()
    evaluated["generate"]["adaptive"] = {}
    assert "generate.adaptive is for curate" in refusal(evaluated, "evaluate")
