"""Training jobs: what is kept, adapters, several workers, and what is left when one is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.config import TrainConfig
from tasks.errors import ConfigError, RunError
from tasks.job import Job
from tasks.models import fetch_policy
from tasks.store import Store
from tasks.train import find_training, train
from tasks.versions import find_version
from tests.conftest import Curated, TinyModels, copy_store
from tests.services import ROOT

REF = "ref_chosen_logps"
SETTINGS = {"max_steps": 4, "save_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def store(fake_run: Curated, tmp_path: Path) -> Store:
    return copy_store(fake_run.store, tmp_path / "store")


def config_of(models: TinyModels, store: Store, policy: dict[str, Any] | None = None, **train: Any) -> TrainConfig:
    values = {"name": "tuned", "subset": "delta", "policy": {"model": str(models.generator), **(policy or {})}}
    return TrainConfig.model_validate({**values, "store": store.url, "train": {**SETTINGS, **train}})


def run(config: TrainConfig, store: Store, helpers: list[str] | None = None, inputs: str = "inputs") -> str:
    """Without Ray: the job alone; the place of its policy."""
    Job(config, inputs, store.url, helpers or []).run(lambda *state: None)
    return find_version(store, config.name, "policies").place


def losses(store: Store, place: str) -> list[float]:
    return [json.loads(line)["loss"] for line in store.read(f"{place}/metrics.jsonl").splitlines()]


def test_reference_log_probabilities_are_computed_once_and_shared(
    store: Store, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.trainers.pairs import PairTrainer

    first = run(config_of(tiny_models, store), store)
    (kept,) = store.list("references")
    rows = pq.read_table(store.full(kept), partitioning=None)
    assert rows.column_names == ["ref_chosen_logps", "ref_rejected_logps"] and rows.num_rows == 12

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(PairTrainer, "_sums", refuse)
    assert losses(store, run(config_of(tiny_models, store), store, inputs="same")) == losses(store, first)
    again = run(config_of(tiny_models, store, learning_rate=2e-3), store, inputs="faster")
    assert losses(store, again)[0] == losses(store, first)[0]
    assert losses(store, again)[-1] != losses(store, first)[-1]
    with pytest.raises(AssertionError, match="computed again"):
        run(config_of(tiny_models, store, max_length=128), store, inputs="shorter")


def test_references_of_another_model_are_noticed_at_the_first_step(store: Store, tiny_models: TinyModels) -> None:
    import pyarrow as pa

    run(config_of(tiny_models, store), store)
    (kept,) = store.list("references")
    rows = store.read_table(kept)
    shifted = rows.set_column(0, rows.column_names[0], pa.array([v - 5 for v in rows[0].to_pylist()], pa.float32()))
    store.remove(kept)
    store.create_table(kept, shifted)
    with pytest.raises(RunError, match="policy and reference differ; remove"):
        run(config_of(tiny_models, store, seed=1), store, inputs="other")


def test_adapters_are_merged_and_change_the_model_by_a_low_rank(store: Store, tiny_models: TinyModels) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    place = run(config_of(tiny_models, store, lora={"rank": 2}, max_steps=6, learning_rate=1e-2), store)
    assert math.isclose(losses(store, place)[0], math.log(2), abs_tol=1e-4)
    tuned = AutoModelForCausalLM.from_pretrained(fetch_policy(store, str(find_version(store, "tuned", "policies"))))
    base = AutoModelForCausalLM.from_pretrained(tiny_models.generator)
    assert tuned.state_dict().keys() == base.state_dict().keys()
    changes = {name: weight - base.state_dict()[name] for name, weight in tuned.state_dict().items()}
    changed = {name: change for name, change in changes.items() if change.abs().max() > 1e-6}
    assert changed and all("proj" in name for name in changed)
    assert all(torch.linalg.matrix_rank(change, atol=1e-5) <= 2 for change in changed.values())


def test_bfloat16_starts_where_the_reference_is_and_takes_small_steps(store: Store, tiny_models: TinyModels) -> None:
    """Steps of 1e-5 are less than the distance of most neighbours in bfloat16: they must add up elsewhere."""
    settings = {"max_steps": 60, "save_steps": 60, "learning_rate": 1e-5}
    curves = {}
    for dtype in ("float32", "bfloat16"):
        curves[dtype] = losses(
            store, run(config_of(tiny_models, store, policy={"dtype": dtype}, **settings), store, inputs=dtype)
        )
    assert math.isclose(curves["bfloat16"][0], math.log(2), abs_tol=0.02)
    moved = {dtype: sum(curve[:5]) - sum(curve[-5:]) for dtype, curve in curves.items()}
    assert moved["float32"] > 0 and moved["bfloat16"] == pytest.approx(moved["float32"], rel=0.5)


def test_largest_margins_come_first_where_the_order_is_by_margin(store: Store, tiny_models: TinyModels) -> None:
    place = run(config_of(tiny_models, store, order="margin"), store)
    (kept,) = store.list("references")
    (data,) = store.list(f"{find_version(store, 'delta').place}/data")
    margins, references = (store.read_table(path)[name].to_pylist() for path, name in ((data, "margin"), (kept, REF)))
    order = sorted(range(len(margins)), key=lambda row: -margins[row])
    expected = [sum(references[row] for row in order[i : i + 4]) / 4 for i in range(0, len(order), 4)]
    first = json.loads(store.read(f"{place}/metrics.jsonl").splitlines()[0])
    assert len(set(margins)) > 1 and first["logps/chosen"] == pytest.approx(expected[0], rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_an_objective_says_which_column_it_misses(store: Store, tiny_models: TinyModels) -> None:
    wanted = config_of(tiny_models, store, objective="crpo", options={"weights": {"helpfulness": 1.0}})
    with pytest.raises(ConfigError, match=r"objective 'crpo' needs the column 'margin.helpfulness'.*it has:.*pvar"):
        run(wanted, store)


def test_metrics_are_left_for_tensorboard(store: Store, tiny_models: TinyModels) -> None:
    run(config_of(tiny_models, store), store)
    (file,) = store.list("policies/tuned/logs")
    assert "tfevents" in file and b"train/loss" in store.read(file)
    place = run(config_of(tiny_models, store, report_to=[], seed=3), store, inputs="quiet")
    assert len(losses(store, place)) == 4 and len(store.list("policies/tuned/logs")) == 1


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_workers_follow_the_same_curve_as_one(objective: str, store: Store, tiny_models: TinyModels) -> None:
    """Two first: nothing is kept in the store that they could read instead of working it out."""
    shared = config_of(tiny_models, store, policy={"workers": 2}, micro_batch_size=2, objective=objective)
    two = losses(store, train(shared, store).place)
    assert len(two) == 4 and all(map(math.isfinite, two))
    if objective == "dpo":  # KTO's divergence is estimated from what meets in one process
        alone = config_of(tiny_models, store).model_copy(update={"name": "alone"})
        assert losses(store, run(alone, store)) == pytest.approx(two, rel=1e-4)


def test_workers_share_batches_evenly_or_are_refused(store: Store, tiny_models: TinyModels) -> None:
    with pytest.raises(ValueError, match=r"workers 3 and train\.micro_batch_size 4 do not share a batch_size of 4"):
        config_of(tiny_models, store, policy={"workers": 3})
    with pytest.raises(ConfigError, match=r"room for \d of 64 workers"):
        train(config_of(tiny_models, store, policy={"workers": 64}, batch_size=64, micro_batch_size=1), store)


def test_the_two_sides_of_a_pair_are_no_neighbours_when_unpaired() -> None:
    from datasets import Dataset

    from tasks.trainers.data import unpaired

    texts = [str(i) for i in range(9)]
    pairs = Dataset.from_dict(
        {"prompt": texts, "chosen": [f"{t} good" for t in texts], "rejected": [f"{t} bad" for t in texts]}
    )
    rows = list(unpaired(pairs, seed=0))
    assert [row["label"] for row in rows] == [True, False] * 9
    assert all(row["completion"] == f"{row['prompt']} {'good' if row['label'] else 'bad'}" for row in rows)
    assert sorted(row["prompt"] for row in rows) == sorted(texts * 2)
    prompts = [row["prompt"] for row in rows]
    assert all(prompts[i] != prompts[i - 1] for i in range(len(prompts)))
    assert prompts != [row["prompt"] for row in unpaired(pairs, seed=1)]


KILLED = """
import sys
from tasks.config import TrainConfig
from tasks.job import Job
from tasks.store import Store
config = TrainConfig.model_validate_json(sys.argv[1])
store = Store(config.store)
Job(config, sys.argv[2], store.url).run(lambda *state: None)
"""


def test_a_killed_training_goes_on_from_its_last_checkpoint(
    store: Store, tiny_models: TinyModels, tmp_path: Path
) -> None:
    undisturbed = copy_store(store, tmp_path / "undisturbed")
    config = config_of(tiny_models, store, max_steps=60, save_steps=5)
    program = [sys.executable, "-c", KILLED, config.model_dump_json(), "inputs"]
    began = time.monotonic()
    killed = subprocess.Popen(program, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not [path for path in store.list("policies") if path.endswith("complete.json")]:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    saved = [path for path in store.list("policies") if path.endswith("complete.json")]
    last = max(int(path.split("/")[-2].removeprefix("checkpoint-")) for path in saved)
    assert 5 <= last < 60
    assert find_training(config, store) is None
    seen: list[int] = []
    assert 0 < Job(config, "inputs", store.url).spent() < time.monotonic() - began
    Job(config, "inputs", store.url).run(lambda step, *_: seen.append(step))
    assert seen == list(range(last + 1, 61))
    place = find_version(store, "tuned", "policies").place
    assert not store.list("policies/tuned/checkpoints")
    assert losses(store, place) == losses(undisturbed, run(config, undisturbed))
