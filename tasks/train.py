"""train: a published subset becomes a policy.

The job runs as a Ray actor that fetches the version (checking every digest), trains, and publishes the model with its
metrics as policies/<name>/<version>/. Checkpoints go to the store as they are made; a job that died goes on from the
last.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from tasks import models
from tasks.cluster import check_room, connect, reraise, telling
from tasks.config import TrainConfig, is_local_path
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, Counts, Version, Work, digest
from tasks.store import Store, to_json
from tasks.versions import (
    fetch_version,
    find_build,
    find_version,
    publish_folder,
    read_manifest,
    remember_build,
)

_POLL = 1.0  # seconds
_KEPT = 2  # checkpoints of a training, the last ones; an optimizer's state is larger than its model


def train(config: TrainConfig, store: Store, report: Report = silent) -> Version:
    """The policy that this subset, model and training configuration give; trained once."""
    started = time.monotonic()
    inputs, subset = _inputs(config, store)
    known = find_build(store, "policies", config.name, inputs)
    if known:
        Meter(report, "train", 1, "policies", reused=1)
        return known
    config = config.model_copy(update={"policy": models.pinned("policy.model", config.policy, store)})
    ray = connect(config.ray_address)
    check_room(ray, config.policy)
    actor = ray.remote(TrainWorker).options(num_cpus=config.policy.cpus, num_gpus=config.policy.gpus, max_concurrency=2)
    worker = actor.remote(config, str(subset), inputs, store.url)
    try:
        with reraise(ray):
            name = _follow(ray, worker, report)
    finally:
        ray.kill(worker)  # also when whoever waits is interrupted: nobody else knows of it
    version = find_version(store, f"{config.name}@{name}", kind="policies")
    return Version(version.name, version.version, version.counts, Work(seconds=time.monotonic() - started), "policies")


def _follow(ray: Any, worker: Any, report: Report) -> str:
    """Run the job and report its steps; the policy's version."""
    done = worker.run.remote()
    meter, seen = None, 0
    while True:
        finished = ray.wait([done], timeout=_POLL)[0]
        if finished:
            version: str = ray.get(done)
        step, steps, loss = ray.get(worker.progress.remote())
        if steps and meter is None:
            meter = Meter(report, "train", steps, "steps")
        if meter and step > seen:
            meter.add(step - seen, f"loss {loss:.4f}")
            seen = step
        if finished:
            return version


def find_training(config: TrainConfig, store: Store) -> Version | None:
    """The policy, when it was trained before."""
    return find_build(store, "policies", config.name, _inputs(config, store)[0], claim=False)


def training_digest(config: TrainConfig, store: Store) -> str:
    """Of all that decides the weights: equal for equal trainings, under whatever name."""
    return _inputs(config, store)[0]


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
    return digest({**facts, **_deciding(config)}), subset


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights: not how often they are saved, nor what memory they are made in."""
    return config.train.model_dump(exclude={"save_steps", "gradient_checkpointing"})


class TrainWorker:
    """One training job; `progress` answers while `run` works."""

    def __init__(self, config: TrainConfig, subset: str, inputs: str, store_url: str) -> None:
        self.config, self.inputs = config, inputs
        self.attempt = uuid.uuid4().hex[:12]  # two attempts at once, or one after the other, mix no files
        self.store = Store(store_url)
        self.subset = find_version(self.store, subset)
        self.state: tuple[int, int, float] = (0, 0, 0.0)
        self.earlier: list[str] = []  # checkpoints of attempts before this one

    def progress(self) -> tuple[int, int, float]:
        """Step, steps in all (0: not begun), loss."""
        return self.state

    def run(self) -> str:
        """Train and publish; the policy's version."""
        with telling(), tempfile.TemporaryDirectory() as room:
            folder = Path(room) / "version"
            data = fetch_version(self.store, self.subset, "data/", Path(room) / "data")
            from tasks.trainers.dpo import train_dpo  # takes seconds: what is damaged is said before

            counts = train_dpo(
                self.config,
                models.local(self.config.policy.model, self.store),
                data,
                Path(room),
                self._on_step,
                self._save_checkpoint,
                self._last_checkpoint(Path(room)),
            )
            folder.mkdir()
            (Path(room) / "model").rename(folder / "model")
            (Path(room) / "metrics.jsonl").rename(folder / "metrics.jsonl")
            content = self._content(counts)
            (folder / "README.md").write_text(_card(content), encoding="utf-8")
            version = publish_folder(self.store, "policies", self.config.name, folder, content)
            remember_build(self.store, version, self.inputs)
        return version.version

    def _on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.state = (step, steps, metrics.get("loss", 0.0))

    def _content(self, counts: Counts) -> dict[str, Any]:
        config = self.config
        model = config.policy.model
        # Where a folder lies differs between machines, and a version's content must not.
        model_name = Path(model).name if is_local_path(model) else model
        return {
            "name": config.name,
            "kind": "policy",
            "counts": {"into": counts.into, "out": counts.out, "dropped": dict(counts.dropped)},
            "parents": {
                "subset": str(self.subset),
                "model": models.identity("policy.model", config.policy, self.store),
                "model_name": model_name,
            },
            "train": _deciding(config),
            "dtype": config.policy.dtype,
            "subset_summary": read_manifest(self.store, self.subset)["content"]["summary"],
        }

    # --- checkpoints: <attempt>/checkpoint-<step>/, files first, complete.json last; without it there is none

    @property
    def _checkpoints(self) -> str:
        return f"policies/{self.config.name}/checkpoints/{self.inputs}"

    def _save_checkpoint(self, folder: Path) -> None:
        place = f"{self._checkpoints}/{self.attempt}/{folder.name}"
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "training_args.bin"]
        for file in files:
            self.store.create_file(f"{place}/{file.relative_to(folder)}", file)
        names = [str(file.relative_to(folder)) for file in files]
        self.store.create(f"{place}/complete.json", to_json({"files": names}))
        mine = [complete for complete in self._complete() if f"/{self.attempt}/" in complete]
        known = [*self.earlier, *mine]
        self.earlier = [complete for complete in self.earlier if complete in known[-_KEPT:]]
        for complete in known[:-_KEPT]:
            self.store.remove(complete)  # first what says that it is whole
            self.store.remove(complete.rpartition("/")[0])

    def _last_checkpoint(self, room: Path) -> Path | None:
        """The last one that can be fetched whole: another attempt may just be removing the older ones."""
        self.earlier = self._complete()
        for complete in reversed(self.earlier):
            place = complete.rpartition("/")[0]
            target = room / "resume" / place.rpartition("/")[2]
            try:
                for file in self.store.read_json(complete)["files"]:
                    self.store.fetch(f"{place}/{file}", target / file)
            except FileNotFoundError:
                continue
            return target
        return None

    def _complete(self) -> list[str]:
        """complete.json of every checkpoint that is whole, in the order of their steps."""
        found = [path for path in self.store.list(self._checkpoints) if path.endswith("/complete.json")]
        return sorted(found, key=lambda path: int(path.split("/")[-2].rpartition("-")[2]))


def _card(content: dict[str, Any]) -> str:
    train = content["train"]
    settings = "\n".join(f"| {key} | {value} |" for key, value in train.items())
    return (
        f"# {content['name']}\n\n"
        f"Trained by {train['objective'].upper()} from `{content['parents']['model_name']}` on the published subset\n"
        f"`{content['parents']['subset']}` ({content['counts']['out']:,} pairs).\n\n"
        f"| setting | value |\n|---|---|\n{settings}\n\nMetrics of every step are in `metrics.jsonl`.\n"
    )
