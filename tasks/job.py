"""One training job: a version and a model in, a published policy out, with checkpoints in between.

In a training of several processes each runs this; the first of them, rank 0, writes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks import models
from tasks.config import TrainConfig, is_local_path
from tasks.records import SCHEMA_VERSION, Counts, digest
from tasks.store import Store, inside
from tasks.versions import fetch_version, find_version, publish_folder, read_manifest, remember_build

_KEPT = 2  # checkpoints of a training that goes on, the last ones; an optimizer's state is larger than its model

Note = Callable[[int, int, float], Any]  # step, steps in all, loss


class Job:
    def __init__(
        self, config: TrainConfig, inputs: str, store_url: str, helpers: Sequence[str] = (), rank: int = 0
    ) -> None:
        """inputs: digest of all that decides the weights; helpers: policies whose token log-probabilities weigh."""
        self.config, self.inputs, self.helpers, self.rank = config, inputs, list(helpers), rank
        self.attempt = uuid.uuid4().hex[:12]  # two attempts at once, or one after the other, mix no files
        self.store = Store(store_url)
        self.subset = find_version(self.store, config.subset)
        self.earlier: list[str] = []  # checkpoints of attempts before this one
        self.began_at = 0  # the step that this attempt went on from
        self.started, self.earlier_seconds = time.monotonic(), 0.0  # what attempts before took, up to that step

    def run(self, note: Note, checkpoint: str | None = None) -> None:
        """Train and publish. checkpoint: the one to go on from, or "" for none; by default the last one."""
        with tempfile.TemporaryDirectory() as folder:
            room = Path(folder)
            data = fetch_version(self.store, self.subset, "data/", room / "data")
            from tasks.trainers import program  # takes seconds: what is damaged is said before
            from tasks.trainers.pairs import Kept

            files = program.Files(
                model=models.local(self.config.policy.model, self.store),
                data=data,
                work=room,
                checkpoint=self._last_checkpoint(room) if checkpoint is None else self._fetched(checkpoint, room),
                helpers=tuple(models.local(f"{models.POLICY}{helper}", self.store) for helper in self.helpers),
            )

            def on_save(checkpoint: Path) -> None:
                self._save_checkpoint(checkpoint)
                self._save_logs(room / "logs")

            hooks = program.Hooks(lambda step, steps, metrics: note(step, steps, metrics.get("loss", 0.0)), on_save)
            counts = program.run(self.config, files, Kept(self._read_kept, self._write_kept), hooks)
            if self.rank == 0:
                self._save_logs(room / "logs")
                self._publish(room, counts)

    def _publish(self, room: Path, counts: Counts) -> None:
        folder = room / "version"
        folder.mkdir()
        (room / "model").rename(folder / "model")
        (room / "metrics.jsonl").rename(folder / "metrics.jsonl")
        content = self._content(counts)
        (folder / "README.md").write_text(_card(content), encoding="utf-8")
        version = publish_folder(self.store, "policies", self.config.name, folder, content)
        remember_build(self.store, version, self.inputs)
        self._forget()

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
                **({"helpers": self.helpers} if self.helpers else {}),
            },
            "train": config.train.deciding(),
            "dtype": config.policy.dtype,
            "subset_summary": read_manifest(self.store, self.subset)["content"]["summary"],
        }

    # --- log-probabilities: references/<digest>/<name>.parquet, a row per pair that fits, in the version's order

    def _kept(self, name: str) -> str:
        config = self.config
        facts = {
            "schema": SCHEMA_VERSION,
            "subset": str(self.subset),
            "model": models.identity("policy.model", config.policy, self.store),
            "dtype": config.policy.dtype,
            "max_length": config.train.max_length,
            "special_tokens": "left out",  # which pairs there is a row for
            "swapped": getattr(config.train.settings, "swapped", False),
        }
        if name != "sums":
            facts |= {"helpers": self.helpers, "settings": config.train.settings.model_dump(exclude={"beta"})}
        return f"references/{digest(facts)}/{name}.parquet"

    def _read_kept(self, name: str) -> dict[str, list[Any]] | None:
        path = self._kept(name)
        return self.store.read_table(path).to_pydict() if self.store.exists(path) else None

    def _write_kept(self, name: str, columns: dict[str, list[Any]]) -> None:
        single, many = pa.float32(), pa.list_(pa.float32())
        arrays = {
            column: pa.array(values, many if values and isinstance(values[0], list) else single)
            for column, values in columns.items()
        }
        self.store.create_table(self._kept(name), pa.table(arrays))

    # --- what a training leaves behind besides its policy, below policies/<name>/

    def _save_logs(self, folder: Path) -> None:
        """For TensorBoard: logs/<inputs>/<attempt>/. Not part of the version, since they hold times."""
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.is_file():
                place = f"policies/{self.config.name}/logs/{self.inputs}/{self.attempt}"
                self.store.replace(f"{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    # checkpoints/<inputs>/<attempt>/checkpoint-<step>/, files first, complete.json last; without it there is none

    @property
    def _checkpoints(self) -> str:
        return f"policies/{self.config.name}/checkpoints/{self.inputs}"

    def _save_checkpoint(self, folder: Path) -> None:
        place = f"{self._checkpoints}/{self.attempt}/{folder.name}"
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "training_args.bin"]
        for file in files:
            self.store.create_file(f"{place}/{file.relative_to(folder)}", file)
        names = [str(file.relative_to(folder)) for file in files]
        seconds = self.earlier_seconds + time.monotonic() - self.started
        about = {"files": names, "began_at": self.began_at, "seconds": seconds}
        self.store.create_json(f"{place}/complete.json", about)
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
            with contextlib.suppress(FileNotFoundError):
                return self._fetched(complete, room)
        return None

    def _fetched(self, complete: str, room: Path) -> Path | None:
        if not complete:
            return None
        place = complete.rpartition("/")[0]
        target = room / "resume" / place.rpartition("/")[2]
        told = self.store.read_object(complete, "files")
        if not isinstance(told["files"], list) or not all(inside(file) for file in told["files"]):
            raise self.store.damaged(complete)
        for file in told["files"]:
            self.store.fetch(f"{place}/{file}", target / file)
        self.began_at, self.earlier_seconds = _step(complete), told.get("seconds", 0.0)
        return target

    def _forget(self) -> None:
        """Optimizers' states of a policy that is published serve nobody."""
        for complete in self._complete():
            self.store.remove(complete)
        self.store.remove(self._checkpoints)

    def last_complete(self) -> str:
        """The last checkpoint; empty when there is none."""
        return next(reversed(self._complete()), "")

    def spent(self) -> float:
        """Seconds of the attempts before this one, as far as they led to the last checkpoint."""
        with contextlib.suppress(FileNotFoundError):  # another attempt may just be removing it
            return self.store.read_object(complete).get("seconds", 0.0) if (complete := self.last_complete()) else 0.0
        return 0.0

    def _complete(self) -> list[str]:
        """complete.json of every checkpoint that is whole, in the order of their steps."""
        found = [path for path in self.store.list(self._checkpoints) if path.endswith("/complete.json")]
        return sorted(found, key=_step)


def _step(complete: str) -> int:
    """.../checkpoint-<step>/complete.json"""
    return int(complete.split("/")[-2].rpartition("-")[2])


def _card(content: dict[str, Any]) -> str:
    train = content["train"]
    shown = {**{key: value for key, value in train.items() if key != "settings"}, **train["settings"]}
    settings = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    return (
        f"# {content['name']}\n\n"
        f"Trained by {train['objective'].upper()} from `{content['parents']['model_name']}` on the published subset\n"
        f"`{content['parents']['subset']}` ({content['counts']['out']:,} pairs).\n\n"
        f"| setting | value |\n|---|---|\n{settings}\n\nMetrics of every step are in `metrics.jsonl`.\n"
    )
