"""What is shipped to run elsewhere: the image, the Kubernetes manifests, the deployments and every configuration."""

from __future__ import annotations

import fnmatch
import functools
import gzip
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import FLOWS, load_values, parse
from flows.deploy import read_deployments
from tasks.errors import ConfigError
from tests.services import ROOT

CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"
MANIFESTS = sorted((ROOT / "infra" / "kuberay").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DOCKERFILES = sorted((ROOT / "docker").rglob("*Dockerfile*"))
INSTRUCTIONS = {
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "ONBUILD",
} | {*("RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")}


# --- configurations and deployments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_is_one_that_a_flow_takes(path: Path) -> None:
    values = load_values(path, [], "")
    if path.stem in FLOWS:
        parse(path.stem, values, path)
    else:
        assert [flow for flow in FLOWS if _accepts(flow, values, path)], f"no flow takes {path}"


def test_every_flow_has_a_deployment_whose_parameters_it_takes() -> None:
    deployments = read_deployments(ROOT / "deployments" / "prefect.yaml")
    assert {"curate", "train", "evaluate", "experiment"} <= {deployment.name for deployment in deployments}
    for deployment in deployments:
        flow = deployment.entrypoint.rsplit(".", 1)[-1]
        parse(flow, deployment.parameters, Path("deployments/prefect.yaml"))
        assert deployment.entrypoint == f"flows.{flow}.{flow}"
        assert deployment.description
        assert deployment.work_pool.job_variables["working_dir"] == "."


@pytest.mark.parametrize("flow", ["curate", "train", "evaluate"])
def test_the_form_starts_with_the_small_worlds_configuration(flow: str) -> None:
    [deployed] = [each for each in read_deployments(ROOT / "deployments" / "prefect.yaml") if each.name == flow]
    assert deployed.parameters == load_values(ROOT / "configs" / "tinyworld" / f"{flow}.yaml", [], "")


def test_the_form_of_an_experiment_starts_with_the_one_on_pvar() -> None:
    [deployed] = [each for each in read_deployments(ROOT / "deployments" / "prefect.yaml") if each.name == "experiment"]
    assert deployed.parameters == load_values(ROOT / "configs" / "experiments" / "pvar.yaml", [], "")


def test_the_deployments_file_is_one_that_prefect_takes_and_pulls_nothing() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    content = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    PrefectYamlModel.model_validate(content)
    assert content["pull"] == [], "with null Prefect would record the deployer's folder"


# --- the image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dockerfile_is_valid_pinned_and_does_not_run_as_root(path: Path) -> None:
    lines = _instructions(path)
    words = [word for word, _ in lines]
    assert set(words) <= INSTRUCTIONS
    assert words[0] in ("FROM", "ARG")
    stages: set[str] = set()
    for word, rest in lines:
        if word == "FROM":
            image, *alias = rest.split()
            assert image in stages or _is_pinned(image), f"FROM {image}: name a version"
            stages |= set(alias[1:])
    last_stage = lines[len(words) - 1 - words[::-1].index("FROM") :]
    user = [rest for word, rest in last_stage if word == "USER"][-1]
    assert user.split(":")[0] not in ("root", "0")
    assert user.split(":")[0].isdigit(), "by number, or Kubernetes cannot tell that it is not root"
    assert ("ENTRYPOINT", '["prefsieve"]') in last_stage
    assert "HEALTHCHECK" in [word for word, _ in last_stage]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_that_the_dockerfile_copies_is_in_the_build_context(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in _instructions(path):
        options = [part for part in shlex.split(rest) if part.startswith("--")]
        if word not in ("COPY", "ADD") or any(option.startswith("--from=") for option in options):
            continue
        *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
        for source in sources:
            assert list(ROOT.glob(source)), f"{source} is not in the repository"
            assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f".dockerignore leaves out {source}"


def test_the_image_installs_pinned_versions() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert "--constraints constraints.txt" in text
    assert ":latest" not in text


# --- Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_operators_schemas(path: Path) -> None:
    if not CRDS.exists():
        pytest.skip(f"KubeRay's resource definitions are not at {CRDS}")
    jsonschema = pytest.importorskip("jsonschema")
    schemas = _crd_schemas()
    checked = 0
    for document in _documents(path):
        if schema := schemas.get((document["apiVersion"], document["kind"])):
            jsonschema.Draft202012Validator(schema).validate(document)
            checked += 1
    assert checked, f"{path.name} holds no Ray resource"


def test_a_misspelt_field_would_be_noticed() -> None:
    if not CRDS.exists():
        pytest.skip(f"KubeRay's resource definitions are not at {CRDS}")
    jsonschema = pytest.importorskip("jsonschema")
    [cluster] = _documents(ROOT / "infra" / "kuberay" / "raycluster.yaml")
    cluster["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.Draft202012Validator(_crd_schemas()["ray.io/v1", "RayCluster"]).validate(cluster)


def test_ray_clusters_ask_for_a_token_hold_no_secret_and_do_not_run_as_root() -> None:
    for spec in _cluster_specs():
        assert spec["authOptions"] == {"mode": "token", "secretName": "prefsieve-ray-auth"}
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                assert _is_pinned(container["image"])
                assert {"secretRef": {"name": "prefsieve-store"}} in container["envFrom"]
                assert not [variable for variable in container.get("env", []) if "SECRET" in variable["name"]]
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert names == ["cpu", "gpu"]


def test_ray_in_the_manifests_is_the_ray_that_is_installed() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {str(spec["rayVersion"]) for spec in _cluster_specs()} == {pins["ray"]}


def test_the_jobs_cluster_is_the_cluster_with_the_configuration_mounted() -> None:
    cluster, job = _cluster_specs()
    head = job["headGroupSpec"]["template"]["spec"]
    assert head.pop("volumes") == [{"name": "config", "configMap": {"name": "prefsieve-curate"}}]
    assert head["containers"][0].pop("volumeMounts")[0]["mountPath"] == "/etc/prefsieve"
    assert job == cluster


def test_the_jobs_configuration_is_one_that_curate_takes_and_fits_the_workers() -> None:
    config_map, job = _documents(ROOT / "infra" / "kuberay" / "rayjob.yaml")
    assert job["spec"]["entrypoint"].split()[:3] == ["prefsieve", "curate", "/etc/prefsieve/curate.yaml"]
    config = parse("curate", yaml.safe_load(config_map["data"]["curate.yaml"]), Path("rayjob.yaml"))
    assert config.ray_address == "auto"
    [gpu] = [group for group in _cluster_specs()[1]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    has = gpu["template"]["spec"]["containers"][0]["resources"]["requests"]
    for engine in (*config.generate.generators, *config.score.scorers):
        assert engine.gpus <= float(has["nvidia.com/gpu"])
        assert engine.cpus <= float(has["cpu"])


# --- readers


def _accepts(flow: str, values: dict[str, Any], path: Path) -> bool:
    try:
        parse(flow, values, path)
    except ConfigError:
        return False
    return True


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) with continued lines joined and comments left out, also those inside an instruction."""
    kept = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(kept).replace("\\\n", " ")
    parts = [line.strip().split(None, 1) for line in joined.splitlines()]
    return [(word, " ".join(rest.split())) for word, rest in parts]


def _is_pinned(image: str) -> bool:
    if "@sha256:" in image:
        return True
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return tag not in ("", "latest") and "." in tag


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _cluster_specs() -> list[dict[str, Any]]:
    folder = ROOT / "infra" / "kuberay"
    [cluster] = _documents(folder / "raycluster.yaml")
    _, job = _documents(folder / "rayjob.yaml")
    return [cluster["spec"], job["spec"]["rayClusterSpec"]]


@functools.cache
def _crd_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    schemas = {}
    for file in CRDS.glob("*.yaml.gz"):
        # libyaml where there is one: these files take pure Python 5 s each.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        spec = yaml.load(gzip.decompress(file.read_bytes()), loader)["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = _strict(schema)
    return schemas


def _strict(schema: Any) -> Any:
    """The API server drops unknown fields without a word; here they are errors."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return strict
