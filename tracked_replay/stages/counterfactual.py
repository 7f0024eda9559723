"""Stage ``counterfactual``: remove or reweight named examples, retrain, and show predicted beside actual."""

from __future__ import annotations

import json
import logging
import math
import operator
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.config import Config
from tracked_replay.errors import ConfigError, RetrainingError
from tracked_replay.executors import InProcess
from tracked_replay.lds import RetrainingJob, predict, require_initial_model, require_no_empty_batch
from tracked_replay.recording import Recording, write_aside, write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import Target, combine, parse_targets
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.lds import matching_influence, require_recorded_measurements
from tracked_replay.stages.magic import checked_setup, magic_stage
from tracked_replay.stages.parameters import TARGETS
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.retrainings import examples_in_words, retrain_all, weights_in_words
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.stages.train import Outcome, log_problem, open_recording, reuse, save_figure
from tracked_replay.tracking import StageRun, artifacts_of, names, resolve, stage_run, tag_of, ui_path

logger = logging.getLogger(__name__)

OUTCOMES = "counterfactual/outcomes.parquet"
WEIGHTS = "counterfactual/weights.parquet"
TARGETS_FILE = "counterfactual/targets.json"
SHOWN = 50  # targets in the description
MANY_TIMES = 10  # of what happened: above, a share in percent is hard to read
INDEX = r"-?\d{1,18}"  # more digits name no example, and int() refuses thousands of them
REMOVE_FORMS = "indices (3,17,40-49), the path of a file with one index a line, or harmful:K@TARGET, helpful:K@TARGET"
WEIGHT_FORMS = "index=weight pairs such as 3=0,17=2.5, or the path of a JSON file {index: weight}"


class Counterfactual(NamedTuple):
    """Measurements of the targets after retraining with other weights.

    Attributes:
        predicted: (targets,) float64, what the scores predict.
        actual: (targets,) float64, what retraining gave.
    """

    predicted: np.ndarray
    actual: np.ndarray


def parse_remove(text: str, num_train: int, influence: Influence | None) -> dict[int, float]:
    """What ``remove`` takes, as weights of 0.

    Args:
        text: see ``REMOVE_FORMS``; ``harmful:20@3`` means the 20 most harmful examples for target 3.
        num_train: training examples.
        influence: scores for the last form.

    Raises:
        ConfigError: malformed, out of range or given twice.
    """
    ranked = re.fullmatch(r"(harmful|helpful):(\d{1,18})@(.+)", text.strip(), re.ASCII)
    if ranked:
        return _ranked(ranked[1], int(ranked[2]), ranked[3].strip(), influence)
    content = None if re.fullmatch(r"[\d\s,-]*", text) else _file_content("remove", text)
    content = None if content is None else re.sub(r"#.*", "", content)  # suspects/top.txt says what each example is
    indices: list[int] = []
    for item in text.split(",") if content is None else content.split():
        span = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", item, re.ASCII)
        if span is None:
            raise ConfigError(f"remove: found {_shown(item)}; allowed: {REMOVE_FORMS}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise ConfigError(f"remove: the range {item.strip()!r} runs backwards; allowed: {last}-{first}")
        _require_in_range("remove", last, num_train)
        indices += range(first, last + 1)
    if not indices:
        raise ConfigError(f"remove: the file {_shown(text)} names no example; allowed: one index a line")
    weights: dict[int, float] = {}
    for index in indices:
        if index in weights:
            raise ConfigError(f"remove: {index} is given twice")
        weights[index] = 0.0
    return weights


def _file_content(name: str, text: str) -> str | None:
    """Content of the file that a parameter names, or None where it names none. Raises ConfigError."""
    path = Path(text.strip())
    try:
        if not path.is_file():
            return None
    except OSError:  # a list of examples longer than a path can be
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{name}: the file {_shown(text)} cannot be read: {reason}") from None


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}…"


