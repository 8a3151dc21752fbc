"""The trainings of an experiment: each cell a policy, trained once, several side by side.

A cell's policy has a name of what it is (subset, objective, seed, digest of all that decides the weights), so every
experiment that has the cell finds it. Trainings that are missing go to a pool of Ray actors that train one cell after
the other: importing TRL takes longer than training a small model. A training itself is what `train` runs, checkpoints
included, so one that was interrupted goes on.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks import models
from tasks.cluster import check_room, connect, fitting, nodes_of, reraise
from tasks.config import PolicyConfig, TrainConfig
from tasks.costs import known_costs
from tasks.errors import ConfigError, RunError, Unreachable
from tasks.experiments import Cell, ExperimentConfig
from tasks.progress import Meter, Report, duration, silent
from tasks.prometheus import show_trained
from tasks.records import Counts, Version, Work
from tasks.store import Store
from tasks.train import TrainWorker, find_training, held, pinned, resources, training_digest
from tasks.versions import find_version

_POLL = 1.0  # seconds
_RESTARTS = 2  # of an actor whose process or machine died
_NAMED = 24  # characters of a subset's name in a policy's


@dataclass(frozen=True)
class Policies:
    """What every cell gave, and what had to be done for it this time."""

    versions: dict[Cell, Version]
    inputs: dict[Cell, str]  # digest of all that decided the weights
    trained: int = 0
    work: Work = field(default_factory=Work)

    @property
    def counts(self) -> Counts:
        return Counts(len(self.versions), len(self.versions))

    @property
    def names(self) -> dict[str, str]:
        """Name -> NAME@VERSION."""
        return {version.name: str(version) for version in self.versions.values()}


def resolved(config: ExperimentConfig, store: Store, published: dict[str, str] | None = None) -> dict[str, str]:
    """Each of `subsets` as the NAME@VERSION that is meant. published: name -> version, of a curate run just before."""
    found = {}
    for subset in config.subsets:
        version = (published or {}).get(subset)
        found[subset] = str(find_version(store, f"{subset}@{version}" if version else subset))
        if list(found.values()).count(found[subset]) > 1:
            raise ConfigError(f"subsets: {subset!r} is in the list under another name too; remove one")
    return found


def trainings(
    config: ExperimentConfig, subsets: dict[str, str], store: Store, cells: Iterable[Cell] = ()
) -> dict[Cell, TrainConfig]:
    """What `train` is asked for, cell by cell; all of them by default. subsets: see `resolved`."""
    found = {}
    for cell in cells or config.cells():
        wanted = config.training(cell, "cell", subsets[cell.arm.subset])
        digest = training_digest(wanted, store)
        seed = f"s{cell.seed}" if wanted.train.seeded else "any"
        parts = (cell.arm.subset.partition("@")[0][:_NAMED], wanted.train.objective, seed, digest[:10])
        found[cell] = wanted.model_copy(update={"name": "-".join(parts)})
    names: dict[str, Cell] = {}
    for cell, wanted in found.items():
        if wanted.name in names and names[wanted.name].arm != cell.arm:
            raise ConfigError(f"objectives: {names[wanted.name]} and {cell} are the same training; remove one")
        names[wanted.name] = cell
    return found


def train_cells(config: ExperimentConfig, subsets: dict[str, str], store: Store, report: Report = silent) -> Policies:
    """The policy of every cell; those that are missing are trained."""
    started = time.monotonic()
    policy = models.pinned("policy.model", config.policy, store)  # once: its latest may move while cells are trained
    config = config.model_copy(update={"policy": policy})
    wanted = trainings(config, subsets, store)
    known = {cell: version for cell, one in wanted.items() if (version := find_training(one, store))}
    first = {one.name: cell for cell, one in reversed(wanted.items())}  # seeds that decide nothing share a policy
    missing = {cell: wanted[cell] for cell in reversed(first.values()) if cell not in known}
    meter = Meter(report, "train", len(first), "policies", reused=len(first) - len(missing))
    if missing:
        ray = connect(config.ray_address)
        check_room(ray, config.policy)
        at_once = min(config.at_once or room(ray, config), len(missing))
        made = _Series(ray, at_once, store, meter).run(missing)
        versions = {missing[cell].name: find_version(store, name, kind="policies") for cell, name in made.items()}
        known |= {cell: versions[one.name] for cell, one in wanted.items() if one.name in versions}
    inputs = {cell: training_digest(one, store) for cell, one in wanted.items()}
    gpu_seconds = held(missing.values(), store)
    show_trained(config.name, gpu_seconds)
    work = Work(
        shards_made=len(missing),
        shards_reused=len(first) - len(missing),
        gpu_seconds=gpu_seconds,
        seconds=time.monotonic() - started,
    )
    return Policies({cell: known[cell] for cell in wanted}, inputs, len(missing), work)


def room(ray: Any, config: ExperimentConfig) -> int:
    """How many trainings the cluster has room for; one that takes several workers is alone.

    Ray started here counts more CPUs than there are: not for these.
    """
    if config.policy.workers > 1:
        return 1
    cores = os.cpu_count() or 1 if config.ray_address == "local" else math.inf
    nodes = [{**node, "CPU": min(node.get("CPU", 0), cores)} for node in nodes_of(ray)]
    return max(1, sum(fitting(config.policy, node) for node in nodes))


@dataclass
class _Series:
    """Hands cells to actors as they become free. A cell that fails does not stop the others; it is told at the end."""

    ray: Any
    at_once: int
    store: Store
    meter: Meter
    idle: list[Any] = field(default_factory=list)
    running: dict[Any, tuple[Any, Cell, str]] = field(default_factory=dict)

    def run(self, missing: dict[Cell, TrainConfig]) -> dict[Cell, str]:
        waiting, made = deque(missing.items()), {}
        failed: dict[Cell, ConfigError | RunError] = {}
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.at_once:
                    self._start(*waiting.popleft())
                for done in self.ray.wait(list(self.running), timeout=_POLL)[0]:
                    actor, cell, inputs = self.running.pop(done)
                    try:
                        with reraise(self.ray):
                            version = self.ray.get(done)
                    except (ConfigError, RunError) as error:
                        self.ray.kill(actor)  # whatever is wrong with it, the next cell gets a fresh one
                        failed[cell] = error
                    else:
                        self.idle.append(actor)
                        made[cell] = f"{missing[cell].name}@{version}"
                        seconds = known_costs(self.store, "train", [inputs]).get(inputs)
                        self.meter.add(1, f"the last took {duration(seconds)}" if seconds else "")
                self._tell()
        finally:
            for actor in [*self.idle, *(actor for actor, _, _ in self.running.values())]:
                self.ray.kill(actor)  # also when whoever waits is interrupted: nobody else knows of it
        if failed:
            cell, first = next(iter(failed.items()))
            kind = Unreachable if all(isinstance(error, Unreachable) for error in failed.values()) else RunError
            raise kind(f"train: {len(failed)} of {len(missing)} cells failed, the others are kept. {cell}: {first}")
        return made

    def _start(self, cell: Cell, config: TrainConfig) -> None:
        policy = config.policy
        actor = self.idle.pop() if self.idle else self._actor(policy)
        inputs = training_digest(config, self.store)
        self.running[actor.run.remote(pinned(config, self.store))] = (actor, cell, inputs)

    def _actor(self, policy: PolicyConfig) -> Any:
        actor = self.ray.remote(TrainWorker).options(
            **resources(policy),
            max_concurrency=3,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        return actor.remote(self.store.url)

    def _tell(self) -> None:
        """What runs now, for people."""
        asked = {actor.progress.remote(): cell for actor, cell, _ in self.running.values()}
        answered = self.ray.wait(list(asked), num_returns=len(asked), timeout=_POLL)[0] if asked else []
        steps = [(asked[answer], self._known(answer)) for answer in answered]
        note = "; ".join(f"{cell} step {known[0]}/{known[1]}" for cell, known in steps if known[1])
        self.meter.add(0, note)

    def _known(self, answer: Any) -> tuple[int, int, float]:
        try:
            with reraise(self.ray):
                progress: tuple[int, int, float] = self.ray.get(answer)
        except RunError:  # it died in this moment; `run` will tell
            return 0, 0, 0.0
        return progress
