"""The Kubernetes manifests, with what no schema sees of them."""

from __future__ import annotations

import functools
import gzip
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from flows.cli import parse
from tasks.cluster import COUNTED
from tests.services import ROOT
from tests.test_docker import IMAGES, is_pinned, pins

INFRA = ROOT / "infra"
README = INFRA / "README.md"
MANIFESTS = sorted(path for path in INFRA.rglob("*.yaml") if path.name != "kustomization.yaml")
SCHEMAS = ROOT / "tests" / "schemas"
COMPONENT = "app.kubernetes.io/component"  # the label by which everything here tells pods apart


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas(path: Path) -> None:
    for document in _documents(path):
        _validate(document)


@pytest.mark.parametrize(
    ("file", "place", "name"),
    [
        ("kuberay/raycluster.yaml", ("workerGroupSpecs", 0), "minReplica"),
        ("prefect/server.yaml", ("template", "spec", "containers", 0), "startupProb"),
        ("network/default.yaml", (), "policyType"),
        ("monitoring/podmonitor.yaml", ("podMetricsEndpoints", 0), "intervall"),
    ],
)
def test_a_misspelt_field_would_be_noticed(file: str, place: tuple[Any, ...], name: str) -> None:
    document = _documents(INFRA / file)[0]
    functools.reduce(lambda inner, key: inner[key], place, document["spec"])[name] = 1
    with pytest.raises(jsonschema.ValidationError, match=name):
        _validate(document)


def test_a_flow_runs_job_follows_the_schema_and_uses_what_the_work_pool_asks_for() -> None:
    template = json.loads((INFRA / "prefect" / "base-job-template.json").read_text())
    job = _flow_run_job()
    pod = job["spec"]["template"]["spec"]
    # Prefect refuses a template without these two at this place, where Kubernetes knows no such fields.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    _validate(job)
    asked = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert asked == set(template["variables"]["properties"])


def test_every_manifest_is_applied_but_the_job() -> None:
    applied = set()
    for file in INFRA.rglob("kustomization.yaml"):
        for name in yaml.safe_load(file.read_text())["resources"]:
            assert (file.parent / name).exists()
            applied.add(file.parent / name)
    assert {path for path in applied if path.is_file()} == set(MANIFESTS) - {INFRA / "kuberay" / "rayjob.yaml"}


def test_one_namespace() -> None:
    [namespace] = _documents(INFRA / "namespace.yaml")
    template = json.loads((INFRA / "prefect" / "base-job-template.json").read_text())
    [monitor] = _documents(INFRA / "monitoring" / "podmonitor.yaml")
    assert {
        yaml.safe_load((INFRA / "kustomization.yaml").read_text())["namespace"],
        template["variables"]["properties"]["namespace"]["default"],
        monitor["metadata"]["namespace"],
        *re.findall(r"--namespace[ =](\S+)", "".join(path.read_text() for path in [README, *MANIFESTS])),
    } == {namespace["metadata"]["name"]}


def test_no_pod_is_privileged_and_all_say_what_they_need() -> None:
    for pod in _pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
    for spec in _cluster_specs():  # the container that KubeRay puts beside the head
        assert spec["autoscalerOptions"]["securityContext"] == container["securityContext"]


def test_images_are_of_this_version_and_of_the_prefect_that_is_installed() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for pod in _pods():
        for container in pod["spec"]["containers"]:
            image, _, tag = container["image"].rpartition(":")
            assert is_pinned(container["image"])
            if image.startswith("registry.example.com/"):
                assert image.rpartition("/")[2] in IMAGES
                assert tag.partition("-")[0] == version
            elif image == "prefecthq/prefect":
                assert tag.split("-")[0] == pins()["prefect"]


