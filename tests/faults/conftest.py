"""What the tests of faults share: a configuration, what it publishes undisturbed, and an S3 server behind a proxy.

`--measured FILE` keeps what the tests measure on their way, for docs/reliability.md; no test depends on a time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import curate_values, generator, prompts, scorer, write_jsonl
from tests.faults.proxy import Proxy, proxy
from tests.faults.runs import PROMPTS, SHARD, kill, processes, report, start
from tests.services import SeaweedFS, environment, seaweedfs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", metavar="FILE", help="Write what was measured into this JSON file.")


@pytest.fixture(scope="session")
def _measured(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    if file := request.config.getoption("--measured"):
        from benchmarks.machine import machine

        whole = {"machine": machine("ray", "prefect", "s3fs"), "faults": found}
        Path(file).write_text(json.dumps(whole, indent=2) + "\n")


@pytest.fixture
def measured(_measured: list[dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test found: put numbers into it."""
    about: dict[str, Any] = {"test": request.node.name}
    _measured.append(about)
    return about


@pytest.fixture(scope="session")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines that take a tenth of a second per request."""
    folder = tmp_path_factory.mktemp("faults")
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    (folder / "faults.json").write_text(json.dumps({"": "sleep 0.1"}))
    slow = {"engine_args": {"faults": str(folder / "faults.json")}}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 2, "generators": [generator(**slow)]},
        score={"scorers": [scorer(**slow)]},
    )
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def undisturbed(configuration: Path, prefect_api: str, tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    plain = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(folder / "prefect"))
    return report(start(configuration, folder / "store", plain))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def _proxy(s3: SeaweedFS) -> Iterator[Proxy]:
    with proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def between(_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy before the S3 server, which fails nothing until a test says so."""
    _proxy.rule, _proxy.seen, _proxy.failed = (lambda method, path: None), [], []
    yield _proxy
    _proxy.rule = lambda method, path: None


@pytest.fixture
def mark() -> Iterator[str]:
    """What all processes of a run can be told by; none is left behind."""
    value = secrets.token_hex(8)
    yield value
    kill(processes(value))
