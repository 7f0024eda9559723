"""Stage ``suspects``: rank all training examples of a recorded run by how suspicious they are."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracked_replay.config import Config, parse_overrides
from tracked_replay.debugging import Suspicion, choose_checkpoints, rank_examples
from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import ConfigError, RetrainingError
from tracked_replay.executors import InProcess
from tracked_replay.lds import RetrainingJob, require_no_empty_batch
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import Target, parse_targets
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.lds import matching_influence
from tracked_replay.stages.magic import REPLAY_SECTIONS, checked_setup, magic_stage, require_fields
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.retrainings import retrain_all
from tracked_replay.stages.suspects_result import Removal, conclude
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.stages.train import Outcome, log_problem, open_recording, reuse
from tracked_replay.tracking import StageRun, names, resolve, stage_run
from tracked_replay.training import TrainingSetup, evaluate

logger = logging.getLogger(__name__)

TARGET = "mean:all"
SHARE = 0.05
CHECKPOINTS = 10


def suspects_stage(
    problem: Problem,
    train_run_id: str | None,
    *,
    share: float = SHARE,
    checkpoints: int = CHECKPOINTS,
    force: bool = False,
    may_point: bool = True,
) -> Outcome:
    """Rank the examples of a recorded training (trained and replayed first where no run matches).

    Args:
        problem: config, task and data.
        train_run_id: the recording; ``None`` looks for a match or trains.
        share: share of the training examples that counts as the top of a ranking.
        checkpoints: recorded states along the training that are looked at, at most.
        force: compute even where finished runs with the same fingerprint hold the result.
        may_point: see :func:`~tracked_replay.stages.train.train_stage`.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    with task_errors(problem.config):
        count = _count(share, problem.data.num_train)
        if checkpoints < 1:
            raise ConfigError(f"checkpoints: found {checkpoints}; allowed: integer >= 1")
        return _suspects_stage(problem, train_run_id, count, checkpoints, force=force, may_point=may_point)


def _count(share: float, num_train: int) -> int:
    """How many examples a share is."""
    count = round(share * num_train) if math.isfinite(share) else 0
    if not 0 < count < num_train:
        raise ConfigError(
            f"share: found {share:g}, which is {count} of {num_train} training examples; allowed: above "
            f"{0.5 / num_train:.2g} and below {1 - 0.5 / num_train:.8g}"
        )
    return count


def _suspects_stage(
    problem: Problem, train_run_id: str | None, count: int, checkpoints: int, *, force: bool, may_point: bool
) -> Outcome:
    title = f"suspects · {problem.task.name} · top {count}"
    targets = parse_targets(TARGET, problem.data.num_evaluation)
    influence = None if force else matching_influence(problem, targets, train_run_id)
    if influence is not None:
        identity, same = _fingerprint(problem, influence, count, checkpoints), "training run, share, config and code"
        found = reuse(names.SUSPECTS, identity, title, _inputs(influence), same, force=force, may_point=may_point)
        if found is not None:
            return found
        train_run_id = influence.train_run_id
    if train_run_id is not None:
        checked_setup(problem, open_recording(train_run_id))  # what is wrong leaves no run behind
    with stage_run(names.SUSPECTS, None, title, {}) as run:
        if influence is None:
            made = magic_stage(problem, targets, train_run_id, force=force, may_point=False).run_id
            influence = Influence.open(made)
        run.tag({f"{names.INPUT}{name}": value for name, value in _inputs(influence).items()})
        run.identify(_fingerprint(problem, influence, count, checkpoints))
        _suspects(problem, influence, targets[0], count, checkpoints, run, force=force)
        return Outcome(run.run_id, reused=False)


def _inputs(influence: Influence) -> dict[str, str]:
    return {"train_run_id": influence.train_run_id, "magic_run_id": influence.run_id}


def _fingerprint(problem: Problem, influence: Influence, count: int, checkpoints: int) -> str:
    return problem.fingerprint(names.SUSPECTS, TRAIN_SECTIONS, _inputs(influence), count=count, checkpoints=checkpoints)