def _ranked(side: str, count: int, target_name: str, influence: Influence | None) -> dict[int, float]:
    if influence is None:
        raise ConfigError(f"remove: {side}:{count}@{target_name} needs the scores of a run; allowed: with magic_run_id")
    names_of = [target.name for target in influence.targets]
    if target_name not in names_of:
        raise ConfigError(
            f"remove: found target {_shown(target_name)}; allowed: {', '.join(names_of[:20])}"
            f"{', …' if len(names_of) > 20 else ''}, the run's targets"
        )
    scores = influence.scores[names_of.index(target_name)]
    order = np.argsort(-scores if side == "harmful" else scores, kind="stable")
    fitting = [int(i) for i in order[:count] if (scores[i] > 0 if side == "harmful" else scores[i] < 0)]
    if not 0 < count <= len(fitting):
        available = int((scores > 0).sum() if side == "harmful" else (scores < 0).sum())
        raise ConfigError(f"remove: found {count} {side} examples asked for; allowed: 1 to {available}")
    return dict.fromkeys(fitting, 0.0)


def parse_weights(text: str, num_train: int) -> dict[int, float]:
    """What ``weights`` takes: ``3=0,17=2.5`` or a JSON file. Raises ConfigError."""
    content = _file_content("weights", text)
    if content is None:
        parts = [item.partition("=") for item in text.split(",")]
        pairs: Sequence[tuple[str, Any]] = [(index.strip(), weight.strip()) for index, _, weight in parts]
    else:
        pairs = _json_pairs(text, content)
    weights: dict[int, float] = {}
    for index, weight in pairs:
        try:
            value = float(weight)
        except (ValueError, TypeError, OverflowError):
            value = None
        if value is None or isinstance(weight, bool) or not re.fullmatch(INDEX, index, re.ASCII):
            raise ConfigError(f"weights: found {_shown(f'{index}={weight}')}; allowed: {WEIGHT_FORMS}")
        if int(index) in weights:
            raise ConfigError(f"weights: {int(index)} is given twice")
        weights[int(index)] = value
    return check_weights(weights, num_train)


def _json_pairs(name: str, content: str) -> Sequence[tuple[str, Any]]:
    """The pairs of a JSON object, repeated keys included. Raises ConfigError."""
    try:
        loaded = json.loads(content, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"weights: the file {_shown(name)} is not JSON: {_shown(str(error))}") from None
    if not isinstance(loaded, tuple):
        raise ConfigError(f"weights: the file {_shown(name)} holds no JSON object; allowed: {WEIGHT_FORMS}")
    return loaded


def check_weights(weights: Mapping[int, float], num_train: int) -> dict[int, float]:
    """Check indices and weights. Raises ConfigError."""
    if not weights:
        raise ConfigError(f"weights: nothing was given; allowed: {WEIGHT_FORMS}")
    checked: dict[int, float] = {}
    for key, weight in weights.items():
        try:
            index, value = operator.index(key), float(weight)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"weights: found {key!r}: {weight!r}; allowed: a whole number and a number") from None
        _require_in_range("weights", index, num_train)
        if not math.isfinite(value):
            raise ConfigError(f"weights: found {weight} for example {index}; allowed: finite numbers")
        checked[index] = value
    return checked


def _require_in_range(name: str, index: int, num_train: int) -> None:
    if not 0 <= index < num_train:
        raise ConfigError(f"{name}: found {index}; allowed: 0 to {num_train - 1}, the training examples")


def counterfactual_stage(
    problem: Problem,
    influence: Influence | None,
    weights: Mapping[int, float],
    targets: Sequence[Target] = (),
    *,
    train_run_id: str = "",
    force: bool = False,
    may_point: bool = True,
) -> Outcome:
    """Retrain with other weights beside what the scores predict.

    Args:
        problem: config, task and data of the recorded run.
        influence: scores of the targets; made first where none is given and none matches.
        weights: weights that differ from 1 by training example.
        targets: what influence is asked on, where it is not given.
        train_run_id: the recorded run, where influence is not given.
        force: retrain even where a finished run holds the result.
        may_point: see :func:`~tracked_replay.stages.train.train_stage`.
    """
    with task_errors(problem.config):
        return _counterfactual_stage(
            problem, influence, weights, targets, train_run_id, force=force, may_point=may_point
        )


