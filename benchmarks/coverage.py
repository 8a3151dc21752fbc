"""How often an experiment's 95 % intervals hold the truth, on simulated experiments whose truth is known.

    .venv/bin/python benchmarks/coverage.py [--experiments 2000] [--out FILE]

An experiment is seeds x 100 prompts of normal values around 0, made of what differs between seeds, between prompts and
for neither reason, with the standard deviations below. `plain` is the bootstrap without corrections: seeds and prompts
resampled as they are. Prints the share of experiments whose interval holds 0; chance alone moves it by +- 1 point.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its `select` would stand for Python's own

import argparse
import json

import numpy as np

from benchmarks.machine import machine
from tasks.selection.comparison import bounds, replicates

PROMPTS = 100
SPREADS = {  # standard deviations of seeds, of prompts, of the rest
    "prompts": (0.0, 0.3, 0.3),
    "all": (0.02, 0.1, 0.3),
    "seeds": (0.05, 0.0, 0.3),
    "seeds and prompts": (0.05, 0.3, 0.0),
    "only seeds": (0.05, 0.0, 0.0),
}


def experiment(rng: np.random.Generator, seeds: int, spread: tuple[float, float, float]) -> np.ndarray:
    """[seeds, prompts], of mean 0."""
    shapes = ((seeds, 1), (1, PROMPTS), (seeds, PROMPTS))
    return sum((rng.normal(0, deviation, shape) for deviation, shape in zip(spread, shapes, strict=True)), np.zeros(()))


def plain(values: np.ndarray, rng: np.random.Generator, draws: int = 1000) -> np.ndarray:
    """Means of seeds and prompts drawn with replacement, sorted."""
    seeds, prompts = values.shape
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    others = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts
    return np.sort(np.einsum("ds,sp,dp->d", weights, values, others, optimize=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    for name, spread in SPREADS.items():
        for seeds in (3, 5, 10):
            held = {"corrected": 0, "plain": 0}
            for key in range(arguments.experiments):
                rng = np.random.default_rng([key, seeds])
                values = experiment(rng, seeds, spread)
                for how, draws in (("corrected", replicates(values, 1000, key)), ("plain", plain(values, rng))):
                    low, high = bounds(draws, 0.05)
                    held[how] += bool(low <= 0 <= high)
            rows.append({"differ": name, "spread": spread, "seeds": seeds})
            rows[-1] |= {how: round(count / arguments.experiments, 3) for how, count in held.items()}
            print(json.dumps(rows[-1]), file=sys.stderr)
    result = {"experiments": arguments.experiments, "prompts": PROMPTS, "runs": rows, "machine": machine("numpy")}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
