"""Completions that adaptive PVar saves, and what the subset loses by it: made-up rewards, TinyWorld, and a real judge.

    .venv/bin/python benchmarks/adaptive.py [--tinyworld FOLDER] [--ratings FILE] [--seeds 2] [--first-seed 0]
        [--out FILE.json]

For a subset of the top 10 %, against 16 completions for every prompt ranked by PVar: the saving (16 / mean completions,
those of the pilot included), the quality (mean true PVar of the adaptive subset / that of the fixed subset), their
overlap, what the planner promised (saving after the first round, the rest after the last), and the rounds. Each along
the planner's knob, `quality`; and again on the ladder that configurations have by default, which saves less in half the
rounds ("few rounds"). Baseline in the same run: the plain cut to 40 % of prompts after 4 samples and 20 % after
8. `saving at 99 %` is where a line through the curve meets quality 0.99.

*Made up.* Spreads s are lognormal. True PVar is exact for pass/fail, by quadrature for normal rewards, and by 200,000
pairs for Student's t. Scale "auto" is the pooled standard deviation of the first samples. Where the distributions are
normal or pass/fail, `bound` is what no method can beat: optimal stopping, one sample at a time from 2 to 24, by one who
knows the prior and the shape exactly, in the limit of many prompts.

So three times fewer completions at 99 % are to be had where prompts differ much (s 1), and only just, by one who knows
everything, where they differ little (s 0.5) or rewards only pass or fail. A ladder instead of single samples costs some
of the bound, and so does a model that has to be fitted.

*TinyWorld.* Rewards of real, tiny models, 88 samples per prompt, made once and kept. 24 serve both methods and the
other 64 are the truth, so that it shares no noise with either; four random splits. Also with prompt length known.

*Ratings.* A judge's logit preferences for the answers of 12 generators to 805 instructions: no samples of one policy.
Their columns are shuffled within each instruction, so that any k are a random sample of those 12; adding more is not
possible. "Fixed" is all 12. Two truths are told, neither perfect: (all) the 12 themselves, of which the fixed subset
is the maximum by construction, so that quality cannot exceed 1 and is a share of the fixed subset *reproduced*; (half)
both methods see 6 answers at most and the other 6 are the truth: fair, but a smaller game, and noisy with 78 chosen.
Four shuffles. The 12 are a finite population: PVar of all of them is known exactly once all are seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its `select` would stand for Python's own

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from tasks.selection import adaptive
from tasks.selection.posterior import fit_prior, posterior
from tasks.selection.pvar import PooledScale, pvar

Floats = NDArray[np.float64]
FRACTION = 0.1
KNOB = (0.95, 0.97, 0.98, 0.99, 1.0)
FEW_ROUNDS = (3, 5, 10, 20)  # the ladder that configurations have by default: a round costs a start of the engines
SHAPES = ("normal, s 0.5", "normal, s 1", "pass/fail", "t3, s 0.5", "t3, s 1")
TRUE_SAMPLES = 64  # TinyWorld
SPLITS, SHUFFLES = 4, 4


@dataclass(frozen=True)
class Case:
    """One data set: rewards [prompts, samples], in the order in which they would be made."""

    name: str
    rewards: Floats
    truth: Floats
    scale: float
    fixed: int = 16
    ladder: tuple[int, ...] = adaptive.LADDER
    covariates: Floats | None = None


def main() -> None:
    arguments = _arguments()
    started = time.monotonic()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    results = []
    for shape in SHAPES:
        for automatic in (False, True):
            cases = [made_up(shape, automatic, 20_000, seed) for seed in seeds]
            results.append(measure(cases, bound(shape, cases[0].scale)))
            few = [replace(case, ladder=FEW_ROUNDS) for case in cases]
            results.append(measure(few, None, f"{cases[0].name}, few rounds"))
    small = [made_up("normal, s 1", True, 1000, seed) for seed in range(4 * seeds.start, 4 * seeds.stop)]
    results.append(measure(small, None, "normal, s 1, T auto, 1,000 prompts"))
    for cases in (*tinyworld(arguments), *ratings(arguments.ratings)):
        results.append(measure(cases, None))
        if cases[0].fixed == 16:
            few = [replace(case, ladder=FEW_ROUNDS) for case in cases]
            results.append(measure(few, None, f"{cases[0].name}, few rounds"))
    summary = {
        "benchmark": "adaptive",
        "machine": machine("numpy"),
        "fraction": FRACTION,
        "ladder": adaptive.LADDER,
        "few_rounds": FEW_ROUNDS,
        "seeds": list(seeds),
        "seconds": round(time.monotonic() - started),
        "results": results,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tinyworld", type=Path, default=ROOT / ".prefsieve" / "tinyworld")
    parser.add_argument("--prompts", type=int, default=1000, help="of TinyWorld")
    parser.add_argument("--ratings", type=Path, help="Parquet file with instruction_id, instruction, preference")
    parser.add_argument("--seeds", type=int, default=2, help="of the made-up rewards")
    parser.add_argument("--first-seed", type=int, default=0, help="of the made-up rewards")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adaptive.json")
    return parser.parse_args()


# --- what is measured


def measure(cases: Sequence[Case], best: list[dict[str, float]] | None, name: str = "") -> dict[str, Any]:
    """The curve of a kind of data set, mean over its seeds, printed as a table."""
    name = name or cases[0].name
    estimates = [_estimates(case) for case in cases]
    print(f"\n{name}: {len(cases[0].rewards)} prompts, T {cases[0].scale:.2f}, {len(cases)} seed(s)")
    plain = _mean([_plain(case, table) for case, table in zip(cases, estimates, strict=True)])
    _line("plain cut", plain)
    curve = []
    for quality in KNOB:
        runs = [_adaptive(case, table, quality) for case, table in zip(cases, estimates, strict=True)]
        curve.append({"knob": quality, **_mean(runs)})
        _line(f"knob {quality}", curve[-1])
    result = {"name": name, "plain": plain, "curve": curve, "saving_at_99": _at(curve, 0.99)}
    if best:
        result |= {"bound": best, "bound_at_99": _at(best, 0.99)}
    known = f", bound {result['bound_at_99']}" if best else ""
    print(f"  saving at 99 %: {result['saving_at_99']}{known}")
    return result


def _adaptive(case: Case, table: Floats, quality: float) -> dict[str, float]:
    prompts = len(table)
    rows = np.arange(prompts)
    counts = adaptive.first_counts(prompts, case.ladder)
    seen = np.where(np.arange(case.rewards.shape[1]) < counts[:, None], case.rewards, np.nan)
    prior = fit_prior(seen[:, : counts.max()], case.scale, case.covariates)
    rounds = []
    while True:
        found = posterior(table[rows, counts], counts, prior, case.covariates)
        rounds.append(
            adaptive.next_round(found, counts, prior, FRACTION, quality=quality, fixed=case.fixed, ladder=case.ladder)
        )
        if not rounds[-1].going.any():
            break
        counts = adaptive.climb(counts, rounds[-1].going, case.ladder)
    chosen = adaptive.top(found.mean, max(1, round(FRACTION * prompts)))
    return {
        **_compare(case, table, chosen, float(counts.mean())),
        "promised_quality": rounds[-1].expected_quality,
        "promised_overlap": rounds[-1].expected_overlap,
        "promised_saving": case.fixed * prompts / rounds[0].expected_completions,
        "rounds": len(rounds),
    }


def _plain(case: Case, table: Floats) -> dict[str, float]:
    """40 % of prompts after a quarter of the samples, 20 % after half."""
    prompts, (first, second, last) = len(table), _quarters(case.fixed)
    kept = adaptive.top(table[:, first], round(0.4 * prompts))
    kept = kept[adaptive.top(table[kept, second], round(0.2 * prompts))]
    chosen = kept[adaptive.top(table[kept, last], round(FRACTION * prompts))]
    return _compare(case, table, chosen, first + 0.4 * (second - first) + 0.2 * (last - second))


def _quarters(fixed: int) -> tuple[int, int, int]:
    return max(2, fixed // 4), fixed // 2, fixed


def _compare(case: Case, table: Floats, chosen: NDArray[np.int64], completions: float) -> dict[str, float]:
    fixed = adaptive.top(table[:, case.fixed], max(1, round(FRACTION * len(table))))
    return {
        "saving": case.fixed / completions,
        "quality": float(case.truth[chosen].mean() / case.truth[fixed].mean()),
        "overlap": len(np.intersect1d(chosen, fixed)) / len(fixed),
    }


def _estimates(case: Case) -> Floats:
    """[prompts, samples + 1]: PVar of the first n samples in column n."""
    table = np.full((len(case.rewards), case.rewards.shape[1] + 1), np.nan)
    for n in sorted({*case.ladder, *_quarters(case.fixed)}):
        table[:, n] = pvar(case.rewards[:, :n], case.scale)
    return table


def _mean(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([run[key] for run in runs])), 4) for key in runs[0]}


def _at(curve: Sequence[dict[str, float]], quality: float) -> float | None:
    """The saving at a quality, on straight lines between the curve's points; None where it is not reached."""
    points = sorted(((point["saving"], point["quality"]) for point in curve), reverse=True)
    if points[0][1] >= quality:
        return round(points[0][0], 2)
    for (more, worse), (less, better) in pairwise(points):
        if better >= quality:
            return round(more + (less - more) * (quality - worse) / (better - worse), 2)
    return None


