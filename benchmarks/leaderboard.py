"""The length-controlled fit on a real leaderboard: twelve generators of AlpacaEval 2 and their published rates.

    .venv/bin/python benchmarks/leaderboard.py [--data ../shared/data/alpaca_eval_12_generators.parquet] [--out FILE]

The data hold a judge's probability that each generator's output beats the baseline's, but not the baseline's outputs.
Their lengths have a substitute, and so has the difficulty of an instruction, which was published elsewhere:

lengths
  scaled      mean length of the other eleven outputs to the instruction, scaled so that its mean over instructions is
              2,049 characters, the baseline's mean length on the public leaderboard. The main choice: the rate is read
              where lengths are equal, so where the baseline's lengths lie matters most, and this is what is known of it
  others      the same, not scaled: nothing is used but the data
  strongest   lengths of the strongest other generator: the nearest to the baseline in win rate
  constant    2,049 for every instruction
difficulty
  others      logit of the mean preference of the other eleven on the instruction, within 0.01 and 0.99
  none        the model without difficulty

Nothing is chosen by how near it comes. Prints, per combination, the rank correlation with the published rates and the
largest and mean gap, and per generator the rates of the main choice, as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its `select` would stand for Python's own

import argparse
import json
import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.machine import machine
from tasks.selection.lengthcontrol import Controlled, length_controlled

BASELINE_LENGTH = 2049  # characters, mean of gpt4_1106_preview on the leaderboard of AlpacaEval 2
PUBLISHED = {  # length-controlled win rate, win rate, mean length
    "FuseChat-Llama-3.1-8B-Instruct": (65.39, 63.33, 2033),
    "FuseChat-Llama-3.2-3B-Instruct": (54.00, 51.30, 1976),
    "FuseChat-Llama-3.2-1B-Instruct": (25.27, 29.92, 2259),
    "claude-2.1": (25.25, 15.73, 1096),
    "gpt-3.5-turbo-1106": (19.30, 9.18, 796),
    "OpenHermes-2.5-Mistral-7B": (16.25, 10.34, 1107),
    "vicuna-13b-v1.5": (10.48, 6.72, 1061),
    "gemma-7b-it": (10.43, 6.94, 1115),
    "vicuna-7b-v1.5": (7.62, 4.80, 1083),
    "alpaca-7b": (5.88, 2.59, 396),
    "phi-2-sft": (5.85, 3.98, 1068),
    "gemma-2b-it": (5.44, 3.40, 1041),
}
# What the published fit gave +1 of tanh(dlen / std(dlen)), from alpaca_eval's file of weights, with the other sign:
# there dlen is the baseline's length minus the generator's. Newer generators are not in it.
PUBLISHED_EFFECT = {
    "claude-2.1": 1.810,
    "gpt-3.5-turbo-1106": 2.042,
    "OpenHermes-2.5-Mistral-7B": 1.532,
    "vicuna-13b-v1.5": 1.747,
    "gemma-7b-it": 1.508,
    "vicuna-7b-v1.5": 1.861,
    "alpaca-7b": 2.207,
    "phi-2-sft": 1.667,
    "gemma-2b-it": 1.713,
}
LENGTHS = ("scaled", "others", "strongest", "constant")
DIFFICULTIES = ("others", "none")
Array = np.ndarray


def read(path: Path) -> tuple[Array, Array]:
    """Preferences and lengths in characters, [generators, instructions], NaN where an output is missing."""
    table = pq.read_table(path, columns=["instruction_id", "generator", "preference", "output"])
    ids, generators = table["instruction_id"].to_pylist(), table["generator"].to_pylist()
    column = {one: i for i, one in enumerate(dict.fromkeys(ids))}
    row = {name: i for i, name in enumerate(PUBLISHED)}
    preferences, lengths = np.full((2, len(row), len(column)), np.nan)
    at = np.array([row[name] for name in generators]), np.array([column[one] for one in ids])
    preferences[at] = table["preference"].to_numpy()
    lengths[at] = [len(text) for text in table["output"].to_pylist()]
    return preferences, lengths


def baseline_lengths(kind: str, me: int, preferences: Array, lengths: Array) -> Array:
    others = np.delete(lengths, me, axis=0)
    if kind == "constant":
        return np.full(lengths.shape[1], float(BASELINE_LENGTH))
    if kind == "strongest":
        return others[np.delete(np.nanmean(preferences, axis=1), me).argmax()]
    mean = np.nanmean(others, axis=0)
    return mean if kind == "others" else mean * (BASELINE_LENGTH / mean.mean())


def difficulty(kind: str, me: int, preferences: Array) -> Array | None:
    if kind == "none":
        return None
    mean = np.clip(np.nanmean(np.delete(preferences, me, axis=0), axis=0), 0.01, 0.99)
    return np.log(mean / (1 - mean))


def control(lengths_by: str, difficulty_by: str, preferences: Array, lengths: Array) -> list[Controlled]:
    return [
        length_controlled(
            preferences[me][:, None],
            (lengths[me] - baseline_lengths(lengths_by, me, preferences, lengths))[:, None],
            difficulty(difficulty_by, me, preferences),
        )
        for me in range(len(preferences))
    ]


def spearman(a: Array, b: Array) -> float:
    ranks = [np.searchsorted(np.sort(one), one) for one in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def compared(rates: Array, published: Array) -> dict[str, Any]:
    gaps = np.abs(rates - published)
    return {
        "spearman": round(spearman(rates, published), 4),
        "largest_gap": round(float(gaps.max()), 2),
        "largest_gap_of": list(PUBLISHED)[int(gaps.argmax())],
        "mean_gap": round(float(gaps.mean()), 2),
    }


def measure(path: Path) -> dict[str, Any]:
    preferences, lengths = read(path)
    published = np.array(list(PUBLISHED.values()))
    raw = 100 * np.nanmean(preferences, axis=1)
    fits = {(a, b): control(a, b, preferences, lengths) for a in LENGTHS for b in DIFFICULTIES}
    main = fits[LENGTHS[0], DIFFICULTIES[0]]
    return {
        "instructions": preferences.shape[1],
        "win_rate": compared(raw, published[:, 1]),
        "length_controlled": {
            f"lengths {a}, difficulty {b}": compared(100 * np.array([one.rate for one in fit]), published[:, 0])
            for (a, b), fit in fits.items()
        },
        "uncontrolled": compared(raw, published[:, 0]),
        "spearman_of_gap_and_gap_of_effect": round(_explained(main, published[:, 0]), 4),
        "generators": [
            {
                "generator": name,
                "outputs": int(np.isfinite(preferences[i]).sum()),
                "win_rate": round(float(raw[i]), 2),
                "published_win_rate": PUBLISHED[name][1],
                "length_controlled": round(100 * main[i].rate, 2),
                "standard_error": round(100 * main[i].error, 2),
                "published_length_controlled": PUBLISHED[name][0],
                "length_effect": round(float(main[i].effects[0]), 3),
                "published_length_effect": PUBLISHED_EFFECT.get(name),
                "mean_length": round(float(np.nanmean(lengths[i]))),
                "published_mean_length": PUBLISHED[name][2],
            }
            for i, name in enumerate(PUBLISHED)
        ],
    }


def _explained(fit: list[Controlled], published: Array) -> float:
    """Where the length effect is larger than the published one, is the rate too?"""
    at = [i for i, name in enumerate(PUBLISHED) if name in PUBLISHED_EFFECT]
    effects = np.array([fit[i].effects[0] - list(PUBLISHED_EFFECT.values())[j] for j, i in enumerate(at)])
    return spearman(effects, np.array([100 * fit[i].rate - published[i] for i in at]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/alpaca_eval_12_generators.parquet"))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        print(f"skipped: {arguments.data} is not there; say where it is with --data", file=sys.stderr)
        return
    started = time.perf_counter()
    result = measure(arguments.data)
    result |= {"seconds": round(time.perf_counter() - started, 2), "machine": machine("numpy", "pyarrow")}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