def _counterfactual_stage(
    problem: Problem,
    influence: Influence | None,
    weights: Mapping[int, float],
    targets: Sequence[Target],
    train_run_id: str,
    *,
    force: bool,
    may_point: bool,
) -> Outcome:
    title = f"counterfactual · {examples_in_words(len(weights))} · {problem.task.name}"
    train_run_id = influence.train_run_id if influence else train_run_id
    influence = influence or matching_influence(problem, targets, train_run_id)
    if influence is not None:
        identity, same = _fingerprint(problem, influence, weights), "run, weights, config and code"
        found = reuse(names.COUNTERFACTUAL, identity, title, _inputs(influence), same, force=force, may_point=may_point)
        if found is not None:
            return found
    recording = open_recording(train_run_id)
    setup = checked_setup(problem, recording)
    require_initial_model(setup, recording)
    indices = np.array(sorted(weights), dtype=np.int64)
    values = np.array([weights[int(index)] for index in indices])
    all_weights = np.ones(problem.data.num_train)
    all_weights[indices] = values
    require_no_empty_batch(setup.plan.indices, all_weights)
    with stage_run(names.COUNTERFACTUAL, None, title, {"train_run_id": train_run_id}) as run:
        if influence is None:
            influence = Influence.open(magic_stage(problem, targets, train_run_id, may_point=False).run_id)
        run.tag({f"{names.INPUT}{name}": value for name, value in _inputs(influence).items()})
        run.identify(_fingerprint(problem, influence, weights))
        log_problem(problem, run)
        require_recorded_measurements(setup, recording, influence)
        job = RetrainingJob(0, indices, values)
        results, errors = retrain_all(problem, train_run_id, [job], run, InProcess(), force=force)
        if errors:
            raise RetrainingError(f"the retraining failed twice: {errors[0]}")
        actual = combine(influence.targets, results[0].measurements)
        _conclude(problem, influence, job, actual, run)
        return Outcome(run.run_id, reused=False)


def _inputs(influence: Influence) -> dict[str, str]:
    return {"train_run_id": influence.train_run_id, "magic_run_id": influence.run_id}


def _fingerprint(problem: Problem, influence: Influence, weights: Mapping[int, float]) -> str:
    exact = {str(index): float(weight).hex() for index, weight in sorted(weights.items())}
    return problem.fingerprint(names.COUNTERFACTUAL, TRAIN_SECTIONS, _inputs(influence), weights=exact)


def _conclude(problem: Problem, influence: Influence, job: RetrainingJob, actual: np.ndarray, run: StageRun) -> None:
    recorded = influence.measurements
    predicted = predict(recorded, influence.scores, job.indices, job.weights)
    ids, names_of = ([getattr(target, field) for target in influence.targets] for field in ("id", "name"))
    table = pa.table({"target": ids, "recorded": recorded, "predicted": predicted, "actual": actual})
    changed = pa.table({"train_index": job.indices, "weight": job.weights})
    with tempfile.TemporaryDirectory(prefix="tracked-replay-counterfactual-") as folder:
        root = Path(folder)
        write_text(root / CONFIG, problem.config.to_toml())
        write_aside(root / OUTCOMES, lambda temporary: pq.write_table(table, temporary))
        write_aside(root / WEIGHTS, lambda temporary: pq.write_table(changed, temporary))
        write_json(root / TARGETS_FILE, [target.to_json_dict() for target in influence.targets])
        heading = f"{problem.task.name}: {examples_in_words(len(job.indices))} with another weight"
        save_figure(
            root, "counterfactual", report.counterfactual_figure(names_of, recorded, predicted, actual, heading)
        )
        run.table({"target": names_of} | table.drop_columns("target").to_pydict(), "tables/counterfactual.json")
        for place in range(len(ids)):
            run.metric("change_by_target/predicted", predicted[place] - recorded[place], place)
            run.metric("change_by_target/actual", actual[place] - recorded[place], place)
        run.metric("mean_absolute/actual_change", np.abs(actual - recorded).mean())
        run.metric("mean_absolute/prediction_error", np.abs(actual - predicted).mean())
        run.describe(_description(problem, influence, job, predicted, actual, run.link("figures/counterfactual.png")))
        publish(run, root)


