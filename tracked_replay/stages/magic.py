"""Stage ``magic``: the exact influence of every training example on the targets, by replaying a recorded training."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from tracked_replay import report
from tracked_replay.config import Config, parse_overrides
from tracked_replay.errors import ConfigError, DataError, NumericalError, ReplayError
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, state_digest, write_json, write_text
from tracked_replay.recording.journal import FOLDER as RESUME
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import (
    CompilingAdjoint,
    PerStepWriter,
    Replay,
    SavedReplay,
    ScoreSum,
    Target,
    check_derivatives,
    combine,
    curves,
    influence_table,
    load_replay,
    parse_targets,
    save_replay,
    write_influence,
)
from tracked_replay.replay.plan import Plan
from tracked_replay.replay.scores import INFLUENCE, PER_STEP, TARGETS
from tracked_replay.replay.states import choose_plan, require_budget
from tracked_replay.stages.along_training import log_along_training
from tracked_replay.stages.influence_report import (
    PAGE,
    SHOWN_OF_A_MEAN,
    extremes,
    key_of,
    training_picture,
    write_magic_report,
)
from tracked_replay.stages.pictures import enlarged, thumbnail, tiled
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.train import DATA, Outcome, log_problem, open_recording, reuse, save_figure, train_stage
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.tracking import (
    StageRun,
    Workspace,
    claimed,
    find_finished,
    find_interrupted,
    names,
    point_to,
    resolve,
    stage_run,
    ui_path,
)
from tracked_replay.training import State, TrainingSetup, evaluate, set_up

logger = logging.getLogger(__name__)

SECTIONS = ("seed", "data", "model", "train", "record", "replay", "report")
REPLAY_SECTIONS = ("replay", "report")
MEASURED_ALONE = 8  # examples whose measurement is taken once by itself, as a check
FIGURES = 32  # targets that get figures of their own
SECONDS_BETWEEN_SAVES = 30.0
CURVES = 5  # helpful and harmful examples in a figure over training time
DESCRIBED = 12  # targets in the run's description


def magic_stage(
    problem: Problem,
    targets: Sequence[Target],
    train_run_id: str | None,
    *,
    force: bool = False,
    may_point: bool = True,
) -> Outcome:
    """Replay a recorded training (trained first where no run is named and none matches).

    Args:
        problem: config, task and data.
        targets: what influence is asked on.
        train_run_id: the recording; ``None`` looks for a match or trains.
        force: replay even where a FINISHED run with the same fingerprint exists (and train again, where no run is
            named).
        may_point: see :func:`~tracked_replay.stages.train.train_stage`.
    """
    with task_errors(problem.config):
        return _magic_stage(problem, targets, train_run_id, force=force, may_point=may_point)


def _magic_stage(
    problem: Problem, targets: Sequence[Target], train_run_id: str | None, *, force: bool, may_point: bool
) -> Outcome:
    title = f"magic · {problem.task.name} · {len(targets)} target{'s' if len(targets) != 1 else ''}"
    known = train_run_id or (None if force else matching_training(problem))
    if known is not None:
        if train_run_id is None:
            logger.info("reusing training run %s (same config, data and code)", known)
        fingerprint = magic_fingerprint(problem, targets, known)
        inputs, same = {"train_run_id": known}, "training run, targets, config and code"
        found = reuse(names.MAGIC, fingerprint, title, inputs, same, force=force, may_point=may_point)
        if found is not None:
            return found
        recording = open_recording(known)
        setup = checked_setup(problem, recording)
        with ExitStack() as held:
            resume, saved = (None, None) if force else _interrupted(fingerprint, setup, held)
            plan = choose_plan(problem.config.replay.mode, setup, recording, None if saved is None else saved.step)
            with stage_run(names.MAGIC, fingerprint, title, inputs, resume) as run:
                _magic(problem, setup, recording, targets, known, run, plan, saved)
        if resume is not None and may_point:
            point_to(names.MAGIC, resume, title, inputs)
        return Outcome(run.run_id, reused=False)
    # A device that is not there, or a budget that is too small, leaves no run behind.
    require_budget(set_up(problem.config, problem.task, problem.data))
    with stage_run(names.MAGIC, None, title, {}) as run:
        trained = train_stage(problem, force=force).run_id
        run.tag({f"{names.INPUT}train_run_id": trained})
        run.identify(magic_fingerprint(problem, targets, trained))
        recording = open_recording(trained)
        setup = checked_setup(problem, recording)
        plan = choose_plan(problem.config.replay.mode, setup, recording)
        _magic(problem, setup, recording, targets, trained, run, plan)
        return Outcome(run.run_id, reused=False)


def _interrupted(fingerprint: str, setup: TrainingSetup, held: ExitStack) -> tuple[str | None, SavedReplay | None]:
    """The newest interrupted run of a replay that saved how far it was; ``held`` keeps the claim to it."""
    for run_id in find_interrupted(names.MAGIC, fingerprint):
        if not held.enter_context(claimed(run_id)):
            continue
        saved = load_replay(Workspace.of(run_id).folder / RESUME, setup.device)
        if saved is not None:
            return run_id, saved
    return None, None


def matching_training(problem: Problem) -> str | None:
    """The finished ``train`` run of the same config, data and code, if there is one."""
    return find_finished(names.TRAIN, problem.fingerprint(names.TRAIN, TRAIN_SECTIONS, {}))


def magic_fingerprint(problem: Problem, targets: Sequence[Target], train_run_id: str) -> str:
    """Identity of the scores of some targets on a recorded training."""
    return problem.fingerprint(
        names.MAGIC,
        SECTIONS,
        {"train_run_id": train_run_id},
        targets=[target.to_json_dict() for target in targets],
    )


def checked_setup(problem: Problem, recording: Recording) -> TrainingSetup:
    """The setup of the recorded run, if this is still its data and its step.

    Raises:
        DataError: the data are not those that were trained on.
        ReplayError: a step taken here differs from the recorded one.
    """
    setup = recorded_setup(problem, recording)
    _check_steps(setup, recording)
    return setup


def recorded_setup(problem: Problem, recording: Recording) -> TrainingSetup:
    """As :func:`checked_setup`, without taking a step. Raises DataError."""
    with recording.open(DATA) as path:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded["fingerprint"] != problem.data_fingerprint:
        raise DataError(
            f"the data differ from those of the training run: their fingerprint is {problem.data_fingerprint[:16]}…, "
            f"recorded was {recorded['fingerprint'][:16]}… "
            f"({recorded['train_examples']} training and {recorded['evaluation_examples']} evaluation examples)"
        )
    return set_up(problem.config, problem.task, problem.data)


def _check_steps(setup: TrainingSetup, recording: Recording) -> None:
    """Take a few recorded steps again: the loss and model that are differentiated must be those that were trained."""
    digests = (*recording.trace.state_digests, recording.final.digest)
    starts = recording.checkpoints[:-1]
    for place in sorted({0, len(starts) // 2, len(starts) - 1}):
        checkpoint = starts[place]
        (after, _), _ = setup.take(recording.state(checkpoint).to(setup.device))
        if state_digest(after) != digests[after.step]:
            raise ReplayError(
                f"step {checkpoint.step}: taken again from its checkpoint it leads to another state than was recorded; "
                f"the task's code, a library, the processor, the device or the number of threads is not the one of the "
                f"training run, or its train.reproducibility is not full"
            )


def _magic(
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    targets: Sequence[Target],
    train_run_id: str,
    run: StageRun,
    plan: Plan,
    saved: SavedReplay | None = None,
) -> None:
    config = problem.config
    log_problem(problem, run)
    if run.resumed:
        run.discard("tables", "images")
    exact = config.replay.exact
    run.tag({names.EXACT: str(exact).lower()})
    # A resumed replay keeps the first choice, which is logged already.
    run.params({"targets_count": len(targets)} | ({} if run.resumed else _plan_params(plan, recording)))
    values = _measurements(setup, recording, targets)
    total = ScoreSum(targets, problem.data.num_train, recording.trace.steps)
    workspace = Workspace.of(run.run_id)
    with tempfile.TemporaryDirectory(prefix="tracked-replay-magic-") as folder, workspace.opened(RESUME) as aside:
        root = Path(folder)
        write_text(root / CONFIG, config.to_toml())
        held = _held_derivatives(setup, recording, targets, run) if exact else "not held against finite differences"
        adjoint = CompilingAdjoint(setup.step, config.replay, steps=recording.trace.steps)
        _replay(setup, recording, targets, adjoint, plan, total, aside, saved, run)
        labels = problem.data.train.labels.cpu().numpy()
        write_influence(root, influence_table(targets, total.scores, labels))
        write_json(root / TARGETS, [target.to_json_dict() | {"measurement": value} for target, value in values])
        for t, value in enumerate(total.absolute.mean(axis=0)):
            run.metric("influence_by_step/absolute_sum", value, t)
        run.metric("measurement/mean_over_targets", float(np.mean([value for _, value in values])))
        if not exact:
            for name, count in dataclasses.asdict(adjoint.clips).items():
                run.metric(f"clip/steps_{name}", count)
        _figures(root, aside, problem, recording, values, total)
        write_magic_report(root, aside, problem, setup, recording, values, total, train_run_id, run)
        pictures = {target: _target_picture(problem, target, value) for target, value in values[:FIGURES]}
        for place, picture in enumerate(pictures.values()):
            run.image(enlarged(picture.pixels), key="targets", step=place)
        log_along_training(run, aside, problem, pictures, recording.trace.steps)
        run.table(_top_examples(root, problem, targets, total.scores), "tables/top_examples.json")
        how = f"{plan.mode} mode{', compiled' if adjoint.compiled else ''}"
        run.describe(_description(problem, values, total.scores, train_run_id, run.run_id, how, exact, held))
        if config.replay.per_step:
            shutil.copytree(aside / PER_STEP, root / PER_STEP)
        publish(run, root)


def _held_derivatives(setup: TrainingSetup, recording: Recording, targets: Sequence[Target], run: StageRun) -> str:
    """Hold derivatives of a step in the middle against finite differences; says what came of it. Raises ReplayError."""
    starts = recording.checkpoints[:-1]
    before, final = (
        recording.state(checkpoint).to(setup.device) for checkpoint in (starts[len(starts) // 2], recording.final)
    )
    found = check_derivatives(setup, before, final, targets)
    if found.deviation is None:
        logger.warning("derivatives could not be held against finite differences: %s", found.why)
        return f"not held against finite differences: {report.markdown_text(found.why)}"
    run.metric("checks/derivative_deviation", found.deviation)
    return f"held against finite differences ({found.deviation:.1g} apart)"


def _plan_params(plan: Plan, recording: Recording) -> dict[str, object]:
    return {
        "replay_mode_used": plan.mode,
        "replay_plan_keeps": plan.keeps,
        "replay_plan_states": plan.held,
        "replay_plan_bytes": plan.held * recording.final.bytes,
        "replay_plan_needed_steps": plan.needed,
        "replay_plan_recomputed_steps": plan.recomputed,
    }


def _replay(
    setup: TrainingSetup,
    recording: Recording,
    targets: Sequence[Target],
    adjoint: CompilingAdjoint,
    plan: Plan,
    total: ScoreSum,
    aside: Path,
    saved: SavedReplay | None,
    run: StageRun,
) -> None:
    """Fill ``total``, and ``aside`` with the scores of each step; save now and then how far it is."""
    steps, done = recording.trace.steps, 0
    per_step = PerStepWriter(aside, targets)
    position = None
    if saved is not None:
        saved.restore(total, per_step, adjoint.clips)
        adjoint.chosen = saved.compiled
        position, done = (saved.step, saved.cotangents), steps - saved.step
        if saved.step:
            logger.info("going on at step %d of an interrupted replay, run %s", saved.step, run.run_id)
        else:
            logger.info("going on with an interrupted replay that had come to the first step, run %s", run.run_id)
    what = _plan_in_words(plan, setup, recording)
    whose = f"{len(targets)} target{'s' if len(targets) != 1 else ''}"
    logger.info("replaying %d steps for %s (%s mode): %s", steps - done, whose, plan.mode, what)
    started = last_saved = time.perf_counter()
    replay = Replay(setup, recording, targets, adjoint, plan, position)
    taken = iter(replay)
    first = list(islice(taken, 1))  # may compile, which says nothing of the time that the others take
    others = progress(taken, steps, f"replay ({plan.mode})", done=done + len(first))
    for count, step in enumerate(chain(first, others)):
        total.add(step)
        per_step.add(step)
        if not count:
            _log_choices(adjoint, run)
        if time.perf_counter() - last_saved >= SECONDS_BETWEEN_SAVES:
            save_replay(aside, replay, total, per_step, adjoint)
            last_saved = time.perf_counter()
    per_step.flush()
    run.metric("replay/seconds", time.perf_counter() - started)


def _log_choices(adjoint: CompilingAdjoint, run: StageRun) -> None:
    """What the first step has decided."""
    run.params({"replay_targets_at_once_used": adjoint.together, "replay_compile_used": adjoint.compiled})
    if adjoint.deviation is not None:
        run.metric("checks/compiled_deviation", adjoint.deviation)
        run.metric("replay/compile_seconds", adjoint.seconds)


def _plan_in_words(plan: Plan, setup: TrainingSetup, recording: Recording) -> str:
    words, again = plan.describe(recording.final.bytes), plan.needed + plan.recomputed
    if not again:
        return words
    started = time.perf_counter()  # others were taken before, so that nothing is made for the first time
    setup.take(setup.initial)
    return f"{words}, in about {again * (time.perf_counter() - started):.1f} s"


def _measurements(setup: TrainingSetup, recording: Recording, targets: Sequence[Target]) -> list[tuple[Target, float]]:
    final = recording.state(recording.final).to(setup.device)
    measured = evaluate(setup, final).measurements
    values = list(zip(targets, combine(targets, measured).tolist(), strict=True))
    for target, value in values:
        if not math.isfinite(value):
            raise NumericalError(f"target {target.name}: its measurement after the last step is {value}")
    for index in sorted({target.indices[0] for target in targets})[:MEASURED_ALONE]:
        _require_own_measurement(setup, final, index, float(measured[index]))
    return values


@torch.no_grad()
def _require_own_measurement(setup: TrainingSetup, final: State, index: int, together: float) -> None:
    """An example's measurement may not depend on which others it is evaluated with; else it has no influence."""
    batch = setup.data.evaluation_batch(torch.tensor([index]))
    outputs = functional_call(setup.step.model.eval(), final.model_tensors, (batch.inputs,))
    alone = float(setup.task.measurement(outputs, batch.labels))
    if not math.isclose(alone, together, rel_tol=1e-3, abs_tol=1e-4):
        raise ReplayError(
            f"the measurement of evaluation example {index} is {alone:g} alone and {together:g} among others: a layer "
            f"mixes examples in eval mode (BatchNorm without running statistics?); allowed: each example by itself"
        )


