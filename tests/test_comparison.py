"""How sure a difference is: against brute force, and by simulated experiments whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection.comparison import bounds, differences, estimate, holm, p_value, replicates


def drawn(key: int, seeds: int, prompts: int, of_seeds: float, of_prompts: float, rest: float) -> np.ndarray:
    """A simulated experiment with mean 0, [seeds, prompts]."""
    rng = np.random.default_rng(key)
    return (
        rng.normal(0, of_seeds, (seeds, 1))
        + rng.normal(0, of_prompts, (1, prompts))
        + rng.normal(0, rest, (seeds, prompts))
    )


# --- what is drawn


def test_the_spread_of_the_draws_is_that_of_the_variance_components() -> None:
    """With many seeds, whose spread is then well known, the draws have the textbook variance of a crossed design."""
    seeds, prompts = 200, 300
    values = drawn(1, seeds, prompts, of_seeds=0.3, of_prompts=0.4, rest=0.5)
    draws = replicates(values)
    of_prompts = values.mean(axis=0).var(ddof=1) / prompts
    of_seeds = values.mean(axis=1).var(ddof=1) / seeds
    residual = values - values.mean(axis=0) - values.mean(axis=1)[:, None] + values.mean()
    both = (residual**2).sum() / (seeds - 1) / (prompts - 1) / seeds / prompts
    assert draws.mean() == pytest.approx(values.mean(), abs=0.002)
    assert draws.var() == pytest.approx(of_prompts + of_seeds - both, rel=0.05)


def test_few_seeds_give_students_t() -> None:
    """Seeds alone differ: 95 % of t with 4 degrees of freedom lie within 2.776 standard errors."""
    seeds = np.array([0.1, -0.3, 0.2, 0.4, -0.4])
    low, high = bounds(replicates(np.repeat(seeds[:, None], 50, axis=1)), 0.05)
    error = seeds.std(ddof=1) / math.sqrt(5)
    assert (high - low) / 2 == pytest.approx(2.776 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(seeds.mean(), abs=0.1 * error)


def test_one_seed_speaks_of_other_prompts_only() -> None:
    values = drawn(3, 1, 400, of_seeds=0.5, of_prompts=1.0, rest=0.0)
    found = estimate(values)
    assert math.isnan(found.deviation)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [(0.0, 0.3, 0.3), (0.02, 0.1, 0.3), (0.05, 0.0, 0.3), (0.05, 0.3, 0.0)])
def test_95_percent_intervals_hold_the_truth_in_about_95_percent_of_experiments(
    seeds: int, spread: tuple[float, float, float]
) -> None:
    """600 experiments each: chance alone gives 93.2 to 96.8 %."""
    held = 0
    for key in range(600):
        low, high = bounds(replicates(drawn(key, seeds, 100, *spread), 1000, key), 0.05)
        held += low <= 0 <= high
    assert 0.92 <= held / 600 <= 0.99


def test_the_plain_bootstrap_that_is_not_used_misses_too_often() -> None:
    """What the corrections are for: where 3 seeds are all that differs, resampling them holds it in 65 to 85 %."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(600, 3))
    means = np.sort(seeds[np.arange(600)[:, None, None], rng.integers(0, 3, (600, 500, 3))].mean(axis=2), axis=1)
    held = (means[:, 12] <= 0) & (means[:, -13] >= 0)
    assert 0.65 < held.mean() < 0.85


# --- differences


def test_a_difference_is_taken_seed_by_seed_and_prompt_by_prompt() -> None:
    """What both arms share, hard prompts above all, does not make the difference unsure."""
    base = drawn(5, 5, 300, of_seeds=0.0, of_prompts=5.0, rest=0.1)
    found = differences({"arm": (base + drawn(6, 5, 300, 0.01, 0.0, 0.1) + 0.1, base)})["arm"]
    assert found.distinguishable
    assert found.mean == pytest.approx(0.1, abs=0.02)
    assert found.high - found.low < 0.1


