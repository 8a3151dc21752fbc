"""A cluster of several nodes, each with processes and an address of its own; one of them is lost."""

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

from tasks.store import Store
from tests.conftest import curate_values, files_below, generator, prompts, scorer, write_jsonl
from tests.faults.runs import ENGINE, kill, processes, report, start, wait_for
from tests.services import ROOT, RayHead, environment, ray_head, ray_node


class Cluster(NamedTuple):
    head: RayHead
    marks: list[str]  # of its two nodes: their processes can be told by them


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes with room for one engine each."""
    marks = [secrets.token_hex(8), secrets.token_hex(8)]
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(ray_head(tmp_path / "head", cpus=0, PYTHONPATH=str(ROOT)))
        for number, mark in enumerate(marks):
            about = {"PYTHONPATH": str(ROOT), "MARK": mark}
            address = f"127.0.0.{number + 2}"
            stack.enter_context(
                ray_node(head, tmp_path / f"node{number}", address, cpus=2, resources={"engine": 1}, **about)
            )
        yield Cluster(head, marks)
        for mark in marks:
            kill(processes(mark))


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """Two engines at once of each kind, half a node each; a tenth of a second per request."""
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(96))
    (tmp_path / "faults.json").write_text(json.dumps({"": "sleep 0.1"}))
    about = {
        "engine_args": {"faults": str(tmp_path / "faults.json")},
        "workers": 2,
        "cpus": 0.5,
        "resources": {"engine": 0.5},
    }
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": 8},
        generate={"samples": 2, "generators": [generator(**about)]},
        score={"scorers": [scorer(**about)]},
    )
    path = tmp_path / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_node_that_is_lost_costs_the_shards_it_had_in_hand(
    cluster: Cluster, configuration: Path, prefect_api: str, tmp_path: Path, store: Store
) -> None:
    about = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    env = environment(**about, **cluster.head.environment)
    joining = ("--set", f"ray_address={cluster.head.gcs}")
    run = start(configuration, store.url, env, *joining)
    wait_for(lambda: len(store.list("completions")) >= 3, run)
    busy = [mark for mark in cluster.marks if processes(mark, ENGINE)]
    assert busy
    before = files_below(Path(store.url))
    kill(processes(busy[0]))
    found = report(run)
    assert not processes(busy[0])
    after = files_below(Path(store.url))
    kept = [path for path in before if path.startswith(("completions", "prompts/shards"))]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    undisturbed = report(start(configuration, tmp_path / "undisturbed", env, *joining))
    assert found["subsets"] == undisturbed["subsets"]
    deadline = time.monotonic() + 30
    while any(processes(mark, ENGINE) for mark in cluster.marks) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(processes(mark, ENGINE) for mark in cluster.marks)


def test_an_engine_that_no_node_has_room_for_is_refused_before_anything_starts(
    local_ray: Any, configuration: Path, tmp_path: Path, prefect_api: str
) -> None:
    about = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    run = start(configuration, tmp_path / "store", environment(**about))
    _, log = run.communicate(timeout=200)
    assert run.returncode == 2
    assert "resources: no node of the Ray cluster has 0.5 CPU, 0 GPU, 0.5 engine" in log
