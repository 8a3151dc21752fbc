"""The mathematics of selection against brute force and against what the definitions promise."""

from __future__ import annotations

import hashlib
import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection.agreement import agreement
from tasks.selection.controls import close, matched
from tasks.selection.delta import GeneratorDelta, Moments, ensemble
from tasks.selection.pairing import (
    ABSENT,
    KEPT,
    MISSING,
    SAME,
    TIE,
    TOO_FEW,
    Choice,
    best_vs_random,
    best_vs_worst,
    generator_delta,
    labelled,
    random_pair,
)
from tasks.selection.pvar import PooledScale, pvar
from tasks.selection.ranking import hashes, in_range, order, shares, size, uniform, within_budget
from tasks.selection.winrate import win_rate

NAN = math.nan

moderate = st.floats(-50, 50, allow_nan=False)
# Sixty-fourths and whole constants add without rounding, so that equality below may be exact.
exact = st.integers(-2000, 2000).map(lambda i: i / 64)


def matrices(values: st.SearchStrategy[float], rows: int = 6, columns: int = 7) -> st.SearchStrategy[np.ndarray]:
    """Rewards [prompts, samples]."""
    return st.tuples(st.integers(1, rows), st.integers(1, columns)).flatmap(
        lambda shape: st.lists(
            st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(lambda cells: np.array(cells, dtype=np.float64))
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def pvar_by_definition(rewards: np.ndarray, scale: float) -> float:
    """The variance of the preference over ordered pairs of different samples."""
    finite = [r for r in rewards if math.isfinite(r)]
    preferences = [sigmoid((a - b) / scale) for a, b in itertools.permutations(finite, 2)]
    return float(np.var(preferences)) if preferences else NAN


# --- pvar


@given(matrices(st.one_of(moderate, st.just(NAN), st.just(math.inf))), st.floats(0.05, 20))
def test_pvar_is_the_variance_of_preferences_over_ordered_pairs(rewards: np.ndarray, scale: float) -> None:
    expected = [pvar_by_definition(row, scale) for row in rewards]
    np.testing.assert_allclose(pvar(rewards, scale), expected, rtol=1e-10, atol=1e-14)


@given(matrices(moderate), st.randoms(use_true_random=False))
def test_pvar_does_not_depend_on_the_order_of_samples(rewards: np.ndarray, random: Random) -> None:
    columns = list(range(rewards.shape[1]))
    random.shuffle(columns)
    np.testing.assert_allclose(pvar(rewards[:, columns]), pvar(rewards), rtol=1e-12, atol=1e-15)


@given(matrices(exact), st.integers(-1000, 1000))
def test_pvar_does_not_change_when_a_constant_is_added(rewards: np.ndarray, constant: int) -> None:
    np.testing.assert_array_equal(pvar(rewards + constant), pvar(rewards))


@given(matrices(st.floats(allow_nan=True, allow_infinity=True)), st.floats(1e-300, 1e300))
def test_pvar_is_within_its_bounds_whatever_the_rewards(rewards: np.ndarray, scale: float) -> None:
    values = pvar(rewards, scale)
    defined = np.isfinite(rewards).sum(axis=1) >= 2
    np.testing.assert_array_equal(np.isnan(values), ~defined)
    assert ((values[defined] >= 0) & (values[defined] <= 0.25)).all()


def test_pvar_is_undefined_and_not_zero_with_fewer_than_two_finite_rewards() -> None:
    rewards = np.array([[NAN, NAN, NAN], [1.0, NAN, NAN], [1.0, math.inf, -math.inf], [1.0, 1.0, NAN]])
    values = pvar(rewards)
    assert np.isnan(values[:3]).all()
    assert values[3] == 0
    assert np.isnan(pvar(np.ones((2, 1)))).all()
    assert pvar(np.empty((0, 4))).shape == (0,)


def test_pvar_of_rewards_with_gaps_is_pvar_of_the_finite_ones() -> None:
    full = np.array([[0.3, -1.2, 2.0]])
    holes = np.array([[NAN, 0.3, math.inf, -1.2, NAN, 2.0]])
    assert pvar(holes)[0] == pytest.approx(pvar(full)[0], abs=1e-16)


def test_pvar_of_a_single_prompt_reads_rewards_that_must_not_be_written() -> None:
    """As they come from a table, when a shard has one prompt."""
    rewards = np.array([[1.0, 0.0, np.inf]])
    rewards.flags.writeable = False
    assert pvar(rewards) == pytest.approx(pvar(np.array([[1.0, 0.0]])))
    assert rewards[0, 2] == np.inf


def test_pvar_is_an_eighth_of_the_variance_for_small_gaps() -> None:
    rewards = np.random.default_rng(0).normal(3.0, 0.01, (50, 8))
    np.testing.assert_allclose(pvar(rewards), rewards.var(axis=1, ddof=1) / 8, rtol=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gap", [1e3, 1e30, 8e307])
def test_pvar_saturates_at_a_quarter_of_the_share_of_different_pairs(gap: float) -> None:
    rewards = np.array([[0.0, gap, gap, -gap], [gap, gap, gap, gap], [0.0, gap, NAN, NAN]])
    np.testing.assert_allclose(pvar(rewards), [5 / 6 / 4, 0, 1 / 4], rtol=1e-12)


def test_pvar_at_a_scale_is_pvar_of_scaled_rewards() -> None:
    rewards = np.random.default_rng(1).normal(0, 5, (20, 6))
    np.testing.assert_allclose(pvar(rewards, 4.0), pvar(rewards / 4.0), rtol=1e-12)


@given(matrices(st.one_of(moderate, st.just(NAN))), st.integers(1, 5))
def test_the_pooled_scale_from_chunks_equals_one_pass(rewards: np.ndarray, chunk: int) -> None:
    pooled = PooledScale()
    for start in range(0, len(rewards), chunk):
        pooled.add(rewards[start : start + chunk])
    squares, freedom = 0.0, 0
    for row in rewards:
        finite = row[np.isfinite(row)]
        if len(finite) >= 2:
            squares += ((finite - finite.mean()) ** 2).sum() if np.ptp(finite) else 0.0
            freedom += len(finite) - 1
    expected = math.sqrt(squares / freedom) if squares > 0 else 1.0
    assert pooled.value == pytest.approx(expected, rel=1e-9)


def test_the_pooled_scale_is_one_where_nothing_varies() -> None:
    pooled = PooledScale()
    assert pooled.value == 1.0
    pooled.add(np.ones((3, 4)))
    pooled.add(np.array([[0.1, 0.1, 0.1, NAN], [0.7, 0.7, 0.7, NAN], [NAN, NAN, NAN, 0.3]]))  # their means are rounded
    assert pooled.value == 1.0


@given(matrices(st.one_of(moderate, st.just(NAN))), moderate)
def test_the_pooled_scale_of_equal_rewards_is_one_whatever_they_are(rewards: np.ndarray, value: float) -> None:
    pooled = PooledScale()
    pooled.add(np.where(np.isnan(rewards), NAN, value))
    assert pooled.value == 1.0


# --- pairing


def test_best_vs_worst_takes_the_highest_and_the_lowest_reward() -> None:
    choice = best_vs_worst(np.array([[1.0, 3.0, NAN, -2.0]]), np.array([[1, 2, 3, 4]]))
    assert (choice.chosen[0], choice.rejected[0], choice.reason[0]) == (1, 3, KEPT)


def test_best_vs_worst_takes_the_first_of_equals() -> None:
    choice = best_vs_worst(np.array([[0.0, 5.0, 5.0, 0.0]]), np.array([[1, 2, 3, 4]]))
    assert (choice.chosen[0], choice.rejected[0]) == (1, 0)


def test_ties_identical_texts_and_missing_rewards_are_drops_with_a_reason() -> None:
    rewards = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, NAN], [NAN, NAN], [2.0, 2.0], [1.0, math.inf]])
    texts = np.array([[1, 2], [7, 7], [1, 1], [1, 2], [3, 3], [1, 2]])
    reasons = best_vs_worst(rewards, texts).reason.tolist()
    assert reasons == [TIE, SAME, TOO_FEW, TOO_FEW, SAME, TOO_FEW]


