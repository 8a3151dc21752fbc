"""train: a published subset becomes a policy.

The job runs as a Ray actor that fetches the version (checking every digest), trains, and publishes the model with its
metrics as policies/<name>/<version>/; several workers share each batch through Ray Train. Checkpoints go to the store
as they are made; a job that died goes on from the last. Log-probabilities of the reference are kept under references/
for every training on the same version, model and length.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from tasks import models
from tasks.cluster import check_room, connect, reraise, telling
from tasks.config import PolicyConfig, TrainConfig
from tasks.costs import known_costs, remember_cost
from tasks.job import Job
from tasks.progress import Meter, Report, silent
from tasks.prometheus import show_trained
from tasks.records import SCHEMA_VERSION, Version, Work, digest
from tasks.store import Store
from tasks.training import TrainingConfig, micro_batch
from tasks.versions import find_build, find_version

_POLL = 1.0  # seconds


def train(config: TrainConfig, store: Store, report: Report = silent) -> Version:
    """The policy that this subset, model and training configuration give; trained once."""
    started = time.monotonic()
    known = find_build(store, "policies", config.name, training_digest(config, store))
    if known:
        Meter(report, "train", 1, "policies", reused=1)
        return known
    ray = connect(config.ray_address)
    check_room(ray, config.policy)
    worker = ray.remote(TrainWorker).options(**resources(config.policy), max_concurrency=3).remote(store.url)
    try:
        with reraise(ray):
            name = _follow(ray, worker, pinned(config, store), report)
    finally:
        ray.kill(worker)  # also when whoever waits is interrupted: nobody else knows of it
    made = find_version(store, f"{config.name}@{name}", kind="policies")
    gpu_seconds = held([config], store)
    show_trained(config.name, gpu_seconds)
    work = Work(seconds=time.monotonic() - started, gpu_seconds=gpu_seconds)
    return Version(made.name, made.version, made.counts, work, "policies")


def pinned(config: TrainConfig, store: Store) -> TrainConfig:
    """The same training with nothing left to resolve."""
    policy = models.pinned("policy.model", config.policy, store)
    return config.model_copy(update={"policy": policy, "subset": str(find_version(store, config.subset))})


def held(trainings: Iterable[TrainConfig], store: Store) -> float:
    """GPU seconds of trainings that have ended, in all attempts; waiting for GPUs is none of them."""
    gpus = {training_digest(one, store): one.policy.gpus * one.policy.workers for one in trainings}
    return sum(seconds * gpus[digest] for digest, seconds in known_costs(store, "train", gpus).items())


def resources(policy: PolicyConfig) -> dict[str, float]:
    """What a worker is given by Ray; one that only watches over several processes needs nothing."""
    return {"num_cpus": policy.cpus, "num_gpus": policy.gpus} if policy.workers == 1 else {"num_cpus": 0}


def _follow(ray: Any, worker: Any, config: TrainConfig, report: Report) -> str:
    """Run the job and report its steps; the policy's version."""
    done = worker.run.remote(config)
    meter, seen = None, 0
    while True:
        finished = ray.wait([done], timeout=_POLL)[0]
        if finished:
            version: str = ray.get(done)
        step, steps, loss = ray.get(worker.progress.remote())
        if steps and (meter is None or step < seen):  # a helper's training came before
            meter, seen = Meter(report, "train", steps, "steps"), 0
        if meter and step > seen:
            meter.add(step - seen, f"loss {loss:.4f}")
            seen = step
        if finished:
            return version


def find_training(config: TrainConfig, store: Store) -> Version | None:
    """The policy, when it was trained before."""
    return find_build(store, "policies", config.name, training_digest(config, store), claim=False)


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


def training_digest(config: TrainConfig, store: Store) -> str:
    """Of all that decides the weights: equal for equal trainings, under whatever name."""
    facts: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "stage": "train",
        "subset": str(find_version(store, config.subset)),
        "model": models.identity("policy.model", config.policy, store),
        "dtype": config.policy.dtype,
    }
    if config.train.settings.by_batch:
        facts["split"] = [config.policy.workers, micro_batch(config.train, config.policy)]
    return digest({**facts, **config.train.deciding()})


class TrainWorker:
    """Trains one policy after the other in one process; `progress` answers while `run` works."""

    def __init__(self, store_url: str) -> None:
        self.store_url = store_url
        self.state: tuple[int, int, float] = (0, 0, 0.0)

    def progress(self) -> tuple[int, int, float]:
        """Step, steps in all (0: not begun), loss."""
        return self.state

    def note(self, step: int, steps: int, loss: float) -> None:
        self.state = (step, steps, loss)

    def run(self, config: TrainConfig) -> str:
        """The policy's version; what it cost, helpers included, is remembered. config: see `pinned`."""
        store = Store(self.store_url)
        with telling():
            needed = helpers_of(config)
            helpers = [f"{helper.name}@{self.run(helper)}" for helper in needed]
            inputs = training_digest(config, store)
            made = find_build(store, "policies", config.name, inputs)
            if not made:
                self.state = (0, 0, 0.0)
                job = Job(config, inputs, self.store_url, helpers)
                earlier, started = job.spent(), time.monotonic()
                if config.policy.workers == 1:
                    job.run(self.note)
                else:
                    self._together(job)
                _tidy()
                seconds = known_costs(store, "train", [training_digest(helper, store) for helper in needed])
                total = earlier + time.monotonic() - started + sum(seconds.values())
                remember_cost(store, "train", inputs, total)
                made = find_build(store, "policies", config.name, inputs)
            assert made
        return made.version

    def _together(self, job: Job) -> None:
        """Several processes through Ray Train, which brings them together for torch.distributed."""
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        policy = job.config.policy
        checkpoint = job.last_complete()  # one for all
        each = {"CPU": policy.cpus, **({"GPU": policy.gpus} if policy.gpus else {})}
        board = ray.get_runtime_context().current_actor
        store = Store(self.store_url)
        with _common_room(store, job.inputs) as room:
            TorchTrainer(
                _share,
                train_loop_config={
                    "job": (job.config, job.inputs, self.store_url, job.helpers),
                    "checkpoint": checkpoint,
                    "board": board,
                },
                torch_config=TorchConfig(backend="nccl" if policy.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=policy.workers, use_gpu=policy.gpus > 0, resources_per_worker=each
                ),
                run_config=RunConfig(**room, name="train"),
            ).fit()


@contextlib.contextmanager
def _common_room(store: Store, inputs: str) -> Iterator[dict[str, Any]]:
    """A folder that all nodes of a cluster see, which Ray Train insists on; the store is what they share for sure."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    path = f".room/{inputs}-{uuid.uuid4().hex}"
    try:
        yield {
            "storage_path": store.full(path),
            "storage_filesystem": None if store.local else PyFileSystem(FSSpecHandler(store.fs)),
        }
    finally:
        store.remove(path)


def _share(given: dict[str, Any]) -> None:
    """What each of several processes does."""
    from ray.train import get_context

    config, inputs, store_url, helpers = given["job"]
    job = Job(config, inputs, store_url, helpers, rank=get_context().get_world_rank())
    job.run(lambda *state: given["board"].note.remote(*state), given["checkpoint"])


def _tidy() -> None:
    """Give back what a training leaves in a process that goes on."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
