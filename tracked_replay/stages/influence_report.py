"""The page ``report/index.html`` of ``magic`` and ``lds`` runs, put together from what they found."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.func import functional_call

from tracked_replay import report
from tracked_replay.lds import Correlation, Subset
from tracked_replay.lds.metasmoothness import sentence
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_text
from tracked_replay.recording.recorder import ENVIRONMENT
from tracked_replay.replay import ScoreSum, Target
from tracked_replay.replay.scores import PER_STEP
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.problem import Problem
from tracked_replay.tasks import Task
from tracked_replay.tracking import StageRun, names, ui_hint
from tracked_replay.training import TrainingSetup

logger = logging.getLogger(__name__)

PAGE = "report/index.html"
SHOWN_TARGETS = 32
SHOWN_OF_A_MEAN = 6
ACCURACY = "epoch/evaluation_accuracy"


@dataclass(frozen=True, eq=False)
class Found:
    """Scores and what is known about the training behind them.

    Attributes:
        problem: config, task and data.
        setup: of the recorded run.
        recording: the recorded run.
        targets: all of them.
        measurements: (targets,) of the recorded run.
        scores: (targets, training examples).
        exact: whether the scores are exact.
        runs: run IDs by stage.
    """

    problem: Problem
    setup: TrainingSetup
    recording: Recording
    targets: Sequence[Target]
    measurements: Sequence[float]
    scores: np.ndarray
    exact: bool
    runs: Mapping[str, str]


def write_magic_report(
    root: Path,
    per_step_root: Path,
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    values: Sequence[tuple[Target, float]],
    total: ScoreSum,
    train_run_id: str,
    run: StageRun,
) -> None:
    """Write the page of a ``magic`` run.

    Args:
        root: folder that is logged as the run's artifacts.
        per_step_root: folder that holds ``scores/per_step``.
        problem: config, task and data.
        setup: of the recorded run.
        recording: the recorded run.
        values: targets and their measurements.
        total: scores and the influence of each step.
        train_run_id: the recorded run.
        run: the run.
    """
    runs = {names.TRAIN: train_run_id, names.MAGIC: run.run_id}
    targets, measurements = [target for target, _ in values], [value for _, value in values]
    found = Found(problem, setup, recording, targets, measurements, total.scores, problem.config.replay.exact, runs)

    write_text(root / PAGE, report.influence_page(_page(found, per_step_root=per_step_root, absolute=total.absolute)))


def write_lds_report(
    root: Path,
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    influence: Influence,
    subsets: Sequence[Subset],
    predicted: np.ndarray,
    actual: np.ndarray,
    table: Mapping[float, Mapping[str, Correlation]],
    smoothness: float | None,
    run: StageRun,
) -> None:
    """Write the page of an ``lds`` run: the scores of its ``magic`` run, and how far they can be trusted.

    Args:
        root: folder that is logged as the run's artifacts.
        problem: config, task and data.
        setup: of the recorded run.
        recording: the recorded run.
        influence: the scores.
        subsets: those that were retrained without.
        predicted: (subsets, targets) measurements that the scores predict.
        actual: (subsets, targets) measurements after retraining.
        table: correlations by share and method.
        smoothness: metasmoothness; ``None`` where it was not asked for.
        run: the run.
    """
    runs = {names.TRAIN: influence.train_run_id, names.MAGIC: influence.run_id, names.LDS: run.run_id}
    measurements = influence.measurements.tolist()
    found = Found(problem, setup, recording, influence.targets, measurements, influence.scores, influence.exact, runs)
    shares = np.array([subset.drop for subset in subsets])
    agreements = [
        report.Agreement(drop, method, one.mean, one.low, one.high, int((shares == drop).sum()))
        for drop, methods in table.items()
        for method, one in methods.items()
    ]
    validation = report.Validation(
        agreements, problem.config.lds.confidence, "" if smoothness is None else sentence(smoothness)
    )
    drop, methods = next(iter(table.items()))
    rows = shares == drop
    ranks = [one.spearman for one in methods[names.MAGIC].targets]
    retrained = [
        report.RetrainedTarget(drop, predicted[rows, place], actual[rows, place], rank)
        for place, rank in enumerate(ranks)
    ]
    write_text(root / PAGE, report.influence_page(_page(found, validation=validation, retrained=retrained)))


def extremes(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training indices of the most helpful (most negative) and the most harmful scores, strongest first."""
    order = np.argsort(scores, kind="stable")
    helpful = order[:count][scores[order[:count]] < 0]
    harmful = order[::-1][:count]
    return helpful, harmful[scores[harmful] > 0]


