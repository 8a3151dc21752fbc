"""Deployments on a real Prefect server, run by a real worker: the schedule, the form, a run by button, a refusal."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.workers.process import ProcessWorker

from flows.deploy import deploy_all
from flows.deployments import read_file
from tasks.errors import ConfigError
from tests.forms import drawn_as, remembered
from tests.services import JOINING, PATIENCE, ROOT, environment, prefect_server, prefect_worker, prefsieve, unlocked

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
RUN = 240.0  # seconds; a run takes about 30 on two idle cores
TRAINING = {"name": "policy", "subset": "half", "policy": {"model": "m"}}
NIGHT = {"slug": "night", "cron": "0 2 * * *"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        prefect_server(tmp_path_factory.mktemp("server")) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def deployed(api: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `prefsieve deploy` printed the second time: doing it twice must be as good as once."""
    env = environment(PREFECT_API_URL=_url(api), PREFECT_HOME=str(tmp_path_factory.mktemp("deployer")))
    for _ in range(2):
        done = prefsieve("deploy", env=env)
        assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def schema(api: httpx.Client, deployed: str) -> dict[str, Any]:
    return dict(_deployment(api, "curate")["parameter_openapi_schema"])


def test_deploy_registers_pool_and_deployments_and_says_what_to_do_next(api: httpx.Client, deployed: str) -> None:
    assert api.get("/work_pools/prefsieve").json()["type"] == "process"
    for flow in ("curate", "train", "evaluate", "experiment"):
        deployment = _deployment(api, flow)
        assert deployment["entrypoint"] == f"flows.{flow}.{flow}"
        assert deployment["path"] is None, "the deployer's folder must not be recorded"
        assert not deployment["pull_steps"]
        assert deployment["enforce_parameter_schema"]
        assert deployment["work_pool_name"] == "prefsieve"
        assert deployment["description"]
        assert "prefsieve" in deployment["tags"]
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert f"{flow}/{flow}" in deployed
    assert "prefect worker start --pool prefsieve" in deployed


def test_curate_runs_every_night_and_the_server_plans_it(api: httpx.Client, deployed: str) -> None:
    [schedule] = _deployment(api, "curate")["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    deadline = time.monotonic() + 60
    while not (runs := _runs(api, "SCHEDULED")) and time.monotonic() < deadline:
        time.sleep(1)
    assert runs, "the scheduler planned no run"
    assert all(run["expected_start_time"][11:16] == "02:00" for run in runs)


def test_the_form_has_a_title_and_a_description_for_every_section(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) >= {"ingest", "generate", "score", "pair", "subset", "publish", "store"}
    for name, section in schema["properties"].items():
        assert section["title"], name
        assert section["description"], name


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("IngestConfig", ["source", "format", "split", "limit", "max_chars", "shard_size"]),
        ("GenerateConfig", ["samples", "generators"]),
        ("GeneratorConfig", ["name", "engine", "model", "revision", "dtype", "workers", "cpus", "gpus"]),
        ("SamplingConfig", ["temperature", "max_tokens"]),
        ("ScoreConfig", ["scorers"]),
        ("ScorerConfig", ["name", "type", "engine", "model", "function"]),
        ("PairingConfig", ["name", "rule", "generators", "scorer", "reward_scale", "seed"]),
        ("SubsetConfig", ["name", "pairs", "steps", "controls", "seed"]),
        ("PublishConfig", ["rows_per_file", "license"]),
    ],
)
def test_common_fields_are_filled_in_without_writing_json(
    schema: dict[str, Any], model: str, fields: list[str]
) -> None:
    sections = (model, f"{model.removesuffix('Config')}More")
    found = [schema["definitions"][name]["properties"] for name in sections if name in schema["definitions"]]
    properties = {name: field for shown in found for name, field in shown.items()}
    for field in fields:
        assert properties[field]["title"], f"{model}.{field}"
        assert properties[field]["description"], f"{model}.{field}"
        assert drawn_as(properties[field], schema) not in ("json", "buttons"), f"{model}.{field}"


