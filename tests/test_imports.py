"""What is heavy is imported at the edge: parsing, selecting and asking for help load none of it."""

from __future__ import annotations

import pytest

from tests.conftest import python
from tests.services import ROOT

HEAVY = ("torch", "vllm", "ray", "transformers", "prefect", "trl", "datasets", "pandas", "openai")

PROGRAMS = {
    "parsing every shipped configuration": """
from flows.cli import load_values, parse, FLOWS
for path in Path("configs").rglob("*.yaml"):
    by_folder = {"import": ["curate"], "experiments": ["experiment"]}
    parts = by_folder.get(path.parent.name) or path.stem.split("-")
    flow = next(part for part in parts if part in FLOWS)
    parse(flow, load_values(path, [], ""), path)
""",
    "selecting": """
import numpy as np
from tasks.selection import pairing, pvar, ranking, winrate
rewards = np.array([[0.0, 1.0], [2.0, 2.0]])
pvar.pvar(rewards)
pairing.best_vs_worst(rewards, np.array([[1, 2], [3, 4]]))
ranking.order(rewards[:, 0], np.array([1, 2], np.uint64), 0)
winrate.win_rate(rewards, rewards)
""",
    "help": """
from flows.cli import main
for arguments in (["--help"], ["curate", "--help"], ["submit", "--help"]):
    sys.argv = ["prefsieve", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
""",
    "a store and its subsets": """
import tempfile
from flows.shelf import list_subsets
from tasks.store import Store
with tempfile.TemporaryDirectory() as folder:
    store = Store(folder)
    store.check()
    list_subsets(store)
""",
    "ingest, pair, subset and publish": "import tasks.ingest, tasks.pair, tasks.subset, tasks.publish",
    "asking a judge": "import tasks.rubric, tasks.judge, tasks.score, tasks.check",
    "the fake engine": """
from tasks.sections import GeneratorConfig
from tasks.engines import GenerationRequest, generator_engine
engine = generator_engine(GeneratorConfig(name="g", engine="fake"), "")
engine.add(0, GenerationRequest([{"role": "user", "content": "x"}], 0, 0, 1))
assert engine.step()
""",
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_this_loads_nothing_heavy(what: str) -> None:
    code = f"""
import sys
from pathlib import Path
{PROGRAMS[what]}
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_engine_actors_load_nothing_of_prefect() -> None:
    """A worker that imports Prefect without a server's address would start a server of its own."""
    code = "import sys, tasks.generate, tasks.score, tasks.train, tasks.cluster; print('prefect' in sys.modules)"
    done = python(code, cwd=ROOT)
    assert done.stdout.split() == ["False"], done.stderr
