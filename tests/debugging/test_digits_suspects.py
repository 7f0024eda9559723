"""The digits preset with wrong labels: the list that a user sees first finds them."""

from __future__ import annotations

import numpy as np
import pytest

from tracked_replay.config import Config
from tracked_replay.debugging import QUESTIONS, Ranking, detection, outputs_of
from tracked_replay.lds import final_state
from tracked_replay.tasks import load_task
from tracked_replay.training import set_up


@pytest.mark.slow
def test_the_first_ranking_finds_flipped_digits() -> None:
    config = Config.resolve("digits", overrides="data.flip_labels=0.05")
    setup = set_up(config, load_task(config))
    found = outputs_of(setup, final_state(setup))
    assert next(iter(QUESTIONS)) == "margin"
    flipped = setup.data.flipped
    result = detection(Ranking("margin", -found.margins), flipped.indices, len(flipped.indices))
    print(result)
    assert result.auc >= 0.98
    assert result.precision >= 0.9
    named_right = np.mean(found.predictions[flipped.indices] == flipped.true_labels)
    assert named_right >= 0.9
