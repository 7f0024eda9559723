"""The replay: the exact adjoint of a recorded training, traversed from the last step to the first."""

from tracked_replay.replay.adjoint import Cotangent, StepAdjoint, measurement_cotangent
from tracked_replay.replay.check import DerivativeCheck, check_derivatives
from tracked_replay.replay.compiled import CompilingAdjoint
from tracked_replay.replay.differentiable import DifferentiableModel
from tracked_replay.replay.saved import SavedReplay, load_replay, save_replay
from tracked_replay.replay.scores import PerStepWriter, ScoreSum, curves, influence_table, write_influence
from tracked_replay.replay.states import choose_plan, require_budget, states_backward
from tracked_replay.replay.targets import Target, combine, parse_targets
from tracked_replay.replay.traversal import Replay, StepScores, require_recorded_plan

__all__ = [
    "CompilingAdjoint",
    "Cotangent",
    "DerivativeCheck",
    "DifferentiableModel",
    "PerStepWriter",
    "Replay",
    "SavedReplay",
    "ScoreSum",
    "StepAdjoint",
    "StepScores",
    "Target",
    "check_derivatives",
    "choose_plan",
    "combine",
    "curves",
    "influence_table",
    "load_replay",
    "measurement_cotangent",
    "parse_targets",
    "require_budget",
    "require_recorded_plan",
    "save_replay",
    "states_backward",
    "write_influence",
]
