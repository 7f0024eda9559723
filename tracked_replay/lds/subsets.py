"""Which examples each retraining leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import ConfigError


@dataclass(frozen=True)
class Subset:
    """A retraining without some examples.

    Attributes:
        id: number of the subset in its run.
        drop: share of the training examples that is removed.
        removed: (removed,) int64, sorted, without repetition.
    """

    id: int
    drop: float
    removed: np.ndarray

    def weights(self, num_train: int) -> np.ndarray:
        """(training examples,) float64: 0 for the removed examples, 1 for all others."""
        weights = np.ones(num_train)
        weights[self.removed] = 0
        return weights


def draw_subsets(master_seed: int, num_train: int, drops: Sequence[float], count: int) -> list[Subset]:
    """Draw ``count`` subsets for each share, each from a seed of its own.

    A subset is a pure function of (master seed, share, number), so asking for more subsets keeps those there were.

    Args:
        master_seed: the training's.
        num_train: training examples.
        drops: shares removed.
        count: subsets a share.

    Raises:
        ConfigError: a share removes no example.
    """
    subsets: list[Subset] = []
    for drop in drops:
        size = round(drop * num_train)
        if not 0 < size < num_train:
            raise ConfigError(
                f"drop: found {drop:g}, which removes {size} of {num_train} training examples; "
                f"allowed: {1 / num_train:g} to {1 - 1 / num_train:g}"
            )
        for number in range(count):
            seed = derive_component_seed(master_seed, "lds_subset", f"{drop:g}_{number}")
            removed = np.random.default_rng(seed).choice(num_train, size, replace=False)
            subsets.append(Subset(len(subsets), drop, np.sort(removed)))
    return subsets


def require_no_empty_batch(indices: np.ndarray, weights: np.ndarray) -> None:
    """Check that every step keeps an example.

    Args:
        indices: (steps, batch) training examples of each step.
        weights: (training examples,).

    Raises:
        ConfigError: naming the first step whose batch would be empty.
    """
    empty = np.flatnonzero((weights[indices] == 0).all(axis=1))
    if len(empty):
        raise ConfigError(
            f"step {int(empty[0])}: all {indices.shape[1]} examples of its batch would be removed; allowed: removals "
            f"that leave every step at least one example"
        )
