"""Subsets: pure functions of seed, share and number."""

from __future__ import annotations

import numpy as np
import pytest

from tracked_replay.config import parse_drop
from tracked_replay.errors import ConfigError
from tracked_replay.lds import Subset, draw_subsets, require_no_empty_batch


def removed(subsets: list[Subset]) -> list[list[int]]:
    return [subset.removed.tolist() for subset in subsets]


@pytest.mark.parametrize(("num_train", "drop", "size"), [(1000, 0.01, 10), (48, 0.05, 2), (48, 0.5, 24), (3, 0.4, 1)])
def test_a_subset_is_sorted_without_repetition_and_has_its_size(num_train: int, drop: float, size: int) -> None:
    subsets = draw_subsets(7, num_train, [drop], 20)
    assert [subset.id for subset in subsets] == list(range(20))
    for subset in subsets:
        assert subset.drop == drop
        assert subset.removed.dtype == np.int64
        assert len(subset.removed) == size
        assert (np.diff(subset.removed) > 0).all()
        assert subset.removed.min() >= 0
        assert subset.removed.max() < num_train
        weights = subset.weights(num_train)
        np.testing.assert_array_equal(np.flatnonzero(weights == 0), subset.removed)
        assert weights.sum() == num_train - size
    assert len({tuple(row) for row in removed(subsets)}) > 1


def test_a_subset_depends_on_seed_share_and_number_alone() -> None:
    drops = (0.05, 0.1)
    few = draw_subsets(7, 200, drops, 4)
    again = draw_subsets(7, 200, drops, 4)
    more = draw_subsets(7, 200, drops, 9)
    assert removed(few) == removed(again)
    # each share keeps its earlier subsets when more are asked for
    assert removed(few) == removed(more[:4] + more[9:13])
    assert removed(few[4:]) == removed(draw_subsets(7, 200, [0.1], 4))
    other = draw_subsets(8, 200, drops, 4)
    assert all(one != another for one, another in zip(removed(few), removed(other), strict=True))


def test_every_example_is_removed_about_as_often() -> None:
    counts = np.zeros(50)
    for subset in draw_subsets(0, 50, [0.2], 400):
        counts[subset.removed] += 1
    assert counts.sum() == 4000
    assert counts.min() > 80 - 5 * 8  # binomial: mean 80, standard deviation 8
    assert counts.max() < 80 + 5 * 8


@pytest.mark.parametrize(
    ("text", "shares"), [("0.01", (0.01,)), (" 0.2 , 0.05", (0.2, 0.05)), ("1e-3,0.999", (0.001, 0.999))]
)
def test_drop_is_one_share_or_several(text: str, shares: tuple[float, ...]) -> None:
    assert parse_drop(text) == shares


@pytest.mark.parametrize("text", ["", "0", "1", "-0.1", "1.5", "nan", "inf", "a", "0.1,", "0.1;0.2", "1%"])
def test_a_drop_that_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"drop: found .* allowed: shares above 0 and below 1"):
        parse_drop(text)


def test_a_share_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop: 0\.1 is given twice"):
        parse_drop("0.1,0.05,0.10")


@pytest.mark.parametrize(("drop", "size"), [(0.001, 0), (0.999, 48)])
def test_a_share_that_removes_nothing_or_everything_is_refused(drop: float, size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"drop: found {drop}, which removes {size} of 48 training examples; allowed"
    ):
        draw_subsets(0, 48, [0.1, drop], 3)


def test_an_empty_batch_is_refused_with_its_step() -> None:
    indices = np.array([[0, 1], [2, 3], [1, 3], [0, 2]])
    weights = np.ones(4)
    weights[[0, 3]] = 0
    require_no_empty_batch(indices, weights)
    weights[1] = 0
    with pytest.raises(ConfigError, match="step 0: all 2 examples of its batch would be removed"):
        require_no_empty_batch(indices, weights)
    weights[0] = 0.5  # a small weight is not a removal
    with pytest.raises(ConfigError, match="step 2:"):
        require_no_empty_batch(indices, weights)