@given(matrices(st.one_of(st.integers(-2, 2).map(float), st.just(NAN)), rows=8, columns=5), st.integers(0, 2**31))
def test_no_pair_is_ever_emitted_with_tied_rewards_or_equal_texts(rewards: np.ndarray, seed: int) -> None:
    texts = np.random.default_rng(seed).integers(0, 3, rewards.shape)
    choice = best_vs_worst(rewards, texts)
    for row, reason in enumerate(choice.reason):
        finite = rewards[row][np.isfinite(rewards[row])]
        if reason != KEPT:
            assert reason in (TOO_FEW, SAME, TIE)
            continue
        best, worst = rewards[row, choice.chosen[row]], rewards[row, choice.rejected[row]]
        assert best == finite.max() > finite.min() == worst
        assert texts[row, choice.chosen[row]] != texts[row, choice.rejected[row]]


def test_generator_delta_takes_the_first_sample_of_each_and_needs_no_reward() -> None:
    rewards = np.array([[NAN, NAN, NAN, NAN], [0.0, 9.0, 5.0, 9.0]])
    texts = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    choice = generator_delta(rewards, texts, np.array([[1, 1, 0, 0]] * 2))
    assert choice.chosen.tolist() == [2, 2]
    assert choice.rejected.tolist() == [0, 0]
    assert choice.reason.tolist() == [KEPT, KEPT]


