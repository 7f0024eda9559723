"""Questions to a recorded run by its ID."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import own_config, write_task

import tracked_replay as tr
from tracked_replay.errors import RecordingError, RunError


@pytest.fixture
def trained(store: Path) -> str:
    return tr.train(own_config(write_task(store), seed=5))


def test_a_run_is_asked_for_its_seed_flags_and_checkpoints(trained: str) -> None:
    tr.require_expected(trained, seed=5, flags={"threads": 1, "deterministic_algorithms": True}, step=2)
    with pytest.raises(RecordingError, match="seed: found 5"):
        tr.require_expected(trained, seed=6)
    with pytest.raises(RecordingError, match="threads: found 1"):
        tr.require_expected(trained, flags={"threads": 2})
    with pytest.raises(RecordingError, match="step"):
        tr.require_expected(trained, step=99)


def test_generators_draw_again_what_they_drew_after_the_run(trained: str) -> None:
    drawn = []
    for _ in range(2):
        assert tr.restore_generators(trained) == tr.restore_generators(trained, 10**6)
        drawn.append((random.getrandbits(32), float(np.random.random()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    with pytest.raises(RecordingError, match="step"):
        tr.restore_generators(trained, -1)


def test_only_a_finished_training_run_answers(store: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        tr.restore_generators("0" * 32)
