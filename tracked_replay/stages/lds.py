"""Stage ``lds``: retrain without random subsets and correlate what happens with what the scores predict."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracked_replay.config import Config, parse_drop, parse_overrides
from tracked_replay.errors import ConfigError, ReplayError, RetrainingError
from tracked_replay.executors import Executor, make_executor
from tracked_replay.lds import (
    MINIMUM_SUBSETS,
    Retrained,
    RetrainingJob,
    Subset,
    draw_subsets,
    require_batchable,
    require_no_empty_batch,
    run_checks,
)
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import Target, combine, parse_targets
from tracked_replay.stages.equality import equality
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.influence_report import PAGE
from tracked_replay.stages.lds_result import conclude, headlines, next_line
from tracked_replay.stages.magic import (
    REPLAY_SECTIONS,
    checked_setup,
    magic_fingerprint,
    magic_stage,
    matching_training,
    require_fields,
)
from tracked_replay.stages.parameters import LDS_TARGETS
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.retrainings import retrain_all
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.stages.train import Outcome, log_problem, open_recording, reuse
from tracked_replay.tracking import StageRun, find_finished, names, note_validation, resolve, stage_run
from tracked_replay.training import TrainingSetup, evaluate, set_up

logger = logging.getLogger(__name__)

CHECKS = "lds/checks.json"


def lds_stage(
    problem: Problem,
    influence: Influence | None,
    targets: Sequence[Target] = (),
    *,
    train_run_id: str | None = None,
    force: bool = False,
    may_point: bool = True,
) -> Outcome:
    """Validate a ``magic`` run (made first where none is given and none matches).

    Args:
        problem: the run's config (with its ``lds`` section as asked for), task and data.
        influence: the run.
        targets: what influence is asked on, where no run is given.
        train_run_id: the recorded training to use, where no run is given.
        force: retrain even what finished runs with the same fingerprint hold.
        may_point: see :func:`~tracked_replay.stages.train.train_stage`.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    with task_errors(problem.config):
        return _lds_stage(problem, influence, targets, train_run_id, force=force, may_point=may_point)


def _lds_stage(
    problem: Problem,
    influence: Influence | None,
    targets: Sequence[Target],
    train_run_id: str | None,
    *,
    force: bool,
    may_point: bool,
) -> Outcome:
    config = problem.config.lds
    title = f"lds · {problem.task.name} · {_shares(config.drop)} × {config.subsets}"
    subsets = checked_subsets(problem)
    executor = make_executor(config.executor, config.workers)
    mode = problem.config.train.reproducibility
    if config.workers > 1 and mode != "full":
        raise ConfigError(
            f"lds.workers: found {config.workers}, but with train.reproducibility={mode} the threads of a worker are "
            f"not those of the recorded run; allowed: 1"
        )
    if influence is None and not force:
        influence = matching_influence(problem, targets, train_run_id)
    if influence is not None:
        identity, same = _fingerprint(problem, influence), "magic run, subsets, config and code"
        found = reuse(names.LDS, identity, title, _inputs(influence), same, force=force, may_point=may_point)
        if found is not None:
            return found
        train_run_id = influence.train_run_id
    if train_run_id is not None:
        checked_setup(problem, open_recording(train_run_id))  # what is wrong leaves no run behind
    if config.models_at_once > 1:
        require_batchable(set_up(problem.config, problem.task, problem.data), config.models_at_once)
    with stage_run(names.LDS, None, title, {}) as run:
        if influence is None:
            made = magic_stage(problem, targets, train_run_id, force=force, may_point=False).run_id
            influence = Influence.open(made)
        run.tag({f"{names.INPUT}{name}": value for name, value in _inputs(influence).items()})
        run.identify(_fingerprint(problem, influence))
        recording = open_recording(influence.train_run_id)
        _lds(problem, checked_setup(problem, recording), recording, influence, subsets, executor, run, force=force)
    said = "; ".join(headlines(run.run_id))
    note_validation(influence.run_id, run.run_id, said, PAGE, next_line(influence.train_run_id))
    return Outcome(run.run_id, reused=False)


def _shares(drop: str) -> str:
    """``1, 5 %``: in a list of runs the UI shows some 18 letters of a name."""
    return f"{', '.join(f'{100 * share:.3g}' for share in parse_drop(drop))} %"


def checked_subsets(problem: Problem) -> list[Subset]:
    """Draw the subsets that the config asks for. Raises ConfigError where one of them cannot be trained without."""
    config, num_train = problem.config.lds, problem.data.num_train
    subsets = draw_subsets(problem.config.seed, num_train, parse_drop(config.drop), config.subsets)
    indices = set_up(problem.config, problem.task, problem.data).plan.indices
    for subset in subsets:
        require_no_empty_batch(indices, subset.weights(num_train))
    return subsets


def matching_influence(
    problem: Problem, targets: Sequence[Target], train_run_id: str | None = None
) -> Influence | None:
    """The finished ``magic`` run with these targets, if there is one."""
    train_run_id = train_run_id or matching_training(problem)
    if train_run_id is None:
        return None
    found = find_finished(names.MAGIC, magic_fingerprint(problem, targets, train_run_id))
    return None if found is None else Influence.open(found)


def _inputs(influence: Influence) -> dict[str, str]:
    return {"train_run_id": influence.train_run_id, "magic_run_id": influence.run_id}


