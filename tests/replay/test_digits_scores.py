"""The digits preset in float32: the largest scores against real retrainings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_exactness import measured, recorded, replayed

from tracked_replay.config import Config
from tracked_replay.replay import Target
from tracked_replay.tasks import load_task
from tracked_replay.training import set_up


@pytest.mark.slow
def test_the_five_largest_scores_of_a_target_are_finite_differences_of_retrainings(tmp_path: Path) -> None:
    config = Config.resolve("digits")
    setup = set_up(config, load_task(config))
    target = (Target.single(3),)
    scores = replayed(setup, recorded(setup, tmp_path), target)[0]
    largest = np.argsort(-np.abs(scores), kind="stable")[:5]
    for example in largest:
        # float32 trainings carry noise of some 1e-7 in the measurement, so the step must be large, and two of them
        # are combined so that the error of the large step cancels to fourth order.
        slopes = []
        for eps in (0.5, 0.25):
            changed = []
            for sign in (1, -1):
                weights = torch.ones(setup.data.num_train)
                weights[example] += sign * eps
                changed.append(measured(setup, weights, target)[0])
            slopes.append((changed[0] - changed[1]) / (2 * eps))
        expected = (4 * slopes[1] - slopes[0]) / 3
        print(f"example {example}: score {scores[example]:+.6e}, retrainings {expected:+.6e}")
        assert scores[example] == pytest.approx(expected, rel=0.01)