def test_generator_delta_drops_missing_samples_before_anything_else() -> None:
    rewards = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    texts = np.array([[0, 0], [1, 2], [3, 3], [3, 3]])
    generators = np.array([[0, ABSENT], [0, 1], [0, 1], [0, 1]])
    assert generator_delta(rewards, texts, generators).reason.tolist() == [MISSING, TIE, SAME, SAME]


def pair_by_hand(rule: str, rewards: np.ndarray, texts: np.ndarray, draws: np.ndarray) -> tuple[int, int] | None:
    """Chosen and rejected of one prompt, with loops; None when there is no pair."""
    rated = [i for i in range(len(rewards)) if math.isfinite(rewards[i])]
    if rule == "random":
        if len(rated) < 2:
            return None
        first, second = sorted(sorted(rated, key=lambda i: draws[i])[:2], key=lambda i: -rewards[i])
        return None if rewards[first] == rewards[second] or texts[first] == texts[second] else (first, second)
    best = max(rated, key=lambda i: rewards[i], default=None)
    lower = [i for i in rated if rewards[i] < rewards[best] and texts[i] != texts[best]]
    return (best, min(lower, key=lambda i: draws[i])) if lower else None


ratings = st.one_of(st.integers(-2, 2).map(float), st.just(NAN))


@given(matrices(ratings, rows=8, columns=5), st.integers(0, 2**31), st.sampled_from(["best", "random"]))
def test_random_rules_take_what_a_loop_takes(rewards: np.ndarray, seed: int, rule: str) -> None:
    random = np.random.default_rng(seed)
    texts, draws = random.integers(0, 3, rewards.shape), random.random(rewards.shape)
    choice = (best_vs_random if rule == "best" else random_pair)(rewards, texts, draws)
    for row, reason in enumerate(choice.reason):
        expected = pair_by_hand(rule, rewards[row], texts[row], draws[row])
        assert (reason == KEPT) == (expected is not None)
        if expected:
            assert (choice.chosen[row], choice.rejected[row]) == expected
        elif np.isfinite(rewards[row]).sum() < 2:
            assert reason == TOO_FEW
        else:
            assert reason in (TIE, SAME)


def test_the_reason_of_no_random_pair_is_that_of_the_samples() -> None:
    rewards = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, NAN], [1.0, NAN, NAN]])
    texts = np.array([[1, 2, 3], [4, 4, 4], [5, 5, 6], [7, 8, 9]])
    draws = np.array([[0.3, 0.1, 0.2]] * 4)
    assert best_vs_random(rewards, texts, draws).reason.tolist() == [TIE, SAME, SAME, TOO_FEW]
    assert random_pair(rewards, texts, draws).reason.tolist() == [TIE, SAME, SAME, TOO_FEW]