def test_a_run_by_button_with_other_parameters_completes_and_shows_its_artifacts(
    api: httpx.Client, deployed: str, local_ray: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    parameters = _fake_parameters(tmp_path, store)
    parameters["ray_address"] = local_ray.get_runtime_context().gcs_address
    parameters["ingest"]["source"] = "prompts.jsonl"  # found in the folder in which the worker was started
    with prefect_worker(_url(api), "prefsieve", tmp_path / "worker", cwd=tmp_path, **JOINING):
        created = _start(api, parameters)
        assert created.status_code == 201, created.text
        run = _finished(api, created.json()["id"])
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]

    artifacts = _artifacts(api, run["id"])
    assert artifacts["generate-progress"]["type"] == "progress"
    assert float(artifacts["generate-progress"]["data"]) == 100
    assert artifacts["curate-counts"]["type"] == "table"
    rows = {row["stage"]: row for row in json.loads(artifacts["curate-counts"]["data"])}
    assert rows["ingest"]["in"] == 12
    assert rows["publish half"]["out"] == 6
    assert artifacts["curate-report"]["type"] == "markdown"
    assert "half" in artifacts["curate-report"]["data"]

    listed = prefsieve("subsets", "--store", store, "--json", env=environment())
    assert [row["pairs"] for row in json.loads(listed.stdout)["subsets"]] == [6]


KEYED = """
import hashlib, os

def score(prompt, text):
    return {digest: 1.0}[hashlib.sha256(os.environ["SCORER_KEY"].encode()).hexdigest()]
"""


def test_a_key_of_a_secret_block_reaches_a_scorer_and_nothing_that_can_be_read(
    api: httpx.Client, deployed: str, tmp_path: Path
) -> None:
    """Through the work pool's job variables, as docs/security.md says."""
    key, store = secrets.token_hex(16), tmp_path / "store"
    save = "import sys; from prefect.blocks.system import Secret; Secret(value=sys.stdin.read()).save('scorer-key')"
    env = environment(PREFECT_API_URL=_url(api), PREFECT_HOME=str(tmp_path / "home"))
    subprocess.run([sys.executable, "-c", save], input=key, env=env, text=True, check=True)
    file = tmp_path / "keyed.py"
    file.write_text(KEYED.replace("digest:", repr(hashlib.sha256(key.encode()).hexdigest()) + ":"))
    parameters = _fake_parameters(tmp_path, store)
    parameters["score"]["scorers"] += [{"name": "keyed", "type": "function", "function": f"{file}:score"}]
    variables = {"env": {"SCORER_KEY": "{{ prefect.blocks.secret.scorer-key }}"}}
    with prefect_worker(_url(api), "prefsieve", tmp_path / "worker"):
        created = _start(api, parameters, job_variables=variables)
        assert created.status_code == 201, created.text
        run = _finished(api, created.json()["id"])
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    logs = api.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run["id"]]}}}).text
    shown = [json.dumps(run), logs, json.dumps(_artifacts(api, run["id"]))]
    files = [file.read_bytes() for root in (store, tmp_path / "worker") for file in root.rglob("*") if file.is_file()]
    assert not any(key in text for text in shown)
    assert len(files) > 10 and not any(key.encode() in content for content in files)


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("generate", {"samples": 0, "generators": [{"name": "one", "engine": "fake"}]}, "samples"),
        ("subset", [{"name": "half", "steps": [{"rank": "pvar", "keep": "middle", "fraction": 0.5}]}], "keep"),
        ("ingest", {"source": "prompts.jsonl", "sauce": "x"}, "sauce"),
    ],
)
def test_a_wrong_value_is_refused_before_a_run_exists(
    api: httpx.Client, deployed: str, tmp_path: Path, section: str, value: Any, said: str
) -> None:
    parameters = {**_fake_parameters(tmp_path, tmp_path / "store"), section: value}
    refused = _start(api, parameters)
    assert refused.status_code == 409
    assert said in refused.json()["detail"]
    assert "Validation failed" in refused.json()["detail"]


def test_the_ui_is_told_what_is_wrong_with_which_field(
    api: httpx.Client, deployed: str, schema: dict[str, Any], tmp_path: Path
) -> None:
    parameters = _fake_parameters(tmp_path, tmp_path / "store")
    parameters["generate"]["samples"] = 0
    told = api.post("/ui/schemas/validate", json={"schema": remembered(schema), "values": parameters}).json()
    beside = {"property": "samples", "errors": ["0 is less than the minimum of 1"]}
    assert told == {"errors": [{"property": "generate", "errors": [beside]}], "valid": False}
    assert (
        _start(api, parameters)
        .json()["detail"]
        .endswith("Validation failed for field 'generate.samples'. Failure reason: 0 is less than the minimum of 1")
    )