def _top_examples(root: Path, problem: Problem, targets: Sequence[Target], scores: np.ndarray) -> dict[str, list[Any]]:
    """The table of the strongest examples; their thumbnails are written under ``root``."""
    label_names, labels = problem.task.label_names, problem.data.train.labels.cpu().numpy()
    rows: dict[str, list[Any]] = {
        name: [] for name in ("target", "effect", "rank", "picture", "train_index", "label", "label_name", "score")
    }
    for target, values in zip(targets, scores, strict=True):
        sides = zip(("helps", "harms"), extremes(values, problem.config.report.examples), strict=True)
        for effect, found in sides:
            for rank, index in enumerate(found, start=1):
                label = int(labels[index])
                picture = thumbnail(root, problem, int(index))
                row = (target.name, effect, rank, picture, int(index), label, label_names[label], float(values[index]))
                for column, value in zip(rows.values(), row, strict=True):
                    column.append(value)
    return rows


def _target_picture(problem: Problem, target: Target, value: float) -> report.Picture:
    """An evaluation example, or, for a combination of several, its first ones side by side."""
    examples, chosen = problem.data.evaluation, target.indices[:SHOWN_OF_A_MEAN]
    pictures = [problem.task.draw(examples.inputs[index].cpu()) for index in chosen]
    label = problem.task.label_names[int(examples.labels[chosen[0]])]
    if len(target.indices) == 1:
        return report.Picture(pictures[0], label, chosen[0], value)
    caption = f"first {len(chosen)} of {len(target.indices)} examples"
    return report.Picture(tiled(pictures), target.name, target.id, value, caption)