def test_equal_arms_are_not_distinguishable() -> None:
    base = drawn(7, 3, 50, 0.1, 0.1, 0.1)
    found = differences({"same": (base, base)})["same"]
    assert (found.mean, found.low, found.high, found.p, found.distinguishable) == (0, 0, 0, 1, False)


def test_prompts_that_any_seed_of_either_arm_lacks_are_left_out() -> None:
    arm, base = drawn(8, 3, 20, 0.1, 0.1, 0.1), drawn(9, 3, 20, 0.1, 0.1, 0.1)
    arm[1, 4], base[0, 7] = np.nan, np.nan
    kept = [place for place in range(20) if place not in (4, 7)]
    assert differences({"x": (arm, base)}) == differences({"x": (arm[:, kept], base[:, kept])})
    assert estimate(arm).prompts == 19


@pytest.mark.parametrize("shape", [(3, 0), (3, 1), (1, 1)])
def test_nothing_is_said_of_fewer_than_two_prompts(shape: tuple[int, int]) -> None:
    found = differences({"x": (np.ones(shape), np.zeros(shape))})["x"]
    assert math.isnan(found.low)
    assert not found.distinguishable


def test_the_same_arms_give_the_same_numbers_whatever_stands_beside_them() -> None:
    pairs = {
        str(key): (drawn(key, 3, 30, 0.1, 0.1, 0.1) + key, drawn(key + 50, 3, 30, 0.1, 0.1, 0.1)) for key in range(3)
    }
    alone = differences({"1": pairs["1"]}, alpha=0.05 / 3)
    among = differences(pairs)
    assert among["1"].p == alone["1"].p
    assert differences(dict(reversed(pairs.items())))["1"] == among["1"]


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    st.integers(1, 5),
    st.floats(0.01, 0.2),
)
def test_the_words_and_the_interval_never_contradict_each_other(shifts: list[float], seeds: int, alpha: float) -> None:
    pairs = {
        f"{place}": (drawn(place, seeds, 12, 0.1, 0.3, 0.3) + shift, np.zeros((seeds, 12)))
        for place, shift in enumerate(shifts)
    }
    for found in differences(pairs, alpha, resamples=2000).values():
        assert found.distinguishable == (not found.low <= 0 <= found.high)
        assert found.low <= found.mean <= found.high or seeds == 1


# --- Holm


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=9), st.floats(0.01, 0.2))
def test_holms_decisions_are_those_of_adjusted_p_values(p: list[float], alpha: float) -> None:
    """By definition: adjusted p_(k) = max over j <= k of (m - j + 1) p_(j)."""
    names = {str(place): value for place, value in enumerate(p)}
    levels = holm(names, alpha)
    largest = 0.0
    for place, name in enumerate(sorted(names, key=lambda name: names[name])):
        largest = max(largest, (len(p) - place) * names[name])
        if not math.isclose(largest, alpha):
            assert (names[name] <= levels[name]) == (largest <= alpha)


def test_false_alarms_over_all_differences_together_stay_below_alpha() -> None:
    """Four arms that are all equal to their baseline, 300 experiments."""
    alarms = 0
    for key in range(300):
        pairs = {
            str(arm): (drawn(1000 * arm + key, 5, 60, 0.02, 0.1, 0.3), drawn(9000 + key, 5, 60, 0.02, 0.1, 0.3))
            for arm in range(4)
        }
        alarms += any(found.distinguishable for found in differences(pairs, resamples=2000, seed=key).values())
    assert alarms / 300 <= 0.08


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=200), st.floats(0.001, 0.5))
def test_p_is_the_level_from_which_on_the_interval_leaves_0_out(values: list[float], level: float) -> None:
    draws = np.sort(np.array(values * 20))
    low, high = bounds(draws, level)
    if level / 2 * (len(draws) + 1) >= 1:
        assert (p_value(draws) <= level) == (not low <= 0 <= high)