def test_deploy_without_a_server_says_which_variable_to_set(tmp_path: Path) -> None:
    done = prefsieve("deploy", env=environment(PREFECT_HOME=str(tmp_path)))
    assert done.returncode == 2
    assert "PREFECT_API_URL" in done.stderr


def test_a_dry_run_checks_the_file_and_needs_no_server(tmp_path: Path) -> None:
    env = environment(PREFECT_HOME=str(tmp_path / "home"), PREFECT_API_URL="http://127.0.0.1:9/api")
    done = prefsieve("deploy", "--dry-run", env=env)
    assert done.returncode == 0, done.stderr
    assert "nothing is registered" in done.stdout
    for line in (
        "work pool   prefsieve",
        "deployment  curate/curate, at 0 2 * * * UTC",
        "automation  prefsieve-run-failed",
    ):
        assert f"  {line}\n" in done.stdout
    wrong = _file(tmp_path, _entry("wrong", parameters={"name": "policy", "subset": "top"}))
    refused = prefsieve("deploy", "--dry-run", "--file", wrong, env=env)
    assert refused.returncode == 2
    assert "deployment 'wrong': policy: " in refused.stderr


def test_deploy_to_a_server_that_is_not_there_names_the_url(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/api"
    done = prefsieve("deploy", env=environment(PREFECT_HOME=str(tmp_path), PREFECT_API_URL=url))
    assert done.returncode == 2
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_a_password_in_the_servers_url_is_not_shown(api: httpx.Client, tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:9/api", _url(api).removesuffix("/api"), _url(api)):
        secret = url.replace("://", "://me:hunter2@")
        done = prefsieve("deploy", env=environment(PREFECT_HOME=str(tmp_path), PREFECT_API_URL=secret))
        assert done.returncode == (0 if url == _url(api) else 2), done.stderr
        assert url in done.stdout + done.stderr
        assert "hunter2" not in done.stdout + done.stderr


def test_deploy_to_the_servers_ui_instead_of_its_api_says_how_the_url_ends(api: httpx.Client, tmp_path: Path) -> None:
    env = environment(PREFECT_HOME=str(tmp_path), PREFECT_API_URL=_url(api).removesuffix("/api"))
    done = prefsieve("deploy", env=env)
    assert done.returncode == 2
    assert "ends in /api" in done.stderr


def test_deploy_refuses_a_missing_file_and_wrong_parameters(tmp_path: Path) -> None:
    done = prefsieve("deploy", "--file", tmp_path / "none.yaml", env=environment())
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    file = tmp_path / "prefect.yaml"
    parameters = {"name": "policy", "subset": "half", "policy": {"model": "m"}, "train": {"beta": -1}}
    entry = {"name": "mine", "entrypoint": "flows.train.train", "work_pool": {"name": "prefsieve"}}
    file.write_text(json.dumps({"deployments": [{**entry, "parameters": parameters}]}))
    done = prefsieve("deploy", "--file", file, env=environment())
    assert done.returncode == 2
    assert "train.beta" in done.stderr
    assert "'mine'" in done.stderr
    done = prefsieve("deploy", "--set", "ray_adress=http://ray:8265", env=environment())
    assert done.returncode == 2
    assert "ray_adress" in done.stderr


# --- a file of one's own


def test_parameters_may_be_the_name_of_a_configuration_file_beside_it(api: httpx.Client, tmp_path: Path) -> None:
    configuration = (ROOT / "configs" / "import" / "long.yaml").read_text()
    (tmp_path / "long.yaml").write_text(configuration)
    done = _deploy(api, tmp_path, _entry("named", entrypoint="flows.curate.curate", parameters="long.yaml"))
    assert done.returncode == 0, done.stderr
    deployment = _deployment(api, "curate", "named")
    expected = yaml.safe_load(configuration)
    assert deployment["parameters"]["import_"]["source"] == expected["import"]["source"]
    assert len(deployment["parameters"]) == len(expected)
    assert expected["pair"][0]["reward_scale"] == "auto"  # for which the form has a number
    asked = {"schema": remembered(deployment["parameter_openapi_schema"]), "values": deployment["parameters"]}
    assert api.post("/ui/schemas/validate", json=asked).json() == {"errors": [], "valid": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"deployments.0.parameters: deployment 'mine': \S+/own.yaml: cannot be read: No such file"),
        ("- 1", r"deployment 'mine': \S+/own.yaml: a configuration is a mapping"),
        ("{name: a, subset: b, policy: {model: m}, train: {beta: -1}}", r"'mine' \(\S+/own.yaml\): train.beta: .*-1"),
    ],
)
def test_a_missing_or_wrong_configuration_file_is_told_with_deployment_and_field(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content:
        (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_file(_file(tmp_path, _entry("mine", parameters="own.yaml")))


def test_a_schedule_that_is_taken_out_of_the_file_is_removed_from_the_server(api: httpx.Client, tmp_path: Path) -> None:
    old, kept = ({"slug": slug, "cron": "0 2 * * *"} for slug in ("old", "kept"))
    for times, removed in (([old, kept], []), ([kept], ["old"]), ([kept], []), ([], ["kept"])):
        done = _deploy(api, tmp_path, _entry("nights", parameters=TRAINING, schedules=times))
        assert done.returncode == 0, done.stderr
        assert re.findall(r"schedule +(\S+) removed", done.stdout) == removed
        there = _deployment(api, "train", "nights")["schedules"]
        assert {each["slug"] for each in there} == {each["slug"] for each in times}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"schedules": [{**NIGHT, "parameters": {"train": {"beta": -1}}}]},
            r"'mine', schedule 'night': train.beta: .*-1",
        ),
        ({"schedules": [{**NIGHT, "parameters": {"subst": "b"}}]}, r"schedule 'night': subst: no such field"),
        ({"parameters": {}, "schedules": [NIGHT]}, r"schedule 'night': name: this field is required"),
        (
            {"triggers": [{"name": "after", "expect": ["x"], "parameters": {"subst": "{{ event.payload.version }}"}}]},
            r"'mine', trigger 'after': subst: no such field; there are: .*subset",
        ),
        ({"entrypoint": "flows.nothing.nothing", "parameters": {}}, "no such flow; give one of flows.curate.curate, "),
        ({"entrypoint": "flows.cli.train"}, "no such flow; give one of flows.curate.curate, "),
        ({"entrypoint": "flows.nothing.train"}, "no such flow; give one of flows.curate.curate, "),
        ({"work_pool": {"name": ""}}, "work_pool.name: .* at least 1 character"),
    ],
)
def test_what_would_start_a_wrong_run_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    whole = {"parameters": TRAINING}
    with pytest.raises(ConfigError, match=said):
        read_file(_file(tmp_path, _entry("mine", **{**whole, **changes})))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedules": [{**NIGHT, "cron": "99 99 * * *"}]}, 'Invalid cron string: "99 99'),
        ({"schedules": [{**NIGHT, "timezone": "Moon/Back"}]}, 'timezone: Invalid timezone: "Moon/Back"'),
        ({"schedules": [{"slug": "x", "interval": -5}]}, "interval: Input should be greater than 0 seconds"),
        ({"concurrency_limit": {"most": 1}}, "limit: this field is required"),
        ({"triggers": [{"type": 5}]}, "0: Input tag '5'"),
    ],
)
def test_what_prefect_cannot_take_is_told_in_a_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^deployment 'mine': {said}") as caught:
        deploy_all(_file(tmp_path, _entry("mine", **{"parameters": TRAINING, **changes})), dry_run=True)
    assert "\n" not in str(caught.value)


