"""`prefsieve submit` against a real Ray head that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from flows.cli import FLOWS, load_values, parse
from flows.submit import absolute, entrypoint, given, prepared
from tests.services import ROOT, RayHead, environment, prefsieve, ray_head


@pytest.fixture(scope="module")
def head(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray head whose jobs know a Prefect server and hold a credential that must not show anywhere."""
    folder = tmp_path_factory.mktemp("cluster")
    with ray_head(folder, PREFECT_API_URL=prefect_api, AWS_SECRET_ACCESS_KEY="clusters-own-secret") as head:
        yield head


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody works: a configuration, its prompts and its store, all by relative path."""
    folder = tmp_path_factory.mktemp("place")
    prompts = [{"prompt": f"Question {i}?"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "curate.yaml").write_text(yaml.safe_dump(_configuration()))
    return folder


class First(NamedTuple):
    """The first submission, interrupted while its job runs, and the same command again."""

    report: dict[str, Any]
    interrupted: str
    status: int
    attached: str


@pytest.fixture(scope="module")
def first(head: RayHead, place: Path) -> First:
    env = _client(head, AWS_SECRET_ACCESS_KEY="submitters-secret")
    # What a shell starts in the background ignores Ctrl-C, and so would what these tests start then.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "flows.cli", *_submit(head, "--json")]
    with subprocess.Popen(command, env=env, cwd=place, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        interrupted = ""
        while "Running entrypoint" not in interrupted:
            line = running.stderr.readline()
            assert line, interrupted
            interrupted += line
        running.send_signal(signal.SIGINT)
        interrupted += running.stderr.read()
        status = running.wait(30)
    done = prefsieve(*_submit(head, "--json"), env=env, cwd=place)
    assert done.returncode == 0, done.stderr
    return First(json.loads(done.stdout), interrupted, status, done.stderr)


def test_ctrl_c_leaves_the_job_running_and_the_same_command_follows_it(first: First) -> None:
    assert first.status == 130, first.interrupted
    assert "goes on without this terminal" in first.interrupted
    assert f"`prefsieve cancel {_job(first.interrupted)} --address http" in first.interrupted
    assert f"job {_job(first.interrupted)} is already" in first.attached
    assert _job(first.attached) == _job(first.interrupted)


def test_ctrl_c_is_not_lost_where_python_ignores_its_exception(head: RayHead) -> None:
    code = """
import signal, sys, time
from flows import jobs

class Garbage:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)  # where the exception is raised, and ignored

def asking(job):
    Garbage()
    return ask(job)

