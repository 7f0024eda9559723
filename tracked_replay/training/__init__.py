"""The step function, parameter groups, schedules, and the loop that goes through a plan of steps."""

from tracked_replay.training.groups import ParameterGroup, parameter_groups
from tracked_replay.training.loop import (
    StepRecord,
    TrainingPlan,
    TrainingSetup,
    evaluate,
    measured,
    require_functional,
    set_up,
    train,
)
from tracked_replay.training.schedule import SHARED_INSTANCE, learning_rates
from tracked_replay.training.state import State, initial_state
from tracked_replay.training.step import BatchedStep, StepResult, TrainingStep, gradient, seed_step, weighted_loss

__all__ = [
    "SHARED_INSTANCE",
    "BatchedStep",
    "ParameterGroup",
    "State",
    "StepRecord",
    "StepResult",
    "TrainingPlan",
    "TrainingSetup",
    "TrainingStep",
    "evaluate",
    "gradient",
    "initial_state",
    "learning_rates",
    "measured",
    "parameter_groups",
    "require_functional",
    "seed_step",
    "set_up",
    "train",
    "weighted_loss",
]