def _line(what: str, run: dict[str, float]) -> None:
    text = f"  {what:<10}  saving {run['saving']:5.2f}x   quality {run['quality']:.4f}   overlap {run['overlap']:.3f}"
    if "rounds" in run:
        text += (
            f"   promised {run['promised_saving']:5.2f}x {run['promised_quality']:.4f} {run['promised_overlap']:.3f}"
        )
        text += f"   rounds {run['rounds']:.0f}"
    print(text, flush=True)


# --- made-up rewards


def made_up(shape: str, automatic: bool, prompts: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    samples = (prompts, max(adaptive.LADDER))
    if shape == "pass/fail":
        p = rng.beta(0.5, 0.5, prompts)
        rewards = (rng.random(samples) < p[:, None]).astype(np.float64)
    else:
        spread = np.exp(rng.normal(0, float(shape.split()[-1]), prompts))
        noise = rng.standard_t(3, samples) if shape.startswith("t3") else rng.normal(size=samples)
        rewards = rng.normal(0, 2, prompts)[:, None] + spread[:, None] * noise
    pooled = PooledScale()
    pooled.add(rewards[:, : adaptive.LADDER[0]])
    scale = pooled.value if automatic else 1.0
    if shape == "pass/fail":
        truth = 2 * p * (1 - p) * (np.tanh(0.5 / scale) / 2) ** 2
    else:
        grid = np.linspace(np.log(spread).min(), np.log(spread).max(), 300)
        truth = np.interp(np.log(spread), grid, true_pvar(np.exp(grid), scale, shape.startswith("t3")))
    return Case(f"{shape}, T {'auto' if automatic else '1'}", rewards, truth, scale)


def true_pvar(spreads: Floats, scale: float, heavy: bool = False) -> Floats:
    """PVar of normal rewards of these standard deviations, or of Student's t with 3 degrees of freedom."""
    if heavy:
        rng = np.random.default_rng(0)
        gaps = rng.standard_t(3, 200_000) - rng.standard_t(3, 200_000)
        return np.array([((np.tanh(s * gaps / scale / 2) / 2) ** 2).mean() for s in spreads])
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    gaps = np.sqrt(2) * spreads[:, None] * nodes / scale
    return (np.tanh(gaps / 2) / 2) ** 2 @ (weights / weights.sum())


# --- the bound: optimal stopping with everything known


def bound(shape: str, scale: float) -> list[dict[str, float]] | None:
    """Points on the best curve that is possible, None for a shape without a small sufficient statistic."""
    if shape.startswith("t3"):
        return None
    prices = np.geomspace(1e-3, 5e-3, 5) if shape == "pass/fail" else np.geomspace(4e-4, 2e-3, 4)
    solve = _PassFail(scale) if shape == "pass/fail" else _Normal(scale, float(shape.split()[-1]))
    # what the fixed subset has: from the same shape, many prompts
    case = made_up(shape, False, 60_000, 99)
    case = Case(case.name, case.rewards[:, :16], _rescaled(case, shape, scale), scale)
    fixed = float(case.truth[adaptive.top(pvar(case.rewards, scale), 6000)].mean())
    return [_best(solve, price, fixed) for price in prices]


def _rescaled(case: Case, shape: str, scale: float) -> Floats:
    """True PVar of the prompts of a case of scale 1 at another one."""
    if shape == "pass/fail":
        return case.truth / np.tanh(0.5) ** 2 * np.tanh(0.5 / scale) ** 2
    spreads = np.exp(np.linspace(-6, 6, 600))
    return np.interp(case.truth, true_pvar(spreads, 1.0), true_pvar(spreads, scale))


def _best(solve: Any, price: float, fixed: float) -> dict[str, float]:
    low, high = 0.0, solve.most
    for _ in range(14):
        cut = (low + high) / 2
        kept, cost, gain = solve(cut, price * solve.most)
        low, high = (cut, high) if kept > FRACTION else (low, cut)
    quality = (gain + (FRACTION - kept) * cut) / FRACTION / fixed
    return {"saving": round(16 / (2 + cost), 3), "quality": round(quality, 4)}


def _stop(mean: Floats, cut: float) -> Floats:
    """[value, kept, cost, gain] of stopping, per state."""
    above = (mean > cut).astype(np.float64)
    return np.stack([np.maximum(mean - cut, 0), above, np.zeros(len(mean)), above * mean])


class _PassFail:
    """States: passes among n. Prior Beta(1/2, 1/2)."""

    def __init__(self, scale: float) -> None:
        self.factor = 2 * (np.tanh(0.5 / scale) / 2) ** 2
        self.most = self.factor / 4

    def __call__(self, cut: float, price: float) -> Floats:
        state = np.empty(0)
        for n in range(24, -1, -1):
            a, b = np.arange(n + 1) + 0.5, n - np.arange(n + 1) + 0.5
            stop = _stop(self.factor * a * b / ((n + 1) * (n + 2)), cut)
            if n == 24:
                state = stop
                continue
            on = state[:, 1:] * (a / (n + 1)) + state[:, :-1] * (b / (n + 1))
            if n >= 2:  # the first two are paid by everybody, and counted elsewhere
                on = on + np.array([-price, 0, 1, 0])[:, None]
                on = np.where(on[0] > stop[0], on, stop)
            state = on
        return state[1:, 0]


class _Normal:
    """States: the logarithm of the sum of squares about the mean, on a grid, after n samples."""

    def __init__(self, scale: float, width: float) -> None:
        logs = np.linspace(-3.5, 3.5, 41) * width
        self.prior = np.exp(-((logs / width) ** 2) / 2)
        self.prior /= self.prior.sum()
        self.squares = np.exp(2 * logs)
        self.truth = true_pvar(np.exp(logs), scale)
        self.most = 0.25
        self.grid = np.linspace(-9, 7 * width + 4.5, 140)
        nodes, weights = np.polynomial.hermite_e.hermegauss(24)
        self.chi, self.weights = nodes[12:] ** 2, 2 * weights[12:] / weights.sum()  # chi-square, one degree
        steps = np.exp(self.grid)[:, None, None] + self.squares[:, None] * self.chi
        self.next = self._between(steps)
        self.first = self._between(self.squares[:, None] * self.chi)

    def _between(self, squares: Floats) -> tuple[NDArray[np.int64], Floats]:
        place = (np.log(squares) - self.grid[0]) / (self.grid[1] - self.grid[0])
        place = np.clip(place, 0, len(self.grid) - 1.001)
        return place.astype(np.int64), place - place.astype(np.int64)

    def _given(self, n: int) -> Floats:
        """[grid, spreads]: the posterior of the spread."""
        log = np.log(self.prior) - (n - 1) / 2 * np.log(self.squares) - np.exp(self.grid)[:, None] / 2 / self.squares
        weights = np.exp(log - log.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def __call__(self, cut: float, price: float) -> Floats:
        left, share = self.next
        state = _stop(self._given(24) @ self.truth, cut)
        for n in range(23, 1, -1):
            given = self._given(n)
            stop = _stop(given @ self.truth, cut)
            on = np.stack(
                [(given * ((v[left] * (1 - share) + v[left + 1] * share) @ self.weights)).sum(1) for v in state]
            )
            on += np.array([-price, 0, 1, 0])[:, None]
            state = np.where(on[0] > stop[0], on, stop)
        left, share = self.first
        return np.array(
            [self.prior @ ((v[left] * (1 - share) + v[left + 1] * share) @ self.weights) for v in state[1:]]
        )


# --- real rewards


def tinyworld(arguments: argparse.Namespace) -> list[list[Case]]:
    folder = arguments.tinyworld
    if not (folder / "world.json").exists():
        print(f"\nTinyWorld: skipped, {folder} holds none; build it with `python -m examples.tinyworld.build`")
        return []
    samples = max(adaptive.LADDER) + TRUE_SAMPLES
    digest = json.loads((folder / "world.json").read_text())["digest"]
    cache = ROOT / ".prefsieve" / f"adaptive-{digest}-{arguments.prompts}x{samples}.npz"
    if not cache.exists():
        cache.parent.mkdir(exist_ok=True)
        np.savez(cache, **_tinyworld_rewards(folder, arguments.prompts, samples))
    with np.load(cache) as kept:
        rewards, lengths = kept["rewards"], kept["lengths"]
    kinds: list[list[Case]] = [[], [], []]
    for seed in range(SPLITS):
        mixed = rewards[
            :, np.random.default_rng(seed).permutation(samples)
        ]  # one order for all: streams are independent
        seen, rest = mixed[:, :-TRUE_SAMPLES], mixed[:, -TRUE_SAMPLES:]
        pooled = PooledScale()
        pooled.add(seen[:, : adaptive.LADDER[0]])
        kinds[0].append(Case("TinyWorld, T 1", seen, pvar(rest), 1.0))
        kinds[1].append(Case("TinyWorld, T auto", seen, pvar(rest, pooled.value), pooled.value))
        kinds[2].append(replace(kinds[1][-1], name="TinyWorld, T auto, length known", covariates=lengths[:, None]))
    return kinds


def _tinyworld_rewards(folder: Path, number: int, samples: int) -> dict[str, Floats]:
    """Rewards [prompts, samples] and prompt lengths, from the engines themselves."""
    from tasks.engines import GenerationRequest, ScoringRequest, generator_engine, reward_engine
    from tasks.sections import GeneratorConfig, SamplingConfig, ScorerConfig

    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()[:number]]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling = SamplingConfig(max_tokens=16)
    policy = generator_engine(
        GeneratorConfig(name="policy", model=str(folder / "policy"), sampling=sampling, batch_size=1024),
        str(folder / "policy"),
    )
    for row, asked in enumerate(messages):
        policy.add(row, GenerationRequest(asked, row * samples, 0, samples))
    texts: list[list[str]] = [[] for _ in prompts]
    done = 0
    while answers := policy.step():
        for row, answer in answers:
            texts[row] = [sample.text for sample in answer.samples]
        done += len(answers)
        print(f"  TinyWorld: {done} of {len(prompts)} prompts answered", end="\r", flush=True)
    judge = reward_engine(
        ScorerConfig(name="reward", model=str(folder / "reward"), batch_size=1024), str(folder / "reward")
    )
    places = list(dict.fromkeys((row, text) for row, said in enumerate(texts) for text in said))
    for key, (row, text) in enumerate(places):
        judge.add(key, ScoringRequest(messages[row], text))
    rated: dict[tuple[int, str], float] = {}
    while answers := judge.step():
        rated |= {places[key]: reward for key, reward in answers}
    rewards = np.array([[rated[row, text] for text in said] for row, said in enumerate(texts)])
    return {"rewards": rewards, "lengths": np.array([len(prompt) for prompt in prompts], dtype=np.float64)}


def ratings(file: Path | None) -> list[list[Case]]:
    if file is None or not file.exists():
        print(f"\nRatings: skipped, {f'{file} is not there' if file else 'no --ratings FILE given'}")
        return []
    import pyarrow.parquet as pq

    rows = pq.read_table(file, columns=["instruction_id", "instruction", "preference"]).to_pylist()
    by_prompt: dict[str, list[float]] = {}
    lengths: dict[str, float] = {}
    for row in rows:
        by_prompt.setdefault(row["instruction_id"], []).append(row["preference"])
        lengths[row["instruction_id"]] = np.log(1 + len(row["instruction"]))
    full = [key for key, values in by_prompt.items() if len(values) == 12]
    p = np.clip(np.array([by_prompt[key] for key in full]), 1e-3, 1 - 1e-3)  # beyond, the judge's digits end
    logits = np.log(p / (1 - p))
    known = np.array([lengths[key] for key in full])[:, None]
    pooled = PooledScale()
    pooled.add(logits)
    kinds: dict[str, list[Case]] = {}
    for seed in range(SHUFFLES):
        mixed = np.random.default_rng(seed).permuted(logits, axis=1)
        for scale, name in ((1.0, "T 1"), (pooled.value, "T auto")):
            whole = Case(f"ratings (all), {name}", mixed, pvar(logits, scale), scale, 12, (3, 4, 6, 8, 12))
            half = pvar(mixed[:, 6:], scale)
            for case in (
                whole,
                replace(whole, name=f"{whole.name}, length known", covariates=known),
                Case(f"ratings (half), {name}", mixed[:, :6], half, scale, 6, (2, 3, 4, 6)),
            ):
                kinds.setdefault(case.name, []).append(case)
    return list(kinds.values())


if __name__ == "__main__":
    main()
