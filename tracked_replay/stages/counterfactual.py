"""Stage ``counterfactual``: remove or reweight named examples, retrain, and show predicted beside actual."""

from __future__ import annotations

import json
import logging
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
from tracked_replay.errors import ConfigError
from tracked_replay.executors import InProcess
from tracked_replay.lds import RetrainingJob, predict, require_no_empty_batch
from tracked_replay.recording import write_aside, write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import Target, parse_targets
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.lds import combine, retrain_all
from tracked_replay.stages.magic import checked_setup, magic_stage
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.stages.train import Outcome, log_problem, open_recording, save_figure
from tracked_replay.tracking import find_finished, names, point_to, resolve, stage_run, ui_path

logger = logging.getLogger(__name__)

OUTCOMES = "counterfactual/outcomes.parquet"
WEIGHTS = "counterfactual/weights.parquet"
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
    ranked = re.fullmatch(r"(harmful|helpful):(\d+)@(.+)", text.strip())
    if ranked:
        return _ranked(ranked[1], int(ranked[2]), ranked[3], influence)
    path = Path(text.strip())
    if path.is_file():
        text = ",".join(path.read_text(encoding="utf-8").split())
    indices: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if span is None:
            raise ConfigError(f"remove: found {item!r}; allowed: {REMOVE_FORMS}")
        first, last = int(span[1]), int(span[2] or span[1])
        _require_in_range("remove", last, num_train)
        indices += range(first, last + 1)
    if not indices:
        raise ConfigError(f"remove: found {text!r}, which names no example; allowed: {REMOVE_FORMS}")
    weights: dict[int, float] = {}
    for index in indices:
        if index in weights:
            raise ConfigError(f"remove: {index} is given twice")
        weights[index] = 0.0
    return weights


def _ranked(side: str, count: int, target_name: str, influence: Influence | None) -> dict[int, float]:
    if influence is None:
        raise ConfigError(f"remove: {side}:{count}@{target_name} needs the scores of a run; allowed: with magic_run_id")
    names_of = [target.name for target in influence.targets]
    if target_name not in names_of:
        raise ConfigError(f"remove: found target {target_name!r}; allowed: {', '.join(names_of)}, the run's targets")
    scores = influence.scores[names_of.index(target_name)]
    order = np.argsort(-scores if side == "harmful" else scores, kind="stable")
    fitting = [int(i) for i in order[:count] if (scores[i] > 0 if side == "harmful" else scores[i] < 0)]
    if not 0 < count <= len(fitting):
        available = int((scores > 0).sum() if side == "harmful" else (scores < 0).sum())
        raise ConfigError(f"remove: found {count} {side} examples asked for; allowed: 1 to {available}")
    return dict.fromkeys(fitting, 0.0)


def parse_weights(text: str, num_train: int) -> dict[int, float]:
    """What ``weights`` takes: ``3=0,17=2.5`` or a JSON file. Raises ConfigError."""
    path = Path(text.strip())
    pairs: list[tuple[str, Any]]
    if path.is_file():
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
            pairs = [(str(index), weight) for index, weight in loaded]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"weights: {text!r} is not a JSON object of index: weight ({error})") from None
    else:
        parts = [item.partition("=") for item in text.split(",")]
        pairs = [(index.strip(), weight.strip()) for index, _, weight in parts]
    weights: dict[int, float] = {}
    for index, weight in pairs:
        try:
            key, value = int(index), float(weight)
        except (ValueError, TypeError):
            raise ConfigError(f"weights: found {index}={weight}; allowed: {WEIGHT_FORMS}") from None
        if key in weights:
            raise ConfigError(f"weights: {key} is given twice")
        weights[key] = value
    return check_weights(weights, num_train)


def check_weights(weights: Mapping[int, float], num_train: int) -> dict[int, float]:
    """Check indices and weights. Raises ConfigError."""
    if not weights:
        raise ConfigError(f"weights: nothing was given; allowed: {WEIGHT_FORMS}")
    checked: dict[int, float] = {}
    for index, weight in weights.items():
        _require_in_range("weights", int(index), num_train)
        if not np.isfinite(weight):
            raise ConfigError(f"weights: found {weight} for example {index}; allowed: finite numbers")
        checked[int(index)] = float(weight)
    return checked


def _require_in_range(name: str, index: int, num_train: int) -> None:
    if not 0 <= index < num_train:
        raise ConfigError(f"{name}: found {index}; allowed: 0 to {num_train - 1}, the training examples")


