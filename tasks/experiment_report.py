"""The page of an experiment, and its place in the store: experiments/<name>/<version>/.

The page is made as that of a subset is (tasks/report.py): it stands alone, no script, nothing loaded. The version is a
digest of results.json, which names every policy and depends on no clock; costs.json, report.md and report.html hold
times, and stay as they were first written.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from tasks import experiment_words as words
from tasks.describe import number
from tasks.experiments import ExperimentConfig
from tasks.records import SCHEMA_VERSION, digest
from tasks.report import environment, ticks
from tasks.store import Store, sealed, to_json

_WIDTH, _HEIGHT = 340, 190  # of a curve, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 330, 12, 160
_STYLES = 8  # colours, and as many again with another dash


@dataclass(frozen=True)
class Experiment:
    name: str
    version: str
    known: bool  # found in the store

    @property
    def place(self) -> str:
        return f"experiments/{self.name}/{self.version}"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def keep(
    config: ExperimentConfig, result: dict[str, Any], costs: dict[str, Any], text: str, store: Store
) -> Experiment:
    """Write the report; what is there already stays. text: of report.md."""
    asked = settings(config)
    version = digest([SCHEMA_VERSION, result])[:16]
    place = f"experiments/{config.name}/{version}"
    known = store.exists(f"{place}/manifest.json")
    if not known:
        files = {
            "results.json": to_json(result),
            "costs.json": to_json(costs),
            "report.md": text.encode(),
            "report.html": page(config, result, costs).encode(),
        }
        for name, data in files.items():
            store.create(f"{place}/{name}", data)
        manifest = {
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": config.name,
            "experiment": asked,
            "cells": {
                f"{words.arm_name(arm)} x seed {cell['seed']}": cell["policy"]
                for arm in result["arms"]
                for cell in arm["cells"]
            },
            "files": {name: hashlib.sha256(store.read(f"{place}/{name}")).hexdigest() for name in files},
        }
        store.create_json(f"{place}/manifest.json", manifest)
    store.replace(f"experiments/{config.name}/latest.json", sealed({"version": version}))
    return Experiment(config.name, version, known)


def settings(config: ExperimentConfig) -> dict[str, Any]:
    """What was asked, without where it ran and how many at once."""
    asked = config.model_dump(
        mode="json", by_alias=True, exclude={"store", "ray_address", "at_once", "curate"}, exclude_defaults=True
    )
    for resource in ("cpus", "gpus"):
        asked["policy"].pop(resource, None)
    return asked


def page(config: ExperimentConfig, result: dict[str, Any], costs: dict[str, Any]) -> str:
    """The HTML page."""
    arms = result["arms"]
    styled = [
        {**arm, "label": words.arm_name(arm), "style": i % _STYLES, "dashed": i // _STYLES % 2}
        for i, arm in enumerate(arms)
    ]
    told = {
        "name": result["name"],
        "lead": words.lead(result),
        "method": words.method(result),
        "warnings": result["warnings"],
        "tiles": _tiles(result, costs),
        "arms": [{**arm, "sentence": words.sentence(arm, result["alpha"])} for arm in styled],
        "rewards": _rewards(styled, result),
        "apart": _apart(styled),
        "table": words.arm_rows(result),
        "charts": [chart for name in _metrics(arms) if (chart := _chart(name, styled))],
        "costs": words.cost_rows(costs),
        "cells": costs["cells"],
        "seeds": result["seeds"],
        "scorer": result["scorer"],
        "configuration": yaml.safe_dump(settings(config), sort_keys=False, allow_unicode=True, width=100),
    }
    made = environment()
    made.filters["seconds"] = words.seconds
    return made.get_template("experiment.html.jinja").render(told)


def _tiles(result: dict[str, Any], costs: dict[str, Any]) -> list[dict[str, str]]:
    """The key numbers."""
    cells = costs["cells"]
    spent = [cell[what] for cell in cells for what in ("train_seconds", "evaluate_seconds")]
    tokens = [cell["training_tokens"] for cell in cells]
    return [
        {"what": "policies", "value": number(sum(cell["steps"] > 0 for cell in cells)), "note": "trained"},
        {"what": "held-out prompts", "value": number(result["prompts"]), "note": f"{result['samples']} samples each"},
        {
            "what": "training tokens",
            "value": "not known" if None in tokens else number(sum(tokens)),
            "note": "of responses",
        },
        {
            "what": "worked for",
            "value": words.seconds(None if None in spent else sum(spent)),
            "note": "all cells together",
        },
    ]


# --- intervals: places in percent of the width, so that text beside them keeps its size on a phone


def _rewards(arms: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any] | None:
    """Each arm's mean with its interval, a dot per seed, and the reference as a line."""
    values = [value for arm in arms for value in (*arm["by_seed"], arm["reward"]["low"], arm["reward"]["high"])]
    scale = _Scale.over([*values, result["reference"]["reward"]])
    if scale is None:
        return None
    rows = [
        {
            **_interval(arm, arm["reward"], scale),
            "dots": [scale.place(value) for value in arm["by_seed"] if value is not None],
            "said": f"{number(arm['reward']['mean'])} ({words.span(arm['reward'])})",
        }
        for arm in arms
    ]
    return {"rows": rows, "ticks": scale.ticks(), "line": scale.place(result["reference"]["reward"])}


