"""Logistic regression with soft targets and weights, by Newton's method.

Maximises sum_i w_i (p_i log s(x_i b) + (1 - p_i) log s(-x_i b)) - ridge / 2 |b|^2, where s is the logistic function and
p_i in [0, 1] may be a probability, or 0, 1/2 and 1. There is no intercept but what the design holds as a column.

The ridge is a prior of variance 1 / ridge on every coefficient. At its default, 0.01, it moves nothing that the data
tell, and keeps finite what they do not: a side that always wins, or two columns that are the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RIDGE = 0.01
_STEPS = 100
_SMALL = 1e-10  # relative to the objective: what a last step may still gain


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit(design: Floats, targets: Floats, weights: Floats, ridge: float = RIDGE) -> tuple[Floats, Floats]:
    """Coefficients [columns], and the curvature there [columns, columns], the ridge included.

    design: [rows, columns]; targets: [rows], in [0, 1]; weights: [rows], not negative.
    """
    assert ridge > 0

    def objective(b: Floats) -> float:
        logits = design @ b
        return float(weights @ (targets * logits - np.logaddexp(0, logits)) - 0.5 * ridge * (b @ b))

    at = np.zeros(design.shape[1])
    best = objective(at)
    for _ in range(_STEPS):
        chances = sigmoid(design @ at)
        slope = design.T @ (weights * (targets - chances)) - ridge * at
        step = np.linalg.solve(_curvature(design, weights, chances, ridge), slope)
        while (found := objective(at + step)) < best and np.abs(step).max() > 1e-14:
            step = step / 2
        gained, at, best = found - best, at + step, found
        if gained <= _SMALL * (1 + abs(best)) and slope @ step <= _SMALL * (1 + abs(best)):
            break
    return at, _curvature(design, weights, sigmoid(design @ at), ridge)


def _curvature(design: Floats, weights: Floats, chances: Floats, ridge: float) -> Floats:
    spread = weights * chances * (1 - chances)
    return (design * spread[:, None]).T @ design + ridge * np.eye(design.shape[1])