def key_of(target: Target) -> str:
    """A short name of a target for files and links: what people call a combination can be of any length and signs."""
    return str(target.id) if target.id >= 0 else f"combination-{-target.id}"


def measures_loss(task: Task) -> bool:
    """Whether the measurement is the loss, so that lower is better."""
    return type(task).measurement is Task.measurement


def _page(
    found: Found,
    *,
    per_step_root: Path | None = None,
    absolute: np.ndarray | None = None,
    validation: report.Validation | None = None,
    retrained: Sequence[report.RetrainedTarget] = (),
) -> report.InfluencePage:
    problem, targets = found.problem, found.targets
    predictions = _predictions(found)
    strongest = {
        target.id: extremes(scores, problem.config.report.examples)
        for target, scores in zip(targets[:SHOWN_TARGETS], found.scores, strict=False)
    }
    along: Mapping[int, np.ndarray] = {}
    if per_step_root is not None:
        both = {target: np.concatenate(sides) for target, sides in strongest.items()}
        along = courses(per_step_root, both, found.recording.trace.steps)
    shown = []
    for place, target in progress(
        list(enumerate(targets[:SHOWN_TARGETS])), min(len(targets), SHOWN_TARGETS), "report", "target"
    ):
        helpful, harmful = _examples(problem, strongest[target.id], found.scores[place], along.get(target.id))
        shown.append(
            report.InfluenceTarget(
                key=key_of(target),
                name=target.name,
                measurement=float(found.measurements[place]),
                pictures=[_evaluation_picture(problem, index) for index in target.indices[:SHOWN_OF_A_MEAN]],
                size=len(target.indices),
                prediction=predictions.get(target.indices[0]) if len(target.indices) == 1 else None,
                helpful=helpful,
                harmful=harmful,
                scores=found.scores[place],
                absolute=None if absolute is None else absolute[place],
                retrained=retrained[place] if retrained else None,
            )
        )
    labels = problem.data.train.labels.cpu().numpy()
    own = problem.data.evaluation.labels.cpu().numpy()
    classes = [int(own[t.indices[0]]) if len(t.indices) == 1 else t.name for t in targets]
    return report.InfluencePage(
        task=problem.task.name,
        targets=shown,
        targets_in_all=len(targets),
        training_examples=problem.data.num_train,
        steps=found.recording.trace.steps,
        accuracy=_accuracy(found.runs[names.TRAIN]),
        is_loss=measures_loss(problem.task),
        exact=found.exact,
        classes=report.class_influence(found.scores, labels, classes, problem.task.label_names),
        validation=validation,
        validate_command=f"tracked-replay lds --magic-run-id {found.runs[names.MAGIC]}",
        facts=_facts(found),
        links={run_id: url for run_id in found.runs.values() if (url := _url(run_id))},
    )


def courses(root: Path, examples: Mapping[int, np.ndarray], num_steps: int) -> dict[int, np.ndarray]:
    """Cumulative influence of some examples along training, for several targets in one pass over the files.

    Args:
        root: folder that holds ``scores/per_step``.
        examples: training indices by target ID.
        num_steps: steps of the training.

    Returns:
        By target ID, (examples, steps) float64: the sum over steps up to and including each.
    """
    found = {target: np.zeros((len(indices), num_steps)) for target, indices in examples.items()}
    for path in sorted((root / PER_STEP).glob("part-*.parquet")):
        table = pq.read_table(path).combine_chunks()
        lists = table["indices"].chunk(0)
        starts, held = lists.offsets.to_numpy(), lists.values.to_numpy()
        scores = table["scores"].chunk(0).values.to_numpy()
        for row, (step, target) in enumerate(zip(table["step"].to_numpy(), table["target"].to_numpy(), strict=True)):
            if target in found:
                part = slice(starts[row], starts[row + 1])
                # Which of the examples each of the batch is; a batch may hold one more than once.
                places, batch = np.nonzero(examples[target][:, None] == held[part])
                np.add.at(found[target][:, step], places, scores[part][batch])
    return {target: added.cumsum(axis=1) for target, added in found.items()}


def _examples(
    problem: Problem, strongest: tuple[np.ndarray, np.ndarray], scores: np.ndarray, along: np.ndarray | None
) -> tuple[list[report.InfluentialExample], list[report.InfluentialExample]]:
    """The strongest training examples of a target, those that help and those that harm."""
    helpful, harmful = strongest
    lines: Sequence[np.ndarray | None] = [None] * (len(helpful) + len(harmful)) if along is None else list(along)
    examples = [
        report.InfluentialExample(training_picture(problem, int(index), float(scores[index])), line)
        for index, line in zip((*helpful, *harmful), lines, strict=True)
    ]
    return examples[: len(helpful)], examples[len(helpful) :]


