"""How far the scores can be trusted: subsets, retrainings, correlation, baselines, metasmoothness."""

from tracked_replay.lds.baselines import BASELINES, baseline_scores
from tracked_replay.lds.batched import BOUND, difference_over_spread, require_batchable, retrain_together
from tracked_replay.lds.checks import Check, require_initial_model, run_checks
from tracked_replay.lds.correlation import MINIMUM_SUBSETS, Correlation, TargetCorrelation, correlate, predict
from tracked_replay.lds.metasmoothness import metasmoothness
from tracked_replay.lds.retraining import (
    MakeSetup,
    Retrained,
    RetrainingJob,
    final_state,
    require_recorded_states,
    retrain,
    weight_tensor,
)
from tracked_replay.lds.subsets import Subset, draw_subsets, require_no_empty_batch

__all__ = [
    "BASELINES",
    "BOUND",
    "MINIMUM_SUBSETS",
    "Check",
    "Correlation",
    "MakeSetup",
    "Retrained",
    "RetrainingJob",
    "Subset",
    "TargetCorrelation",
    "baseline_scores",
    "correlate",
    "difference_over_spread",
    "draw_subsets",
    "final_state",
    "metasmoothness",
    "predict",
    "require_batchable",
    "require_initial_model",
    "require_no_empty_batch",
    "require_recorded_states",
    "retrain",
    "retrain_together",
    "run_checks",
    "weight_tensor",
]
