"""Every configuration and deployment that is shipped is one that a flow takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import FLOWS, load_values, parse
from flows.deployments import read_file
from tasks.errors import ConfigError
from tests.services import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DEPLOYED = read_file(ROOT / "deployments" / "prefect.yaml").deployments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_is_one_that_a_flow_takes(path: Path) -> None:
    values = load_values(path, [], "")
    if path.stem in FLOWS:
        parse(path.stem, values, path)
    else:
        assert [flow for flow in FLOWS if _accepts(flow, values, path)], f"no flow takes {path}"


def test_every_flow_has_a_deployment_whose_parameters_it_takes() -> None:
    assert {"curate", "train", "evaluate", "experiment"} <= {deployment.name for deployment in DEPLOYED}
    for deployment in DEPLOYED:
        flow = deployment.entrypoint.rsplit(".", 1)[-1]
        parse(flow, deployment.parameters, Path("deployments/prefect.yaml"))
        assert deployment.entrypoint == f"flows.{flow}.{flow}"
        assert deployment.description


@pytest.mark.parametrize("flow", ["curate", "train", "evaluate"])
def test_the_form_starts_with_the_small_worlds_configuration_under_names_of_its_own(flow: str) -> None:
    expected = load_values(ROOT / "configs" / "tinyworld" / f"{flow}.yaml", [], "")
    renamed = json.dumps(expected).replace("tinyworld-dpo", "nightly-dpo").replace('"pvar-top"', '"nightly"')
    own = {"subset": parameters("curate")["subset"]} if flow == "curate" else {}
    assert parameters(flow) == {**json.loads(renamed), **own}


def test_what_is_published_by_night_is_new_after_the_demo_is_trained_on_and_evaluated() -> None:
    demo = load_values(ROOT / "configs" / "tinyworld" / "curate.yaml", [], "")
    nightly, former = (parse("curate", values, Path()) for values in (parameters("curate"), demo))
    names, taken = ({name for each in config.subset for name in each.names()} for config in (nightly, former))
    assert not names & taken
    training = parameters("train")
    assert training["subset"] in names
    [[trigger]] = [each.triggers for each in DEPLOYED if each.name == "train"]
    assert trigger["match"] == {"prefect.resource.id": f"prefsieve.subset.{training['subset']}"}
    assert parameters("evaluate")["generate"]["generators"][0]["model"] == f"policy:{training['name']}"


def test_the_form_of_an_experiment_starts_with_the_one_on_pvar() -> None:
    assert parameters("experiment") == load_values(ROOT / "configs" / "experiments" / "pvar.yaml", [], "")


def test_the_deployments_file_is_one_that_prefect_takes_and_pulls_nothing() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    content = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    PrefectYamlModel.model_validate(content)
    assert content["pull"] == [], "with null Prefect would record the deployer's folder"


def parameters(name: str) -> dict[str, Any]:
    [deployed] = [each for each in DEPLOYED if each.name == name]
    return deployed.parameters


def _accepts(flow: str, values: dict[str, Any], path: Path) -> bool:
    try:
        parse(flow, values, path)
    except ConfigError:
        return False
    return True
