"""Adaptive PVar: the error of PVar, the posterior, who goes on, and what it saves."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection.adaptive import LADDER, Round, climb, first_counts, next_round, top
from tasks.selection.posterior import Posterior, Prior, fit_prior, pilot, posterior
from tasks.selection.pvar import pair_sums, pvar, pvar_with_error
from tests.test_selection import matrices, moderate

NAN = math.nan


def normal_rewards(prompts: int, samples: int, width: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rewards with lognormal spreads of that width, and the spreads."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, width, prompts))
    return rng.normal(0, 2, prompts)[:, None] + spread[:, None] * rng.normal(size=(prompts, samples)), spread


def true_pvar(spread: np.ndarray) -> np.ndarray:
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    return (np.tanh(spread[:, None] * nodes / math.sqrt(2)) / 2) ** 2 @ (weights / weights.sum())


def first_round(rewards: np.ndarray, quality: float = 0.99, fraction: float = 0.1) -> tuple[Round, Prior, np.ndarray]:
    counts = first_counts(len(rewards))
    seen = np.where(np.arange(rewards.shape[1]) < counts[:, None], rewards, NAN)
    prior = fit_prior(seen)
    found = posterior(pvar(seen), np.isfinite(seen).sum(axis=1), prior)
    return next_round(found, counts, prior, fraction, quality=quality), prior, counts


# --- the error of PVar


def jackknife_by_hand(rewards: np.ndarray, scale: float) -> float:
    finite = rewards[np.isfinite(rewards)]
    n = len(finite)
    if n < 3:
        return NAN
    left = np.array([pvar(np.delete(finite, i)[None], scale)[0] for i in range(n)])
    return math.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())


@given(matrices(st.one_of(moderate, st.just(NAN), st.just(math.inf))), st.floats(0.05, 20))
def test_the_error_is_that_of_leaving_out_each_sample_in_turn(rewards: np.ndarray, scale: float) -> None:
    value, error = pvar_with_error(rewards, scale)
    np.testing.assert_allclose(value, pvar(rewards, scale), rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(error, [jackknife_by_hand(row, scale) for row in rewards], rtol=1e-7, atol=1e-10)


def test_the_error_of_two_far_samples_and_one_between_by_hand() -> None:
    # v is 1/4 for each pair but the equal one: leaving out 0 gives 0, leaving out either 100 gives 1/4
    value, error = pvar_with_error(np.array([[0.0, 1000.0, 1000.0]]))
    assert value[0] == pytest.approx(1 / 6)
    assert error[0] == pytest.approx(math.sqrt(2 / 3 * ((0 - 1 / 6) ** 2 + 2 * (1 / 4 - 1 / 6) ** 2)))


def test_the_error_is_about_the_spread_of_pvar_over_repetitions() -> None:
    rewards = np.random.default_rng(0).normal(0, 1, (4000, 12))
    value, error = pvar_with_error(rewards)
    assert math.sqrt((error**2).mean()) == pytest.approx(value.std(), rel=0.1)


def test_the_error_needs_three_finite_rewards() -> None:
    value, error = pvar_with_error(np.array([[1.0, 2.0, NAN], [1.0, NAN, NAN], [NAN] * 3, [5.0, 5.0, 5.0]]))
    assert np.isfinite(value).tolist() == [True, False, False, True]
    assert np.isnan(error[:3]).all()
    assert error[3] == 0
    assert [part.shape for part in pvar_with_error(np.empty((0, 4)))] == [(0,), (0,)]


def test_a_data_set_larger_than_a_block_is_worked_on_as_one() -> None:
    rewards, _ = normal_rewards(20_000, 5)
    part = slice(8000, 8400)
    np.testing.assert_array_equal(pvar(rewards)[part], pvar(rewards[part]))
    np.testing.assert_array_equal(pvar_with_error(rewards)[1][part], pvar_with_error(rewards[part])[1])


# --- the posterior


def test_moments_of_the_prior_are_those_of_the_true_pvar() -> None:
    rewards, spread = normal_rewards(40_000, 6)
    prior, x = fit_prior(rewards), 4 * true_pvar(spread)
    assert prior.mean == pytest.approx(x.mean(), rel=0.01)
    assert prior.second == pytest.approx((x**2).mean(), rel=0.02)
    assert prior.mean * (1 - prior.mean) / (prior.strength + 1) == pytest.approx(x.var(), rel=0.05)
    for n in (2, 4, 8):  # the weight of n samples: their noise about the true value
        noise = ((4 * pvar(normal_rewards(40_000, n, seed=0)[0]) - x) ** 2).mean()
        assert (x * (1 - x)).mean() / prior.weight(np.array([n]))[0] == pytest.approx(noise, rel=0.1)


def test_the_posterior_mean_is_right_on_average_wherever_it_lies() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(0.5, 0.5, 50_000)
    passes = (rng.random((50_000, 8)) < p[:, None]) * 1.0
    prior, truth = fit_prior(passes), 2 * p * (1 - p) * (math.tanh(0.5) / 2) ** 2
    found = posterior(pvar(passes[:, :4]), np.full(50_000, 4), prior)
    for mean in np.unique(found.mean.round(12)):
        here = found.mean.round(12) == mean
        assert truth[here].mean() == pytest.approx(
            mean, abs=0.04 * truth.mean() + 4 * truth[here].std() / here.sum() ** 0.5
        )


def test_the_posterior_shrinks_less_and_errs_less_with_more_samples() -> None:
    prior = fit_prior(normal_rewards(2000, 6)[0])
    samples = np.array([2, 3, 4, 8, 16, 200])
    found = posterior(np.full(6, 0.2), samples, prior)
    assert (np.diff(found.mean) > 0).all() and prior.mean / 4 < found.mean[0] and found.mean[-1] < 0.2
    assert (np.diff(found.error) < 0).all() and (found.error > 0).all()
    low = posterior(np.zeros(6), samples, prior)
    assert (np.diff(low.mean) < 0).all() and low.mean[-1] > 0


def test_a_prompt_stopped_on_two_lucky_samples_does_not_pass_one_that_held_its_value() -> None:
    prior = fit_prior(normal_rewards(2000, 6)[0])
    found = posterior(np.array([0.24, 0.22]), np.array([2, 16]), prior)
    assert top(found.mean, 1).tolist() == [1]


@given(matrices(moderate, rows=8), st.randoms(use_true_random=False))
def test_prior_and_posterior_do_not_depend_on_the_order_of_samples(rewards: np.ndarray, random: Random) -> None:
    columns = list(range(rewards.shape[1]))
    random.shuffle(columns)
    mixed, samples = rewards[:, columns], np.full(len(rewards), rewards.shape[1])
    one, other = fit_prior(rewards), fit_prior(mixed)
    assert other.mean == pytest.approx(one.mean, abs=1e-12)
    assert other.second == pytest.approx(one.second, abs=1e-9)
    a, b = posterior(pvar(rewards), samples, one), posterior(pvar(mixed), samples, one)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-10, atol=1e-14)


@given(matrices(st.one_of(st.integers(-2, 2).map(float), moderate, st.just(NAN)), rows=8))
def test_the_posterior_is_a_pvar_whatever_the_rewards(rewards: np.ndarray) -> None:
    samples = np.isfinite(rewards).sum(axis=1)
    found = posterior(pvar(rewards), samples, fit_prior(rewards))
    np.testing.assert_array_equal(np.isnan(found.mean), samples < 2)
    known = samples >= 2
    assert ((found.mean[known] >= 0) & (found.mean[known] <= 0.25)).all()
    assert ((found.error[known] >= 0) & (found.error[known] <= 0.125)).all()


def test_a_covariate_that_tells_moves_the_prior_and_one_that_does_not_stays_out() -> None:
    rewards, spread = normal_rewards(4000, 4)
    telling, idle = np.log(spread)[:, None], np.random.default_rng(9).normal(size=(4000, 1))
    plain, known, noise = (fit_prior(rewards, 1.0, c) for c in (None, telling, idle))
    assert known.strength > 3 * plain.strength
    assert noise.strength == pytest.approx(plain.strength, rel=0.1)
    means = known.means(4000, telling)
    assert np.corrcoef(means, 4 * true_pvar(spread))[0, 1] > 0.95
    assert np.ptp(noise.means(4000, idle)) < 0.2 * np.ptp(means)


def test_the_pilot_is_spread_evenly_over_the_rows() -> None:
    assert pilot(10, 5).tolist() == [True, False] * 5
    assert pilot(3, 10).all() and pilot(0, 10).shape == (0,)
    assert pilot(10_000_000, 400).sum() == 400


def test_pair_sums_of_three_samples_by_hand() -> None:
    v = (math.tanh(0.5) / 2) ** 2  # a gap of one
    sums, squares, n = pair_sums(np.array([[0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(sums, [[2 * v, v, v]])
    assert squares[0] == pytest.approx(4 * v**2) and n[0] == 3


# --- who goes on


def test_prompts_near_the_cut_go_on_and_sure_ones_do_not() -> None:
    prior = fit_prior(normal_rewards(4000, 6)[0])
    estimates = np.linspace(0, 0.25, 2000)
    counts = np.full(2000, 8)
    found = posterior(estimates, counts, prior)
    going = next_round(found, counts, prior, 0.3, quality=1.0).going
    assert going[1399 - 50 : 1399 + 50].all()
    assert not going[:200].any() and not going[-50:].any()
    assert np.count_nonzero(np.diff(going.astype(int))) == 2  # one interval


def test_a_higher_quality_asks_for_more_prompts_to_go_on() -> None:
    rewards, _ = normal_rewards(5000, max(LADDER))
    rounds = [first_round(rewards, quality)[0] for quality in (0.9, 0.95, 0.98, 0.99, 1.0)]
    for less, more in pairwise(rounds):
        assert not (less.going & ~more.going).any()
        assert less.expected_completions <= more.expected_completions
        assert less.expected_quality <= more.expected_quality + 1e-9


def test_a_round_accounts_for_every_prompt_and_completion() -> None:
    rewards, _ = normal_rewards(3000, max(LADDER))
    made, _, counts = first_round(rewards)
    assert made.prompts == 3000 == made.undecided + made.inside + made.outside
    assert made.completions == counts.sum() <= made.expected_completions <= made.fixed_completions == 48_000
    assert 0 < made.expected_overlap <= 1
    assert climb(counts, made.going).sum() > counts.sum()


def test_nobody_goes_beyond_the_last_step() -> None:
    prior = fit_prior(normal_rewards(1000, 6)[0])
    counts = np.full(1000, LADDER[-1])
    made = next_round(posterior(np.linspace(0, 0.25, 1000), counts, prior), counts, prior, 0.1, quality=1.0)
    assert made.undecided == 0 and made.expected_completions == made.completions


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rewards", "fraction"),
    [
        (np.full((50, 8), 3.0), 0.1),  # all equal
        (np.full((50, 8), NAN), 0.1),
        (np.array([[1.0, 2.0, 5.0, 3.0]]), 0.1),  # one prompt
        (normal_rewards(50, 8)[0], 1.0),
        (np.where(np.arange(8) < 1, 1.0, np.full((50, 8), NAN)), 0.1),  # one reward each
    ],
)
def test_where_there_is_nothing_to_decide_nobody_goes_on(rewards: np.ndarray, fraction: float) -> None:
    samples = np.isfinite(rewards).sum(axis=1)
    prior = fit_prior(rewards)
    counts = np.full(len(rewards), 4)
    made = next_round(posterior(pvar(rewards), samples, prior), counts, prior, fraction)
    assert not made.going.any()
    assert made.expected_completions == counts.sum()


def test_a_prompt_without_a_pvar_is_in_no_subset() -> None:
    assert top(np.array([0.1, NAN, 0.2, 0.2]), 4).tolist() == [2, 3, 0]
    prior = fit_prior(normal_rewards(200, 6)[0])
    counts = np.full(100, 4)
    samples = np.where(np.arange(100) < 5, 1, 4)
    estimates = np.where(samples < 2, NAN, np.linspace(0, 0.25, 100))
    made = next_round(posterior(estimates, samples, prior), counts, prior, 0.1)
    assert math.isfinite(made.expected_quality) and made.undecided + made.inside + made.outside == 100


def test_the_same_rewards_give_the_same_round() -> None:
    rewards, _ = normal_rewards(2000, max(LADDER))
    one, other = first_round(rewards)[0], first_round(rewards.copy())[0]
    np.testing.assert_array_equal(one.going, other.going)
    assert (one.expected_completions, one.expected_quality) == (other.expected_completions, other.expected_quality)


def test_prompts_are_judged_alike_wherever_they_stand() -> None:
    prior = fit_prior(normal_rewards(3000, 6)[0])
    estimates, counts = np.random.default_rng(0).uniform(0, 0.25, 3000), np.tile([3, 4, 6], 1000)
    mixed = np.random.default_rng(1).permutation(3000)
    straight = next_round(posterior(estimates, counts, prior), counts, prior, 0.1)
    turned = next_round(posterior(estimates[mixed], counts[mixed], prior), counts[mixed], prior, 0.1)
    assert (straight.going[mixed] != turned.going).mean() < 0.002  # sums in another order may move the cut by a hair


# --- the whole


def climb_to_the_end(rewards: np.ndarray, quality: float) -> tuple[np.ndarray, Posterior, list[Round]]:
    counts, rows = first_counts(len(rewards)), np.arange(len(rewards))
    table = {n: pvar(rewards[:, :n]) for n in LADDER}
    seen = np.where(np.arange(rewards.shape[1]) < counts[:, None], rewards, NAN)
    prior, rounds = fit_prior(seen), []
    while True:
        estimates = np.choose(np.searchsorted(LADDER, counts), [table[n][rows] for n in LADDER])
        found = posterior(estimates, counts, prior)
        rounds.append(next_round(found, counts, prior, 0.1, quality=quality))
        if not rounds[-1].going.any():
            return counts, found, rounds
        counts = climb(counts, rounds[-1].going)


def test_a_third_of_the_completions_give_99_percent_of_the_fixed_subsets_true_pvar() -> None:
    rewards, spread = normal_rewards(10_000, max(LADDER))
    truth = true_pvar(spread)
    counts, found, rounds = climb_to_the_end(rewards, 0.995)
    adaptive, fixed = truth[top(found.mean, 1000)].mean(), truth[top(pvar(rewards[:, :16]), 1000)].mean()
    assert counts.mean() <= 16 / 3
    assert adaptive >= 0.99 * fixed
    assert adaptive / fixed == pytest.approx(rounds[-1].expected_quality, abs=0.02)
    overlap = np.isin(top(found.mean, 1000), top(pvar(rewards[:, :16]), 1000)).mean()
    assert overlap == pytest.approx(rounds[-1].expected_overlap, abs=0.08)
    assert [r.completions for r in rounds] == sorted(r.completions for r in rounds)
