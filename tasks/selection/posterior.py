"""What a few samples say about a prompt's true PVar: an empirical-Bayes posterior.

x = 4 PVar lies in [0, 1]. Over the data set, true x is taken to be Beta distributed with mean m and strength s; n
rewards, whose unbiased estimate is x_n, are taken to weigh as much as w(n) draws of yes or no, so that (conjugacy)

    posterior mean  = (s m + w(n) x_n) / (s + w(n)),     posterior variance = mean (1 - mean) / (s + w(n) + 1)

The mean is the best linear predictor of x from x_n (credibility: Buhlmann 1967) whatever the rewards' distribution,
because m, s and w come from moments that are estimated without bias. With u_ij = 4 (sigmoid((r_i - r_j) / T) - 1/2)^2:

    E[u_12] = m      E[u_12 u_34] = E[x^2]      E[u_12 u_13] = E[x^2] + z1      E[u_12^2] = E[x^2] + z2
    s + 1 = m (1 - m) / (E[x^2] - m^2)                                   (spread of true x over prompts)
    Var(x_n | x) = (4 (n - 2) z1 + 2 z2) / (n (n - 1)) on average        (Hoeffding 1948, section 5)
    w(n) = (m - E[x^2]) / Var(x_n | x)

Disjoint pairs, hence prompts with at least four finite rewards, tell how true PVar varies apart from noise. These must
not have been picked by their rewards: `pilot` names evenly spaced rows. Covariates (length, source as 0/1) move m
from prompt to prompt by ridge regression of x_n on them and their squares.

Degenerate: without a prompt of four finite rewards, spread and noise are taken to be those of single draws of yes or no
from an even prior; strength is held within 0.1 to 1000, also where the moments, which are noisy in small data, show no
spread; w(n) is at least n / 2, that of disjoint yes-or-no pairs. Equal rewards everywhere give mean 0 and error 0. A
prompt with fewer than two finite rewards has an undefined PVar: NaN, not the prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.selection.pvar import pair_sums

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST = 0.25  # PVar is x / 4
STRENGTH = (0.1, 1000.0)
RIDGE = 10.0  # prompts' worth of "covariates say nothing"


@dataclass(frozen=True)
class Prior:
    """Of x = 4 PVar; single, double: z1, z2 above."""

    mean: float
    strength: float
    second: float  # E[x^2]
    single: float
    double: float
    slopes: Floats  # of standardised covariates and their squares
    centre: Floats
    spread: Floats

    def weight(self, samples: Ints) -> Floats:
        """w(n) of numbers of finite rewards; 0 below two."""
        n = np.maximum(samples, 2).astype(np.float64)
        noise = (4 * (n - 2) * self.single + 2 * self.double) / (n * (n - 1))
        most = max(self.mean - self.second, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(noise > 0, most / noise, np.inf)
        return np.where(samples < 2, 0.0, np.clip(np.nan_to_num(weight, nan=0.0), n / 2, 1e6))

    def means(self, prompts: int, covariates: Floats | None = None) -> Floats:
        """The prior mean of each prompt's x."""
        if covariates is None or not len(self.slopes):
            return np.full(prompts, self.mean)
        return np.clip(self.mean + _features(covariates, self.centre, self.spread) @ self.slopes, 1e-3, 1 - 1e-3)


@dataclass(frozen=True)
class Posterior:
    """mean, error: of each prompt's true PVar, [prompts], NaN where PVar is undefined; error: standard deviation."""

    mean: Floats
    error: Floats


def pilot(prompts: int, size: int) -> NDArray[np.bool_]:
    """Evenly spaced rows [prompts], `size` of them or all: those that get four samples or more at once."""
    rows = np.zeros(prompts, dtype=bool)
    rows[np.linspace(0, prompts, min(size, prompts), endpoint=False).astype(np.int64)] = True
    return rows


def fit_prior(rewards: Floats, scale: float = 1.0, covariates: Floats | None = None) -> Prior:
    """The prior of a data set after its first round. rewards: [prompts, samples], NaN where there is none.

    Which prompts have more samples than others must not depend on rewards. A part of a large data set is enough, such
    as the pilot and 100,000 others. covariates: [prompts, features], finite, such as the logarithm of the length.
    """
    sums, squares, n = pair_sums(rewards, scale)
    sums, squares = sums / MOST, squares / MOST**2
    total, rows = sums.sum(axis=1), (sums**2).sum(axis=1)
    defined, enough = n >= 2, n >= 4
    x = total[defined] / (n * (n - 1.0))[defined]
    mean = float(x.mean()) if len(x) else 0.5
    if enough.any():
        t, r, q, k = total[enough], rows[enough], squares[enough], n[enough].astype(np.float64)
        at = float((t / (k * (k - 1))).mean())  # all moments of the same prompts: their noise partly cancels
        second = float(((t**2 - 4 * r + 2 * q) / (k * (k - 1) * (k - 2) * (k - 3))).mean())
        single = max(float(((r - q) / (k * (k - 1) * (k - 2))).mean()) - second, 0.0)
        double = max(float((q / (k * (k - 1))).mean()) - second, 2 * single)  # Hoeffding: z2 >= 2 z1
        variance = second - at**2
    else:
        variance = mean * (1 - mean) / 2
        single, double = 0.0, mean * (1 - mean) / 2
    slopes, centre, width, explained = _regress(x, covariates[defined] if covariates is not None else None)
    left = max(variance - explained, variance / 20)
    most = mean * (1 - mean)
    known = max(STRENGTH[0], min(STRENGTH[1], float(enough.sum())))  # few prompts cannot show that all are alike
    strength = float(np.clip(most / left - 1 if left > 0 else np.inf, STRENGTH[0], known))
    return Prior(
        mean, strength, mean**2 + max(variance, most / (1 + STRENGTH[1])), single, double, slopes, centre, width
    )


def posterior(estimates: Floats, samples: Ints, prior: Prior, covariates: Floats | None = None) -> Posterior:
    """What is known of each prompt's true PVar.

    estimates: `pvar` of the rewards so far, [prompts]; samples: finite rewards that each is made of.
    """
    weight = prior.weight(samples)
    mean = (prior.strength * prior.means(len(estimates), covariates) + weight * estimates / MOST) / (
        prior.strength + weight
    )
    mean = np.where(samples >= 2, mean, np.nan)
    return Posterior(MOST * mean, MOST * np.sqrt(np.maximum(mean * (1 - mean), 0.0) / (prior.strength + weight + 1)))


def _features(covariates: Floats, centre: Floats, spread: Floats) -> Floats:
    """[prompts, 2 features]: standardised, held within 3 deviations, and their squares less 1."""
    z = np.clip((np.asarray(covariates, dtype=np.float64) - centre) / spread, -3, 3)
    return np.concatenate([z, z**2 - 1], axis=1)


def _regress(x: Floats, covariates: Floats | None) -> tuple[Floats, Floats, Floats, float]:
    """Slopes of x, the covariates' centre and spread, and the variance explained beyond what chance explains."""
    if covariates is None or len(x) < 10 * covariates.shape[1]:
        return np.empty(0), np.empty(0), np.empty(0), 0.0
    centre, spread = covariates.mean(axis=0), covariates.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    features = _features(covariates, centre, spread)
    middle = features.mean(axis=0)
    design = features - middle
    slopes = np.linalg.solve(design.T @ design + RIDGE * np.eye(design.shape[1]), design.T @ (x - x.mean()))
    fitted = design @ slopes
    chance = float((x - x.mean() - fitted).var()) * design.shape[1] / len(x)
    return slopes, centre, spread, max(float(fitted.var()) - chance, 0.0)
