"""Training by TRL in a Ray actor, on a published subset of fake completions and with a tiny random model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.config import TrainConfig
from tasks.errors import ConfigError, RunError
from tasks.job import Job
from tasks.models import fetch_policy
from tasks.store import Store
from tasks.train import train, training_digest
from tasks.versions import damage, find_version, read_manifest
from tests.conftest import Curated, TinyModels, copy_store

STEPS = 6
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 256,
    "learning_rate": 1e-3,
}


def train_config(models: TinyModels, store: Store, **changes: Any) -> TrainConfig:
    values = {"name": "tuned", "subset": "delta", "policy": {"model": str(models.generator)}, "train": SETTINGS}
    return TrainConfig.model_validate({**values, "store": store.url, **changes})


@pytest.fixture(scope="module")
def trained(fake_run: Curated, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = copy_store(fake_run.store, tmp_path_factory.mktemp("train") / "store")
    config = train_config(tiny_models, store)
    return config, store, train(config, store)


def metrics(store: Store, place: str) -> list[dict[str, float]]:
    lines = store.read(f"{place}/metrics.jsonl").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_the_first_step_has_loss_ln_2_and_every_step_is_in_the_metrics(trained: Any) -> None:
    _, store, version = trained
    steps = metrics(store, version.place)
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert math.isclose(steps[0]["loss"], math.log(2), abs_tol=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_policy_names_its_data_and_model_and_can_be_verified_and_loaded(trained: Any, fake_run: Curated) -> None:
    from transformers import AutoModelForCausalLM

    config, store, version = trained
    parents = read_manifest(store, version)["content"]["parents"]
    assert parents["subset"] == str(find_version(store, "delta")) == str(fake_run.versions[-1])
    assert damage(store, version) == []
    AutoModelForCausalLM.from_pretrained(fetch_policy(store, str(version)))
    files = store.list(f"policies/{config.name}")
    assert not [file for file in files if file.endswith((".bin", ".pkl", ".pickle", ".pt", ".pth"))]


def test_training_again_does_no_work(trained: Any) -> None:
    config, store, version = trained
    before = store.list("policies")
    again = train(config, store)
    assert str(again) == str(version) and again.work.seconds == 0
    assert store.list("policies") == before


def interrupted(config: TrainConfig, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in which the training came to its end, and everything after its checkpoints was lost."""
    cut = copy_store(store, folder)
    shutil.rmtree(Path(cut.url) / "policies" / config.name)
    with monkeypatch.context() as patched:
        patched.setattr(Job, "_publish", lambda *_: None)
        Job(config, training_digest(config, cut), cut.url).run(lambda *_: None)
    return cut


def test_a_job_that_lost_its_end_goes_on_from_the_last_checkpoint_to_the_same_version(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, version = trained
    cut = interrupted(config, store, tmp_path / "store", monkeypatch)
    (attempt,) = (Path(cut.url) / "policies" / config.name / "checkpoints").glob("*/*")
    assert sorted(folder.name for folder in attempt.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    shutil.rmtree(attempt / "checkpoint-6")
    resumed = train(config.model_copy(update={"store": cut.url}), cut)
    assert str(resumed) == str(version)
    assert not cut.list(f"policies/{config.name}/checkpoints")


def test_a_checkpoint_that_was_not_finished_is_not_used(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, _ = trained
    cut = interrupted(config, store, tmp_path / "store", monkeypatch)
    (attempt,) = (Path(cut.url) / "policies" / config.name / "checkpoints").glob("*/*")
    (attempt / "checkpoint-6" / "complete.json").unlink()
    worker = Job(config, attempt.parent.name, cut.url)
    assert worker._last_checkpoint(tmp_path / "room").name == "checkpoint-4"


def test_an_attempt_leaves_the_checkpoints_of_another_that_still_runs(trained: Any, tmp_path: Path) -> None:
    config, _, _ = trained
    cut = copy_store(trained[1], tmp_path / "store")
    one, two = (Job(config, "inputs", cut.url) for _ in range(2))

    def save(worker: Job, step: int) -> None:
        folder = tmp_path / worker.attempt / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
        worker._save_checkpoint(folder)

    def kept(worker: Job) -> list[str]:
        return [path.split("/")[-2] for path in worker._complete() if worker.attempt in path]

    for step in (2, 4, 6):
        save(one, step)
    assert two._last_checkpoint(tmp_path / "room").name == "checkpoint-6"
    save(two, 8)
    save(one, 8)
    assert (kept(one), kept(two)) == (["checkpoint-6", "checkpoint-8"], ["checkpoint-8"])
    save(two, 10)  # now two has enough of its own: what it started from may go
    assert (kept(one), kept(two)) == (["checkpoint-8"], ["checkpoint-8", "checkpoint-10"])
    save(one, 10)
    assert kept(one) == ["checkpoint-8", "checkpoint-10"]


def test_settings_that_leave_the_weights_alone_are_not_in_the_name_of_a_policy(trained: Any) -> None:
    config, store, version = trained
    changed = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 3})})
    assert str(train(changed, store)) == str(version)
    content = read_manifest(store, version)["content"]
    assert not {"save_steps", "gradient_checkpointing"} & set(content["train"])
    assert content["parents"]["model_name"] == config.policy.model.rpartition("/")[2]


def test_pairs_that_do_not_fit_are_dropped_and_counted(trained: Any, tiny_models: TinyModels, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tasks.trainers.data import load_pairs
    from tasks.versions import fetch_version

    config, store, _ = trained
    data = fetch_version(store, find_version(store, "delta"), "data/", tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.generator)
    short = config.model_copy(update={"train": config.train.model_copy(update={"max_length": 100})})
    pairs, counts = load_pairs(short, data, tokenizer, tmp_path / "cache")
    assert 0 < counts.out == len(pairs) < counts.into == 12
    assert counts.dropped == {"longer than max_length": counts.into - counts.out}
    with pytest.raises(RunError, match="longer than max_length 3; raise it"):
        load_pairs(
            short.model_copy(update={"train": short.train.model_copy(update={"max_length": 3})}),
            data,
            tokenizer,
            tmp_path,
        )


def test_a_path_or_an_unknown_subset_is_refused(tiny_models: TinyModels, trained: Any) -> None:
    _, store, _ = trained
    with pytest.raises(ValueError, match="subset"):
        train_config(tiny_models, store, subset="./data/pairs.parquet")
    with pytest.raises(ConfigError, match="no subset 'nothing'"):
        train(train_config(tiny_models, store, subset="nothing"), store)


def test_a_damaged_subset_is_not_trained_on(trained: Any, tiny_models: TinyModels, tmp_path: Path) -> None:
    _, store, _ = trained
    cut = copy_store(store, tmp_path / "store")
    version = find_version(cut, "top")
    file = next(Path(cut.url, version.place, "data").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    worker = Job(train_config(tiny_models, cut, subset="top"), "inputs", cut.url)
    with pytest.raises(ConfigError, match="damaged"):
        worker.run(lambda *state: None)