def _figures(
    root: Path,
    per_step_root: Path,
    problem: Problem,
    recording: Recording,
    values: Sequence[tuple[Target, float]],
    total: ScoreSum,
) -> None:
    data, trace, scores = problem.data, recording.trace, total.scores
    steps = np.arange(trace.steps)
    targets = [target for target, _ in values]
    if len(targets) > FIGURES:
        logger.info("figures for the first %d of %d targets; all scores are in %s", FIGURES, len(targets), INFLUENCE)
    for (target, value), found in progress(
        zip(values[:FIGURES], scores, strict=False), min(len(values), FIGURES), "figures", "target"
    ):
        helpful, harmful = extremes(found, problem.config.report.examples)
        if not len(helpful) and not len(harmful):
            logger.warning("target %s: no training example has any influence on it, so it gets no figure", target.name)
            continue
        about = f"evaluation example {target.name}" if len(target.indices) == 1 else target.name
        figure = report.extremes_figure(
            _target_picture(problem, target, value),
            [training_picture(problem, int(i), found[i]) for i in helpful],
            [training_picture(problem, int(i), found[i]) for i in harmful],
            f"Influence on the measurement of {about}",
        )
        save_figure(root, f"target-{key_of(target)}-extremes", figure)
        chosen = [*helpful[:CURVES], *harmful[:CURVES]]
        along = curves(per_step_root, target, chosen, trace.steps)
        names_of = [f"{index} ({problem.task.label_names[int(data.train.labels[index])]})" for index in chosen]
        split = len(helpful[:CURVES])
        figure = report.influence_over_training_figure(
            along[:split],
            along[split:],
            steps,
            trace.learning_rates,
            f"Target {target.name}: cumulative influence along training",
            helpful_labels=names_of[:split],
            harmful_labels=names_of[split:],
            losses=trace.losses,
        )
        save_figure(root, f"target-{key_of(target)}-over-training", figure)
    histogram = {target.name: found for target, found in zip(targets, scores, strict=True)}
    save_figure(root, "score-histogram", report.score_histogram_figure(histogram, "Influence scores"))
    share = report.influence_share_over_training_figure(total.absolute, [target.name for target in targets], steps)
    save_figure(root, "influence-share-over-training", share)