def _suspects(
    problem: Problem,
    influence: Influence,
    target: Target,
    count: int,
    checkpoints: int,
    run: StageRun,
    *,
    force: bool,
) -> None:
    recording = open_recording(influence.train_run_id)
    setup = checked_setup(problem, recording)
    log_problem(problem, run)
    chosen = choose_checkpoints(recording, checkpoints)
    shown = progress(iter(chosen), len(chosen), "rank", "state")
    with recording.ahead([*chosen, recording.final]) as source:
        suspicion = rank_examples(setup, source, shown, target, influence.scores[0])
    removals = _removals(problem, setup, recording, influence, suspicion, count, run, force=force)
    with tempfile.TemporaryDirectory(prefix="tracked-replay-suspects-") as folder:
        root = Path(folder)
        write_text(root / CONFIG, problem.config.to_toml())
        conclude(root, problem, influence, suspicion, count, removals, run)
        publish(run, root)


def _removals(
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    influence: Influence,
    suspicion: Suspicion,
    count: int,
    run: StageRun,
    *,
    force: bool,
) -> Sequence[Removal]:
    """Where labels were flipped: what the evaluation gives without the suspects, beside other removals."""
    flipped = problem.data.flipped.indices
    if not len(flipped):
        return ()
    generator = np.random.default_rng(derive_component_seed(problem.config.seed, "suspects_random"))
    removed = {
        "suspects": np.sort(suspicion.rankings[0].order[:count]),
        "random": np.sort(generator.choice(problem.data.num_train, count, replace=False)),
        "flipped": flipped,
    }
    jobs = [RetrainingJob(number, indices, np.zeros(len(indices))) for number, indices in enumerate(removed.values())]
    for job in jobs:
        weights = np.ones(problem.data.num_train)
        weights[job.indices] = 0
        require_no_empty_batch(setup.plan.indices, weights)
    results, errors = retrain_all(problem, influence.train_run_id, jobs, run, InProcess(), force=force)
    if errors:
        raise RetrainingError(f"a retraining failed twice: {next(iter(errors.values()))}")
    recorded = evaluate(setup, recording.state(recording.final).to(setup.device))
    accuracy = recorded.accuracy(setup.data.evaluation.labels)
    found = [Removal("nothing", np.empty(0, dtype=np.int64), accuracy, float(recorded.measurements.mean()))]
    for name, job in zip(removed, jobs, strict=True):
        result = results[job.id]
        found.append(Removal(name, job.indices, result.accuracy, float(result.measurements.mean())))
    return found


def run_suspects(
    train_run_id: str | None = None,
    *,
    share: float = SHARE,
    checkpoints: int = CHECKPOINTS,
    config: Config | None = None,
    overrides: str | Mapping[str, Any] = "",
    data_root: str | None = None,
    force: bool = False,
) -> str:
    """Rank all training examples by how suspicious they are: mislabelled, hard, or harmful.

    Args:
        train_run_id: a finished ``train`` run; its recorded config holds, and ``overrides`` may change ``replay.*``
            and ``report.*`` only. Where it is ``None``, a matching run is reused or one is trained.
        share: share of the training examples that counts as the top of a ranking.
        checkpoints: recorded states along the training that are looked at, at most; the last of an epoch each.
        config: what to train, where no run is named; the digits preset where it is ``None``.
        overrides: changes to the config.
        data_root: where the data are now.
        force: compute even where finished runs hold the result.

    Returns:
        The ID of the MLflow run that holds the rankings.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    pairs = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    if train_run_id:
        if config is not None:
            raise ConfigError("config: a config and train_run_id were both given; allowed: one of them")
        require_fields(pairs, REPLAY_SECTIONS, "train_run_id", train_run_id)
        train_run_id = str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id)
        config = open_recording(train_run_id).config
    config = (config or Config.resolve()).override(pairs | ({"data.root": data_root} if data_root else {}))
    problem = Problem.load(config)
    return suspects_stage(problem, train_run_id or None, share=share, checkpoints=checkpoints, force=force).run_id