client = jobs.connect(sys.argv[1])
job = client.submit_job(entrypoint="sleep 60")
ask, client.get_job_info = client.get_job_info, asking
try:
    jobs.follow(client, job, sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
client.stop_job(job)
"""
    command = ["env", "--default-signal=INT", sys.executable, "-c", code, head.address]
    done = subprocess.run(command, env=_client(head), capture_output=True, text=True, timeout=50)
    assert done.stdout == "interrupted True\n", done.stderr
    assert "Exception ignored in" in done.stderr


def test_a_submitted_flow_publishes_into_the_store_of_who_submitted_it(first: First, place: Path) -> None:
    report = first.report
    assert report["store"] == str(place / "store")
    assert [(row["name"], row["pairs"]) for row in report["subsets"]] == [("half", 6)]
    listed = prefsieve("subsets", "--store", "store", "--json", env=environment(), cwd=place)
    [subset] = json.loads(listed.stdout)["subsets"]
    assert subset["version"] == report["subsets"][0]["version"]


def test_the_report_has_one_row_per_stage_and_counts_that_add_up(first: First) -> None:
    for row in first.report["stages"]:
        assert row["in"] == row["out"] + sum(row["dropped"].values()), row
    assert _work(first.report, "generate")["requests"] == 12


def test_a_second_submission_is_a_new_attempt_and_does_no_engine_work(head: RayHead, place: Path, first: First) -> None:
    done = prefsieve(*_submit(head, "--json"), env=_client(head), cwd=place)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["version"] for row in report["subsets"]] == [row["version"] for row in first.report["subsets"]]
    for stage in ("generate", "score"):
        row = _work(report, stage)
        assert (row["engine_starts"], row["requests"], row["shards_made"]) == (0, 0, 0)
        assert row["shards_reused"] == 3
    assert _job(done.stderr) == f"{_job(first.attached)}-2"


def test_no_secret_reaches_the_jobs_record(head: RayHead, first: First) -> None:
    """What the dashboard shows to everybody with the token: entrypoint, metadata, runtime environment, log."""
    code = (
        "import dataclasses, sys; from ray.job_submission import JobSubmissionClient as C; c = C(sys.argv[1])\n"
        "for j in c.list_jobs(): print(j.model_dump_json(), c.get_job_logs(j.submission_id) if j.submission_id else '')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, head.address], env=_client(head), capture_output=True, text=True, check=True
    ).stdout
    assert "curate" in shown
    for secret in ("submitters-secret", "clusters-own-secret", head.token):
        assert secret not in shown


def test_a_job_that_fails_says_how_its_log_ends(head: RayHead, place: Path) -> None:
    two_of_twelve_too_long = ["--set", "ingest.max_chars=11"]
    done = prefsieve(*_submit(head, *two_of_twelve_too_long), env=_client(head), cwd=place)
    assert done.returncode == 1
    assert "failed; the end of its log" in done.stderr
    assert "max_quarantined" in done.stderr


def test_what_the_job_finds_wrong_is_a_configuration_error_here_too(head: RayHead, place: Path) -> None:
    done = prefsieve(*_submit(head, "--set", "ingest.source=/no/such/file.jsonl"), env=_client(head), cwd=place)
    assert done.returncode == 2
    assert "/no/such/file.jsonl" in done.stderr


def test_a_job_that_is_not_there_or_has_ended_cannot_be_cancelled(head: RayHead, place: Path, first: First) -> None:
    ended = _job(first.interrupted)
    refusals = {
        ("another",): "job 'another' is not known at http",
        (ended,): f"job {ended} has ended already: succeeded",
        ("curate", "curate.yaml"): "no job runs curate with this configuration at http",
    }
    for which, said in refusals.items():
        done = prefsieve("cancel", *which, "--address", head.address, env=_client(head), cwd=place)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_run_that_follows_a_job_tells_of_a_version_what_the_job_tells_and_it_counts_once(
    head: RayHead, place: Path, prefect_api: str
) -> None:
    """Both have the server; only new versions are told of."""
    change = ("--set", f"ray_address={head.address}", "--set", "subset.0.name=told", "--json")
    for published in (1, 0):
        done = prefsieve("curate", "curate.yaml", *change, env=_client(head, PREFECT_API_URL=prefect_api), cwd=place)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert _work(report, "publish told")["shards_made"] == published
    [version] = [row["version"] for row in report["subsets"]]
    told = _events(prefect_api, "prefsieve.subset.told")
    assert [event["payload"]["version"] for event in told] == [f"told@{version}"]
    assert told[0]["payload"]["store"] == str(place / "store")


@pytest.mark.parametrize("wrong", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN": ""}])
def test_a_wrong_or_missing_token_is_refused_with_the_variables_to_set(
    head: RayHead, place: Path, tmp_path: Path, wrong: dict[str, str]
) -> None:
    env = {key: value for key, value in _client(head, HOME=str(tmp_path), **wrong).items() if value}
    done = prefsieve(*_submit(head), env=env, cwd=place)
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "RAY_AUTH_MODE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "ray://127.0.0.1:10001", "somewhere"])
def test_an_address_without_a_dashboard_is_refused(place: Path, address: str) -> None:
    done = prefsieve("submit", "curate", "curate.yaml", "--address", address, env=environment(), cwd=place)
    assert done.returncode == 2
    assert address in done.stderr
    assert "8265" in done.stderr


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFSIEVE_STORE", raising=False)
    (tmp_path / "model").mkdir()
    shipped = absolute(
        {
            "ingest": {"source": "data/*.jsonl"},
            "generate": {"generators": [{"model": "model"}, {"model": "org/model"}, {"model": "policy:mine"}]},
            "score": {"scorers": [{"function": "checks/answers.py:score"}, {"function": "package.module:score"}]},
        }
    )
    here = os.getcwd()
    assert "store" not in shipped, "which store is then up to the cluster"
    assert shipped["ingest"]["source"] == f"{here}/data/*.jsonl"
    models = [generator["model"] for generator in shipped["generate"]["generators"]]
    assert models == [f"{here}/model", "org/model", "policy:mine"]
    functions = [scorer["function"] for scorer in shipped["score"]["scorers"]]
    assert functions == [f"{here}/checks/answers.py:score", "package.module:score"]
    nested = absolute(
        {"curate": {"ingest": {"source": "./p.jsonl"}}, "evaluate": shipped, "policy": {"model": "model"}}
    )
    assert nested["curate"]["ingest"]["source"] == f"{here}/p.jsonl"
    assert nested["policy"]["model"] == f"{here}/model"
    assert absolute({"store": "s3://bucket/prefix"})["store"] == "s3://bucket/prefix"
    assert absolute({"store": "kept"})["store"] == f"{here}/kept"
    monkeypatch.setenv("PREFSIEVE_STORE", "mine")
    assert absolute({})["store"] == f"{here}/mine"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_job_is_the_same_whether_a_file_or_a_form_in_prefect_says_so(path: Path) -> None:
    values = load_values(path, [], "")
    flow = "experiment" if "subsets" in values else "train" if "subset" in values and "policy" in values else ""
    flow = flow or ("evaluate" if "evaluate" in values else "curate")
    from_file = parse(flow, values, path)
    from_form = FLOWS[flow](**{field: getattr(from_file, field) for field in FLOWS[flow].model_fields})
    assert prepared(flow, from_file) == prepared(flow, from_form)
    assert FLOWS[flow].model_validate(given(from_file)) == from_file, "nothing of it is lost on the way"


@pytest.mark.parametrize(
    ("cluster", "taken"), [("s3://clusters/own", "s3://clusters/own"), ("", "{here}/.prefsieve/store")]
)
def test_without_a_configured_store_the_clusters_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, taken: str
) -> None:
    here = tmp_path / "a folder with 'quotes' and $signs"
    here.mkdir()
    monkeypatch.chdir(here)
    choose, _, _ = entrypoint("curate").partition(" python ")
    shown = subprocess.run(
        ["sh", "-c", f'{choose} echo "$PREFSIEVE_STORE"'],
        env={"PREFSIEVE_STORE": cluster},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == taken.replace("{here}", str(here))


# --- builders and readers


def _configuration() -> dict[str, Any]:
    return {
        "ingest": {"source": "prompts.jsonl", "shard_size": 4},
        "generate": {"samples": 4, "generators": [{"name": "one", "engine": "fake"}]},
        "score": {"scorers": [{"name": "reward", "engine": "fake"}]},
        "subset": [{"name": "half", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
        "store": "store",
    }


def _events(api: str, resource: str) -> list[dict[str, Any]]:
    """Of published versions of a subset; the server keeps what it is told a little later."""
    asked = {"filter": {"event": {"name": ["prefsieve.subset.published"]}, "resource": {"id": [resource]}}, "limit": 50}
    request = urllib.request.Request(
        f"{api}/events/filter", data=json.dumps(asked).encode(), headers={"Content-Type": "application/json"}
    )
    for _ in range(60):
        with urllib.request.urlopen(request, timeout=30) as answer:
            if events := json.load(answer)["events"]:
                return list(events)
        time.sleep(1)
    return []


def _submit(head: RayHead, *options: str) -> list[str]:
    return ["submit", "curate", "curate.yaml", "--address", head.address, *options]


def _client(head: RayHead, **extra: str) -> dict[str, str]:
    return environment(**{**head.environment, "PYTHONPATH": str(ROOT), **extra})


def _work(report: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(row for row in report["stages"] if row["stage"] == stage)


def _job(said: str) -> str:
    """The id in `job NAME at ADDRESS`."""
    return next(line.split()[1] for line in said.splitlines() if line.startswith("job ") and " at http" in line)
