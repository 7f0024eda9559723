"""Stage ``train``: a deterministic training run, recorded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tracked_replay import report
from tracked_replay.config import Config
from tracked_replay.determinism import (
    GeneratorStates,
    capture_generator_states,
    derive_component_seed,
    deterministic_context,
    restore_generator_states,
)
from tracked_replay.errors import RecordingError, TrackedReplayError
from tracked_replay.progress import progress
from tracked_replay.recording import (
    Recorder,
    Recording,
    Unfinished,
    find_unfinished,
    state_digest,
    write_aside,
    write_json,
)
from tracked_replay.recording.recorder import checkpoint_distance, checkpoint_steps
from tracked_replay.stages.problem import Problem, task_errors
from tracked_replay.tasks import BUILT_IN_TASKS
from tracked_replay.tracking import (
    StageRun,
    Workspace,
    artifacts_of,
    claimed,
    find_finished,
    find_interrupted,
    names,
    point_to,
    resolve,
    stage_run,
    tag_of,
)
from tracked_replay.training import State, TrainingSetup, evaluate, require_functional, set_up, train

logger = logging.getLogger(__name__)

SECTIONS = ("seed", "data", "model", "train", "record")
TASK_COPY = "config/task"
DATA = "config/data.json"
FLIPPED = "config/flipped_labels.parquet"
ACCURACY = "epoch/evaluation_accuracy"
LOGGED_NAMES = {names.TRAIN: "training", names.LDS: "LDS"}  # of runs in log messages, where not the stage's own


class Outcome(NamedTuple):
    """What a stage gives back.

    Attributes:
        run_id: the run that holds the result.
        reused: whether it was there already.
    """

    run_id: str
    reused: bool


def reuse(
    stage: str, fingerprint: str, title: str, inputs: Mapping[str, str], same: str, *, force: bool, may_point: bool
) -> Outcome | None:
    """The FINISHED run with the same fingerprint, if there is one and it may be taken.

    Args:
        stage: name of the stage.
        fingerprint: identity of the result.
        title: name of the run that would be made.
        inputs: upstream run IDs by parameter name.
        same: what the two have in common, for the log.
        force: take none.
        may_point: see :func:`train_stage`.
    """
    found = None if force else find_finished(stage, fingerprint)
    if found is None:
        return None
    logger.info("reusing %s run %s (same %s)", LOGGED_NAMES.get(stage, stage), found, same)
    if may_point:
        point_to(stage, found, title, inputs)
    return Outcome(found, reused=True)


def train_stage(
    problem: Problem, *, force: bool = False, may_point: bool = False, reproduces: str | None = None
) -> Outcome:
    """Train and record, or find the FINISHED run with the same fingerprint, or go on with an interrupted one.

    Args:
        problem: config, task and data.
        force: train from the start even where there is such a run.
        may_point: whether this is the stage that was asked for, so that under ``mlflow run`` the run that MLflow made
            points to the one that is reused or gone on with.
        reproduces: the recorded run that is trained again.

    Raises:
        TrackedReplayError: naming what was wrong; the run is then FAILED.
    """
    fingerprint = problem.fingerprint(names.TRAIN, SECTIONS, {})
    title = f"train · {problem.task.name} · seed {problem.config.seed}"
    found = reuse(names.TRAIN, fingerprint, title, {}, "config, data and code", force=force, may_point=may_point)
    if found is not None:
        return found
    with task_errors(problem.config):
        # Before the run starts: a device that is not there, a batch that is too large or a budget that is too small
        # leaves no run behind.
        setup = set_up(problem.config, problem.task, problem.data)
        checkpoint_distance(setup)
        generators = capture_generator_states()
        with ExitStack() as held:
            resume, unfinished = (None, None) if force else _interrupted(fingerprint, setup, held)
            with stage_run(names.TRAIN, fingerprint, title, {}, resume) as run:
                if reproduces is not None:
                    run.tag({names.REPRODUCES: reproduces})
                _train(problem, setup, run, generators, unfinished)
        if resume is not None and may_point:
            point_to(names.TRAIN, resume, title, {})
        return Outcome(run.run_id, reused=False)


def _interrupted(fingerprint: str, setup: TrainingSetup, held: ExitStack) -> tuple[str | None, Unfinished | None]:
    """The newest interrupted run of a training that has a state to go on from here; ``held`` keeps the claim to it."""
    for run_id in find_interrupted(names.TRAIN, fingerprint):
        if not held.enter_context(claimed(run_id)):
            continue
        folder = Workspace.of(run_id).folder
        unfinished = find_unfinished(folder)
        if unfinished is None:
            continue
        if _repeats(setup, folder, unfinished):
            return run_id, unfinished
        logger.warning("the interrupted training run %s is left alone: its bits are not repeated here", run_id)
    return None, None


def _repeats(setup: TrainingSetup, folder: Path, unfinished: Unfinished) -> bool:
    """Whether a step before the interruption, taken again, leads to the recorded state.

    A recording whose parts were computed by machines of different bits could be replayed on neither.
    """
    digests = [*(row.digest for row in unfinished.rows), state_digest(unfinished.state)]
    try:
        restore_generator_states(unfinished.generators)
        earlier = find_unfinished(folder, before=unfinished.state.step)
        if earlier is None:
            return state_digest(setup.initial) == digests[0]
        restore_generator_states(earlier.generators)
        (after, _), _ = setup.take(earlier.state.to(setup.device))
    except TrackedReplayError:
        return False
    return state_digest(after) == digests[after.step]


def open_recording(run_id: str) -> Recording:
    """The recording of a finished training run. Raises RunError."""
    run = resolve(run_id, names.TRAIN, "train_run_id")
    identity = tag_of(run, names.DIGESTS)
    if identity is None:
        raise RecordingError(f"train_run_id: run {run_id} has no tag {names.DIGESTS}, so its files cannot be checked")
    return Recording(artifacts_of(run.info.run_id), identity)


def _train(
    problem: Problem, setup: TrainingSetup, run: StageRun, generators: GeneratorStates, unfinished: Unfinished | None
) -> None:
    plan = setup.plan
    state = setup.initial if unfinished is None else unfinished.state.to(setup.device)
    how = "training" if unfinished is None else _going_on(state.step)
    logger.info("%s %d steps of %d examples, run %s", how, plan.steps, problem.config.train.batch_size, run.run_id)
    log_problem(problem, run)
    if problem.config.record.budget:
        every = checkpoint_distance(setup)
        run.params({"record_every_used": every})
        logger.info("keeping %d states, one every %d steps (record.budget)", len(checkpoint_steps(setup)), every)
    workspace = Workspace.of(run.run_id)
    curves = _Curves(problem, setup, run)
    restore_generator_states(generators)  # MLflow draws a run's name, where it was not given a run
    if unfinished is None:
        require_functional(setup)
    with workspace.opened() as root, Recorder(root, setup, unfinished) as recorder:
        _describe_data(problem, root)
        for row in () if unfinished is None else unfinished.rows:
            curves.step(row.step, row.loss)
        curves.end_of_epoch(state)
        for record in progress(train(setup, start=state), plan.steps, "train", done=state.step):
            recorder.add(record)
            state = record.after
            curves.step(record.before.step, record.loss)
            curves.end_of_epoch(state)
        _figure(root, setup, curves)
        run.describe(_description(problem, setup, curves, run.run_id, run.link("figures/training.png")))
        run.tag({names.DIGESTS: recorder.finish(state)})
        workspace.publish()


def _going_on(step: int) -> str:
    if not step:
        return "an interrupted training had kept no step yet and begins again:"
    return f"going on at step {step} of an interrupted training of"


class _Curves:
    """The metrics of a training, step by step and epoch by epoch."""

    def __init__(self, problem: Problem, setup: TrainingSetup, run: StageRun) -> None:
        self._problem, self._setup, self._run = problem, setup, run
        self.losses = np.empty(setup.plan.steps)
        self.accuracies: dict[int, float] = run.history(ACCURACY) if run.resumed else {}

    def step(self, t: int, loss: float) -> None:
        """Note the loss and the learning rates of a step."""
        self.losses[t] = loss
        self._run.metric("train/loss", loss, t)
        for group, rate in zip(self._setup.step.groups, self._setup.plan.learning_rates[t], strict=True):
            self._run.metric(f"lr/{group.name}", rate, t)

    def end_of_epoch(self, state: State) -> None:
        """Evaluate and send the metrics, if the state is the last of an epoch."""
        epochs, t = self._setup.plan.epochs, state.step
        last = t == len(epochs)
        if t == 0 or not (last or epochs[t] != epochs[t - 1]):
            return
        epoch = int(epochs[t - 1])
        # An interruption may have lost the metrics of earlier ones.
        for past in range(0 if self._run.resumed else epoch, epoch + 1):
            self._run.metric("epoch/train_loss", self.losses[epochs == past].mean(), past)
        every = self._problem.config.record.evaluate_every
        if last or (every and (epoch + 1) % every == 0):
            self._evaluate(state, epoch)
        self._run.flush()

    def _evaluate(self, state: State, epoch: int) -> None:
        # On a seed of its own: a model that draws numbers when it is evaluated does not change the training.
        seed = derive_component_seed(self._problem.config.seed, "evaluation", epoch)
        with deterministic_context(seed, "evaluation"):
            evaluation = evaluate(self._setup, state)
        self._run.metric("epoch/evaluation_measurement", float(evaluation.measurements.mean()), epoch)
        accuracy = evaluation.accuracy(self._setup.data.evaluation.labels)
        if accuracy is not None:
            self._run.metric(ACCURACY, accuracy, epoch)
            self.accuracies[epoch] = accuracy


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
    indices, true_labels = data.flipped
    if len(indices):
        labels = data.train.labels.cpu().numpy()[indices]
        flipped = pa.table({"train_index": indices, "label": labels, "true_label": true_labels})
        write_aside(root / FLIPPED, lambda temporary: pq.write_table(flipped, temporary))
    if problem.config.data.task in BUILT_IN_TASKS:
        return
    shutil.rmtree(root / TASK_COPY, ignore_errors=True)
    (root / TASK_COPY).mkdir(parents=True)
    for place, path in enumerate(problem.task.source_files()):
        copy = root / TASK_COPY / path.name
        shutil.copyfile(path, copy if not copy.exists() else copy.with_name(f"{place}-{path.name}"))


def _description(problem: Problem, setup: TrainingSetup, curves: _Curves, run_id: str, look: str) -> str:
    plan, config, data = setup.plan, problem.config, problem.data
    last = plan.epochs == plan.epochs[-1]
    numbers = [f"mean training loss in the last epoch {curves.losses[last].mean():.4g}"]
    if curves.accuracies:
        accuracy = curves.accuracies[max(curves.accuracies)]
        numbers.insert(0, f"**accuracy {accuracy:.1%}** on {data.num_evaluation} evaluation examples")
    # The first lines are what MLflow shows before "Show more".
    lines = [
        f"A deterministic training of {report.markdown_text(problem.task.name)}, recorded so that it can be replayed "
        f"and trained again bit for bit: {', '.join(numbers)}.\n",
        f"- {plan.steps} steps of {config.train.batch_size} examples out of {data.num_train}, "
        f"{config.train.epochs} epochs, master seed {config.seed}, {config.train.dtype} on {config.train.device}",
        f"- to look at: {look} among the artifacts",
        f"- next: `tracked-replay magic --train-run-id {run_id} --targets 0-7`",
    ]
    return "\n".join(lines)


def _figure(root: Path, setup: TrainingSetup, curves: _Curves) -> None:
    plan = setup.plan
    ends = np.flatnonzero(np.diff(plan.epochs, append=plan.epochs[-1] + 1))  # the last step of each epoch
    evaluated = sorted(curves.accuracies)
    figure = report.training_figure(
        np.arange(plan.steps),
        curves.losses,
        plan.learning_rates,
        ends[evaluated] if evaluated else ends,
        [curves.accuracies[epoch] for epoch in evaluated] or None,
    )
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
