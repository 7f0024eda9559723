"""Bitwise comparison: of tensors, of checkpoint files, of recorded runs; where two runs first part, and why."""

from tracked_replay.compare.certificate import Certificate, certify, check_certificate
from tracked_replay.compare.files import compare_paths
from tracked_replay.compare.result import Cause, Comparison, Difference, Drift, TensorComparison, Tolerance
from tracked_replay.compare.runs import compare_recordings
from tracked_replay.compare.states import StateSource, Unavailable, checkpoint_states, retrained_states
from tracked_replay.compare.tensors import compare_states, compare_tensor

__all__ = [
    "Cause",
    "Certificate",
    "Comparison",
    "Difference",
    "Drift",
    "StateSource",
    "TensorComparison",
    "Tolerance",
    "Unavailable",
    "certify",
    "check_certificate",
    "checkpoint_states",
    "compare_paths",
    "compare_recordings",
    "compare_states",
    "compare_tensor",
    "retrained_states",
]
