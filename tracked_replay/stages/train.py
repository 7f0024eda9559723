"""Stage ``train``: a deterministic training run, recorded."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tracked_replay import report
from tracked_replay.config import Config
from tracked_replay.errors import RecordingError
from tracked_replay.progress import progress
from tracked_replay.recording import Recorder, Recording, write_json
from tracked_replay.stages.problem import Problem, task_errors
from tracked_replay.tasks import BUILT_IN_TASKS
from tracked_replay.tracking import (
    StageRun,
    artifacts_of,
    find_finished,
    names,
    point_to,
    resolve,
    stage_run,
    tag_of,
)
from tracked_replay.training import State, TrainingSetup, evaluate, set_up, train

logger = logging.getLogger(__name__)

SECTIONS = ("seed", "data", "model", "train", "record")
TASK_COPY = "config/task"
DATA = "config/data.json"


class Outcome(NamedTuple):
    """What a stage gives back.

    Attributes:
        run_id: the run that holds the result.
        reused: whether it was there already.
    """

    run_id: str
    reused: bool


def train_stage(problem: Problem, *, force: bool = False, may_point: bool = False) -> Outcome:
    """Train and record, or find the FINISHED run with the same fingerprint.

    Args:
        problem: config, task and data.
        force: train even where there is such a run.
        may_point: whether this is the stage that was asked for, so that under ``mlflow run`` the run that MLflow made
            points to the one that is reused.

    Raises:
        TrackedReplayError: naming what was wrong; the run is then FAILED.
    """
    fingerprint = problem.fingerprint(names.TRAIN, SECTIONS, {})
    title = f"train · {problem.task.name} · seed {problem.config.seed}"
    found = None if force else find_finished(names.TRAIN, fingerprint)
    if found is not None:
        logger.info("reusing training run %s (same config, data and code)", found)
        if may_point:
            point_to(names.TRAIN, found, title, {})
        return Outcome(found, reused=True)
    with task_errors(problem.config):
        # Made before the run starts: a device that is not there or a batch that is too large leaves no run behind.
        setup = set_up(problem.config, problem.task, problem.data)
        with stage_run(names.TRAIN, fingerprint, title, {}) as run:
            _train(problem, setup, run)
            return Outcome(run.run_id, reused=False)


def open_recording(run_id: str) -> Recording:
    """The recording of a finished training run. Raises RunError."""
    run = resolve(run_id, names.TRAIN, "train_run_id")
    identity = tag_of(run, names.DIGESTS)
    if identity is None:
        raise RecordingError(f"train_run_id: run {run_id} has no tag {names.DIGESTS}, so its files cannot be checked")
    return Recording(artifacts_of(run.info.run_id), identity)


def _train(problem: Problem, setup: TrainingSetup, run: StageRun) -> None:
    config, plan = problem.config, setup.plan
    logger.info("training %d steps of %d examples, run %s", plan.steps, config.train.batch_size, run.run_id)
    log_problem(problem, run)
    losses = np.empty(plan.steps)
    accuracies: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory(prefix="tracked-replay-train-") as folder:
        root = Path(folder)
        _describe_data(problem, root)
        with Recorder(root, setup) as recorder:
            state = setup.initial
            for record in progress(train(setup), plan.steps, "train"):
                recorder.add(record)
                state, t = record.after, record.before.step
                losses[t] = record.loss
                run.metric("train/loss", record.loss, t)
                for group, rate in zip(setup.step.groups, record.learning_rates, strict=True):
                    run.metric(f"lr/{group.name}", rate, t)
                if t + 1 == plan.steps or plan.epochs[t + 1] != record.epoch:
                    last = t + 1 == plan.steps
                    run.metric("epoch/train_loss", losses[plan.epochs == record.epoch].mean(), record.epoch)
                    every = config.record.evaluate_every
                    if last or (every and (record.epoch + 1) % every == 0):
                        accuracy = _evaluate(setup, state, run, record.epoch)
                        accuracies += [] if accuracy is None else [(state.step, accuracy)]
                    run.flush()
            identity = recorder.finish(state)
        run.tag({names.DIGESTS: identity})
        _figure(root, setup, losses, accuracies)
        run.artifacts(root)


def log_problem(problem: Problem, run: StageRun) -> None:
    """Log what every stage's run shows of its config and data."""
    flat = problem.config.flat()
    # MLflow has logged the entry point's own parameters, `seed` among them, under their names already.
    run.params({"master_seed" if name == "seed" else name: value for name, value in flat.items()})
    run.tag({names.TASK: problem.task.name})
    for examples, context in ((problem.data.train, "training"), (problem.data.evaluation, "evaluation")):
        run.dataset(
            _array(examples.inputs),
            _array(examples.labels),
            f"{problem.task.name} ({context})",
            examples.fingerprint(),
            context,
        )


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16


def _evaluate(setup: TrainingSetup, state: State, run: StageRun, epoch: int) -> float | None:
    evaluation = evaluate(setup, state)
    run.metric("epoch/evaluation_measurement", float(evaluation.measurements.mean()), epoch)
    accuracy = evaluation.accuracy(setup.data.evaluation.labels)
    if accuracy is not None:
        run.metric("epoch/evaluation_accuracy", accuracy, epoch)
    return accuracy


def _describe_data(problem: Problem, root: Path) -> None:
    """Keep the data's identity and, of a user's own task, the files, so that the run can be understood later."""
    data = problem.data
    content = {
        "task": problem.task.name,
        "fingerprint": problem.data_fingerprint,
        "train_examples": data.num_train,
        "evaluation_examples": data.num_evaluation,
        "label_names": list(problem.task.label_names),
        "code": problem.code,
    }
    write_json(root / DATA, content)
    if problem.config.data.task in BUILT_IN_TASKS:
        return
    (root / TASK_COPY).mkdir(parents=True)
    for place, path in enumerate(problem.task.source_files()):
        copy = root / TASK_COPY / path.name
        shutil.copyfile(path, copy if not copy.exists() else copy.with_name(f"{place}-{path.name}"))


def _figure(root: Path, setup: TrainingSetup, losses: np.ndarray, accuracies: list[tuple[int, float]]) -> None:
    plan = setup.plan
    ends = [step - 1 for step, _ in accuracies] or np.flatnonzero(np.diff(plan.epochs, append=plan.epochs[-1] + 1))
    values = [accuracy for _, accuracy in accuracies] or None
    figure = report.training_figure(np.arange(plan.steps), losses, plan.learning_rates, ends, values)
    save_figure(root, "training", figure)


def save_figure(root: Path, name: str, figure: object) -> None:
    """Write ``figures/NAME.png`` under a folder that will be logged."""
    path = root / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(report.figure_png_bytes(figure))  # type: ignore[arg-type]


def run_train(config: Config | None = None, *, force: bool = False) -> str:
    """Train deterministically and record everything.

    Args:
        config: from :meth:`Config.resolve`; the digits preset where it is ``None``.
        force: train even where a FINISHED run with the same fingerprint exists.

    Returns:
        The ID of the MLflow run that holds the recording.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    return train_stage(Problem.load(config or Config.resolve()), force=force, may_point=True).run_id