def test_an_automation_names_its_block_by_a_text(tmp_path: Path) -> None:
    automation = {"name": "a", "trigger": {}, "actions": [{"block": ["x"]}]}
    with pytest.raises(ConfigError, match=r"automations\.0\.actions: `block` is the name of a notification block"):
        deploy_all(_file(tmp_path, _entry("mine", parameters=TRAINING), automations=[automation]), dry_run=True)


def test_a_wrong_step_is_told_where_the_form_starts_empty(tmp_path: Path) -> None:
    file = _file(tmp_path, _entry("mine", entrypoint="flows.curate.curate"))
    with pytest.raises(ConfigError, match=r"'mine': subset\.0\.steps\.0: a step is `filter: METRIC`"):
        read_file(file, ["subset=[{name: t, steps: [{bogus: 1}]}]"])


def test_a_schedule_may_bring_what_the_form_leaves_open(tmp_path: Path) -> None:
    file = _file(tmp_path, _entry("mine", schedules=[{**NIGHT, "parameters": TRAINING}]))
    [deployment] = read_file(file, ["ray_address=http://ray:8265", "train.beta=0.2"]).deployments
    assert deployment.parameters == {"ray_address": "http://ray:8265", "train": {"beta": 0.2}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ray_adress=http://ray:8265", "ray_adress: no such field"),
        ("ray_address=ray", "ray_address: give local, auto"),
        ("policy.gpu=1", "policy.gpu: no such field"),
        ("train.beta=-1", "train.beta: .*-1"),
    ],
)
def test_changes_are_checked_where_the_form_starts_empty(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"'mine': {said}") as caught:
        read_file(_file(tmp_path, _entry("mine")), [change])
    assert "required" not in str(caught.value), "what is left for the form is no fault"