def test_every_name_that_is_referred_to_is_defined_or_is_for_the_reader_to_make() -> None:
    made = {
        name: set(re.findall(r"--from-literal=(\w+)=", line))
        for name, line in re.findall(r"create secret generic (\S+)(.*)", README.read_text().replace("\\\n", " "))
    }
    defined = {(doc["kind"], doc["metadata"]["name"]) for path in MANIFESTS for doc in _documents(path)}
    for file in INFRA.rglob("kustomization.yaml"):
        generated = yaml.safe_load(file.read_text()).get("configMapGenerator", [])
        defined |= {("ConfigMap", each["name"]) for each in generated}
        assert all((file.parent / source).exists() for each in generated for source in each["files"])
    documents = [doc for path in MANIFESTS for doc in _documents(path)]
    for key, value in _fields([*documents, _flow_run_job()]):
        match key:
            case "secretKeyRef":
                assert value["key"] in made[value["name"]]
            case "secretRef":
                assert value["name"] in made
            case "authOptions":
                assert "auth_token" in made[value["secretName"]]
            case "configMap":
                assert ("ConfigMap", value["name"]) in defined
            case "persistentVolumeClaim":
                assert ("PersistentVolumeClaim", value["claimName"]) in defined
            case "serviceAccountName":
                assert ("ServiceAccount", value) in defined
            case "roleRef" | "subjects":
                for each in value if key == "subjects" else [value]:
                    assert (each["kind"], each["name"]) in defined


def test_services_and_their_addresses_lead_to_a_port_that_a_pod_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    ports = {}
    for service in (doc for path in MANIFESTS for doc in _documents(path) if doc["kind"] == "Service"):
        [pod] = _selected(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert _ports([pod])[port["targetPort"]] == port["port"]
            ports[service["metadata"]["name"]] = port["port"]
    [cluster] = _documents(INFRA / "kuberay" / "raycluster.yaml")
    [head] = _selected({COMPONENT: "ray-head"})[:1]
    ports[f"{cluster['metadata']['name']}-head-svc"] = _ports([head])["dashboard"]  # made by KubeRay
    texts = "".join(path.read_text() for path in [README, *MANIFESTS])
    addresses = re.findall(r"(prefsieve-[\w-]+):(\d+)(?!\.\d)", texts)  # tags of images have a dot
    assert {(host, int(port)) for host, port in addresses} <= set(ports.items())
    for name, value in _settings("prefect-server"):
        monkeypatch.setenv(name, value or "secret")
    address = Settings().server.database.connection_url.get_secret_value()
    assert address == f"postgresql+asyncpg://prefect:secret@prefsieve-postgres:{ports['prefsieve-postgres']}/prefect"


def test_who_may_speak_is_heard_and_nobody_else() -> None:
    ray = {"ray-head", "ray-worker"}
    expected = {
        ("prefect-server", "postgres", 5432),
        ("prefect-worker", "prefect-server", 4200),
        ("prefect-run", "prefect-server", 4200),
        ("ray-head", "prefect-server", 4200),
        ("prefect-run", "ray-head", 8265),
        ("ray-submitter", "ray-head", 8265),
        *((one, other, None) for one in ray for other in ray),
    }
    assert _talks("Egress") == expected
    assert _talks("Ingress") == expected
    for _, heard, port in expected:
        assert port is None or port in _ports(_selected({COMPONENT: heard})).values()
    nothing = _documents(INFRA / "network" / "default.yaml")[0]["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_prometheus_may_reach_what_it_is_told_to_scrape() -> None:
    [monitor] = _documents(INFRA / "monitoring" / "podmonitor.yaml")
    [policy] = _documents(INFRA / "network" / "metrics.yaml")
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    ports = _ports(_selected(monitor["spec"]["selector"]))
    scraped = {ports[endpoint["port"]] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {port["port"] for port in policy["spec"]["ingress"][0]["ports"]}
    for spec in _cluster_specs():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert int(group["rayStartParams"]["metrics-export-port"]) == _ports([group["template"]])["metrics"]


def test_every_panel_of_the_dashboard_asks_in_promql_for_series_that_there_are() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    counted = [f"ray_prefsieve_{name}_total" for name in (*COUNTED, "shards_done", "dropped", "cost")]
    gauges = {f"ray_prefsieve_{name}" for name in ("shards", "shards_open", "cost_per_pair")}
    known = {*counted, *gauges, *(f"ray_{name}" for name in METRICS_GAUGES)}
    board = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    given = {"__rate_interval": "1m", "__range": "6h", "gpu_hour": "1", "million_tokens": "1"}
    asked = set()
    for panel in board["panels"]:
        assert panel["title"] and panel["description"]
        for target in panel["targets"]:
            query = re.sub(r"\$(\w+)", lambda found: given.get(found[1], "x"), target["expr"])
            promql_parser.parse(query)
            asked |= set(re.findall(r"\bray_\w+", query))
    assert asked <= known
    assert {*counted, *gauges} - asked <= {
        "ray_prefsieve_requests_total",
        "ray_prefsieve_engine_starts_total",
    }
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(board["panels"]))) <= variables


def test_ray_clusters_ask_for_a_token_hold_no_secret_and_do_not_run_as_root() -> None:
    for spec in _cluster_specs():
        assert spec["authOptions"] == {"mode": "token", "secretName": "prefsieve-ray-auth"}
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                assert is_pinned(container["image"])
                assert {"secretRef": {"name": "prefsieve-store"}} in container["envFrom"]
                assert not [variable for variable in container.get("env", []) if "SECRET" in variable["name"]]
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]