def _description(
    problem: Problem, influence: Influence, job: RetrainingJob, predicted: np.ndarray, actual: np.ndarray, look: str
) -> str:
    change, error = np.abs(actual - influence.measurements).mean(), np.abs(actual - predicted).mean()
    names_of = [target.name for target in influence.targets]
    found = conclusion(job.weights, names_of, influence.measurements, predicted, actual)
    lines = ["| target | recorded | predicted | actual |", "|---|---|---|---|"]
    columns = zip(influence.targets, influence.measurements, predicted, actual, strict=True)
    for target, recorded, one, other in list(columns)[:SHOWN]:
        lines.append(f"| {_markdown(target.name)} | {recorded:.6g} | {one:.6g} | {other:.6g} |")
    # The first lines are what MLflow shows before "Show more".
    return (
        f"{_markdown(found)} In the mean over the targets the measurement changes by {change:.3g} (absolute); the "
        f"scores predict it up to {error:.3g}.\n\n"
        f"{_markdown(problem.task.name)} retrained {weights_in_words(job)}.\n\n"
        + "\n".join(lines)
        + f"\n\n- training run: [{influence.train_run_id}]({ui_path(influence.train_run_id)})\n"
        f"- scores: [{influence.run_id}]({ui_path(influence.run_id)})\n"
        f"- to look at: {look} among the artifacts; the weights are in `{WEIGHTS}`\n"
        f"- next, the same for random subsets: `tracked-replay lds --magic-run-id {influence.run_id}`\n"
    )


def _markdown(text: str) -> str:
    """Text from outside, literal and on one line: a line break would end a table's row."""
    return report.markdown_text(_one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def conclusion(
    weights: np.ndarray, names_of: Sequence[str], recorded: np.ndarray, predicted: np.ndarray, actual: np.ndarray
) -> str:
    """What the retraining did to the targets and what the scores had predicted, as one sentence.

    Args:
        weights: (examples,) of those with another weight than 1.
        names_of: a name a target.
        recorded: (targets,) measurements of the recorded run.
        predicted: (targets,) what the scores predict.
        actual: (targets,) what retraining gave.
    """
    done = "Reweighting" if weights.any() else "Removing"
    examples = "this example" if len(weights) == 1 else f"these {len(weights)} examples"
    happened, expected = actual - recorded, predicted - recorded
    if len(names_of) == 1:
        return f"{done} {examples} {_one_change(names_of[0], float(happened[0]), float(expected[0]))}."
    return f"{done} {examples} {_changes(names_of, happened, expected)}."


def _one_change(name: str, happened: float, expected: float) -> str:
    if happened == 0:
        said = ", as the scores predicted" if expected == 0 else f"; the scores predicted {_move(expected)}"
        return f"did not change the measurement of target {name}{said}"
    did = f"{'raised' if happened > 0 else 'lowered'} the measurement of target {name} by {abs(happened):.3g}"
    if expected == 0:
        return f"{did}; the scores predicted no change"
    if (expected > 0) != (happened > 0):
        return f"{did}; the scores predicted the opposite, {_move(expected)}"
    share = expected / happened
    times = f"{share:.0%} of" if share < MANY_TIMES else f"{share:.3g} times"
    return f"{did}; the scores predicted {abs(expected):.3g} ({times} what happened)"


def _changes(names_of: Sequence[str], happened: np.ndarray, expected: np.ndarray) -> str:
    if not happened.any() and not expected.any():
        return f"changed the measurement of none of the {len(names_of)} targets, as the scores predicted"
    right = int((np.sign(happened) == np.sign(expected)).sum())
    deviations = np.abs(happened - expected)
    worst = int(deviations.argmax())
    return (
        f"moved the measurement of {right} of {len(names_of)} targets the way that the scores predicted; they are "
        f"furthest off at target {names_of[worst]}, by {deviations[worst]:.3g}: {_move(float(happened[worst]))}, "
        f"predicted {_move(float(expected[worst]))}"
    )


def _move(change: float) -> str:
    return "no change" if change == 0 else f"a {'rise' if change > 0 else 'fall'} of {abs(change):.3g}"


def read_counterfactual(run_id: str) -> Counterfactual:
    """Predicted and actual measurements of a finished ``counterfactual`` run. Raises RunError, RecordingError."""
    run = resolve(run_id, names.COUNTERFACTUAL, "run_id")
    with Recording(artifacts_of(run.info.run_id), tag_of(run, names.DIGESTS) or "").open(OUTCOMES) as path:
        table = pq.read_table(path)
    return Counterfactual(table["predicted"].to_numpy(), table["actual"].to_numpy())


def headlines(run_id: str) -> list[str]:
    """What a finished ``counterfactual`` run found: a line a target, then :func:`conclusion`.

    Raises:
        RunError: no such finished run.
        RecordingError: a file is missing or damaged.
    """
    run = resolve(run_id, names.COUNTERFACTUAL, "run_id")
    recording = Recording(artifacts_of(run.info.run_id), tag_of(run, names.DIGESTS) or "")
    with recording.open(OUTCOMES) as path:
        outcomes = pq.read_table(path)
    with recording.open(WEIGHTS) as path:
        weights = pq.read_table(path)["weight"].to_numpy()
    with recording.open(TARGETS_FILE) as path:
        targets = json.loads(path.read_text(encoding="utf-8"))
    names_of = [_one_line(target["name"]) for target in targets]
    lines = [
        f"target {name}: recorded {row['recorded']:.6g}, predicted {row['predicted']:.6g}, actual {row['actual']:.6g}"
        for name, row in zip(names_of, outcomes.to_pylist(), strict=True)
    ]
    columns = [outcomes[name].to_numpy() for name in ("recorded", "predicted", "actual")]
    return [*lines, conclusion(weights, names_of, *columns)]


def counterfactual(
    train_run_id: str,
    weights: Mapping[int, float],
    targets: str | int | Sequence[int] = TARGETS,
    *,
    data_root: str | None = None,
    force: bool = False,
) -> Counterfactual:
    """Retrain a recorded run with other example weights.

    Args:
        train_run_id: a finished ``train`` run.
        weights: weights that differ from 1, by training example; 0 removes an example.
        targets: see :func:`~tracked_replay.replay.parse_targets`; influence on them is computed where no matching
            ``magic`` run is there.
        data_root: where the data are now.
        force: retrain even where a finished run holds the result.

    Returns:
        Predicted and actual measurement of each target.

    Raises:
        TrackedReplayError: one clear sentence about what was wrong.
    """
    train_run_id = str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id)
    config = open_recording(train_run_id).config.override({"data.root": data_root} if data_root else {})
    problem = Problem.load(config)
    checked = check_weights(weights, problem.data.num_train)
    chosen = parse_targets(targets, problem.data.num_evaluation)
    done = counterfactual_stage(problem, None, checked, chosen, train_run_id=train_run_id, force=force)
    return read_counterfactual(done.run_id)


