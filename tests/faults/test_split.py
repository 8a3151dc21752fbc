"""An engine whose model is split over two processes, as over two GPUs: real vLLM, killed while it starts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from examples.tinyworld.build import build
from flows.demo import WORLD
from tasks.store import Store
from tests.conftest import curate_values, prompts, write_jsonl
from tests.faults.runs import ENGINE, kill, processes, report, start, wait_for
from tests.services import ROOT, environment

pytest.importorskip("vllm", reason="vLLM is not installed")

PARTS = "VLLM::Worker_TP"  # how vLLM calls the processes of its tensor-parallel parts


def test_an_engine_in_two_parts_ends_as_a_whole_and_is_started_again_as_a_whole(
    prefect_api: str, tmp_path: Path, mark: str, store: Store
) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    policy = {
        "name": "policy",
        "engine": "vllm",
        "model": str(build(ROOT / WORLD) / "policy"),
        "sampling": {"max_tokens": 6},
        "engine_args": {"tensor_parallel_size": 2},
        "max_model_len": 64,
        "cpus": 2,
    }
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": 4},
        generate={"samples": 2, "generators": [policy]},
    )
    path = tmp_path / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"), MARK=mark)
    run = start(path, store.url, env)
    wait_for(lambda: len(processes(mark, PARTS)) == 2, run, 200)
    parts = processes(mark, PARTS)
    kill(processes(mark, ENGINE))
    deadline = time.monotonic() + 30
    while set(parts) & set(processes(mark, PARTS)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(parts) & set(processes(mark, PARTS))  # they would keep their GPUs' memory
    wait_for(lambda: len(processes(mark, PARTS)) == 2, run, 200)
    made = report(run)
    assert [stage["out"] for stage in made["stages"] if stage["stage"] == "generate"] == [12]
    assert processes(mark, PARTS) == []