def test_a_run_is_told_what_the_cluster_may_grow_to() -> None:
    for spec in _cluster_specs():
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        [said] = [variable["value"] for variable in head["env"] if variable["name"] == "PREFSIEVE_NODES"]
        grown = []
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == 0
            has = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            node = {"CPU": float(has["cpu"]), "GPU": float(has.get("nvidia.com/gpu", 0))}
            grown.append({"nodes": group["maxReplicas"], **{kind: amount for kind, amount in node.items() if amount}})
        assert json.loads(said) == grown


def test_ray_in_the_manifests_is_the_ray_that_is_installed() -> None:
    assert {str(spec["rayVersion"]) for spec in _cluster_specs()} == {pins()["ray"]}


def test_the_jobs_cluster_is_the_cluster_with_the_configuration_mounted() -> None:
    cluster, job = _cluster_specs()
    head = job["headGroupSpec"]["template"]["spec"]
    assert head["volumes"].pop() == {"name": "config", "configMap": {"name": "prefsieve-curate"}}
    assert head["containers"][0]["volumeMounts"].pop()["mountPath"] == "/etc/prefsieve"
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


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _cluster_specs() -> list[dict[str, Any]]:
    folder = ROOT / "infra" / "kuberay"
    [cluster] = _documents(folder / "raycluster.yaml")
    _, job = _documents(folder / "rayjob.yaml")
    return [cluster["spec"], job["spec"]["rayClusterSpec"]]


def _flow_run_job() -> dict[str, Any]:
    """The Job that the worker makes of a flow run when nothing is set."""
    template = json.loads((INFRA / "prefect" / "base-job-template.json").read_text())
    values = {
        name: variable.get("default", {"string": "x", "object": {}}.get(variable["type"]))
        for name, variable in template["variables"]["properties"].items()
    }
    values["command"] = ["prefect", "flow-run", "execute"]

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(value) for key, value in part.items()}
        if isinstance(part, list):
            return [filled(value) for value in part]
        if isinstance(part, str) and (whole := re.fullmatch(r"{{ (\w+) }}", part)):
            return values[whole[1]]
        return re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], part) if isinstance(part, str) else part

    return filled(template["job_configuration"]["job_manifest"])


