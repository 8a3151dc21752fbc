"""Every objective against a second implementation, pair by pair in plain Python, and against TRL where TRL has it.

The second implementation takes the tokens that move and the pairs as they stood apart: what an objective detaches is
computed from the latter, so that finite differences give the gradient that the first one should have.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.errors import ConfigError, RunError
from tasks.objectives import kto, module, tisdpo
from tasks.objectives.batch import PairBatch, Side
from tasks.objectives.numbers import percentiles
from tasks.objectives.settings import SETTINGS, Kto, Objective, Tisdpo
from tests.conftest import TinyModels, python

PAIRED = [name for name, settings in SETTINGS.items() if not settings.unpaired]
LN2 = math.log(2)


# --- pairs of random numbers


@dataclass
class Response:
    logps: list[float]  # by token
    reference: list[float]
    weights: list[float]


@dataclass
class Pair:
    chosen: Response
    rejected: Response
    numbers: dict[str, float]  # what `columns` gave


def some_pairs(rng: np.random.Generator, number: int, spread: float = 1.0) -> list[Pair]:
    return [Pair(some_response(rng, spread), some_response(rng, spread), {}) for _ in range(number)]


def some_response(rng: np.random.Generator, spread: float) -> Response:
    length = int(rng.integers(1, 7))
    logps, reference = (-spread * rng.exponential(1.5, length) for _ in range(2))
    return Response(logps.tolist(), reference.tolist(), rng.uniform(0.5, 1.5, length).tolist())


def some_data(rng: np.random.Generator, pairs: list[Pair]) -> dict[str, np.ndarray]:
    """Columns of a subset, and what the training job adds."""
    return {
        "margin": np.append(rng.normal(1, 4, len(pairs) - 1), 0.7),  # one is above 0
        "margin.other": rng.normal(0, 1, len(pairs)),
        "votes": rng.uniform(0, 1, len(pairs)),
        "ref_chosen": np.array([sum(pair.chosen.reference) for pair in pairs]),
        "ref_rejected": np.array([sum(pair.rejected.reference) for pair in pairs]),
        "chosen_length": np.array([len(pair.chosen.logps) for pair in pairs]),
        "rejected_length": np.array([len(pair.rejected.logps) for pair in pairs]),
    }


def to_batch(pairs: list[Pair], dtype: torch.dtype = torch.float64, room: int = 0, **more: Any) -> PairBatch:
    columns = {name: torch.tensor([pair.numbers[name] for pair in pairs], dtype=dtype) for name in pairs[0].numbers}
    sides = [to_side([getattr(pair, side) for pair in pairs], dtype, room) for side in ("chosen", "rejected")]
    return PairBatch(*sides, columns, **more)


def to_side(responses: list[Response], dtype: torch.dtype, room: int) -> Side:
    """Padded on the right to the longest, or to `room`."""
    longest = max(room, *(len(response.logps) for response in responses))

    def padded(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=dtype)

    return Side(
        padded([response.logps for response in responses]).requires_grad_(),
        padded([[1.0] * len(response.logps) for response in responses]),
        torch.tensor([sum(response.reference) for response in responses], dtype=dtype),
        padded([response.reference for response in responses]),
        padded([response.weights for response in responses]),
    )


def prepared(name: str, settings: Objective, rng: np.random.Generator, number: int) -> list[Pair]:
    """Random pairs with the columns that the objective itself computes."""
    pairs = some_pairs(rng, number)
    if hasattr(module(name), "columns"):
        columns = module(name).columns(some_data(rng, pairs), settings)
        for i, pair in enumerate(pairs):
            pair.numbers = {column: float(values[i]) for column, values in columns.items()}
    return pairs


def loss_of(name: str, batch: PairBatch, **changes: Any) -> torch.Tensor:
    return module(name).loss(batch, SETTINGS[name](**changes))


# --- the second implementation: f(pair that moves, pairs as they stood, number of the pair, settings) -> loss


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def ratio(response: Response) -> float:
    return sum(response.logps) - sum(response.reference)


def delta(pair: Pair) -> float:
    return ratio(pair.chosen) - ratio(pair.rejected)


def normalised(pair: Pair) -> float:
    return ratio(pair.chosen) / len(pair.chosen.logps) - ratio(pair.rejected) / len(pair.rejected.logps)


def gap(pair: Pair) -> float:
    return mean(pair.chosen.logps) - mean(pair.rejected.logps)


def cdpo(pair: Pair, beta: float, eps: float) -> float:
    return -(1 - eps) * log_s(beta * delta(pair)) - eps * log_s(-beta * delta(pair))


def sft(pair: Pair, stood: list[Pair], i: int, p: Any) -> float:
    if p.average == "pairs":
        return -mean(pair.chosen.logps)
    return -sum(pair.chosen.logps) * len(stood) / sum(len(other.chosen.logps) for other in stood)


def mixdpo(pair: Pair, stood: list[Pair], i: int, p: Any) -> float:
    return -mean(pair.chosen.logps) if pair.numbers["imitate"] else cdpo(pair, p.beta, p.label_smoothing)


def amapo(pair: Pair, stood: list[Pair], i: int, p: Any) -> float:
    q = [gap(other) for other in stood]
    mu = mean(q)
    sd = math.sqrt(sum((value - mu) ** 2 for value in q) / (len(q) - 1))
    margin = p.beta * math.exp((mu - q[i]) / sd * mu) if q[i] < mu else 0.0
    return -log_s(p.beta * gap(pair) - margin)


def confpo(pair: Pair, stood: list[Pair], i: int, p: Any) -> float:
    def kept(moving: Response, as_stood: Response) -> list[float]:
        probabilities = [math.exp(logp) for logp in as_stood.logps]
        threshold = mean(probabilities)
        return [logp for logp, prob in zip(moving.logps, probabilities, strict=True) if prob < threshold * (1 - 1e-6)]

    chosen, rejected = kept(pair.chosen, stood[i].chosen), kept(pair.rejected, stood[i].rejected)
    return -log_s(p.beta * (mean(chosen) - mean(rejected)) - p.gamma) if chosen and rejected else 0.0


def tis(pair: Pair, stood: list[Pair], i: int, p: Any) -> float:
    def weighted(response: Response) -> float:
        tokens = zip(response.weights, response.logps, response.reference, strict=True)
        return sum(weight * (logp - reference) for weight, logp, reference in tokens)

    return -log_s(p.beta * (weighted(pair.chosen) - weighted(pair.rejected)))


SECOND: dict[str, Callable[[Pair, list[Pair], int, Any], float]] = {
    "dpo": lambda pair, stood, i, p: cdpo(pair, p.beta, p.label_smoothing),
    "dpo_norm": lambda pair, stood, i, p: -log_s(p.beta * normalised(pair)),
    "ipo": lambda pair, stood, i, p: (normalised(pair) - 0.5 / p.beta) ** 2,
    "simpo": lambda pair, stood, i, p: -log_s(p.beta * gap(pair) - p.gamma),
    "sft": sft,
    "mixdpo": mixdpo,
    "amapo": amapo,
    "madpo": lambda pair, stood, i, p: -pair.numbers["weight"] * log_s(p.beta * delta(pair)),
    "gdpo": lambda pair, stood, i, p: -log_s(p.beta * pair.numbers["sureness"] * delta(pair)),
    "dadpo": lambda pair, stood, i, p: -log_s(p.beta * pair.numbers["scale"] * delta(pair)),
    "crpo": lambda pair, stood, i, p: -pair.numbers["weight"] * log_s(p.beta * delta(pair)),
    "confpo": confpo,
    "tisdpo": tis,
}
VARIANTS = [
    *((name, {}) for name in PAIRED),
    ("dpo", {"label_smoothing": 0.2, "beta": 0.5}),
    ("sft", {"average": "tokens"}),
    ("mixdpo", {"threshold": 1.0, "label_smoothing": 0.0, "beta": 0.3}),
    ("madpo", {"margin": "margin.other", "c_max": 2, "c_min": 0.3, "slope": 2, "tau": 1}),
    ("gdpo", {"shares": "votes"}),
    ("gdpo", {"temperature": 3.0}),
    ("crpo", {"weights": {"margin": 0.5, "margin.other": 2.0}}),
    ("confpo", {"beta": 4, "gamma": 0}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
@hypothesis_settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_loss_and_gradient_are_those_of_the_second_implementation(
    name: str, changes: dict[str, Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    settings = SETTINGS[name](**changes)
    pairs = prepared(name, settings, rng, int(rng.integers(2, 6)))
    batch = to_batch(pairs, room=8)
    losses = module(name).loss(batch, settings)
    assert losses.shape == (len(pairs),)
    expected = [SECOND[name](pair, pairs, i, settings) for i, pair in enumerate(pairs)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    losses.sum().backward()
    for side in ("chosen", "rejected"):
        logps = getattr(batch, side).logps
        found = torch.zeros_like(logps) if logps.grad is None else logps.grad
        assert (found * (1 - getattr(batch, side).mask) == 0).all(), "padding has no gradient"
        for i, pair in enumerate(pairs):
            for token in range(len(getattr(pair, side).logps)):
                slope = difference(name, settings, pairs, i, side, token)
                assert found[i, token].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def difference(name: str, settings: Objective, pairs: list[Pair], i: int, side: str, token: int) -> float:
    """Of the second implementation's loss by one token's log-probability, all else held."""
    values, h = [], 1e-4
    for step in (h, -h):
        moving = copy.deepcopy(pairs[i])
        getattr(moving, side).logps[token] += step
        values.append(SECOND[name](moving, pairs, i, settings))
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("name", PAIRED)
def test_padding_changes_nothing(name: str) -> None:
    pairs = prepared(name, SETTINGS[name](), np.random.default_rng(1), 4)
    short, wide = (loss_of(name, to_batch(pairs, room=room)) for room in (0, 40))
    assert torch.allclose(short, wide, atol=1e-12)


# --- columns


def second_percentile(values: np.ndarray, i: int) -> float:
    if len(values) == 1:
        return 0.5
    below, ties = sum(v < values[i] for v in values), sum(v == values[i] for v in values)
    return (below + (ties - 1) / 2) / (len(values) - 1)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_percentiles_share_ties_and_do_not_depend_on_the_order(numbers: list[int]) -> None:
    values = np.array(numbers, np.float64)
    assert percentiles(values).tolist() == pytest.approx([second_percentile(values, i) for i in range(len(values))])
    assert percentiles(values[::-1]).tolist() == percentiles(values)[::-1].tolist()
    assert percentiles(values).mean() == pytest.approx(0.5)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(1.01, 10), st.floats(0.01, 0.99), st.floats(0.1, 9)
)
def test_madpo_weighs_as_the_formula_says(margins: list[float], c_max: float, c_min: float, tau: float) -> None:
    settings = SETTINGS["madpo"](c_max=c_max, c_min=c_min, tau=tau)
    found = module("madpo").columns({"margin": margins}, settings)["weight"]
    for h, weight in zip(margins, found, strict=True):
        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(abs(h) - tau))
        assert weight == pytest.approx(s(c * h) / s(h) if h > -tau else 1.0, rel=1e-9)


def test_madpo_raises_hard_pairs_lowers_easy_ones_and_leaves_strong_contradictions_alone() -> None:
    weigh = module("madpo").columns
    tau = 6.907
    margins = [0.5, tau, 20.0, 0.0, -0.5, -tau, -20.0, 1e4, -1e4]
    weights = weigh({"margin": margins}, SETTINGS["madpo"]())["weight"]
    assert 1 < weights[0] < 2 and weights[1] == pytest.approx(1) and 0.5 < weights[2] < 1 and weights[3] == 1
    assert 0 < weights[4] < 1 and weights[5] == weights[6] == weights[8] == 1 and np.isfinite(weights).all()
    steep = weigh({"margin": [2.0, 6.0, 8.0]}, SETTINGS["madpo"](slope=1e6))["weight"]  # c is 4, 4, 1/4
    assert steep.tolist() == pytest.approx([s(8) / s(2), s(24) / s(6), s(2) / s(8)])
    nearly_one = weigh({"margin": margins}, SETTINGS["madpo"](c_max=1 + 1e-9))["weight"]
    assert nearly_one.tolist() == pytest.approx([1.0] * len(margins), abs=1e-6)


def test_gdpo_is_sure_by_margin_or_by_votes() -> None:
    sure = module("gdpo").columns
    margin = np.array([0.0, 2.0, -2.0, 1e6])
    found = sure({"margin": margin}, SETTINGS["gdpo"](temperature=0.5))["sureness"]
    assert found.tolist() == pytest.approx([0, 2 * s(4) - 1, 2 * s(-4) - 1, 1])
    votes = sure({"votes": [0.0, 0.5, 0.75, 1.0]}, SETTINGS["gdpo"](shares="votes"))["sureness"]
    assert votes.tolist() == [-1, 0, 0.5, 1]
    with pytest.raises(ConfigError, match="2 of 3 values of 'votes' are no shares"):
        sure({"votes": [0.5, 1.5, -0.1]}, SETTINGS["gdpo"](shares="votes"))


def test_dadpo_takes_the_mean_of_two_ranks() -> None:
    rng = np.random.default_rng(3)
    data = some_data(rng, some_pairs(rng, 9))
    means = data["ref_chosen"] / data["chosen_length"] - data["ref_rejected"] / data["rejected_length"]
    found = module("dadpo").columns(data, SETTINGS["dadpo"]())["scale"]
    for i, scale in enumerate(found):
        assert scale == pytest.approx(1 + (second_percentile(data["margin"], i) + second_percentile(means, i)) / 2)
    alone = {name: values[:1] for name, values in data.items()}
    assert module("dadpo").columns(alone, SETTINGS["dadpo"]())["scale"].tolist() == [1.5]
    empty = {**alone, "chosen_length": np.zeros(1), "ref_chosen": np.zeros(1)}
    assert module("dadpo").columns(empty, SETTINGS["dadpo"]())["scale"].tolist() == [1.5]


def test_crpo_adds_what_is_better_and_refuses_a_set_without_any() -> None:
    settings = SETTINGS["crpo"](weights={"margin": 0.5, "margin.other": 2.0})
    data = {"margin": np.array([1.0, -1.0, -1.0]), "margin.other": np.array([1.0, 3.0, -3.0])}
    assert module("crpo").columns(data, settings)["weight"].tolist() == [2.5, 6.0, 0.0]
    with pytest.raises(ConfigError, match=r"no pair has margin or margin\.other above 0"):
        module("crpo").columns({"margin": np.zeros(2), "margin.other": -np.ones(2)}, settings)


def test_mixdpo_imitates_below_the_threshold_only() -> None:
    imitate = module("mixdpo").columns
    margin = np.array([1.0, 2.0, 3.0, 4.0])
    assert imitate({"margin": margin}, SETTINGS["mixdpo"](threshold=2.0))["imitate"].tolist() == [1, 0, 0, 0]
    assert imitate({"margin": margin}, SETTINGS["mixdpo"](quantile=0.5))["imitate"].tolist() == [1, 1, 0, 0]
    assert imitate({"margin": np.ones(4)}, SETTINGS["mixdpo"](quantile=0.5))["imitate"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["mixdpo", "madpo", "gdpo", "dadpo", "crpo"])
def test_pairs_without_a_number_are_counted_and_refused(name: str) -> None:
    rng = np.random.default_rng(0)
    data = some_data(rng, some_pairs(rng, 5))
    settings = SETTINGS[name]()
    assert settings.needs == ["margin"]
    data["margin"][[1, 3]] = np.nan, np.inf
    with pytest.raises(ConfigError, match="2 of 5 pairs have no 'margin'"):
        module(name).columns(data, settings)
    del data["margin"]
    with pytest.raises(ConfigError, match="goes by 'margin', which the subset does not have"):
        module(name).columns(data, settings)


# --- known identities


@pytest.mark.parametrize(
    ("name", "changes", "numbers"),
    [
        ("mixdpo", {"label_smoothing": 0.1}, {"imitate": 0.0}),
        ("madpo", {}, {"weight": 1.0}),
        ("gdpo", {}, {"sureness": 1.0}),
        ("dadpo", {}, {"scale": 1.0}),
        ("crpo", {}, {"weight": 1.0}),
        ("tisdpo", {}, {}),
    ],
)
def test_relatives_of_dpo_become_dpo(name: str, changes: dict[str, Any], numbers: dict[str, float]) -> None:
    pairs = some_pairs(np.random.default_rng(7), 5)
    for pair in pairs:
        pair.numbers = numbers
        for response in (pair.chosen, pair.rejected):
            response.weights = [1.0] * len(response.weights)
    plain = loss_of("dpo", to_batch(pairs), beta=0.2, **changes)
    assert torch.allclose(loss_of(name, to_batch(pairs), beta=0.2, **changes), plain, atol=1e-12)


def test_mixdpo_at_quantile_0_is_dpo_with_the_same_smoothing() -> None:
    rng = np.random.default_rng(5)
    settings = SETTINGS["mixdpo"](quantile=0.0, beta=0.2, label_smoothing=0.1)
    pairs = prepared("mixdpo", settings, rng, 8)
    plain = loss_of("dpo", to_batch(pairs), beta=0.2, label_smoothing=0.1)
    assert torch.equal(module("mixdpo").loss(to_batch(pairs), settings), plain)


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "mixdpo", "madpo", "gdpo", "dadpo", "crpo", "tisdpo"])
def test_the_loss_is_ln_2_where_policy_and_reference_are_equal(name: str) -> None:
    settings = SETTINGS["mixdpo"](quantile=0) if name == "mixdpo" else SETTINGS[name]()
    pairs = prepared(name, settings, np.random.default_rng(2), 6)
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            response.reference = list(response.logps)
    factors = [pair.numbers.get("weight", 1.0) for pair in pairs]
    losses = module(name).loss(to_batch(pairs), settings)
    assert losses.tolist() == pytest.approx([LN2 * factor for factor in factors])


def test_ipo_starts_at_the_square_of_its_target() -> None:
    pairs = some_pairs(np.random.default_rng(2), 3)
    for pair in pairs:
        pair.chosen.reference, pair.rejected.reference = pair.chosen.logps, pair.rejected.logps
    assert loss_of("ipo", to_batch(pairs), beta=0.5).tolist() == pytest.approx([1.0] * 3)


# --- degenerate cases


@pytest.mark.parametrize("name", [name for name in PAIRED if name != "sft"])
def test_equal_responses_teach_nothing_but_imitation(name: str) -> None:
    settings = SETTINGS["mixdpo"](quantile=0) if name == "mixdpo" else SETTINGS[name]()
    pairs = prepared(name, settings, np.random.default_rng(4), 4)
    for pair in pairs:
        pair.rejected = copy.deepcopy(pair.chosen)
    batch = to_batch(pairs)
    batch = PairBatch(batch.chosen, batch.chosen, batch.columns)  # the same text is the same tensor
    module(name).loss(batch, settings).sum().backward()
    assert batch.chosen.logps.grad is not None and batch.chosen.logps.grad.abs().max() < 1e-9


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_without_tokens_counts_as_nothing(name: str, side: str) -> None:
    pairs = prepared(name, SETTINGS[name](), np.random.default_rng(6), 3)
    setattr(pairs[1], side, Response([], [], []))
    batch = to_batch(pairs)
    losses = module(name).loss(batch, SETTINGS[name]())
    losses.sum().backward()
    assert losses.isfinite().all() and getattr(batch, side).mask[1].sum() == 0
    assert all(part.logps.grad is None or part.logps.grad.isfinite().all() for part in (batch.chosen, batch.rejected))


def one_token_each(gaps: list[float]) -> list[Pair]:
    """Pairs of one-token responses whose q is as given."""
    return [Pair(Response([value], [0.0], [1.0]), Response([0.0], [0.0], [1.0]), {}) for value in gaps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_amapo_has_no_margin_where_there_is_no_spread(dtype: torch.dtype) -> None:
    for number in range(1, 40):  # the mean of equal numbers is off by a rounding error for some
        batch = to_batch(one_token_each([-0.7] * number), dtype)
        plain = loss_of("simpo", batch, beta=2.0, gamma=0.0)
        assert torch.equal(loss_of("amapo", batch, beta=2.0), plain)


def test_amapo_takes_its_statistics_from_all_processes_and_its_gradient_from_its_own() -> None:
    pairs = some_pairs(np.random.default_rng(8), 6)
    whole = to_batch(pairs)
    expected = loss_of("amapo", whole)
    expected.sum().backward()
    q = (whole.chosen.mean - whole.rejected.mean).detach()
    asked: list[torch.Tensor] = []

    def gather(values: torch.Tensor) -> torch.Tensor:
        asked.append(values)
        return q

    part = to_batch(pairs[:2], room=whole.chosen.logps.shape[1], gather=gather)
    losses = loss_of("amapo", part)
    losses.sum().backward()
    assert torch.allclose(losses, expected[:2]) and not asked[0].requires_grad
    assert part.chosen.logps.grad is not None and whole.chosen.logps.grad is not None
    assert torch.allclose(part.chosen.logps.grad, whole.chosen.logps.grad[:2])


def test_amapo_gives_only_pairs_below_the_mean_a_margin() -> None:
    q = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert module("amapo").margins(q, q).tolist() == pytest.approx([math.exp(2.0), 0.0, 0.0])


def test_confpo_skips_a_pair_with_nothing_kept_and_the_mean_counts_it() -> None:
    uneven, even, single = (
        Response([-1.0, -3.0], [0, 0], [1, 1]),
        Response([-0.1] * 7, [0] * 7, [1] * 7),
        Response([-2.0], [0], [1]),
    )
    pairs = [Pair(uneven, uneven, {}), Pair(uneven, even, {}), Pair(even, uneven, {}), Pair(single, uneven, {})]
    for dtype in (torch.float32, torch.float64):
        batch = to_batch(pairs, dtype)
        losses = loss_of("confpo", batch)
        assert losses.tolist() == pytest.approx([-log_s(-1.6), 0, 0, 0])
        losses.mean().backward()
        assert batch.chosen.logps.grad is not None and not batch.chosen.logps.grad[1:].any()
        assert batch.chosen.logps.grad[0, 1].item() == pytest.approx(-1.5 * s(1.6) / 4)  # of 4 pairs, one is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confpo_keeps_no_token_that_is_below_the_mean_by_rounding_only(dtype: torch.dtype) -> None:
    uneven = Response([-1.0, -3.0], [0, 0], [1, 1])
    shapes = [(logp, length) for logp in (-0.1, -0.7, -3.3) for length in range(1, 40)]
    even = [Response([logp] * length, [0] * length, [1] * length) for logp, length in shapes]
    batch = to_batch([Pair(response, uneven, {}) for response in even], dtype)
    assert not module("confpo").unsure(batch.chosen).any()
    assert not loss_of("confpo", batch).any()


def test_tis_weights_rise_with_rank_in_opposite_directions() -> None:
    plus, minus = np.array([-1.0, -2.0, -3.0, -2.0]), np.array([-2.0, -2.0, -1.0, -2.0])  # s_t: -1, 0, 2, 0
    settings = Tisdpo()
    assert tisdpo.token_weights(plus, minus, False, settings).tolist() == pytest.approx([0.7, 1.0, 1.3, 1.0])
    assert tisdpo.token_weights(plus, minus, True, settings).tolist() == pytest.approx([1.3, 1.0, 0.7, 1.0])
    for chosen in (True, False):
        assert tisdpo.token_weights(plus[:1], minus[:1], chosen, settings).tolist() == [1.0]
        assert tisdpo.token_weights(plus[:0], minus[:0], chosen, settings).tolist() == []
        assert tisdpo.token_weights(plus, plus, chosen, Tisdpo(low=0, high=1)).tolist() == [0.5] * 4
    with pytest.raises(RunError, match="not finite"):
        tisdpo.token_weights(np.array([-np.inf]), np.array([-np.inf]), True, settings)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_stay_finite_far_out(name: str, dtype: torch.dtype) -> None:
    settings = SETTINGS[name]()
    extremes = [0.0, -1e-4, -1e4]
    pairs = []
    for number, (chosen, rejected, reference) in enumerate(
        (a, b, c) for a in extremes for b in extremes for c in extremes
    ):
        sides = (Response([value, -1.0], [reference, -1.0], [1.3, 0.7]) for value in (chosen, rejected))
        pairs.append(Pair(*sides, {"imitate": float(number % 2), "weight": 2.0, "sureness": -1.0, "scale": 2.0}))
    batch = to_batch(pairs, dtype)
    losses = module(name).loss(batch, settings)
    losses.mean().backward()
    assert losses.isfinite().all() and losses.mean().isfinite()
    assert all(side.logps.grad is None or side.logps.grad.isfinite().all() for side in (batch.chosen, batch.rejected))


# --- settings


def test_every_objective_has_its_module_and_says_what_it_needs() -> None:
    for name, settings in SETTINGS.items():
        assert module(name).__doc__ and callable(module(name).loss)
        chosen = settings()
        assert settings.model_validate(chosen.model_dump()) == chosen
        assert bool(chosen.needs) <= hasattr(module(name), "columns")
        assert all(field.description for field in settings.model_fields.values())
    assert {name: kind().trl for name, kind in SETTINGS.items() if kind().trl} == {
        "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo", "kto": "kto"
    }  # fmt: skip
    assert SETTINGS["dpo"](label_smoothing=0.1).trl == "" and SETTINGS["sft"](average="tokens").trl == "sft"
    assert SETTINGS["gdpo"](shares="votes").needs == ["votes"]
    assert SETTINGS["crpo"](weights={"a": 1, "margin.b": 1, "margin": 2}).needs == ["margin.a", "margin.b", "margin"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dpo", {"beta": 0}),
        ("dpo", {"gamma": 1}),
        ("madpo", {"c_max": 1}),
        ("madpo", {"c_min": 1}),
        ("madpo", {"margin": ""}),
        ("crpo", {"weights": {}}),
        ("crpo", {"weights": {"quality": 1, "margin.quality": 1}}),
        ("crpo", {"weights": {"margin": 0}}),
        ("tisdpo", {"low": 1.4}),
    ],
)
def test_settings_without_meaning_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SETTINGS[name](**changes)


def test_settings_need_no_torch() -> None:
    done = python("import sys, tasks.objectives.settings; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


# --- against TRL


WORDS = [("ab", "cd", "efgh"), ("what is 2", "four and more", "5"), ("a>b", "x", "yz 1"), ("k", "mno pq", "rst")]


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> tuple[Any, Any, Any]:
    """Policy, reference and tokenizer; policy and reference differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_models.generator) for _ in range(2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return policy.eval(), reference.eval(), AutoTokenizer.from_pretrained(tiny_models.generator)


def arguments(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def token_logps(model: Any, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the completion's tokens, each under those before it; 0 elsewhere."""
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double().log_softmax(-1)
    return logps.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]


@pytest.fixture(scope="module")
def trl_dpo(models: tuple[Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, PairBatch]:
    """A DPOTrainer, its inputs for four pairs of different lengths, and what our losses see of them."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference, tokenizer = models
    rows = [dict(zip(("prompt", "chosen", "rejected"), words, strict=True)) for words in WORDS]
    args = arguments(DPOConfig, tmp_path_factory.mktemp("dpo"))
    trainer = DPOTrainer(
        policy, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    parts = [inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    policy_logps, reference_logps = (token_logps(model, *parts) for model in (policy, reference))
    mask = parts[2][:, 1:]
    sides = [
        Side(policy_logps[half], mask[half], reference_logps[half].sum(1), reference_logps[half])
        for half in (slice(0, 4), slice(4, 8))
    ]
    assert len(set(mask.sum(1).tolist())) > 3
    return trainer, inputs, PairBatch(*sides)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("dpo", {"beta": 0.3}), ("dpo_norm", {"beta": 5.0}), ("ipo", {"beta": 0.2}), ("sft", {"average": "tokens"})],
)
def test_ours_is_trls_loss_where_trl_has_it(trl_dpo: tuple[Any, Any, PairBatch], name: str, changes: Any) -> None:
    trainer, inputs, batch = trl_dpo
    settings = SETTINGS[name](**changes)
    trainer.loss_types, trainer.beta = [settings.trl], settings.beta
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model.eval(), inputs, return_outputs=False)
    ours = module(name).loss(batch, settings).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_sft_by_pairs_differs_from_trls_by_length_only(trl_dpo: tuple[Any, Any, PairBatch]) -> None:
    batch = trl_dpo[2]
    by_tokens, by_pairs = (loss_of("sft", batch, average=average) for average in ("tokens", "pairs"))
    lengths = batch.chosen.mask.sum(1)
    assert torch.allclose(by_tokens, by_pairs * lengths / lengths.double().mean())


def test_simpo_is_trls_on_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    batch = to_batch(some_pairs(np.random.default_rng(9), 6))
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", beta=2.5, simpo_gamma=1.25,
        label_smoothing=0.0,
    )  # fmt: skip
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, batch.chosen.mean, batch.rejected.mean)
    assert torch.allclose(loss_of("simpo", batch, beta=2.5, gamma=1.25), theirs, atol=1e-12)


@pytest.mark.parametrize("labels", [[True, False, True, True], [False, False, True, False]])
def test_kto_is_trls_loss(models: tuple[Any, Any, Any], tmp_path: Path, labels: list[bool]) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference, tokenizer = models
    rows = [
        {"prompt": prompt, "completion": completion, "label": label}
        for (prompt, completion, _), label in zip(WORDS, labels, strict=True)
    ]
    settings = Kto(beta=0.2)
    of_each = kto.weights(sum(labels), len(labels) - sum(labels), settings)
    args = arguments(KTOConfig, tmp_path, beta=0.2, desirable_weight=of_each[0], undesirable_weight=of_each[1])
    trainer = KTOTrainer(
        policy, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model.eval(), inputs, return_outputs=False)
    parts = ("input_ids", "attention_mask", "completion_mask")
    ratios, mismatched = (
        token_logps(policy, *(inputs[kind + part] for part in parts)).sum(1)
        - token_logps(reference, *(inputs[kind + part] for part in parts)).sum(1)
        for kind in ("", "KL_")
    )
    ours = kto.loss(ratios, inputs["label"].bool(), mismatched.mean(), of_each, settings.beta)
    assert ours.shape == (4,) and ours.mean().item() == pytest.approx(theirs.item(), rel=1e-4)


@hypothesis_settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_kto_and_its_gradient_are_the_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ratios = torch.tensor(rng.normal(0, 5, 6), requires_grad=True)
    desirable = torch.tensor(rng.random(6) < 0.5)
    z, beta, (first, second) = float(rng.normal(0, 3)), 0.3, (1.5, 0.7)
    divergence = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    losses = kto.loss(ratios, desirable, divergence, (first, second), beta)
    losses.sum().backward()
    assert ratios.grad is not None and divergence.grad is None
    for i, (value, good) in enumerate(zip(ratios.tolist(), desirable.tolist(), strict=True)):
        x = beta * (value - max(z, 0.0))
        assert losses[i].item() == pytest.approx(first * (1 - s(x)) if good else second * (1 - s(-x)), rel=1e-9)
        slope = (-first if good else second) * beta * s(x) * s(-x)
        assert ratios.grad[i].item() == pytest.approx(slope, rel=1e-9)


def test_kto_weights_balance_the_labels_unless_they_are_given() -> None:
    assert kto.weights(10, 10, Kto()) == (1, 1)
    assert kto.weights(10, 40, Kto()) == (4, 1) and kto.weights(40, 10, Kto()) == (1, 4)
    assert kto.weights(10, 40, Kto(desirable_weight=2)) == (2, 0.5)
    assert kto.weights(10, 40, Kto(undesirable_weight=2)) == (8, 2)
    assert kto.weights(10, 40, Kto(desirable_weight=1, undesirable_weight=1)) == (1, 1)
    with pytest.raises(ConfigError, match="0 are desirable and 5 are not"):
        kto.weights(0, 5, Kto())
