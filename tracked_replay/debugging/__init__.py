"""Data debugging: which training examples are probably mislabelled, and which hurt.

Beside :mod:`tracked_replay.lds`; pure functions of a recorded run. Knows no MLflow.
"""

from tracked_replay.debugging.gradients import self_influence
from tracked_replay.debugging.outputs import Outputs, margins, outputs_of
from tracked_replay.debugging.rankings import (
    QUESTIONS,
    Detection,
    Ranking,
    Suspicion,
    choose_checkpoints,
    detection,
    rank_examples,
)
from tracked_replay.tasks import FlippedLabels, flip_labels

__all__ = [
    "QUESTIONS",
    "Detection",
    "FlippedLabels",
    "Outputs",
    "Ranking",
    "Suspicion",
    "choose_checkpoints",
    "detection",
    "flip_labels",
    "margins",
    "outputs_of",
    "rank_examples",
    "self_influence",
]