def _fingerprint(problem: Problem, influence: Influence) -> str:
    return problem.fingerprint(names.LDS, (*TRAIN_SECTIONS, "lds"), _inputs(influence))


def _lds(
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    influence: Influence,
    subsets: Sequence[Subset],
    executor: Executor,
    run: StageRun,
    *,
    force: bool,
) -> None:
    keep, at_once = problem.config.lds.keep_states, problem.config.lds.models_at_once
    with tempfile.TemporaryDirectory(prefix="tracked-replay-lds-") as folder:
        root = Path(folder)
        log_problem(problem, run)
        write_text(root / CONFIG, problem.config.to_toml())
        _checks(root, setup, recording, subsets, influence.config, run)
        require_recorded_measurements(setup, recording, influence)
        jobs = [RetrainingJob(s.id, s.removed, np.zeros(len(s.removed)), keep) for s in subsets]
        results, errors = retrain_all(
            problem, influence.train_run_id, jobs, run, executor, force=force, models_at_once=at_once
        )
        if errors:
            run.reusable = False  # so that the same command tries the missing ones again
            run.tag({names.FAILED: str(len(errors))})
            logger.warning(
                "%d of %d retrainings failed twice; they are missing from the result", len(errors), len(jobs)
            )
            _require_enough(subsets, results, errors)
        same = equality(problem, influence.train_run_id, jobs, subsets, results, run, force=force)
        run.tag({names.EQUALITY: same})
        conclude(root, problem, setup, recording, influence, subsets, results, run)
        publish(run, root)


def require_recorded_measurements(setup: TrainingSetup, recording: Recording, influence: Influence) -> None:
    """Check that the task still measures what the scores are about. Raises ReplayError."""
    measured = evaluate(setup, recording.state(recording.final).to(setup.device)).measurements
    found = combine(influence.targets, measured)
    for target, one, other in zip(influence.targets, found, influence.measurements, strict=True):
        if one != other:
            raise ReplayError(
                f"target {target.name}: the recorded run has the measurement {one!r} here, but {other!r} in the magic "
                f"run {influence.run_id}; the task's measurement is not the one that the scores are about"
            )


def _require_enough(subsets: Sequence[Subset], results: Mapping[int, Retrained], errors: Mapping[int, str]) -> None:
    left = [subset.drop for subset in subsets if subset.id in results]
    if not any(left.count(drop) >= MINIMUM_SUBSETS for drop in left):
        number, why = next(iter(errors.items()))
        raise RetrainingError(
            f"{len(left)} of {len(subsets)} retrainings ended, which is too few for a correlation (at least "
            f"{MINIMUM_SUBSETS} of each drop share); retraining {number} failed twice: {why}"
        )


def _checks(
    root: Path, setup: TrainingSetup, recording: Recording, subsets: Sequence[Subset], config: Config, run: StageRun
) -> None:
    passed = []
    for check in progress(run_checks(setup, recording, subsets, config), 8, "checks", "check"):
        logger.info("check passed: %s (%s)", check.name, check.detail)
        passed.append(check._asdict())
    write_json(root / CHECKS, passed)
    run.metric("checks/passed", len(passed))


def run_lds(
    magic_run_id: str | None = None,
    *,
    train_run_id: str | None = None,
    targets: str | int | Sequence[int] = "",
    config: Config | None = None,
    overrides: str | Mapping[str, Any] = "",
    data_root: str | None = None,
    force: bool = False,
) -> str:
    """Validate influence scores by retraining on random subsets.

    Args:
        magic_run_id: a finished ``magic`` run; its config holds, and ``overrides`` may change ``lds.*`` only.
        train_run_id: where no ``magic`` run is named: the recorded training to replay first.
        targets: see :func:`~tracked_replay.replay.parse_targets`; empty: those of the named ``magic`` run, or ``"0-7"``
            where none is named.
        config: where no run is named: what to train; the digits preset where it is ``None``.
        overrides: changes to the config, for example ``{"lds.subsets": 24, "lds.drop": "0.01,0.05"}``.
        data_root: where the data are now.
        force: compute even where finished runs hold the result.

    Returns:
        The ID of the MLflow run that holds subsets, outcomes and correlations.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    pairs = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    if data_root:
        pairs["data.root"] = data_root
    if config is not None and (magic_run_id or train_run_id):
        raise ConfigError("config: a config and a recorded run were both given; allowed: one of them")
    influence = None
    if magic_run_id:
        influence = Influence.open(magic_run_id)
        if train_run_id and resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id != influence.train_run_id:
            raise ConfigError(
                f"magic_run_id: run {magic_run_id} replayed the training run {influence.train_run_id}, but "
                f"train_run_id is {train_run_id}; allowed: one of them, or two that belong together"
            )
        require_fields(pairs, ("lds",), "magic_run_id", magic_run_id)
        config = influence.config
    elif train_run_id:
        require_fields(pairs, ("lds", *REPLAY_SECTIONS), "train_run_id", train_run_id)
        train_run_id = str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id)
        config = open_recording(train_run_id).config
    problem = Problem.load((config or Config.resolve()).override(pairs))
    if influence is not None:
        influence.require_targets(targets, problem.data.num_evaluation)
        chosen = influence.targets
    else:
        chosen = parse_targets(LDS_TARGETS if targets == "" else targets, problem.data.num_evaluation)
    return lds_stage(problem, influence, chosen, train_run_id=train_run_id or None, force=force).run_id
