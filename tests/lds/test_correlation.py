"""The linear datamodeling score against scipy and by hand, and where it has no value."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from tracked_replay.errors import ConfigError
from tracked_replay.lds import Correlation, correlate, predict


def noisy(subsets: int, targets: int, seed: int = 0, noise: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    predicted = generator.normal(size=(subsets, targets))
    return predicted, 2 + 0.5 * predicted + noise * generator.normal(size=predicted.shape)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_each_target_is_what_scipy_gives(scale: float) -> None:
    predicted, actual = noisy(30, 5)
    predicted *= scale
    actual[:4] = actual[0]  # ties
    found = correlate(predicted, actual, seed=0)
    for column, target in enumerate(found.targets):
        one, other = predicted[:, column], actual[:, column]
        assert target.spearman == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)
        assert target.pearson == pytest.approx(stats.pearsonr(one, other).statistic, abs=1e-12)
        assert target.slope == pytest.approx(stats.linregress(one, other).slope, rel=1e-10)
    assert found.mean == pytest.approx(np.mean([target.spearman for target in found.targets]), abs=1e-12)
    assert found.undefined == 0


def test_a_hand_example() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: Σd² = 4, so ρ = 1 − 6·4/(4·15) = 0.6.
    predicted = np.array([[1.0], [2.0], [3.0], [4.0]])
    actual = np.array([[20.0], [10.0], [40.0], [30.0]])
    found = correlate(predicted, actual, seed=0)
    (target,) = found.targets
    assert target.spearman == pytest.approx(0.6)
    assert target.pearson == pytest.approx(0.6)
    assert target.slope == pytest.approx(6.0)
    assert found.mean == pytest.approx(0.6)


def test_a_right_order_of_the_wrong_size_shows_in_the_slope_alone() -> None:
    predicted, _ = noisy(20, 1)
    found = correlate(predicted, 3 + 0.25 * predicted, seed=0).targets[0]
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)
    assert found.slope == pytest.approx(0.25)


@pytest.mark.parametrize("subsets", [10, 40, 160])
def test_the_interval_holds_the_mean(subsets: int) -> None:
    for seed in range(5):
        found = correlate(*noisy(subsets, 4, seed), seed=seed, resamples=200)
        assert found.low <= found.mean <= found.high
        assert -1 <= found.low < found.high <= 1


def test_the_interval_shrinks_with_more_subsets_and_grows_with_the_confidence() -> None:
    def width(found: Correlation) -> float:
        return found.high - found.low

    few, some, many = (width(correlate(*noisy(subsets, 3), seed=0)) for subsets in (12, 48, 192))
    assert few > 1.4 * some > 1.4 * 1.4 * many
    predicted, actual = noisy(30, 3)
    narrow = correlate(predicted, actual, seed=0, confidence=0.5)
    assert width(narrow) < width(correlate(predicted, actual, seed=0, confidence=0.99))


def test_the_interval_is_a_function_of_the_seed() -> None:
    predicted, actual = noisy(20, 3)
    first = correlate(predicted, actual, seed=3)
    assert correlate(predicted, actual, seed=3) == first
    other = correlate(predicted, actual, seed=4)
    assert (other.low, other.high) != (first.low, first.high)
    assert (other.mean, other.targets) == (first.mean, first.targets)


@pytest.mark.parametrize("side", ["predicted", "actual"])
def test_a_constant_target_is_undefined_and_left_out_of_the_mean(side: str) -> None:
    predicted, actual = noisy(20, 3)
    (predicted if side == "predicted" else actual)[:, 1] = 0.3
    found = correlate(predicted, actual, seed=0)
    assert found.undefined == 1
    assert all(math.isnan(value) for value in vars(found.targets[1]).values())
    others = correlate(predicted[:, [0, 2]], actual[:, [0, 2]], seed=0)
    assert (found.mean, found.low, found.high) == (others.mean, others.low, others.high)


def test_without_any_varying_target_everything_is_undefined() -> None:
    found = correlate(np.zeros((5, 2)), noisy(5, 2)[1], seed=0)
    assert found.undefined == 2
    assert all(math.isnan(value) for value in (found.mean, found.low, found.high))


@pytest.mark.parametrize("size", [1e-200, 1e-16, 1e-13, 1e200])
def test_values_that_hardly_vary_or_are_huge_give_no_warning(size: float) -> None:
    _, pattern = noisy(10, 1)
    one, other = (0.0 if size < 1e-100 or size > 1 else 1.0) + size * np.round(8 * pattern), pattern
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (correlate(one, other, seed=0), correlate(other, one, seed=0)):
            assert found.undefined == 0
            assert found.targets[0].spearman > 0.5
            assert math.isfinite(found.targets[0].pearson)


@pytest.mark.parametrize("subsets", [0, 1, 2])
def test_fewer_than_three_subsets_have_no_correlation(subsets: int) -> None:
    with pytest.raises(ConfigError, match=f"subsets: found {subsets} with a result; allowed: at least 3"):
        correlate(np.zeros((subsets, 1)), np.zeros((subsets, 1)), seed=0)


def test_three_subsets_are_enough() -> None:
    found = correlate(*noisy(3, 2), seed=0)
    assert found.low <= found.mean <= found.high


def test_prediction_of_removals_and_reweightings() -> None:
    base = np.array([1.0, 2.0])
    scores = np.array([[1.0, 10.0, 100.0], [-1.0, 0.0, 0.5]])
    np.testing.assert_allclose(predict(base, scores, [0, 2], [0.0, 0.0]), [1 - 101, 2 + 0.5])
    np.testing.assert_allclose(predict(base, scores, [1, 2], [0.5, 3.0]), [1 - 5 + 200, 2 + 1])
    np.testing.assert_array_equal(predict(base, scores, [0, 1], [1.0, 1.0]), base)
    np.testing.assert_array_equal(predict(base, scores, [], []), base)