def run_counterfactual(
    train_run_id: str,
    *,
    remove: str = "",
    weights: str = "",
    targets: str = "",
    magic_run_id: str = "",
    data_root: str = "",
    force: bool = False,
) -> str:
    """The stage as the command line calls it; returns the run ID. See :func:`counterfactual`."""
    if bool(remove.strip()) == bool(weights.strip()):
        raise ConfigError(f"remove, weights: found {remove!r} and {weights!r}; allowed: exactly one of them")
    if not train_run_id and not magic_run_id:
        raise ConfigError("train_run_id: nothing was given; allowed: a finished train run, or magic_run_id")
    if train_run_id:
        train_run_id = str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id)
    influence = Influence.open(magic_run_id) if magic_run_id else None
    if influence is not None and train_run_id and influence.train_run_id != train_run_id:
        raise ConfigError(
            f"magic_run_id: run {magic_run_id} is of training run {influence.train_run_id}, but train_run_id is "
            f"{train_run_id}"
        )
    source: Config = influence.config if influence else open_recording(train_run_id).config
    problem = Problem.load(source.override({"data.root": data_root} if data_root else {}))
    changed = (
        parse_remove(remove, problem.data.num_train, influence)
        if remove.strip()
        else parse_weights(weights, problem.data.num_train)
    )
    chosen: Sequence[Target] = ()
    if influence is not None:
        influence.require_targets(targets, problem.data.num_evaluation)
    else:
        chosen = parse_targets(targets or TARGETS, problem.data.num_evaluation)
    return counterfactual_stage(problem, influence, changed, chosen, train_run_id=train_run_id, force=force).run_id
