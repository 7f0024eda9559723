"""Stage ``verify``: the consistency checks of a recorded run, by themselves."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from tracked_replay.lds import draw_subsets, parse_drop, run_checks
from tracked_replay.progress import progress
from tracked_replay.recording import write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.stages.lds import CHECKS
from tracked_replay.stages.magic import checked_setup
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import SECTIONS, log_problem, open_recording
from tracked_replay.tracking import names, resolve, stage_run, ui_path

logger = logging.getLogger(__name__)


def run_verify(train_run_id: str, *, overrides: dict[str, Any] | None = None, data_root: str | None = None) -> str:
    """Check a recorded run: order, trace, weights, initial model, config, digests, and one retraining.

    Always computed anew, never reused: its purpose is to look now.

    Args:
        train_run_id: a finished ``train`` run.
        overrides: changes to ``lds.*``, whose subsets' weights are checked.
        data_root: where the data are now.

    Returns:
        The ID of the MLflow run that holds the list of passed checks.

    Raises:
        ReplayError: the first check that fails, naming the first differing step and value.
    """
    recording = open_recording(train_run_id)
    train_run_id = resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id
    pairs = dict(overrides or {}) | ({"data.root": data_root} if data_root else {})
    problem = Problem.load(recording.config.override(pairs))
    setup = checked_setup(problem, recording)
    config = problem.config.lds
    subsets = draw_subsets(problem.config.seed, problem.data.num_train, parse_drop(config.drop), config.subsets)
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
        for check in progress(run_checks(setup, recording, subsets), 8, "checks", "check"):
            logger.info("check passed: %s (%s)", check.name, check.detail)
            passed.append(check._asdict())
            lines.append(f"- {check.name}: passed ({check.detail})")
        run.metric("checks/passed", len(passed))
        write_json(Path(folder) / CHECKS, passed)
        run.describe(f"Checks of the training run [{train_run_id}]({ui_path(train_run_id)}):\n\n" + "\n".join(lines))
        run.artifacts(Path(folder))
        return run.run_id
