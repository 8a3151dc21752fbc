"""What the tests of faults share: a configuration, what it publishes undisturbed, and an S3 server behind a proxy.

`--junitxml FILE` keeps what the tests measure on their way, for docs/reliability.md; no test depends on a time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from tests.conftest import curate_values, generator, prompts, scorer, write_jsonl
from tests.faults.proxy import Proxy, proxy
from tests.faults.runs import PROMPTS, SHARD, kill, processes, report, start
from tests.services import SeaweedFS, environment, seaweedfs


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Iterator[dict[str, Any]]:
    """What a test found: put numbers into it."""
    found: dict[str, Any] = {}
    yield found
    for what, number in found.items():
        record_property(what, number)


@pytest.fixture(scope="session")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines that take a tenth of a second per request, and note it in the file `log` beside the configuration."""
    folder = tmp_path_factory.mktemp("faults")
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    (folder / "faults.json").write_text(json.dumps({"": "sleep 0.1"}))
    slow = {"engine_args": {"faults": str(folder / "faults.json"), "log": str(folder / "log")}}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 2, "generators": [generator(**slow)]},
        score={"scorers": [scorer(**slow)]},
    )
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def log(configuration: Path, undisturbed: dict[str, Any]) -> Path:
    """What engines of the shared configuration were asked from here on."""
    file = configuration.with_name("log")
    file.write_text("")
    return file


@pytest.fixture(scope="session")
def undisturbed(configuration: Path, prefect_api: str, tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    plain = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(folder / "prefect"))
    return report(start(configuration, folder / "store", plain))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def buckets(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL below which this process, too, reads stores on the S3 server; past the proxy."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield f"s3://{s3.bucket}"
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def _proxy(s3: SeaweedFS) -> Iterator[Proxy]:
    with proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def between(_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy before the S3 server, which fails nothing until a test says so."""
    _proxy.rule, _proxy.seen, _proxy.failed, _proxy.answered = (lambda method, path: None), [], [], []
    yield _proxy
    _proxy.rule = lambda method, path: None


@pytest.fixture
def mark() -> Iterator[str]:
    """What all processes of a run can be told by; none is left behind."""
    value = secrets.token_hex(8)
    yield value
    kill(processes(value))
