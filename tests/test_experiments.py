"""Experiments: what is refused, what is compared with what, and that nothing is trained twice.

Policies are tiny random models trained by TRL on published subsets of fake completions, rated by a fake reward model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main, parse
from flows.doctor import plan
from flows.markdown import experiment_markdown, experiment_text, plan_markdown
from tasks.cells import Policies, resolved, room, train_cells, trainings
from tasks.compare import compare
from tasks.errors import ConfigError, RunError
from tasks.experiment_report import keep
from tasks.experiments import Arm, ArmConfig, ExperimentConfig, ObjectiveConfig, control_of
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.records import Rewards
from tasks.score import score
from tasks.store import Store
from tasks.train import train
from tasks.versions import read_manifest
from tests.conftest import (
    NO_COST,
    Curated,
    TinyModels,
    copy_store,
    curate_values,
    files_below,
    prompts,
    scorer,
    write_jsonl,
)
from tests.services import JOINING, ROOT, environment

TRAIN = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "max_length": 256, "learning_rate": 1e-3}


def values(model: str = "models/base", source: str = "heldout.jsonl", **changes: Any) -> dict[str, Any]:
    reference = {"name": "reference", "model": model, "sampling": {"max_tokens": 6}}
    return {
        "name": "small",
        "subsets": ["top", "random"],
        "seeds": 2,
        "policy": {"model": model},
        "train": TRAIN,
        "evaluate": {
            "ingest": {"source": source, "shard_size": 8},
            "generate": {"samples": 2, "generators": [reference]},
            "score": {"scorers": [scorer("reward"), scorer("second")]},
        },
        **changes,
    }


def config(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(values(**changes))


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse("experiment", values(**changes), Path("run.yaml"))
    return str(caught.value)


# --- the configuration


def test_a_number_of_seeds_stands_for_the_first_ones() -> None:
    assert config(seeds=3).seeds == [0, 1, 2]
    assert config(seeds=[7, 3]).seeds == [7, 3]


def test_the_grid_is_every_subset_by_every_objective_unless_arms_say_otherwise() -> None:
    objectives = [{"name": "weak", "train": {"beta": 0.1}}, {"name": "strong", "train": {"beta": 0.5}}]
    whole = config(objectives=objectives)
    assert [str(arm) for arm in whole.grid()] == [
        "top x weak",
        "top x strong",
        "random x weak",
        "random x strong",
    ]
    assert len(list(whole.cells())) == 8
    some = config(objectives=objectives, arms=[{"subset": "random"}, {"subset": "top", "objective": "strong"}])
    assert [str(arm) for arm in some.grid()] == ["top x strong", "random x weak", "random x strong"]
    cell = list(whole.cells())[3]
    assert whole.training(cell, "x", "top@12345678").train.beta == 0.5
    assert whole.training(cell, "x", "top@12345678").train.seed == 1


def test_another_objective_takes_its_own_beta_and_options() -> None:
    """Scales of beta differ between objectives: that of one means nothing to another."""
    arms = [{"name": "dpo"}, {"name": "simpo", "train": {"objective": "simpo"}}]
    mixed = config(objectives=arms, train={**TRAIN, "beta": 0.3, "options": {"label_smoothing": 0.1}}, seeds=1)
    dpo, simpo, *_ = [mixed.training(cell, "x", "top@12345678").train for cell in mixed.cells()]
    assert (dpo.settings.beta, dpo.options, dpo.max_steps) == (0.3, {"label_smoothing": 0.1}, 3)
    assert (simpo.beta, simpo.options, simpo.max_steps) == (None, {}, 3)


@pytest.mark.parametrize(
    ("subset", "subsets", "control"),
    [
        ("top", ["top", "top-random", "bottom"], "top-random"),
        ("top-bottom", ["top", "top-random", "top-bottom"], "top-random"),
        ("margin-top", ["margin-top", "pvar-random", "margin-random"], "margin-random"),
        ("margin-top", ["margin-top", "margin-random", "margin-top-random"], "margin-top-random"),
        ("other", ["other", "pvar-random", "margin-random"], "pvar-random"),
        ("pvar-random", ["margin-random", "pvar-random"], "pvar-random"),
        ("top@12345678", ["top@12345678", "top-random@87654321"], "top-random@87654321"),
        ("b", ["a", "b"], "a"),
    ],
)
def test_a_subset_is_compared_with_the_random_control_nearest_by_name(
    subset: str, subsets: list[str], control: str
) -> None:
    assert control_of(subset, subsets) == control


def test_every_arm_but_one_has_a_baseline() -> None:
    objectives = [{"name": "weak"}, {"name": "strong", "train": {"beta": 0.5}}]
    by_control = config(subsets=["top", "top-random"], objectives=objectives)
    assert {str(arm): str(by_control.baseline_of(arm)) for arm in by_control.grid()} == {
        "top x weak": "top-random x weak",
        "top x strong": "top-random x strong",
        "top-random x weak": "None",
        "top-random x strong": "top-random x weak",
    }
    fixed = config(objectives=objectives, baseline={"subset": "top", "objective": "weak"})
    assert {str(fixed.baseline_of(arm)) for arm in fixed.grid()} == {"None", "top x weak"}
    few = config(subsets=["top", "top-random"], objectives=objectives, arms=[{"objective": "strong"}])
    assert few.baseline_of(Arm("top", "strong")) == Arm("top-random", "strong")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, ["seeds", "at least 1 item"]),
        ({"seeds": [1, 1]}, ["seeds: the name '1' is used twice"]),
        ({"subsets": ["a/b"]}, ["subsets.0", "pattern"]),
        ({"subsets": ["top", "top"]}, ["subsets: the name 'top' is used twice"]),
        ({"arms": [{"subset": "absent"}]}, ["arms: subset: 'absent' is not one of top, random"]),
        ({"baseline": {"subset": "absent"}}, ["baseline: subset: 'absent' is not one of top, random"]),
        ({"baseline": {}}, ["baseline: names no arm, or several"]),
        ({"train": {**TRAIN, "max_steps": 0}}, ["length: steps needs train.max_steps"]),
        ({"length": "epochs"}, ["length: epochs goes by train.epochs; remove train.max_steps"]),
        ({"train": {**TRAIN, "seed": 3}}, ["train.seed is set by `seeds`"]),
        (
            {"objectives": [{"name": "long", "train": {"max_steps": 9}}]},
            ["objectives 'long': max_steps must be the same for all arms"],
        ),
        (
            {"objectives": [{"name": "odd", "train": {"bta": 1}}]},
            ["objectives 'odd': train.bta: Extra inputs are not permitted"],
        ),
        (
            {"objectives": [{"name": "odd", "train": {"beta": -1}}]},
            ["objectives 'odd': train.beta: Input should be greater than 0"],
        ),
        ({"curate": {**curate_values("p.jsonl"), "store": "x"}}, ["curate: store and ray_address are those of"]),
        (
            {"subsets": ["other"], "curate": curate_values("p.jsonl")},
            ["curate publishes top: none of them is in `subsets`"],
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_policies_are_sampled_as_the_one_reference_is() -> None:
    evaluate = values()["evaluate"]
    two = {**evaluate, "generate": {"generators": [{"name": name, "engine": "fake"} for name in "ab"]}}
    assert "give one generator, the reference" in refusal(evaluate=two)
    assert "'absent' is not one of reward, second" in refusal(evaluate={**evaluate, "scorer": "absent"})
    reference, policy = config().generators({"p": "p@1234"}).generators
    assert policy.model == "policy:p@1234"
    assert policy.model_copy(update={"name": reference.name, "model": reference.model}) == reference


# --- running


@dataclass(frozen=True)
class Ran:
    policies: Policies
    rewards: Rewards
    result: dict[str, Any]
    costs: dict[str, Any]
    place: str


def stages(config: ExperimentConfig, store: Store) -> Ran:
    """The flow's stages, as plain functions."""
    policies = train_cells(config, resolved(config, store), store)
    held_out = ingest(config.evaluate.ingest, store)
    completions = generate(config.generators(policies.names), held_out, store, in_turn=True)
    rewards = score(config.evaluate.score, completions, store)
    result, costs = compare(config, policies, rewards, store)
    kept = keep(config, result, costs, experiment_text(result, costs), store)
    return Ran(policies, rewards, result, costs, kept.place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out prompts, and room."""
    folder = tmp_path_factory.mktemp("experiment")
    write_jsonl(folder / "heldout.jsonl", prompts(20, first=100))
    return folder


@pytest.fixture(scope="module")
def asked(folder: Path, tiny_models: TinyModels) -> ExperimentConfig:
    return config(model=str(tiny_models.generator), source=str(folder / "heldout.jsonl"), at_once=1)


@pytest.fixture(scope="module")
def finished(asked: ExperimentConfig, folder: Path, fake_run: Curated) -> tuple[Store, Ran]:
    store = copy_store(fake_run.store, folder / "finished")
    return store, stages(asked, store)


def test_every_cell_is_trained_once_and_says_what_it_was_trained_on(
    asked: ExperimentConfig, finished: tuple[Store, Ran]
) -> None:
    store, ran = finished
    assert ran.policies.trained == 4
    assert [str(cell) for cell in ran.policies.versions] == [
        "top x dpo x seed 0",
        "top x dpo x seed 1",
        "random x dpo x seed 0",
        "random x dpo x seed 1",
    ]
    for cell, version in ran.policies.versions.items():
        content = read_manifest(store, version)["content"]
        assert content["parents"]["subset"].startswith(f"{cell.arm.subset}@")
        assert content["train"]["seed"] == cell.seed
        assert version.name.startswith(f"{cell.arm.subset}-dpo-s{cell.seed}-")
    assert len({version.version for version in ran.policies.versions.values()}) == 4


def test_a_process_that_trained_before_gives_the_same_policy_as_a_fresh_one(
    asked: ExperimentConfig, finished: tuple[Store, Ran], folder: Path, fake_run: Curated
) -> None:
    last, version = list(finished[1].policies.versions.items())[-1]
    store = copy_store(fake_run.store, folder / "fresh")
    alone = train(trainings(asked, resolved(asked, store), store)[last], store)
    assert str(alone) == str(version)


def test_one_process_answers_for_all_policies_in_turn(asked: ExperimentConfig, finished: tuple[Store, Ran]) -> None:
    work = finished[1].rewards.completions.work
    assert work.engine_starts == 1
    assert work.shards_made == 5 * 3  # reference and four policies, 20 prompts in shards of 8
    assert work.requests == 5 * 20
    assert finished[1].rewards.work.engine_starts == 2  # a scorer each, for all policies


def test_policies_answer_in_turn_as_they_do_alone(
    asked: ExperimentConfig, finished: tuple[Store, Ran], folder: Path
) -> None:
    store, ran = finished
    alone = copy_store(store, folder / "alone")
    generators = asked.generators(ran.policies.names)
    fingerprint = ran.rewards.completions.generators[generators.generators[1].name]
    before = {path: store.read_table(path) for path in store.list(f"completions/{fingerprint}")}
    for path in before:
        alone.remove(path)
    some = generators.model_copy(update={"generators": generators.generators[:2]})
    generate(some, ran.rewards.completions.prompts, alone)
    assert len(before) == 3
    for path, table in before.items():
        assert alone.read_table(path)["texts"] == table["texts"]


def test_the_result_has_every_arm_its_difference_and_its_words(finished: tuple[Store, Ran]) -> None:
    result, costs = finished[1].result, finished[1].costs
    top, random = result["arms"]
    assert (random["verdict"], random["difference"]) == ("not distinguishable", random["difference"])
    assert top["verdict"] == "baseline"  # no name ends in -random: the first subset is what others are compared with
    assert random["against"] == "top x dpo"
    assert random["difference"]["low"] <= 0 <= random["difference"]["high"]
    assert top["reward"]["mean"] == pytest.approx(sum(top["by_seed"]) / 2, abs=1e-6)
    assert list(top["others"]) == ["second"]
    assert [step for step, _ in top["curves"]["loss"]] == [1, 2, 3]
    assert "implicit margin" in top["curves"]
    assert ["2 seeds: how much trainings differ by chance" in warning for warning in result["warnings"]] == [True]
    for cell in costs["cells"]:
        assert cell["steps"] == 3
        assert cell["training_tokens"] > 0
        assert cell["generated_tokens"] > 0
        assert cell["train_seconds"] > 0
        assert cell["evaluate_seconds"] > 0


def test_a_finished_experiment_starts_nothing_and_writes_nothing(
    asked: ExperimentConfig, finished: tuple[Store, Ran]
) -> None:
    store, ran = finished
    before = files_below(Path(store.url))
    again = stages(asked, store)
    assert again.policies.trained == 0
    assert again.rewards.completions.work.engine_starts == again.rewards.work.engine_starts == 0
    assert (again.result, again.costs, again.place) == (ran.result, ran.costs, ran.place)
    latest = f"experiments/{asked.name}/latest.json"
    after = files_below(Path(store.url))
    assert {path: after[path] for path in before if path != latest} == {
        path: about for path, about in before.items() if path != latest
    }


def test_a_grown_experiment_trains_and_samples_only_what_is_new(
    asked: ExperimentConfig, finished: tuple[Store, Ran], folder: Path
) -> None:
    store = copy_store(finished[0], folder / "grown")
    grown = asked.model_copy(update={"subsets": [*asked.subsets, "bottom"], "name": "larger"})
    before = files_below(Path(store.url))
    states = plan(grown.model_copy(update={"store": store.url}))
    assert [row["train"] for row in states["cells"]] == ["done"] * 4 + ["missing"] * 2
    assert [row["evaluate"] for row in states["cells"]] == ["done"] * 4 + ["missing"] * 2
    assert "2 of 6 cells" in plan_markdown(states)
    assert files_below(Path(store.url)) == before
    ran = stages(grown, store)
    assert ran.policies.trained == 2
    assert ran.rewards.completions.work.requests == 2 * 20
    after = files_below(Path(store.url))
    assert {path: after[path] for path in before} == before
    assert plan(grown.model_copy(update={"store": store.url}))["work"][-1]["to do"] == "nothing, all in the store"


def test_seeds_that_decide_nothing_share_a_policy(
    asked: ExperimentConfig, finished: tuple[Store, Ran], folder: Path
) -> None:
    store = copy_store(finished[0], folder / "sorted")
    by_margin = ObjectiveConfig(name="sorted", train={"order": "margin"})
    only = [ArmConfig(objective="dpo"), ArmConfig(subset="top", objective="sorted")]
    ran = stages(asked.model_copy(update={"objectives": [*asked.objectives, by_margin], "arms": only}), store)
    assert ran.policies.trained == 1
    assert ran.rewards.completions.work.requests == 20
    one, other = (version for cell, version in ran.policies.versions.items() if cell.arm.objective == "sorted")
    assert one == other
    (arm,) = [arm for arm in ran.result["arms"] if arm["objective"] == "sorted"]
    assert arm["by_seed"][0] == arm["by_seed"][1]
    first, second = (cell for cell in ran.costs["cells"] if cell["objective"] == "sorted")
    assert first["steps"] == 3 and first["train_seconds"] > 0 and first["generated_tokens"] > 0
    assert [second[what] for what in ("steps", "training_tokens", "train_seconds", "generated_tokens")] == [0] * 4
    assert any("top x sorted" in warning and "share one policy" in warning for warning in ran.result["warnings"])


def test_the_report_stands_alone_and_holds_what_was_found(finished: tuple[Store, Ran]) -> None:
    store, ran = finished
    page = store.read(f"{ran.place}/report.html").decode()
    assert "default-src 'none'" in page
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)
    for part in ("top x dpo", "random x dpo", "not distinguishable", "Learning curves", "implicit margin", "Costs"):
        assert part in page
    for version in ran.policies.versions.values():
        assert str(version) in page
    text = store.read(f"{ran.place}/report.md").decode()
    assert "**random x dpo**: not distinguishable" in text
    manifest = store.read_json(f"{ran.place}/manifest.json")
    assert set(manifest["cells"].values()) == {str(version) for version in ran.policies.versions.values()}
    assert store.read_json(f"{ran.place}/results.json") == ran.result
    about = {"costs": ran.costs, "cost": NO_COST, "version": "small@0", "place": "there"}
    shown = experiment_markdown({**ran.result, **about})
    assert shown.startswith(text)


def test_prompts_that_were_trained_on_are_no_held_out_prompts(
    asked: ExperimentConfig, finished: tuple[Store, Ran], folder: Path
) -> None:
    store = copy_store(finished[0], folder / "leak")
    source = write_jsonl(folder / "leak.jsonl", prompts(40))
    evaluate = asked.evaluate.model_copy(
        update={"ingest": asked.evaluate.ingest.model_copy(update={"source": str(source)})}
    )
    leaking = asked.model_copy(update={"evaluate": evaluate})
    warnings = stages(leaking, store).result["warnings"]
    assert sum("of the held-out prompts are in top@" in warning for warning in warnings) == 1


def test_equal_trainings_under_two_names_are_refused(asked: ExperimentConfig, finished: tuple[Store, Ran]) -> None:
    twice = asked.model_copy(
        update={"objectives": [*asked.objectives, asked.objectives[0].model_copy(update={"name": "b"})]}
    )
    with pytest.raises(ConfigError, match="are the same training; remove one"):
        trainings(twice, resolved(twice, finished[0]), finished[0])
    version = resolved(asked, finished[0])["top"]
    doubled = asked.model_copy(update={"subsets": ["top", version]})
    with pytest.raises(ConfigError, match="is in the list under another name too"):
        resolved(doubled, finished[0])


def test_a_cell_that_fails_is_told_at_the_end_and_the_others_are_kept(
    asked: ExperimentConfig, folder: Path, fake_run: Curated
) -> None:
    store = copy_store(fake_run.store, folder / "failing")
    wild = asked.model_copy(update={"seeds": [0], "objectives": [*asked.objectives]})
    broken = ExperimentConfig.model_validate(
        {
            **wild.model_dump(exclude_unset=True),
            "objectives": [{"name": "short", "train": {"max_length": 2}}, {"name": "dpo"}],
            "subsets": ["top"],
        }
    )
    with pytest.raises(RunError, match=r"1 of 2 cells failed, the others are kept\. top x short x seed 0: train: all"):
        train_cells(broken, resolved(broken, store), store)
    assert len([path for path in store.list("policies") if path.endswith("/manifest.json")]) == 1


class Nodes:
    """A cluster's resources."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.resources = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.resources]


def test_as_many_trainings_go_on_at_once_as_there_is_room_for() -> None:
    small = config(ray_address="auto", policy={"model": "m", "cpus": 2, "gpus": 1})
    assert room(Nodes({"CPU": 16, "GPU": 4}, {"CPU": 3, "GPU": 8}, {"CPU": 64}), small) == 5
    assert room(Nodes({"CPU": 1}), small) == 1
    here = config(policy={"model": "m", "cpus": 1})
    assert room(Nodes({"CPU": 1000}), here) == os.cpu_count()


# --- killed


def test_an_experiment_that_was_killed_half_way_goes_on_and_ends_as_an_undisturbed_one(
    asked: ExperimentConfig,
    finished: tuple[Store, Ran],
    folder: Path,
    fake_run: Curated,
    local_ray: Any,
    prefect_api: str,
) -> None:
    store = copy_store(fake_run.store, folder / "killed")
    written = {
        **asked.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "store": store.url,
        "ray_address": local_ray.get_runtime_context().gcs_address,
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(written))
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(folder / "prefect"), **JOINING)
    command = [sys.executable, "-m", "flows.cli", "experiment", str(path), "--json"]
    with (folder / "killed.log").open("w") as log:
        run = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while len(store.list("costs/train")) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
    done = [path for path in store.list("policies") if path.endswith("/manifest.json")]
    assert 2 <= len(done) < 4, (folder / "killed.log").read_text()
    time.sleep(3)  # a training that went on may finish: it counts as done
    before = {path: about for path, about in files_below(Path(store.url)).items() if "/manifest.json" in path}
    again = subprocess.run(command, env=env, cwd=ROOT, timeout=400, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    after = files_below(Path(store.url))
    assert report["trained"] == 4 - len([path for path in before if path.startswith("policies/")])
    assert {path: after[path] for path in before} == before
    undisturbed = finished[1]
    assert report["version"] == f"small@{undisturbed.place.rpartition('/')[2]}"
    assert report["arms"] == undisturbed.result["arms"]


# --- the command


def test_a_subset_that_is_missing_ends_the_command_with_status_2(
    asked: ExperimentConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "missing.yaml"
    path.write_text(yaml.safe_dump({**asked.model_dump(mode="json", exclude_unset=True), "subsets": ["absent"]}))
    monkeypatch.setattr(sys, "argv", ["prefsieve", "experiment", str(path), "--store", str(folder / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no subset 'absent'" in capfd.readouterr().err