def test_a_random_rejected_one_is_any_lower_one_equally_often() -> None:
    prompts = 6000
    ids = np.random.default_rng(0).integers(0, 2**63, prompts).astype(np.uint64)
    rewards, texts = np.tile([3.0, 2.0, 1.0, 0.0], (prompts, 1)), np.tile([1, 2, 3, 4], (prompts, 1))
    choice = best_vs_random(rewards, texts, uniform(ids, 4, seed=3))
    counts = np.bincount(choice.rejected, minlength=4)
    assert counts[0] == 0
    assert np.abs(counts[1:] / prompts - 1 / 3).max() < 0.03  # five deviations
    two = random_pair(rewards, texts, uniform(ids, 4, seed=3))
    assert (two.chosen < two.rejected).all()
    pairs = np.bincount(two.chosen * 4 + two.rejected, minlength=16)
    assert np.abs(pairs[pairs > 0] / prompts - 1 / 6).max() < 0.025
    assert (pairs > 0).sum() == 6


@pytest.mark.parametrize("rule", [best_vs_random, random_pair])
def test_one_sample_is_too_few_for_a_random_pair(rule: object) -> None:
    choice = rule(np.ones((3, 1)), np.ones((3, 1), int), np.full((3, 1), 0.5))  # type: ignore[operator]
    assert isinstance(choice, Choice)
    assert choice.reason.tolist() == [TOO_FEW] * 3


def test_labelled_pairs_are_samples_side_by_side_and_need_no_reward() -> None:
    there = np.array([[0, 1, 0, 1, 0, 1], [0, 1, ABSENT, ABSENT, ABSENT, ABSENT], [ABSENT] * 6, [0, 1, 0, 1, -1, -1]])
    texts = np.array([[1, 2, 3, 3, 5, 6], [1, 2, 0, 0, 0, 0], [0] * 6, [1, 2, 3, 4, 0, 0]])
    rewards = np.full(there.shape, NAN)
    rewards[3] = [1, 1, 0, 5, NAN, NAN]
    choice = labelled(rewards, texts, there)
    assert choice.row.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert choice.chosen.tolist() == [0, 2, 4, 0, 0, 0, 2]
    assert choice.rejected.tolist() == [1, 3, 5, 1, 1, 1, 3]
    assert choice.reason.tolist() == [KEPT, SAME, KEPT, KEPT, MISSING, TIE, KEPT]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 1))
def test_every_labelled_pair_is_one_candidate(pairs: list[int], odd: int) -> None:
    width = 2 * max(pairs) + odd or 1
    there = np.array([[0, 1] * n + [ABSENT] * (width - 2 * n) for n in pairs]).reshape(len(pairs), width)
    choice = labelled(np.full(there.shape, NAN), np.arange(there.size).reshape(there.shape), there)
    assert np.bincount(choice.row, minlength=len(pairs)).tolist() == [max(n, 1) for n in pairs]
    assert (choice.reason == KEPT).sum() == sum(pairs)
    assert (choice.reason == MISSING).sum() == pairs.count(0)


# --- agreement


