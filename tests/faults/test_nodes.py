"""A cluster of several nodes, each with processes and an address of its own: what runs where, and one that is lost."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tasks.cluster import IN_FLIGHT
from tasks.store import Store
from tests.conftest import TinyModels, curate_values, generator, prompts, scorer, write_jsonl
from tests.faults.runs import ENGINE, asked, kill, left_on, next_file, processes, report, start, wait_for
from tests.services import ROOT, RayHead, environment, ray_head, ray_node

PROMPTS, SHARDS = 96, 12
TRAINING = "ray::RayTrainWorker"  # how the processes of a training call themselves
SLEEPY = {"": "sleep 0.1"}  # each request takes a tenth of a second
TRAIN = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 256, "learning_rate": 1e-3}

PROBE = """
import json, os
from pathlib import Path

def score(prompt, text):
    import ray
    context = ray.get_runtime_context()
    about = {"has": context.get_assigned_resources(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    Path(__file__).with_name(f"{context.get_actor_id()}.json").write_text(json.dumps(about))
    return float(sum(map(ord, text)) % 97)
"""


# Of every Python of the nodes: from where it has prefsieve, in a file per process.
NOTING = """
import os, sys
from importlib.machinery import PathFinder
from pathlib import Path

class Noting:
    def find_spec(name, path=None, target=None):
        if name == "tasks":
            Path(__file__).with_name(f"{os.getpid()}.seen").write_text(PathFinder.find_spec(name, path).origin)

sys.meta_path.insert(0, Noting)
"""


class Cluster(NamedTuple):
    head: RayHead
    marks: list[str]  # of its two nodes: their processes can be told by them
    notes: Path

    def engines(self) -> list[int]:
        """How many engines each node runs now."""
        return [len(processes(mark, ENGINE)) for mark in self.marks]

    def origins(self) -> dict[int, str]:
        """From where which process of the nodes had the code; told once."""
        seen = {int(file.stem): file.read_text() for file in self.notes.glob("*.seen")}
        for pid in seen:
            (self.notes / f"{pid}.seen").unlink()
        return seen

    def shipped(self) -> set[int]:
        """The processes since then, all of which had a copy that Ray unpacked there."""
        seen = self.origins()
        assert all("/runtime_resources/py_modules_files/" in place for place in seen.values()), seen
        return set(seen)

    def left(self, seconds: float = 30) -> list[Any]:
        """What runs leave behind when they do not end as they should; processes take a moment to end."""
        deadline = time.monotonic() + seconds
        while any(self.engines()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [*left_on(self.head), *(mark for mark in self.marks if processes(mark, ENGINE))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes with room for one engine each; of GPUs there are only the numbers.

    Of a source tree they know nothing.
    """
    folder, notes = tmp_path_factory.mktemp("cluster"), tmp_path_factory.mktemp("notes")
    (notes / "sitecustomize.py").write_text(NOTING)  # run by every Python that starts with this path
    marks = [secrets.token_hex(8), secrets.token_hex(8)]
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(ray_head(folder / "head", cpus=0, PYTHONPATH=""))
        for number, mark in enumerate(marks):
            about = {"PYTHONPATH": str(notes), "MARK": mark}
            room = {"cpus": 2, "gpus": 2, "resources": {"engine": 1.0}}
            address = f"127.0.0.{number + 2}"
            stack.enter_context(ray_node(head, folder / f"node{number}", address, **room, **about))  # type: ignore[arg-type]
        yield Cluster(head, marks, notes)
        for mark in marks:
            kill(processes(mark))


@pytest.fixture
def env(cluster: Cluster, prefect_api: str, tmp_path: Path) -> dict[str, str]:
    about = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    return environment(**about, **cluster.head.environment)


@pytest.fixture
def joining(cluster: Cluster) -> tuple[str, str]:
    return ("--set", f"ray_address={cluster.head.gcs}")


def write(folder: Path, values: dict[str, Any], name: str = "curate") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def sleepy(folder: Path, **room: Any) -> Path:
    """PROMPTS in SHARDS, on engines that take their time."""
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    (folder / "faults.json").write_text(json.dumps(SLEEPY))
    noted = {"faults": str(folder / "faults.json"), "log": str(folder / "log")}
    about = {"engine_args": noted, "cpus": 0.5, **room}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": PROMPTS // SHARDS},
        generate={"samples": 2, "generators": [generator(**about)]},
        score={"scorers": [scorer(**about)]},
    )
    return write(folder, values)


def test_a_pool_grows_from_one_node_to_the_next_while_there_is_work(
    cluster: Cluster, env: dict[str, str], joining: tuple[str, str], tmp_path: Path, store: Store
) -> None:
    """To three engines where there is room for four; and none is left behind when there is no work any more."""
    path = sleepy(tmp_path, workers=1, max_workers=3, resources={"engine": 0.5})
    run = start(path, store.url, env, *joining)
    wait_for(lambda: any(cluster.engines()), run)
    assert not all(cluster.engines())
    wait_for(lambda: all(cluster.engines()), run)
    most = 0
    while len(store.list("completions")) < SHARDS:
        assert run.poll() is None
        now = sum(cluster.engines())
        if len(store.list("completions")) < SHARDS:  # a scorer's engine would be another pool's
            most = max(most, now)
        time.sleep(0.1)
    assert most == 3
    report(run)
    assert cluster.left() == []


def test_engines_get_as_much_of_a_gpu_or_as_many_as_was_asked_for(
    env: dict[str, str], joining: tuple[str, str], tmp_path: Path, store: Store
) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    scorers = []
    for name, gpus in {"two": 2, "part": 0.5}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "probe.py").write_text(f"# {name}\n{PROBE}")  # one function under two names is refused
        scorers.append({"name": name, "type": "function", "function": f"{folder}/probe.py:score", "gpus": gpus})
    ingest = {"source": str(source), "shard_size": 4}
    report(
        start(
            write(tmp_path, curate_values(source, ingest=ingest, score={"scorers": scorers})), store.url, env, *joining
        )
    )

    def given(name: str) -> list[Any]:
        return [json.loads(file.read_text()) for file in (tmp_path / name).glob("*.json")]

    assert [(about["has"]["GPU"], about["gpus"]) for about in given("two")] == [(2.0, "0,1")]
    assert [(about["has"]["GPU"], about["gpus"]) for about in given("part")] in ([(0.5, "0")], [(0.5, "1")])