# --- work pools


def test_a_misspelt_pool_is_refused_with_the_names_that_there_are(api: httpx.Client, tmp_path: Path) -> None:
    template = ProcessWorker.get_default_base_job_template()
    there = {"name": "only-there", "type": "process", "base_job_template": template}
    assert api.post("/work_pools/", json=there).status_code == 201
    definitions = {"work_pools": [{"name": "declared", "type": "process"}]}
    refused = _deploy(api, tmp_path, _entry("pooled"), "--pool", "only-tehre", definitions=definitions)
    assert refused.returncode == 2
    assert "--pool 'only-tehre'" in refused.stderr
    assert re.search(r"there are: declared, elsewhere,.* only-there", refused.stderr)
    assert api.get("/work_pools/only-tehre").status_code == 404
    assert api.get("/deployments/name/train/pooled").status_code == 404
    for known in ("declared", "only-there", "elsewhere"):
        done = _deploy(api, tmp_path, _entry("pooled"), "--pool", known, definitions=definitions)
        assert done.returncode == 0, done.stderr
        assert _deployment(api, "train", "pooled")["work_pool_name"] == known


def test_job_variables_of_a_pool_are_those_of_all_deployments_in_it(api: httpx.Client, tmp_path: Path) -> None:
    """Left out, a process runs in its worker's folder; and all runs send signs of life."""
    signs = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    shared = {"name": "shared", "type": "process", "job_variables": {"env": {"A": "1"}, "working_dir": "/"}}
    own = {"name": "shared", "job_variables": {"working_dir": "."}}
    for options in ([], ["--pool", "shared"]):
        entries = [_entry("inside", work_pool=own), _entry(f"outside{len(options)}")]
        done = _deploy(api, tmp_path, *entries, *options, definitions={"work_pools": [shared]})
        assert done.returncode == 0, done.stderr
        assert _deployment(api, "train", "inside")["job_variables"] == {
            "env": {"A": "1", **signs},
            "working_dir": ".",
        }
    assert _deployment(api, "train", "outside0")["job_variables"] == {"env": signs, "working_dir": "."}
    assert _deployment(api, "train", "outside2")["job_variables"] == {"env": {"A": "1", **signs}, "working_dir": "/"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory; check the path, which is relative to the deployments file"),
        ('{"variables": }', "is not JSON: Expecting value: line 1 column 15"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_before_a_server_is_asked(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content:
        (tmp_path / "job.json").write_text(content)
    pools = [{"name": "elsewhere", "type": "kubernetes", "base_job_template": "job.json"}]
    file = _file(tmp_path, _entry("templated"), definitions={"work_pools": pools})
    with pytest.raises(ConfigError) as caught:
        deploy_all(file)
    assert str(caught.value).startswith(
        f"{file}: base_job_template of work pool 'elsewhere': {tmp_path / 'job.json'}: "
    )
    assert said in str(caught.value)


def test_what_the_server_refuses_is_told_in_its_words_and_not_as_a_wrong_url(api: httpx.Client, tmp_path: Path) -> None:
    reserved = _deploy(api, tmp_path, _entry("refused", work_pool={"name": "prefect-own"}))
    assert reserved.returncode == 2
    assert "work pool 'prefect-own' is refused by the server: Work pools starting with" in reserved.stderr
    wrong = {"name": "elsewhere", "job_variables": {"env": 3}}
    assert _deploy(api, tmp_path, _entry("there")).returncode == 0
    for name in ("refused", "there"):  # made, and brought up to date
        done = _deploy(api, tmp_path, _entry(name, work_pool=wrong))
        assert done.returncode == 2
        assert f"deployment '{name}' is refused by the server" in done.stderr
        assert "3 is not " in done.stderr
        assert "PREFECT_API" not in done.stderr + reserved.stderr


# --- automations


def test_what_was_switched_off_in_the_ui_stays_off_unless_the_file_says_otherwise(
    api: httpx.Client, tmp_path: Path
) -> None:
    expected: dict[str, Any] = {"expect": ["prefsieve.subset.published"]}

    def deploy(**said: Any) -> str:
        trigger = {"name": "own-trigger", **expected, **said}
        automation = {"name": "own-automation", "trigger": expected, "actions": [{"type": "do-nothing"}], **said}
        done = _deploy(api, tmp_path, _entry("triggered", triggers=[trigger]), automations=[automation])
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "switched off" not in deploy()
    assert _automations(api) == {"own-trigger": True, "own-automation": True}
    for each in _own_automations(api):
        _patch(api, f"/automations/{each['id']}", {"enabled": False})
    told = deploy()
    assert _automations(api) == {"own-trigger": False, "own-automation": False}
    assert "own-automation (was there, brought up to date, is switched off)" in told
    assert "own-trigger was switched off, and stays so" in told
    assert "switched off" not in deploy(enabled=True)
    assert _automations(api) == {"own-trigger": True, "own-automation": True}


# --- builders and readers


def _entry(name: str, **more: Any) -> dict[str, Any]:
    """A deployment of train whose runs wait where no worker is."""
    return {"name": name, "entrypoint": "flows.train.train", "work_pool": {"name": "elsewhere"}, **more}


def _file(folder: Path, *entries: dict[str, Any], **more: Any) -> Path:
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": entries, **more}))
    return file


def _deploy(
    api: httpx.Client, folder: Path, *entries_and_options: dict[str, Any] | str, **more: Any
) -> subprocess.CompletedProcess[str]:
    entries = [each for each in entries_and_options if isinstance(each, dict)]
    options = [each for each in entries_and_options if isinstance(each, str)]
    env = environment(PREFECT_API_URL=_url(api), PREFECT_HOME=str(folder / "home"))
    return prefsieve("deploy", "--file", _file(folder, *entries, **more), *options, env=env)


def _own_automations(api: httpx.Client) -> list[dict[str, Any]]:
    return [each for each in api.post("/automations/filter", json={}).json() if each["name"].startswith("own-")]


def _automations(api: httpx.Client) -> dict[str, bool]:
    """Whether they are on, by name."""
    return {each["name"]: each["enabled"] for each in _own_automations(api)}


def _patch(api: httpx.Client, place: str, change: dict[str, Any]) -> None:
    unlocked(lambda: api.patch(place, json=change)).raise_for_status()


def _fake_parameters(folder: Path, store: Path) -> dict[str, Any]:
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12)))
    return {
        "ingest": {"source": str(source), "shard_size": 4},
        "generate": {"samples": 4, "generators": [{"name": "one", "engine": "fake"}]},
        "score": {"scorers": [{"name": "reward", "engine": "fake"}]},
        "pair": [{"name": "pairs", "rule": "best_vs_worst"}],
        "subset": [{"name": "half", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
        "store": str(store),
    }


def _url(api: httpx.Client) -> str:
    return str(api.base_url).rstrip("/")


def _deployment(api: httpx.Client, flow: str, name: str = "") -> dict[str, Any]:
    found = api.get(f"/deployments/name/{flow}/{name or flow}")
    assert found.status_code == 200, found.text
    return dict(found.json())


def _start(api: httpx.Client, parameters: dict[str, Any], **more: Any) -> httpx.Response:
    """What the button in the UI does."""
    place = f"/deployments/{_deployment(api, 'curate')['id']}/create_flow_run"
    return unlocked(lambda: api.post(place, json={"parameters": parameters, **more}))


def _finished(api: httpx.Client, run_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + RUN
    while True:
        run = api.get(f"/flow_runs/{run_id}").json()
        if run["state"]["type"] in FINAL:
            return dict(run)
        assert time.monotonic() < deadline, f"the run is still {run['state']['name']}"
        time.sleep(1)


def _runs(api: httpx.Client, state: str) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": [state]}}}}
    return list(api.post("/flow_runs/filter", json=wanted).json())


def _artifacts(api: httpx.Client, run_id: str) -> dict[str, dict[str, Any]]:
    wanted = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    return {artifact["key"]: artifact for artifact in api.post("/artifacts/filter", json=wanted).json()}
