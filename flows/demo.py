"""demo: the whole way on TinyWorld. Builds the small world, curates, trains on subsets, and evaluates the policies."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.cluster import disconnecting
from tasks.errors import ConfigError

WORLD = Path(".prefsieve/tinyworld")
SUBSETS = ("pvar-top", "pvar-random", "pvar-bottom")


def run_demo() -> dict[str, Any]:
    """curate once; then train and evaluate a policy per on-policy subset, the random control among them."""
    started = time.monotonic()
    with _in_clone(), disconnecting():  # one Ray for all flows
        importlib.import_module("examples.tinyworld.build").build(WORLD)
        from flows.curate import curate
        from flows.evaluate import evaluate
        from flows.train import train

        curated = curate(**_config("curate"))
        runs = []
        for subset in SUBSETS:
            name = f"tinyworld-{subset}"
            trained = train(**{**_config("train"), "name": name, "subset": subset})
            settings = _config("evaluate")
            settings["generate"]["generators"][0]["model"] = f"policy:{trained['policy']}"
            runs.append({"train": trained, "evaluate": evaluate(**settings)})
    return {"curate": curated, "runs": runs, "seconds": round(time.monotonic() - started, 1)}


def _config(flow: str) -> dict[str, Any]:
    return yaml.safe_load(Path(f"configs/tinyworld/{flow}.yaml").read_text())


@contextlib.contextmanager
def _in_clone() -> Iterator[None]:
    """The examples are not installed: the demo runs in the clone that this code belongs to."""
    root = Path(__file__).parent.parent
    if not (root / "examples" / "tinyworld").is_dir():
        raise ConfigError("demo needs a clone of the project, for its examples; run it from there with `make demo`")
    before = Path.cwd()
    sys.path.insert(0, str(root))
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(root))