def counterfactual_stage(
    problem: Problem, influence: Influence, weights: Mapping[int, float], *, force: bool = False, may_point: bool = True
) -> Outcome:
    """Retrain with other weights beside what the scores predict.

    Args:
        problem: config, task and data of the recorded run.
        influence: scores of the targets.
        weights: weights that differ from 1 by training example.
        force: retrain even where a finished run holds the result.
        may_point: see :func:`~tracked_replay.stages.train.train_stage`.
    """
    inputs = {"train_run_id": influence.train_run_id, "magic_run_id": influence.run_id}
    exact = {str(index): float(weight).hex() for index, weight in sorted(weights.items())}
    fingerprint = problem.fingerprint(names.COUNTERFACTUAL, TRAIN_SECTIONS, inputs, weights=exact)
    title = f"counterfactual · {problem.task.name} · {len(weights)} examples"
    found = None if force else find_finished(names.COUNTERFACTUAL, fingerprint)
    if found is not None:
        logger.info("reusing counterfactual run %s (same run, weights, config and code)", found)
        if may_point:
            point_to(names.COUNTERFACTUAL, found, title, inputs)
        return Outcome(found, reused=True)
    setup = checked_setup(problem, open_recording(influence.train_run_id))
    indices = np.array(sorted(weights), dtype=np.int64)
    values = np.array([weights[int(index)] for index in indices])
    all_weights = np.ones(problem.data.num_train)
    all_weights[indices] = values
    require_no_empty_batch(setup.plan.indices, all_weights)
    with stage_run(names.COUNTERFACTUAL, fingerprint, title, inputs) as run, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        log_problem(problem, run)
        write_text(root / CONFIG, problem.config.to_toml())
        job = RetrainingJob(0, indices, values)
        results = retrain_all(problem, influence.train_run_id, [job], run, InProcess(), force=force)
        if 0 not in results:
            raise ConfigError("the retraining failed twice; the messages above say why")
        actual = combine(influence.targets, results[0].measurements)
        predicted = predict(influence.measurements, influence.scores, indices.tolist(), values.tolist())
        table = pa.table(
            {
                "target": [target.id for target in influence.targets],
                "recorded": influence.measurements,
                "predicted": predicted,
                "actual": actual,
            }
        )
        write_aside(root / OUTCOMES, lambda temporary: pq.write_table(table, temporary))
        changed = pa.table({"train_index": indices, "weight": values})
        write_aside(root / WEIGHTS, lambda temporary: pq.write_table(changed, temporary))
        write_json(root / "counterfactual/targets.json", [target.to_json_dict() for target in influence.targets])
        names_of = [target.name for target in influence.targets]
        figure = report.counterfactual_figure(
            names_of,
            influence.measurements,
            predicted,
            actual,
            f"{problem.task.name}: {len(weights)} examples with another weight",
        )
        save_figure(root, "counterfactual", figure)
        rows = {"target": names_of} | {name: table[name].to_pylist() for name in table.column_names[1:]}
        run.table(rows, "tables/counterfactual.json")
        for place, (one, other) in enumerate(
            zip(predicted - influence.measurements, actual - influence.measurements, strict=True)
        ):
            run.metric("change/predicted", one, place)
            run.metric("change/actual", other, place)
        run.describe(_description(problem, influence, weights, predicted, actual))
        run.artifacts(root)
        return Outcome(run.run_id, reused=False)


def _description(
    problem: Problem, influence: Influence, weights: Mapping[int, float], predicted: np.ndarray, actual: np.ndarray
) -> str:
    lines = ["| target | recorded | predicted | actual |", "|---|---|---|---|"]
    columns = zip(influence.targets, influence.measurements, predicted, actual, strict=True)
    for target, recorded, one, other in list(columns)[:50]:
        lines.append(f"| {target.name} | {recorded:.6g} | {one:.6g} | {other:.6g} |")
    return (
        f"{problem.task.name} retrained with another weight for {len(weights)} training examples; scores from "
        f"[{influence.run_id}]({ui_path(influence.run_id)}).\n\n" + "\n".join(lines) + "\n"
    )


def read_counterfactual(run_id: str) -> Counterfactual:
    """Predicted and actual measurements of a finished ``counterfactual`` run. Raises RunError."""
    from tracked_replay.tracking import artifacts_of

    run = resolve(run_id, names.COUNTERFACTUAL, "run_id")
    with artifacts_of(run.info.run_id)(OUTCOMES) as path:
        table = pq.read_table(path)
    return Counterfactual(table["predicted"].to_numpy(), table["actual"].to_numpy())


def counterfactual(
    train_run_id: str,
    weights: Mapping[int, float],
    targets: str | int | Sequence[int] = "0",
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
    config = open_recording(train_run_id).config.override({"data.root": data_root} if data_root else {})
    problem = Problem.load(config)
    checked = check_weights(weights, problem.data.num_train)
    influence = influence_of(problem, train_run_id, parse_targets(targets, problem.data.num_evaluation))
    return read_counterfactual(counterfactual_stage(problem, influence, checked, force=force).run_id)


def influence_of(problem: Problem, train_run_id: str, targets: Sequence[Target]) -> Influence:
    """The matching ``magic`` run of a recorded run, computed where there is none."""
    train_run = resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id
    return Influence.open(magic_stage(problem, targets, train_run, may_point=False).run_id)


def run_counterfactual(
    train_run_id: str,
    *,
    remove: str = "",
    weights: str = "",
    targets: str = "0",
    magic_run_id: str = "",
    data_root: str = "",
    force: bool = False,
) -> str:
    """The stage as the command line calls it; returns the run ID. See :func:`counterfactual`."""
    if bool(remove.strip()) == bool(weights.strip()):
        raise ConfigError(f"remove, weights: found {remove!r} and {weights!r}; allowed: exactly one of them")
    if not train_run_id and not magic_run_id:
        raise ConfigError("train_run_id: nothing was given; allowed: a finished train run, or magic_run_id")
    influence = Influence.open(magic_run_id) if magic_run_id else None
    if influence is not None and train_run_id and influence.train_run_id != train_run_id:
        raise ConfigError(
            f"magic_run_id: run {magic_run_id} is of training run {influence.train_run_id}, but train_run_id is "
            f"{train_run_id}"
        )
    source: Config = influence.config if influence else open_recording(train_run_id).config
    problem = Problem.load(source.override({"data.root": data_root} if data_root else {}))
    chosen = (
        parse_remove(remove, problem.data.num_train, influence)
        if remove
        else parse_weights(weights, problem.data.num_train)
    )
    if influence is None:
        influence = influence_of(problem, train_run_id, parse_targets(targets, problem.data.num_evaluation))
    return counterfactual_stage(problem, influence, chosen, force=force).run_id