def _description(
    problem: Problem,
    values: Sequence[tuple[Target, float]],
    scores: np.ndarray,
    train_run_id: str,
    run_id: str,
    how: str,
    exact: bool,
    held: str,
) -> str:
    kind = "**Exact influence**" if exact else "**Inexact influence** (clipping was on)"
    lines = ["| target | label | measurement | helps most | harms most |", "|---|---|---|---|---|"]
    for (target, value), found in zip(values[:DESCRIBED], scores, strict=False):
        sides = (_in_words(problem, side, found) for side in extremes(found, 1))
        lines.append(f"| {target.name} | {_label_of(problem, target)} | {value:.6g} | {' | '.join(sides)} |")
    if len(values) > DESCRIBED:
        lines.append(f"| … | {len(values) - DESCRIBED} more | | | |")
    # The first lines are what MLflow shows before "Show more".
    return (
        f"{kind} of each of the {problem.data.num_train} training examples of "
        f"{report.markdown_text(problem.task.name)} on {len(values)} target{'s' * (len(values) != 1)}: "
        f"[open the report]({ui_path(run_id, PAGE)}). A positive score means that the example raises the measurement "
        f"(for a loss: it harms).\n\n{names.HELD} not yet.\n\n"
        + "\n".join(lines)
        + f"\n\n- to look at: `{PAGE}` among the artifacts; under *Model metrics* "
        f"`target-{key_of(values[0][0])}-along-training`: the strongest examples so far, with a slider over the "
        f"training's steps, below the parameters that MLflow puts into the same tile\n"
        f"- training run: [{train_run_id}]({ui_path(train_run_id)})\n"
        f"- replay: {how}, {problem.config.train.dtype}, every state checked against its recorded digest, "
        f"derivatives {held}\n"
        f'- scores: `{INFLUENCE}`; in Python `tracked_replay.load_scores("{run_id}")`\n'
        f"{names.UNTRIED} `tracked-replay lds --magic-run-id {run_id}`\n"
    )


