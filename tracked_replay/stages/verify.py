"""Stage ``verify``: the consistency checks of a recorded run, by themselves."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracked_replay import report
from tracked_replay.config import parse_drop
from tracked_replay.errors import TrackedReplayError
from tracked_replay.lds import Subset, draw_subsets, run_checks
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, require_expected, write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.stages.lds import CHECKS
from tracked_replay.stages.magic import recorded_setup, require_fields
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.train import SECTIONS, log_problem, open_recording
from tracked_replay.tracking import names, resolve, stage_run, ui_path

logger = logging.getLogger(__name__)


def run_verify(
    train_run_id: str,
    *,
    overrides: dict[str, Any] | None = None,
    data_root: str | None = None,
    seed: int | None = None,
) -> str:
    """Check a recorded run: order, trace, weights, initial model, config, digests, and one retraining.

    Always computed anew, never reused: its purpose is to look now.

    Args:
        train_run_id: a finished ``train`` run.
        overrides: changes to ``lds.*``, whose subsets' weights are checked.
        data_root: where the data are now.
        seed: master seed that the run must have been recorded with; any where it is ``None``.

    Returns:
        The ID of the MLflow run that holds the list of passed checks.

    Raises:
        ReplayError: the first check that fails, naming the first differing step and value.
    """
    train_run_id = str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id)
    recording = open_recording(train_run_id)
    if seed is not None:
        require_expected(recording, seed=seed)
    pairs = dict(overrides or {})
    require_fields(pairs, ("lds",), "train_run_id", train_run_id)
    problem = Problem.load(recording.config.override(pairs | ({"data.root": data_root} if data_root else {})))
    with task_errors(problem.config):
        return _verify(problem, recording, train_run_id, _subsets(problem, asked="lds.drop" in pairs))


def _subsets(problem: Problem, *, asked: bool) -> list[Subset]:
    config, num_train = problem.config.lds, problem.data.num_train
    drops = parse_drop(config.drop)
    if not asked:  # the recorded share may be too small for so few examples, which is no fault of the run
        drops = tuple(drop for drop in drops if 0 < round(drop * num_train) < num_train)
    return draw_subsets(problem.config.seed, num_train, drops, config.subsets)


def _verify(problem: Problem, recording: Recording, train_run_id: str, subsets: Sequence[Subset]) -> str:
    setup = recorded_setup(problem, recording)  # takes no step, so that the checks are the first to say what differs
    inputs = {"train_run_id": train_run_id}
    fingerprint = problem.fingerprint(names.VERIFY, (*SECTIONS, "lds"), inputs)
    with (
        stage_run(names.VERIFY, fingerprint, f"verify · {problem.task.name}", inputs) as run,
        tempfile.TemporaryDirectory() as folder,
    ):
        log_problem(problem, run)
        write_text(Path(folder) / CONFIG, problem.config.to_toml())
        lines = []
        passed = []
        try:
            for check in progress(run_checks(setup, recording, subsets), 8, "checks", "check"):
                logger.info("check passed: %s (%s)", check.name, check.detail)
                passed.append(check._asdict())
                lines.append(f"- {check.name}: passed ({check.detail})")
        except TrackedReplayError as error:
            lines.append(f"- **failed**: {report.markdown_text(str(error))}")
            raise
        finally:
            run.metric("checks/passed", len(passed))
            run.flush()
            write_json(Path(folder) / CHECKS, passed)
            run.describe(_description(train_run_id, len(passed), lines))
            publish(run, Path(folder))
        return run.run_id


def _description(train_run_id: str, passed: int, lines: Sequence[str]) -> str:
    """The checks, a line each; the last line is that of the one that failed, where one did."""
    if passed == len(lines):
        head = f"**All {passed} checks passed**: what was recorded of the training is consistent, and it repeats here."
        after = f"tracked-replay magic --train-run-id {train_run_id} --targets 0-7"
    else:
        head = f"**A check failed**, after {passed} that passed: the last one below."
        after = f"tracked-replay reproduce --run-id {train_run_id}"
    links = [f"- training run: [{train_run_id}]({ui_path(train_run_id)})", f"- next: `{after}`"]
    # The first line is what MLflow shows before "Show more".
    return "\n".join([head, "", *lines, *links]) + "\n"