def _apart(arms: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Each difference with its corrected interval, and 0 as a line."""
    compared = [arm for arm in arms if arm["difference"]]
    scale = _Scale.over([0.0, *(arm["difference"][end] for arm in compared for end in ("low", "high", "mean"))])
    if not compared or scale is None:
        return None
    rows = [{**_interval(arm, arm["difference"], scale), "dots": [], "said": arm["verdict"]} for arm in compared]
    return {"rows": rows, "ticks": scale.ticks(), "line": scale.place(0.0)}


def _interval(arm: dict[str, Any], found: dict[str, Any], scale: _Scale) -> dict[str, Any]:
    ends = {end: scale.place(found[end]) for end in ("low", "high", "mean")}
    return {**{key: arm[key] for key in ("label", "style", "dashed", "verdict", "against")}, **ends}


@dataclass(frozen=True)
class _Scale:
    """From values to places."""

    low: float
    high: float
    first: float = 2.0
    last: float = 98.0

    @classmethod
    def over(cls, values: list[float | None], first: float = 2.0, last: float = 98.0) -> _Scale | None:
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        low, high = min(known), max(known)
        room = 0.04 * (high - low) or max(abs(high), 1e-6) * 0.1
        return cls(low - room, high + room, first, last)

    def place(self, value: float | None) -> float | None:
        if value is None:
            return None
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 2)

    def ticks(self, about: int = 6) -> list[tuple[float | None, str]]:
        return [(self.place(tick), number(tick)) for tick in ticks(self.low, self.high, about) if self._holds(tick)]

    def _holds(self, tick: float) -> bool:
        return self.low <= tick <= self.high


# --- learning curves


def _metrics(arms: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for name in arm["curves"]))


def _chart(name: str, arms: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A line per arm: the metric by step, mean over seeds."""
    drawn = [(arm, arm["curves"][name]) for arm in arms if arm["curves"].get(name)]
    points = [point for _, curve in drawn for point in curve]
    across = _Scale.over([step for step, _ in points], _LEFT, _RIGHT)
    up = _Scale.over([value for _, value in points], _BOTTOM, _TOP)
    if not across or not up:
        return None
    return {
        "name": name,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "x_ticks": across.ticks(),
        "y_ticks": up.ticks(),
        "lines": [
            {
                "label": arm["label"],
                "style": arm["style"],
                "dashed": arm["dashed"],
                "points": " ".join(f"{across.place(step)},{up.place(value)}" for step, value in curve),
                "last": curve[-1][1],
            }
            for arm, curve in drawn
        ],
    }