def agreement_by_hand(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Kendall's tau-b by its definition with the numbers of ties, and the share of discordant pairs."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a) and math.isfinite(b)]
    concordant = discordant = only_first = only_second = 0
    for (a, b), (c, d) in itertools.combinations(both, 2):
        product = (a - c) * (b - d)
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        only_first, only_second = only_first + (a == c and b != d), only_second + (a != c and b == d)
    decided = concordant + discordant
    under = math.sqrt((decided + only_first) * (decided + only_second))
    return ((concordant - discordant) / under if under else NAN, discordant / decided if decided else NAN)


@given(matrices(ratings, columns=6), st.integers(0, 2**31))
def test_agreement_is_kendalls_tau_b_and_the_share_turned_round(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).integers(-2, 3, first.shape).astype(float)
    second[np.random.default_rng(seed + 1).random(first.shape) < 0.2] = NAN
    tau, flipped = agreement(first, second)
    expected = np.array([agreement_by_hand(a, b) for a, b in zip(first, second, strict=True)])
    np.testing.assert_allclose(tau, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(flipped, expected[:, 1], atol=1e-12)
    np.testing.assert_allclose(agreement(second, first), (tau, flipped), atol=1e-12)
    opposite = agreement(first, -second)
    np.testing.assert_allclose(opposite, (-tau, 1 - flipped), atol=1e-12)


def test_agreement_of_what_cannot_be_compared_is_no_number() -> None:
    first = np.array([[1.0, 1.0], [1.0, NAN], [1.0, 2.0], [1.0, 2.0]])
    second = np.array([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0], [1.0, 2.0]])
    tau, flipped = agreement(first, second)
    np.testing.assert_array_equal(tau, [NAN, NAN, NAN, 1])
    np.testing.assert_array_equal(flipped, [NAN, NAN, NAN, 0])


# --- whole data sets from chunks


def chunks(rows: int, sizes: list[int]) -> list[slice]:
    edges = np.minimum(np.cumsum([0, *sizes, rows]), rows)
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@given(matrices(st.one_of(moderate, st.just(NAN)), rows=8), st.lists(st.integers(0, 4), max_size=6))
def test_moments_from_chunks_are_those_of_all(rewards: np.ndarray, sizes: list[int]) -> None:
    moments = Moments()
    for chunk in chunks(len(rewards), sizes):
        moments.add(rewards[chunk])
    known = rewards[np.isfinite(rewards)]
    assert moments.count == len(known)
    if len(known):
        assert moments.mean == pytest.approx(known.mean(), abs=1e-12)
    assert moments.deviation == pytest.approx(known.std(ddof=1) if len(known) > 1 else 0.0, abs=1e-9)


def test_moments_do_not_cancel_far_from_zero() -> None:
    moments = Moments()
    values = np.random.default_rng(0).normal(0, 1, 10_000)
    for part in np.split(values + 1e9, 100):
        moments.add(part)
    assert moments.deviation == pytest.approx(values.std(ddof=1), rel=1e-4)


def test_an_ensemble_is_the_mean_of_z_scores_and_needs_all_members() -> None:
    one, other = np.array([[0.0, 2.0, 4.0]]), np.array([[30.0, NAN, 10.0]])
    members = [Moments(), Moments()]
    for moments, rewards in zip(members, (one, other), strict=True):
        moments.add(rewards)
    z = [moments.z(rewards) for moments, rewards in zip(members, (one, other), strict=True)]
    np.testing.assert_allclose(z[0], [[-1, 0, 1]])
    reward, apart = ensemble(z)
    root = math.sqrt(0.5)
    np.testing.assert_allclose(reward, [[(-1 + root) / 2, NAN, (1 - root) / 2]])
    np.testing.assert_allclose(apart, [[(1 + root) / 2, NAN, (1 + root) / 2]])
    flat = Moments()
    flat.add(np.array([7.0, 7.0, NAN]))
    np.testing.assert_array_equal(flat.z(np.array([7.0, NAN])), [0, NAN])
    tenths = Moments()
    tenths.add(np.full(3, 0.1))  # whose mean is no 0.1
    tenths.add(np.full(4, 0.1))
    assert tenths.z(np.array([0.1])).tolist() == [0]


def delta_by_hand(rewards: np.ndarray, authors: np.ndarray, a: int, b: int) -> tuple[float, float, int]:
    """Mean difference of two generators over the prompts of both, its standard error, and how many these are."""
    apart = []
    for row, who in zip(rewards, authors, strict=True):
        ours, theirs = ([r for r, g in zip(row, who, strict=True) if g == x and math.isfinite(r)] for x in (a, b))
        if ours and theirs:
            apart.append(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    if not apart:
        return NAN, NAN, 0
    return float(np.mean(apart)), float(np.std(apart, ddof=1) / math.sqrt(len(apart))) if apart[1:] else NAN, len(apart)


@given(
    matrices(st.one_of(moderate, st.just(NAN)), rows=8, columns=6),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), max_size=5),
)
def test_generators_are_compared_over_the_prompts_of_both(rewards: np.ndarray, seed: int, sizes: list[int]) -> None:
    authors = np.random.default_rng(seed).integers(-1, 3, rewards.shape)
    known = GeneratorDelta(3)
    for chunk in chunks(len(rewards), sizes):
        known.add(rewards[chunk], authors[chunk])
    for a, b in itertools.permutations(range(3), 2):
        delta, error, prompts = delta_by_hand(rewards, authors, a, b)
        assert known.delta()[a, b] == pytest.approx(delta, abs=1e-9, nan_ok=True)
        assert known.error(a, b) == pytest.approx(error, abs=1e-5, nan_ok=True)
        assert known.prompts[a, b] == prompts
    for g in range(3):
        mine = rewards[(authors == g) & np.isfinite(rewards)]
        assert known.mean()[g] == pytest.approx(mine.mean() if len(mine) else NAN, abs=1e-9, nan_ok=True)


