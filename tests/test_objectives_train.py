"""Every objective trains the small world's policy on a subset published from its own rated completions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.tinyworld.verifier import score_text
from tasks.config import PairingConfig, PublishConfig, RankStep, SubsetConfig, TrainConfig
from tasks.imports import import_
from tasks.job import Job
from tasks.objectives.settings import SETTINGS
from tasks.pair import pair
from tasks.publish import publish
from tasks.sections import ImportConfig
from tasks.store import Store
from tasks.subset import subset
from tasks.train import helpers_of
from tasks.versions import find_version, read_manifest
from tests.conftest import write_jsonl
from tests.tinyworld_fixture import tinyworld  # noqa: F401 (a fixture)

pytestmark = pytest.mark.timeout(1800)  # the first test may build the world
STEPS = 20
LN2 = {"dpo", "dpo_norm", "gdpo", "dadpo", "tisdpo"}


@pytest.fixture(scope="module")
def store(tinyworld: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:  # noqa: F811
    """The 100 pairs of highest PVar of 160 prompts with 6 answers each, rated twice."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.tinyworld.generators import sample

    folder = tmp_path_factory.mktemp("objectives")
    model = AutoModelForCausalLM.from_pretrained(tinyworld / "policy")
    prompts = [json.loads(line) for line in (tinyworld / "prompts.jsonl").read_text().splitlines()[:160]]
    answers = sample(
        model, AutoTokenizer.from_pretrained(tinyworld / "policy"), [p["prompt"] for p in prompts], 6, seed=3
    )
    rows = [
        {"prompt": p["prompt"], "text": text, "right": score_text(p["answer"], text), "length": -abs(len(text) - 5)}
        for p, texts in zip(prompts, answers, strict=True)
        for text in texts
    ]
    ratings = [{"name": "right", "column": "right"}, {"name": "length", "column": "length"}]
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    made = Store(folder / "store")
    config = ImportConfig.model_validate(
        {"source": source, "form": "long", "columns": {"text": "text"}, "ratings": ratings}
    )
    table = pair(PairingConfig(scorer="right"), import_(config, made), made)
    steps = SubsetConfig(name="top", steps=[RankStep(rank="pvar", count=100)])
    publish(PublishConfig(), steps, subset(steps, table, made)[0], made)
    return made


def config_of(store: Store, policy: Path, objective: str, **train: Any) -> TrainConfig:
    settings = {"max_steps": STEPS, "batch_size": 16, "micro_batch_size": 16, "max_length": 64, "learning_rate": 2e-4}
    if objective == "crpo":
        train = {"options": {"weights": {"margin": 1.0, "length": 0.5}}, **train}
    values = {"name": objective, "subset": "top", "policy": {"model": str(policy)}, "store": store.url}
    return TrainConfig.model_validate({**values, "train": {**settings, "objective": objective, **train}})


def run(config: TrainConfig, store: Store, helpers: list[str]) -> list[dict[str, float]]:
    """Metrics of every step."""
    Job(config, "inputs", store.url, helpers).run(lambda *state: None)
    place = find_version(store, config.name, "policies").place
    return [json.loads(line) for line in store.read(f"{place}/metrics.jsonl").splitlines()]


@pytest.mark.parametrize("objective", list(SETTINGS))
def test_every_objective_trains(objective: str, store: Store, tinyworld: Path) -> None:  # noqa: F811
    config = config_of(store, tinyworld / "policy", objective)
    helpers = []
    for helper in helpers_of(config):
        run(helper, store, [])
        helpers.append(str(find_version(store, helper.name, "policies")))
    steps = run(config, store, helpers)
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in steps)
    if objective in LN2:
        assert math.isclose(steps[0]["loss"], math.log(2), abs_tol=1e-3)
    before, after = (sum(entry["rewards/margins"] for entry in part) for part in (steps[:5], steps[-5:]))
    assert after > before or objective == "sft"  # imitation alone need not lower what is rejected
    content = read_manifest(store, find_version(store, objective, "policies"))["content"]
    assert content["train"]["settings"] == config.train.settings.model_dump()
    assert content["parents"].get("helpers", []) == helpers and len(helpers) == (2 if objective == "tisdpo" else 0)
