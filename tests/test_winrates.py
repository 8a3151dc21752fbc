"""Length control, arena scores and style control: against brute force, and against worlds whose truth is known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection.arena import agreed, arena_score, bradley_terry, points_of, weights_of
from tasks.selection.lengthcontrol import controlled, length_controlled, squashed
from tasks.selection.logistic import fit, sigmoid
from tasks.selection.style import FEATURES, differences, markdown_counts
from tasks.selection.winrate import win_rate
from tests.services import ROOT

# --- the fit


def test_the_fit_is_where_brute_force_finds_nothing_better() -> None:
    rng = np.random.default_rng(1)
    design, targets, weights = rng.normal(size=(60, 2)), rng.random(60), rng.random(60)

    def objective(b: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-design @ b))
        return float((weights * (targets * np.log(p) + (1 - targets) * np.log(1 - p))).sum() - 0.5 * 0.3 * (b @ b))

    found, curvature = fit(design, targets, weights, ridge=0.3)
    grid = np.linspace(-1, 1, 81)
    best = max(itertools.product(grid, grid), key=lambda b: objective(np.array(b)))
    assert np.abs(found - best).max() <= 0.0126  # half a step of the grid
    for move in itertools.product((-1e-4, 0, 1e-4), repeat=2):
        assert objective(found + np.array(move)) <= objective(found) + 1e-12
    step = 1e-4
    for i in range(2):
        unit = step * np.eye(2)[i]
        second = (objective(found + unit) - 2 * objective(found) + objective(found - unit)) / step**2
        assert curvature[i, i] == pytest.approx(-second, rel=1e-4)


@given(st.integers(1, 200), st.sampled_from([0.0, 1.0]))
def test_a_side_that_always_wins_gets_a_finite_strength_that_grows_with_the_evidence(n: int, side: float) -> None:
    ones = np.ones((n, 1))
    (found,), _ = fit(ones, np.full(n, side), np.ones(n))
    (more,), _ = fit(np.ones((2 * n, 1)), np.full(2 * n, side), np.ones(2 * n))
    assert 0 < abs(found) < abs(more) < 20 and np.sign(found) == (1 if side else -1)
    assert n * abs(side - sigmoid(np.array(found))) == pytest.approx(0.01 * abs(found), rel=1e-4)


def test_columns_of_very_different_size_do_not_lead_the_fit_astray() -> None:
    rng = np.random.default_rng(2)
    design = rng.normal(size=(500, 3)) * [1, 1e3, 1e-3]
    truth = np.array([1.0, 2e-3, 5.0])
    found, _ = fit(design, sigmoid(design @ truth), np.ones(500), ridge=1e-9)
    assert found == pytest.approx(truth, rel=1e-4)


# --- length control


def world(
    n: int, theta: float, phi: float, psi: float = 0.0, shift: float = 0.0, seed: int = 0, soft: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Points and length differences [prompts, 1], difficulties [prompts], and the true rate at equal length."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(shift, 100, (n, 1))
    difficulty = rng.normal(0, 1, n)
    logits = theta + phi * squashed(longer, np.zeros_like(longer)) + psi * difficulty[:, None]
    chances = sigmoid(logits)
    points = chances if soft else (rng.random((n, 1)) < chances).astype(float)
    return points, longer, difficulty, float(sigmoid(theta + psi * difficulty).mean())


def test_the_truth_is_found_again_when_preferences_follow_the_model() -> None:
    points, longer, difficulty, truth = world(4000, -0.4, 1.2, 0.8, shift=60, soft=True)
    found = length_controlled(points, longer, difficulty)
    assert (found.base, found.effects[0], found.difficulty) == pytest.approx((-0.4, 1.2, 0.8), abs=1e-3)
    assert found.rate == pytest.approx(truth, abs=1e-4)
    assert points.mean() > truth + 0.04, "the raw rate is what length has made of it"


def test_drawn_preferences_lead_to_the_truth_within_the_error_that_is_told() -> None:
    misses, errors, rates = [], [], []
    for seed in range(120):
        points, longer, difficulty, truth = world(500, -0.4, 1.2, 0.8, shift=60, seed=seed)
        found = length_controlled(points, longer, difficulty)
        misses.append((found.rate - truth) / found.error)
        errors.append(found.error)
        rates.append(found.rate - truth)
    # The error also covers which prompts were drawn, so against the truth of these prompts it is a little large.
    assert 0.75 < np.std(misses) < 1.1 and abs(np.mean(misses)) < 0.25
    assert np.mean(np.abs(misses) < 1.96) > 0.9


def test_the_error_is_that_of_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(3)
    longer = rng.normal(30, 100, (300, 4))
    taste = rng.normal(0, 1, (300, 1))  # meetings of a prompt are alike
    points = (rng.random((300, 4)) < sigmoid(0.3 + taste + np.tanh(longer / 100))).astype(float)
    points[rng.random((300, 4)) < 0.1] = np.nan
    found = length_controlled(points, longer)
    features = squashed(longer, points)[..., None]
    drawn = []
    for _ in range(300):
        at = rng.integers(0, 300, 300)
        drawn.append(controlled(points[at], features[at]).rate)
    assert found.error == pytest.approx(np.std(drawn), rel=0.12)


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_without_a_difference_in_length_it_is_the_raw_rate_with_the_raw_error(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy, reference = rng.integers(0, 3, (n, k)).astype(float), rng.integers(0, 3, (n, k)).astype(float)
    raw = win_rate(policy, reference)
    points = (0.5 + 0.5 * np.sign(policy[:, :, None] - reference[:, None, :])).reshape(n, -1)
    found = length_controlled(points, np.zeros_like(points))
    assert found.prompts == raw.prompts and found.effects.tolist() == [0.0]
    assert found.rate == pytest.approx(raw.rate, abs=0.1 / n)  # the ridge keeps 0 and 1 away
    if 0.2 < raw.rate < 0.8:
        assert found.rate == pytest.approx(raw.rate, abs=0.02 / n)
        assert found.error == pytest.approx(raw.error, abs=0.1 / n)


def test_swapping_the_two_sides_gives_the_other_side_of_the_rate() -> None:
    points, longer, difficulty, _ = world(200, 0.5, 0.7, 0.3, shift=40)
    found, other = length_controlled(points, longer, difficulty), length_controlled(1 - points, -longer, -difficulty)
    assert found.rate == pytest.approx(1 - other.rate, abs=1e-9)
    assert found.error == pytest.approx(other.error, abs=1e-9)


def test_a_side_that_is_always_longer_by_the_same_has_an_error_that_says_nothing_is_known() -> None:
    points = (np.random.default_rng(0).random((200, 1)) < 0.9).astype(float)
    found = length_controlled(points, np.full((200, 1), 50.0))
    assert found.error > 0.4
    assert length_controlled(points, np.random.default_rng(1).normal(0, 50, (200, 1))).error < 0.04


def test_meetings_share_the_weight_of_their_prompt_and_what_is_missing_does_not_count() -> None:
    points = np.array([[1.0, 1.0, 1.0], [0.0, np.nan, np.nan], [np.nan] * 3, [0.5, 0.5, np.nan]])
    found = controlled(points, np.zeros((4, 3, 1)))
    assert (found.prompts, found.rate) == (3, pytest.approx(0.5))
    assert math.isnan(length_controlled(points[:1], points[:1]).rate)
    assert controlled(points, np.zeros((4, 3, 1)), difficulty=np.array([1.0, np.nan, 1.0, 2.0])).prompts == 2


# --- arena


def test_a_strong_verdict_counts_as_three_games() -> None:
    grades = np.array([[2.0, 1.0], [-1.0, 0.0], [-2.0, np.nan]])
    games = [1.0] * 3 + [1.0] + [0.0] + [0.5] + [0.0] * 3
    found = arena_score(grades)
    assert found.score == pytest.approx(np.mean(games)) and found.games == 5
    assert weights_of(grades).tolist() == [[3, 1], [1, 1], [3, 0]]


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=12))
def test_the_score_against_a_baseline_is_the_bradley_terry_chance_of_beating_it(games: list[tuple[int, int]]) -> None:
    grades = np.array(games, dtype=float)
    flat = grades.ravel()
    zeros = np.zeros(len(flat), dtype=np.int64)
    (policy, baseline), _ = bradley_terry(zeros, zeros + 1, points_of(flat), weights_of(flat), ridge=1e-6)
    assert arena_score(grades, 2).score == pytest.approx(float(sigmoid(np.array(policy - baseline))), abs=1e-4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(5), 0
    for seed in range(200):
        chance = rng.beta(2, 2, (150, 1))  # of a win, per prompt: its two games go together
        grades = np.where(rng.random((150, 2)) < chance, 1.0, -1.0)
        found = arena_score(grades, 200, seed)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.985
    assert arena_score(grades, 200, 1) == arena_score(grades, 200, 1)


def test_both_orders_must_name_the_same_winner() -> None:
    first = np.array([1.0, 1.0, 2.0, 0.0, -1.0, 1.0, np.nan])
    second = np.array([1.0, -1.0, 1.0, 0.0, -2.0, 0.0, 1.0])
    assert agreed(first, second)[:-1].tolist() == [1.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    assert np.isnan(agreed(first, second)[-1])
    always_first = np.ones(10)  # such a judge says 1 for whoever is shown first
    assert agreed(always_first, -always_first).tolist() == [0.5] * 10


def test_a_judges_taste_for_the_first_place_cancels() -> None:
    rng = np.random.default_rng(6)
    better, taste = rng.normal(0.3, 1, (5000, 1)), 0.8
    grades = np.hstack([np.sign(better + taste), np.sign(better - taste)])
    assert arena_score(grades[:, :1]).score > 0.8, "one order alone is far off"
    agreed_rate = float(agreed(grades[:, 0], grades[:, 1]).mean())
    assert agreed_rate == pytest.approx(arena_score(grades).score, abs=1e-9)
    assert 0.5 < agreed_rate < 0.62 == pytest.approx(float((better > 0).mean()), abs=0.02)


def test_bradley_terry_finds_the_strengths_that_minorisation_finds() -> None:
    """Hunter (2004): p_i <- wins_i / sum_j games_ij / (p_i + p_j), in plain Python."""
    wins = np.array([[0, 7, 9, 4], [3, 0, 6, 5], [1, 4, 0, 8], [6, 5, 2, 0]], dtype=float)
    p = [1.0] * 4
    for _ in range(5000):
        p = [
            sum(wins[i]) / sum((wins[i, j] + wins[j, i]) / (p[i] + p[j]) for j in range(4) if j != i) for i in range(4)
        ]
        p = [one / sum(p) for one in p]
    first, second = (np.array(part) for part in zip(*itertools.permutations(range(4), 2), strict=True))
    found, effects = bradley_terry(first, second, np.ones(12), wins[first, second], ridge=1e-9)
    assert len(effects) == 0
    assert found - found[0] == pytest.approx(np.log(p) - np.log(p[0]), abs=1e-5)


def test_style_control_takes_off_what_dress_has_won() -> None:
    """Model 1 is weaker by 0.5 but longer and in bold, which the judge rewards."""
    rng, games = np.random.default_rng(7), 20_000
    first = rng.integers(0, 3, games)
    second = (first + rng.integers(1, 3, games)) % 3
    strengths, effects = np.array([0.0, -0.5, 0.4]), np.array([1.0, 0.0, 0.0, 0.6, 0.0])
    counts = rng.poisson(20, (games, 2, 5)) + 15 * (np.stack([first, second], 1) == 1)[..., None]
    style = differences(counts[:, 0].astype(float), counts[:, 1].astype(float))
    points = (rng.random(games) < sigmoid(strengths[first] - strengths[second] + style @ effects)).astype(float)
    raw, _ = bradley_terry(first, second, points, np.ones(games))
    found, taste = bradley_terry(first, second, points, np.ones(games), style)
    assert raw[1] > raw[0], "without control the dressed one leads"
    assert found - found[0] == pytest.approx(strengths, abs=0.15)
    assert taste == pytest.approx(effects, abs=0.1)


# --- style

TEXT = """# Title
Some **bold** words, __bold too__, 2 ** 3 ** 4 and snake__case__name.