def _pods() -> list[dict[str, Any]]:
    """Templates of all pods that are ever made."""
    documents = [doc for path in MANIFESTS for doc in _documents(path)]
    pods = [doc["spec"]["template"] for doc in documents if doc["kind"] in ("Deployment", "StatefulSet")]
    for spec in _cluster_specs():
        pods += [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    pods += [doc["spec"]["submitterPodTemplate"] for doc in documents if doc["kind"] == "RayJob"]
    return [*pods, _flow_run_job()["spec"]["template"]]


def _selected(selector: dict[str, Any]) -> list[dict[str, Any]]:
    """Pods that a Service's selector selects, or one of a policy; never none."""
    if not selector.keys() & {"matchLabels", "matchExpressions"}:
        selector = {"matchLabels": selector}
    wanted = {key: {value} for key, value in selector.get("matchLabels", {}).items()}
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        wanted[each["key"]] = set(each["values"])
    found = [
        pod for pod in _pods() if all(pod["metadata"]["labels"].get(key) in any_of for key, any_of in wanted.items())
    ]
    for key, any_of in wanted.items():
        assert any_of == {pod["metadata"]["labels"][key] for pod in found}, f"no pod for a part of {selector}"
    return found


def _settings(component: str) -> list[tuple[str, str | None]]:
    [pod] = _selected({COMPONENT: component})
    return [(variable["name"], variable.get("value")) for variable in pod["spec"]["containers"][0]["env"]]


def _ports(pods: list[dict[str, Any]]) -> dict[str, int]:
    opened = [port for pod in pods for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    return {port["name"]: port["containerPort"] for port in opened}


def _talks(direction: str) -> set[tuple[str, str, int | None]]:
    """(who speaks, who hears, port or None for any) among our own pods, as policies of one direction allow it."""

    def components(selector: dict[str, Any]) -> set[str]:
        return {pod["metadata"]["labels"][COMPONENT] for pod in _selected(selector)}

    talks = set()
    for policy in (doc for path in sorted((INFRA / "network").glob("[!k]*.yaml")) for doc in _documents(path)):
        assert (direction.lower() in policy["spec"]) <= (direction in policy["spec"]["policyTypes"])
        for rule in policy["spec"].get(direction.lower(), []):
            peers = rule.get("from" if direction == "Ingress" else "to", [])
            for peer in (each["podSelector"] for each in peers if set(each) == {"podSelector"}):
                for own in components(policy["spec"]["podSelector"]):
                    for other in components(peer):
                        pair = (other, own) if direction == "Ingress" else (own, other)
                        talks |= {(*pair, port["port"]) for port in rule.get("ports", [{"port": None}])}
    return talks


def _fields(part: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(part, dict):
        yield from part.items()
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else []:
        yield from _fields(inner)


def _validate(document: dict[str, Any]) -> None:
    """Raises ValidationError for what the API server would refuse, and KeyError for what is of no known kind."""
    jsonschema.Draft202012Validator(_schemas()[document["apiVersion"], document["kind"]]).validate(document)


@functools.cache
def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """By (apiVersion, kind); tests/schemas/README.md says where they come from."""
    schemas = {}
    for file in SCHEMAS.glob("ray.io_*.yaml.gz"):
        # libyaml where there is one: these files take pure Python 5 s each.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        spec = yaml.load(gzip.decompress(file.read_bytes()), loader)["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = _strict(schema)
    [file] = SCHEMAS.glob("kubernetes-*.json.gz")
    bundle = json.loads(gzip.decompress(file.read_bytes()))
    for name, definition in bundle["kinds"].items():
        version, _, kind = name.rpartition("/")
        schemas[version, kind] = {"$ref": f"#/$defs/{definition}", "$defs": bundle["definitions"]}
    monitor = json.loads(gzip.decompress((SCHEMAS / "podmonitor.json.gz").read_bytes()))
    schemas["monitoring.coreos.com/v1", "PodMonitor"] = _strict(monitor)
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