# --- ranking


def ids(number: int) -> list[str]:
    return [f"prompt-{i}" for i in range(number)]


def bits(names: list[str]) -> np.ndarray:
    """64 bits of digests, as the pairs table has them."""
    return np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names), np.uint64)


def test_top_takes_large_values_first_and_bottom_small_ones() -> None:
    values = np.array([0.2, NAN, 0.5, 0.1, 0.4])
    assert order(values, bits(ids(5)), 0).tolist() == [2, 4, 0, 3]
    assert order(values, bits(ids(5)), 0, "bottom").tolist() == [3, 0, 4, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 5), st.sampled_from(["top", "bottom"]))
def test_ties_are_broken_by_the_prompt_and_the_seed_not_by_the_position(
    values: list[int], seed: int, keep: str
) -> None:
    names = ids(len(values))
    straight = [names[i] for i in order(np.array(values, dtype=float), bits(names), seed, keep)]
    turned = [names[::-1][i] for i in order(np.array(values[::-1], dtype=float), bits(names[::-1]), seed, keep)]
    assert straight == turned


def test_top_and_bottom_of_tied_values_share_no_row_before_they_must() -> None:
    values = np.array([1.0] * 30)
    top, bottom = order(values, bits(ids(30)), 4), order(values, bits(ids(30)), 4, "bottom")
    assert top[:15].tolist() == bottom[:14:-1].tolist()
    assert not set(top[:15].tolist()) & set(bottom[:15].tolist())


def test_another_seed_breaks_ties_in_another_way() -> None:
    values = np.zeros(50)
    assert order(values, bits(ids(50)), 1).tolist() != order(values, bits(ids(50)), 2).tolist()
    assert sorted(order(values, bits(ids(50)), 1).tolist()) == list(range(50))


def test_the_hash_of_a_prompt_is_the_same_on_every_machine() -> None:
    assert hashes(np.array([1, 2**63], np.uint64), 7).tolist() == [9648886400068060533, 7084241770554260413]


def test_random_order_is_stable_in_size_and_when_prompts_are_added() -> None:
    def drawn(names: list[str], number: int) -> list[str]:
        ranked = order(hashes(bits(names), 3).astype(np.float64), bits(names), 3)
        return [names[i] for i in ranked[:number]]

    small, large = drawn(ids(200), 20), drawn(ids(200), 50)
    assert large[:20] == small
    grown = drawn(ids(400), 400)
    assert [name for name in grown if name in set(ids(200))] == drawn(ids(200), 200)


def test_random_order_favours_no_position() -> None:
    names = ids(1000)
    taken = np.zeros(1000)
    for seed in range(200):
        taken[order(hashes(bits(names), seed).astype(np.float64), bits(names), seed)[:250]] += 1
    halves = taken[:500].sum(), taken[500:].sum()
    assert abs(halves[0] - halves[1]) / 50_000 < 0.02
    assert taken.min() > 20 and taken.max() < 85  # binomial(200, 1/4): mean 50, deviation 6