## Second
- one
* two
  + three
1. four
23) five
-no item
#no header

```python
# a comment
- no item **not bold**
```
~~~
never closed
# still code
"""


def test_markdown_is_counted_and_code_is_not_markdown() -> None:
    assert markdown_counts(TEXT) == (2, 5, 2, 2)
    assert markdown_counts("") == (0, 0, 0, 0)
    assert len(FEATURES) == 1 + len(markdown_counts(""))


@given(st.text(alphabet="#*-_`~ \n1.)a+", max_size=200))
def test_counting_ends_for_any_text(text: str) -> None:
    assert min(markdown_counts(text)) >= 0


def test_counting_takes_no_longer_than_the_text_is_long() -> None:
    import time

    started = time.perf_counter()
    for piece in ("*", "**a", "__a", "```", "`", "~~~\n", "1", "#", " ", "- ", "**a **"):
        markdown_counts(piece * 20_000)
    assert time.perf_counter() - started < 5


def test_differences_are_shares_scaled_by_their_deviation() -> None:
    policy, reference = np.array([[3.0], [1.0], [0.0]]), np.array([[1.0], [3.0], [0.0]])
    shares = np.array([0.5, -0.5, 0.0])
    assert differences(policy, reference)[:, 0] == pytest.approx(shares / shares.std())
    assert np.isnan(differences(np.array([[np.nan]]), np.array([[1.0]]))).all()
    assert differences(policy, policy).tolist() == [[0.0]] * 3


# --- a real leaderboard

DATA = ROOT.parent / "shared" / "data" / "alpaca_eval_12_generators.parquet"


def test_twelve_published_generators_keep_their_order_and_the_result_is_the_one_that_is_shown() -> None:
    from benchmarks.leaderboard import measure

    if not DATA.is_file():
        pytest.skip(f"{DATA} is not there: the leaderboard is not compared with")
    found = measure(DATA)
    shown = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())
    assert found == {name: value for name, value in shown.items() if name not in ("seconds", "machine")}
    assert found["win_rate"]["largest_gap"] <= 0.02, "one generator lacks 22 of its outputs"
    main = found["length_controlled"]["lengths scaled, difficulty others"]
    assert main["spearman"] > 0.95 and main["mean_gap"] < found["uncontrolled"]["mean_gap"]
