"""How far retrainings that were done several at once equal those done alone: checked in every run, and said in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tracked_replay.errors import ReplayError, RetrainingError
from tracked_replay.executors import InProcess
from tracked_replay.lds import BOUND, Retrained, RetrainingJob, Subset, difference_over_spread
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.retrainings import retrain_all
from tracked_replay.tracking import StageRun


def equality(
    problem: Problem,
    train_run_id: str,
    jobs: Sequence[RetrainingJob],
    subsets: Sequence[Subset],
    results: Mapping[int, Retrained],
    run: StageRun,
    *,
    force: bool = False,
) -> str:
    """What the retrainings equal, in words; of several at once, one is done alone and compared.

    Args:
        problem: config, task and data of the recorded run.
        train_run_id: the recorded run.
        jobs: the retrainings.
        subsets: what each leaves out, by the same IDs.
        results: what came of them; of one share at least two.
        run: parent of the retraining that is done alone.
        force: do that one even where a finished child run holds it.

    Raises:
        ReplayError: they differ by more than the bound.
        RetrainingError: the one done alone failed.
    """
    models = problem.config.lds.models_at_once
    if models == 1:
        return "bitwise"
    # The last of a group and not the first: had all of them got the first one's weights, the first would be right.
    place = min(models, len(jobs)) - 1
    job = next(job for job in (*jobs[place:], *jobs[:place]) if job.id in results)
    alone, errors = retrain_all(problem, train_run_id, [job], run, InProcess(), force=force)
    if errors:
        raise RetrainingError(f"retraining {job.id} failed twice when it was done alone: {errors[job.id]}")
    shares: dict[float, list[np.ndarray]] = {}
    for subset in subsets:
        if subset.id in results:
            shares.setdefault(subset.drop, []).append(results[subset.id].measurements)
    several = [share for share in shares.values() if len(share) > 1]
    found = difference_over_spread(results[job.id].measurements, alone[job.id].measurements, several)
    if not found <= BOUND:
        raise ReplayError(
            f"lds.models_at_once: found {models}, but retraining {job.id} done alone has other measurements, by "
            f"{found:.2g} of the spread between retrainings; allowed: 1, or a training where this is <= {BOUND:g}"
        )
    return f"bound {BOUND:g} of the spread between retrainings; found {found:.2g}, {models} at once"