@pytest.mark.parametrize(
    ("available", "fraction", "count", "expected"),
    [
        (100, 0.25, None, 25),
        (10, 0.26, None, 3),
        (10, 0.24, None, 2),
        (3, 0.01, None, 1),
        (0, 0.5, None, 0),
        (7, 1.0, None, 7),
        (5, None, 9, 5),
        (5, None, 2, 2),
    ],
)
def test_the_size_of_a_subset_is_rounded_at_least_one_and_at_most_all(
    available: int, fraction: float | None, count: int | None, expected: int
) -> None:
    assert size(available, fraction, count) == expected


strata = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 50), min_size=1)


@given(strata, st.integers(0, 200))
def test_shares_by_size_add_up_and_are_within_one_of_the_exact_ones(sizes: dict[str, int], total: int) -> None:
    whole = sum(sizes.values())
    total = min(total, whole)
    given_ = shares(sizes, total, {})
    assert sum(given_.values()) == total
    assert all(abs(given_[s] - total * n / whole) < 1 and given_[s] <= n for s, n in sizes.items())


@given(strata, st.integers(0, 200), st.dictionaries(st.sampled_from("abcdefgxyz"), st.integers(0, 10), min_size=1))
def test_quotas_share_out_the_total_as_far_as_strata_reach(
    sizes: dict[str, int], total: int, parts: dict[str, int]
) -> None:
    whole = max(10, sum(parts.values()))
    quotas = {s: n / whole for s, n in parts.items()}
    given_ = shares(sizes, total, quotas)
    assert given_.keys() == sizes.keys()
    for s, n in given_.items():
        exact = total * quotas.get(s, 0.0)
        assert n == sizes[s] if exact >= sizes[s] + 1 else abs(n - min(exact, sizes[s])) < 1
        assert n == 0 if exact == 0 else n <= sizes[s]
    plenty = shares(dict.fromkeys(quotas, 10_000), total, quotas)
    assert sum(plenty.values()) == round(sum(total * q for q in quotas.values()))


@given(st.lists(st.integers(0, 20), max_size=30), st.floats(0, 300))
def test_a_budget_takes_as_many_from_the_front_as_fit(tokens: list[int], budget: float) -> None:
    taken = within_budget(np.array(tokens, np.int64), budget)
    assert sum(tokens[:taken]) <= budget
    assert taken == len(tokens) or sum(tokens[: taken + 1]) > budget


bounds = st.none() | st.integers(-3, 3).map(float)


@given(
    st.lists(ratings, min_size=1, max_size=20),
    bounds,
    bounds,
    st.none() | st.integers(0, 3).map(float),
    st.none() | st.sampled_from([(0.0, 1.0), (0.25, 0.75), (0.1, 0.5), (0.0, 0.3)]),
)
def test_a_range_keeps_what_all_its_bounds_hold(
    values: list[float],
    low: float | None,
    high: float | None,
    within: float | None,
    quantiles: tuple[float, float] | None,
) -> None:
    side = in_range(np.array(values), low, high, within, quantiles)
    known = [v for v in values if not math.isnan(v)]
    between = np.quantile(known, quantiles) if quantiles and known else (-math.inf, math.inf)
    for value, where in zip(values, side, strict=True):
        if math.isnan(value):
            assert where == 2
            continue
        below = (low is not None and value < low) or (within is not None and value < -within) or value < between[0]
        above = (high is not None and value > high) or (within is not None and value > within) or value > between[1]
        assert (where == 0) == (not below and not above)
        assert where != -1 or below
        assert where != 1 or above


def test_uniform_draws_belong_to_the_id_and_the_seed() -> None:
    ids_ = np.random.default_rng(1).integers(0, 2**63, 4000).astype(np.uint64)
    draws = uniform(ids_, 5, seed=9)
    assert draws.shape == (4000, 5)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_array_equal(uniform(ids_[::-1], 3, seed=9)[::-1], draws[:, :3])
    assert (uniform(ids_, 5, seed=8) != draws).all()
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(draws.T) - np.eye(5), 0, atol=0.08)