def _label_of(problem: Problem, target: Target) -> str:
    """What a target is labelled, in a cell of a Markdown table."""
    if len(target.indices) > 1:
        return f"{len(target.indices)} examples"
    return _cell(problem.task.label_names[int(problem.data.evaluation.labels[target.indices[0]])])


def _cell(label: str) -> str:
    return report.markdown_text(report.plain_text(label, 60))


def _in_words(problem: Problem, strongest: np.ndarray, scores: np.ndarray) -> str:
    """The strongest example of a side, in a cell of a Markdown table."""
    if not len(strongest):
        return "none"
    index = int(strongest[0])
    label = problem.task.label_names[int(problem.data.train.labels[index])]
    return f"#{index} ({_cell(label)}) {scores[index]:+.3g}"


def require_fields(pairs: Mapping[str, Any], sections: Sequence[str], parameter: str, run_id: str) -> None:
    """Check that overrides of a recorded config stay in some sections. Raises ConfigError."""
    for name in pairs:
        if name.split(".")[0] not in sections and name != "data.root":
            raise ConfigError(
                f"{name}: cannot be changed for the recorded run {run_id}; allowed with {parameter}: fields of "
                f"{' and '.join(sections)}, and data.root"
            )


def run_magic(
    train_run_id: str | None = None,
    targets: str | int | Sequence[int] = "0",
    *,
    config: Config | None = None,
    overrides: str | dict[str, Any] = "",
    data_root: str | None = None,
    force: bool = False,
) -> str:
    """Exact influence of all training examples on the targets.

    Args:
        train_run_id: a finished ``train`` run; its recorded config holds, and ``overrides`` may change ``replay.*``
            and ``report.*`` only. Where it is ``None``, a matching run is reused or one is trained.
        targets: see :func:`~tracked_replay.replay.parse_targets`.
        config: what to train, where no run is named; the digits preset where it is ``None``.
        overrides: changes to the config.
        data_root: where the data are now.
        force: compute even where a FINISHED run with the same fingerprint exists.

    Returns:
        The ID of the MLflow run that holds the scores.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    pairs = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    if train_run_id:
        if config is not None:
            raise ConfigError("config: a config and train_run_id were both given; allowed: one of them")
        require_fields(pairs, REPLAY_SECTIONS, "train_run_id", train_run_id)
        config = open_recording(train_run_id).config
        train_run_id = resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id
    config = (config or Config.resolve()).override(pairs | ({"data.root": data_root} if data_root else {}))
    problem = Problem.load(config)
    chosen = parse_targets(targets, problem.data.num_evaluation)
    return magic_stage(problem, chosen, train_run_id, force=force).run_id
