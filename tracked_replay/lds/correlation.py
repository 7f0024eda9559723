"""The linear datamodeling score and what stands beside it.

Source: Park et al., "TRAK: Attributing Model Behavior at Scale" (2023), definition 2.3: the Spearman correlation, over
random subsets, between the measurement that the scores predict and the one that retraining gives, averaged over
targets.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tracked_replay.errors import ConfigError

MINIMUM_SUBSETS = 3


@dataclass(frozen=True)
class TargetCorrelation:
    """How one target's predictions agree with its retrainings.

    Attributes:
        spearman: rank correlation; NaN where either side is constant.
        pearson: linear correlation.
        slope: of actual on predicted, 1 where the predicted changes have the right size.
    """

    spearman: float
    pearson: float
    slope: float


@dataclass(frozen=True)
class Correlation:
    """The linear datamodeling score of one method at one drop share.

    Attributes:
        targets: one entry a target, in the order of the columns.
        mean: mean Spearman correlation over the targets where it is defined; NaN where it is for none.
        low, high: bootstrap interval of the mean, over subsets.
        undefined: targets whose predictions or measurements do not vary.
    """

    targets: tuple[TargetCorrelation, ...]
    mean: float
    low: float
    high: float
    undefined: int


def predict(base: np.ndarray, scores: np.ndarray, indices: ArrayLike, weights: ArrayLike) -> np.ndarray:
    """Measurements that scores predict for other weights: ``φ + Σ (wᵢ − 1) · score``.

    Args:
        base: (targets,) measurements of the recorded run.
        scores: (targets, training examples).
        indices: examples whose weight is not 1.
        weights: their weights.

    Returns:
        (targets,) float64.
    """
    change = np.asarray(weights, dtype=float) - 1
    return base + scores[:, np.asarray(indices, dtype=np.int64)] @ change


def correlate(
    predicted: np.ndarray, actual: np.ndarray, *, seed: int, resamples: int = 1000, confidence: float = 0.95
) -> Correlation:
    """Correlate predictions with retrainings.

    Args:
        predicted: (subsets, targets).
        actual: (subsets, targets).
        seed: of the bootstrap.
        resamples: bootstrap samples of the subsets.
        confidence: of the interval.

    Raises:
        ConfigError: fewer than three subsets.
    """
    if len(predicted) < MINIMUM_SUBSETS:
        raise ConfigError(
            f"subsets: found {len(predicted)} with a result; allowed: at least {MINIMUM_SUBSETS}, since fewer have no "
            f"correlation"
        )
    targets = tuple(_target(predicted[:, column], actual[:, column]) for column in range(predicted.shape[1]))
    ranks = [target.spearman for target in targets]
    undefined = sum(math.isnan(rank) for rank in ranks)
    mean = _mean_spearman(predicted, actual)
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(predicted), size=len(predicted)) for _ in range(resamples)]
    means = np.array([_mean_spearman(predicted[draw], actual[draw]) for draw in draws])
    means = means[np.isfinite(means)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail]) if len(means) else (math.nan, math.nan)
    return Correlation(targets, mean, float(low), float(high), undefined)


def _target(predicted: np.ndarray, actual: np.ndarray) -> TargetCorrelation:
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return TargetCorrelation(math.nan, math.nan, math.nan)
    # scipy warns, or divides by zero, where values differ only in their last digits or are very small.
    first, first_unit = _standardised(predicted)
    second, second_unit = _standardised(actual)
    return TargetCorrelation(
        spearman=float(stats.spearmanr(predicted, actual).statistic),
        pearson=float(stats.pearsonr(first, second).statistic),
        slope=float(stats.linregress(first, second).slope) * (second_unit / first_unit),
    )


def _standardised(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Deviations from the mean in units of the largest, and that unit."""
    deviations = values - values.mean()
    unit = float(np.abs(deviations).max())
    return deviations / unit, unit


def _mean_spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Mean over the targets where it is defined; all columns at once, since the bootstrap asks a thousand times."""
    first, second = (stats.rankdata(values, axis=0) for values in (predicted, actual))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no defined correlation is NaN
        return float(np.nanmean(np.where(scale > 0, (first * second).sum(axis=0) / scale, np.nan)))