# --- controls


def matched_by_hand(targets: list[float], candidates: list[float]) -> list[float]:
    """Values of the nearest free candidates, one target after the other; of two equally near ones the smaller."""
    free, taken = sorted(candidates), []
    for target in targets[: len(candidates)]:
        nearest = min(free, key=lambda value: (abs(value - target), value))
        free.remove(nearest)
        taken.append(nearest)
    return taken


halves = st.integers(-20, 20).map(lambda i: i / 2)


@given(st.lists(halves, max_size=25), st.lists(halves, max_size=25))
def test_matching_takes_the_nearest_free_candidate_in_turn(targets: list[float], candidates: list[float]) -> None:
    places = matched(np.array(targets), np.array(candidates))
    assert len(places) == min(len(targets), len(candidates)) == len(set(places.tolist()))
    assert [candidates[i] for i in places] == matched_by_hand(targets, candidates)


def test_matches_are_close_within_a_fifth_of_the_deviation() -> None:
    pool = np.array([-1.0, 1.0])  # deviation 1
    assert close(np.array([0.0, 0.0, 5.0]), np.array([0.2, -0.21]), pool) == 0.5
    assert math.isnan(close(np.array([1.0]), np.array([]), pool))
    assert close(np.array([3.0]), np.array([3.0]), np.array([3.0])) == 1


# --- win rate


def win_rate_by_hand(policy: np.ndarray, reference: np.ndarray) -> tuple[float, float, int]:
    """Rate, clustered standard error, prompts; with loops over every meeting."""
    rates = []
    for ours, theirs in zip(policy, reference, strict=True):
        points = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, b in itertools.product(ours, theirs)
            if math.isfinite(a) and math.isfinite(b)
        ]
        if points:
            rates.append(sum(points) / len(points))
    if not rates:
        return NAN, NAN, 0
    mean = sum(rates) / len(rates)
    if len(rates) == 1:
        return mean, NAN, 1
    spread = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
    return mean, math.sqrt(spread / len(rates)), len(rates)


@given(matrices(st.one_of(st.integers(-2, 2).map(float), st.just(NAN)), columns=4), st.integers(0, 2**31))
def test_the_win_rate_is_the_mean_over_prompts_of_all_meetings(policy: np.ndarray, seed: int) -> None:
    reference = np.random.default_rng(seed).integers(-2, 3, (len(policy), 3)).astype(float)
    result = win_rate(policy, reference)
    expected = win_rate_by_hand(policy, reference)
    np.testing.assert_allclose([result.rate, result.error, result.prompts], expected, rtol=1e-12, atol=1e-12)


def test_ties_count_one_half_and_both_sides_add_up_to_one() -> None:
    rewards = np.random.default_rng(2).integers(0, 3, (40, 4)).astype(float)
    other = np.random.default_rng(3).integers(0, 3, (40, 5)).astype(float)
    assert win_rate(rewards, rewards.copy()).rate == pytest.approx(0.5)
    assert win_rate(rewards, other).rate + win_rate(other, rewards).rate == pytest.approx(1.0)
    assert win_rate(np.ones((3, 2)), np.ones((3, 4))).rate == 0.5


def test_more_samples_of_the_same_prompts_do_not_shrink_the_standard_error() -> None:
    policy = np.random.default_rng(4).normal(size=(30, 1))
    reference = np.random.default_rng(5).normal(size=(30, 1))
    once = win_rate(policy, reference)
    often = win_rate(np.repeat(policy, 10, axis=1), np.repeat(reference, 10, axis=1))
    assert often.error == pytest.approx(once.error)


def test_prompts_without_rewards_on_both_sides_are_left_out() -> None:
    policy, reference = np.array([[1.0], [NAN], [2.0]]), np.array([[0.0], [0.0], [NAN]])
    assert win_rate(policy, reference).prompts == 1
    nothing = win_rate(np.full((2, 2), NAN), np.ones((2, 2)))
    assert nothing.prompts == 0
    assert math.isnan(nothing.rate)
    assert math.isnan(nothing.error)
