"""train: a published subset becomes a policy.

The job runs as a Ray actor that fetches the version (checking every digest), trains, and publishes the model with its
metrics as policies/<name>/<version>/; several workers share each batch through Ray Train. Checkpoints go to the store
as they are made; a job that died goes on from the last. Log-probabilities of the reference are kept under references/
for every training on the same version, model and length.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tasks import models
from tasks.cluster import check_room, connect, reraise, telling
from tasks.config import TrainConfig
from tasks.job import Job
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, Version, Work, digest
from tasks.store import Store
from tasks.training import TrainingConfig
from tasks.versions import find_build, find_version

_POLL = 1.0  # seconds


def train(config: TrainConfig, store: Store, report: Report = silent) -> Version:
    """The policy that this subset, model and training configuration give; trained once."""
    started = time.monotonic()
    inputs, subset = _inputs(config, store)
    known = find_build(store, "policies", config.name, inputs)
    if known:
        Meter(report, "train", 1, "policies", reused=1)
        return known
    helpers = [str(train(helper, store, report)) for helper in helpers_of(config)]
    config = config.model_copy(update={"policy": models.pinned("policy.model", config.policy, store)})
    ray = connect(config.ray_address)
    check_room(ray, config.policy)
    alone = config.policy.workers == 1
    resources = {"num_cpus": config.policy.cpus, "num_gpus": config.policy.gpus} if alone else {"num_cpus": 0}
    actor = ray.remote(TrainWorker).options(**resources, max_concurrency=3)
    worker = actor.remote(config, str(subset), inputs, store.url, helpers)
    try:
        with reraise(ray):
            _follow(ray, worker, report)
    finally:
        ray.kill(worker)  # also when whoever waits is interrupted: nobody else knows of it
    made = find_build(store, "policies", config.name, inputs)
    assert made
    return Version(made.name, made.version, made.counts, Work(seconds=time.monotonic() - started), "policies")


def _follow(ray: Any, worker: Any, report: Report) -> None:
    """Run the job and report its steps."""
    done = worker.run.remote()
    meter, seen = None, 0
    while True:
        finished = ray.wait([done], timeout=_POLL)[0]
        if finished:
            ray.get(done)
        step, steps, loss = ray.get(worker.progress.remote())
        if steps and meter is None:
            meter = Meter(report, "train", steps, "steps")
        if meter and step > seen:
            meter.add(step - seen, f"loss {loss:.4f}")
            seen = step
        if finished:
            return


def find_training(config: TrainConfig, store: Store) -> Version | None:
    """The policy, when it was trained before."""
    return find_build(store, "policies", config.name, _inputs(config, store)[0], claim=False)


def helpers_of(config: TrainConfig) -> list[TrainConfig]:
    """Trainings whose policies this one needs: TIS-DPO's two, on the pairs as they are and on swapped ones."""
    if config.train.objective != "tisdpo":
        return []
    settings = config.train.model_dump(exclude={"objective", "beta", "options"})
    found = []
    for name, swapped in (("plus", False), ("minus", True)):
        options = {"swapped": True} if swapped else {}
        train = TrainingConfig(**settings, objective="dpo", beta=config.train.settings.beta, options=options)
        found.append(config.model_copy(update={"name": f"{config.name}-{name}"[-64:], "train": train}))
    return found


def _inputs(config: TrainConfig, store: Store) -> tuple[str, Version]:
    """Digest of all that decides the weights, and the subset that is meant."""
    subset = find_version(store, config.subset)
    facts = {
        "schema": SCHEMA_VERSION,
        "stage": "train",
        "subset": str(subset),
        "model": models.identity("policy.model", config.policy, store),
        "dtype": config.policy.dtype,
    }
    return digest({**facts, **config.train.deciding()}), subset


class TrainWorker:
    """One training; `progress` answers while `run` works."""

    def __init__(self, config: TrainConfig, subset: str, inputs: str, store_url: str, helpers: list[str]) -> None:
        self.arguments = (config, subset, inputs, store_url, helpers)
        self.policy = config.policy
        self.state: tuple[int, int, float] = (0, 0, 0.0)

    def progress(self) -> tuple[int, int, float]:
        """Step, steps in all (0: not begun), loss."""
        return self.state

    def note(self, step: int, steps: int, loss: float) -> None:
        self.state = (step, steps, loss)

    def run(self) -> None:
        with telling():
            if self.policy.workers == 1:
                Job(*self.arguments).run(self.note)
            else:
                self._together()

    def _together(self) -> None:
        """Several processes through Ray Train, which brings them together for torch.distributed."""
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        each = {"CPU": self.policy.cpus, **({"GPU": self.policy.gpus} if self.policy.gpus else {})}
        with tempfile.TemporaryDirectory() as room:
            TorchTrainer(
                _share,
                train_loop_config={"arguments": self.arguments, "board": ray.get_runtime_context().current_actor},
                torch_config=TorchConfig(backend="nccl" if self.policy.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self.policy.workers, use_gpu=self.policy.gpus > 0, resources_per_worker=each
                ),
                run_config=RunConfig(storage_path=str(Path(room) / "ray"), name="train"),
            ).fit()


def _share(given: dict[str, Any]) -> None:
    """What each of several workers does."""
    from ray.train import get_context

    board = given["board"]
    config, subset, inputs, store_url, helpers = given["arguments"]
    job = Job(config, subset, inputs, store_url, helpers, rank=get_context().get_world_rank())
    job.run(lambda *state: board.note.remote(*state))