def test_curate_train_and_experiment_share_a_cluster(
    cluster: Cluster,
    env: dict[str, str],
    joining: tuple[str, str],
    tiny_models: TinyModels,
    tmp_path: Path,
    store: Store,
) -> None:
    """Engines of transformers, a training of two processes on two nodes, and an experiment on what was published.

    From a folder that is no source tree: where the nodes are on the same machine, Ray's processes look into it first.
    """
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(16))
    policy = {"name": "policy", "model": str(tiny_models.generator), "sampling": {"max_tokens": 6}}
    reward = {"name": "reward", "model": str(tiny_models.reward)}
    ingest = {"source": str(source), "shard_size": 8}
    curated = {"ingest": ingest, "generate": {"samples": 4, "generators": [policy]}, "score": {"scorers": [reward]}}
    values = curate_values(source, **curated, subset=[{"name": "top", "steps": [{"rank": "pvar", "count": 8}]}])
    cluster.origins()
    made = report(start(write(tmp_path, values), store.url, env, *joining, cwd=tmp_path))
    assert cluster.shipped()
    assert [row["pairs"] for row in made["subsets"]] == [8]

    model = {"model": str(tiny_models.generator), "workers": 2, "cpus": 2}
    training = write(tmp_path, {"name": "tuned", "subset": "top", "policy": model, "train": TRAIN}, "train")
    run = start(training, store.url, env, *joining, flow="train", cwd=tmp_path)
    wait_for(lambda: all(processes(mark, TRAINING) for mark in cluster.marks), run)
    trained = {pid for mark in cluster.marks for pid in processes(mark, TRAINING)}
    assert report(run)["steps"] == 2
    assert trained <= cluster.shipped()

    wanted = {
        "name": "small",
        "subsets": ["top"],
        "seeds": 1,
        "objectives": [{"name": "dpo"}, {"name": "ipo", "train": {"objective": "ipo"}}],
        "policy": {"model": str(tiny_models.generator), "cpus": 2},
        "train": TRAIN,
        "evaluate": {
            "ingest": ingest,
            "generate": {"samples": 2, "generators": [policy]},
            "score": {"scorers": [reward]},
        },
    }
    path = write(tmp_path, wanted, "experiment")
    found = report(start(path, store.url, env, *joining, flow="experiment", cwd=tmp_path))
    assert [stage["out"] for stage in found["stages"] if stage["stage"] == "train"] == [2]
    assert cluster.shipped()
    assert cluster.left() == []


def test_a_node_that_is_lost_costs_the_shards_it_had_in_hand(
    cluster: Cluster,
    env: dict[str, str],
    joining: tuple[str, str],
    tmp_path: Path,
    store: Store,
    measured: dict[str, Any],
) -> None:
    """The last of this file: the node stays lost."""
    path = sleepy(tmp_path, workers=2, resources={"engine": 0.5})
    run = start(path, store.url, env, *joining)
    wait_for(lambda: len(store.list("completions")) >= 3, run)
    busy = [mark for mark in cluster.marks if processes(mark, ENGINE)]
    assert busy
    before = store.list("completions")
    lost = processes(busy[0], ENGINE)
    kill(processes(busy[0]))
    measured["next shard after seconds"] = next_file(store, "completions", run)
    found = report(run)
    assert not processes(busy[0])
    times = asked(store, "completions", tmp_path / "log")
    measured["shards made again"] = sum(number > 1 for number in times.values())
    measured["finished shards made again"] = sum(times[path] > 1 for path in before)
    assert len(times) == SHARDS and [times[path] for path in before] == [1] * len(before)
    assert max(times.values()) <= 2 and 1 <= measured["shards made again"] <= IN_FLIGHT * len(lost)
    undisturbed = report(start(path, tmp_path / "undisturbed", env, *joining))
    assert found["subsets"] == undisturbed["subsets"]
    assert cluster.left() == []


def test_an_engine_that_no_node_has_room_for_is_refused_before_anything_starts(
    tmp_path: Path, prefect_api: str
) -> None:
    about = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    path = sleepy(tmp_path, resources={"engine": 0.5})
    run = start(path, tmp_path / "store", environment(**about))
    _, log = run.communicate(timeout=200)
    assert run.returncode == 2
    assert "resources: no node of the Ray cluster has 0.5 CPU, 0 GPU, 0.5 engine" in log