def training_picture(problem: Problem, index: int, score: float) -> report.Picture:
    """A training example with its score."""
    examples = problem.data.train
    label = problem.task.label_names[int(examples.labels[index])]
    return report.Picture(problem.task.draw(examples.inputs[index].cpu()), label, index, score)


def _evaluation_picture(problem: Problem, index: int) -> report.Picture:
    examples = problem.data.evaluation
    label = problem.task.label_names[int(examples.labels[index])]
    return report.Picture(problem.task.draw(examples.inputs[index].cpu()), label, index)


@torch.no_grad()
def _predictions(found: Found) -> dict[int, report.Prediction]:
    """What the trained model says about the targets of one example, where outputs are one value a class."""
    setup, label_names = found.setup, found.problem.task.label_names
    indices = [target.indices[0] for target in found.targets[:SHOWN_TARGETS] if len(target.indices) == 1]
    if not indices:
        return {}
    final = found.recording.state(found.recording.final).to(setup.device)
    batch = setup.data.evaluation_batch(torch.tensor(indices))
    outputs = functional_call(setup.step.model.eval(), final.model_tensors, (batch.inputs,))
    if outputs.ndim != 2 or outputs.shape[1] != len(label_names) or outputs.shape[1] < 2:
        return {}
    # Another loss may not make probabilities of the outputs.
    softmax = type(found.problem.task).per_example_loss is Task.per_example_loss
    best = outputs.argmax(1)
    probabilities = outputs.double().softmax(1).gather(1, best[:, None]).squeeze(1).tolist()
    return {
        index: report.Prediction(label_names[said], said == label, probability if softmax else None)
        for index, said, label, probability in zip(
            indices, best.tolist(), batch.labels.tolist(), probabilities, strict=True
        )
    }


def _accuracy(train_run_id: str) -> float | None:
    """Share of right predictions after the last epoch, as the training logged it."""
    history = StageRun(train_run_id).history(ACCURACY)
    return history[max(history)] if history else None


def _url(run_id: str) -> str | None:
    """Where a run's page is, if a server has it; a password in the tracking URI is left out."""
    hint = ui_hint(run_id)
    return re.sub(r"(?<=://)[^/@]*@", "", hint) if hint.startswith(("http://", "https://")) else None


def _facts(found: Found) -> list[report.Fact]:
    with found.recording.open(ENVIRONMENT) as path:
        environment = json.loads(path.read_text(encoding="utf-8"))
    config = found.problem.config
    what = {names.TRAIN: "Training run", names.MAGIC: "Influence run", names.LDS: "Validation run"}
    exact = "true" if found.exact else "false (clipping was on)"
    return [
        *(report.Fact(what[stage], run_id) for stage, run_id in found.runs.items()),
        report.Fact("Exact", exact, f"tag {names.EXACT}"),
        report.Fact("Digests", "verified", "every file and state that was read had the digest that was recorded"),
        report.Fact("Data", found.problem.data_fingerprint, "SHA-256 of the examples"),
        report.Fact("Code", found.problem.code, "SHA-256 of the source"),
        report.Fact("Master seed", str(config.seed), "all others are derived from it: seeds/derivations.json"),
        report.Fact("Training", _training_words(found)),
        report.Fact("Trained with", _environment_words(environment)),
    ]


def _training_words(found: Found) -> str:
    train = found.problem.config.train
    return (
        f"{found.recording.trace.steps:,} steps, {train.epochs:,} epochs, batches of {train.batch_size:,}, "
        f"{train.optimizer}, {train.dtype}"
    )


def _environment_words(environment: Mapping[str, Any]) -> str:
    """Versions and machine in one line, as far as they were recorded."""

    def value(section: str, name: str) -> Any:
        return environment.get(section, {}).get(name)

    devices, threads, python = value("cuda", "devices") or (), value("threads", "intra_op"), value("python", "version")
    words = [
        python and f"Python {python.split()[0]}",
        value("torch", "version") and f"torch {value('torch', 'version')}",
        value("platform", "description"),
        value("cpu", "model"),
        *(str(device.get("name", device)) if isinstance(device, dict) else str(device) for device in devices),
        threads and f"{threads} thread{'s' if threads != 1 else ''}",
        value("determinism", "mode") and f"determinism {value('determinism', 'mode')}",
    ]
    return ", ".join(str(word) for word in words if word) or "not recorded"
