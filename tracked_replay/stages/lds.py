"""Stage ``lds``: retrain without random subsets and correlate what happens with what the scores predict."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.config import Config, parse_overrides
from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import ConfigError, RecordingError, ReplayError, RetrainingError
from tracked_replay.executors import Executor, make_executor
from tracked_replay.lds import (
    MINIMUM_SUBSETS,
    Correlation,
    MakeSetup,
    Retrained,
    RetrainingJob,
    Subset,
    baseline_scores,
    correlate,
    draw_subsets,
    metasmoothness,
    parse_drop,
    predict,
    require_no_empty_batch,
    retrain,
    run_checks,
)
from tracked_replay.lds.metasmoothness import sentence
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_aside, write_digests, write_json, write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import Target, parse_targets
from tracked_replay.stages.influence import Influence
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
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.stages.train import Outcome, log_problem, open_recording, save_figure
from tracked_replay.tracking import (
    FinishedChild,
    StageRun,
    artifacts_of,
    find_finished,
    finished_children,
    names,
    point_to,
    record_child,
    resolve,
    stage_run,
    ui_path,
)
from tracked_replay.training import TrainingSetup, evaluate, set_up

logger = logging.getLogger(__name__)

SUBSETS = "lds/subsets.parquet"
OUTCOMES = "lds/outcomes.parquet"
PREDICTIONS = "lds/predictions.parquet"
LOSSES = "lds/validation_losses.parquet"
SUMMARY = "lds/summary.json"
CHECKS = "lds/checks.json"
MEASUREMENTS = "lds/measurements.parquet"
STATE = "checkpoints/final.safetensors"
METHOD = "magic"


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
    title = f"lds · {problem.task.name} · drop {config.drop} · {config.subsets} subsets"
    subsets = checked_subsets(problem)
    executor = make_executor(config.executor, config.workers)
    if influence is None and not force:
        influence = matching_influence(problem, targets, train_run_id)
    if influence is not None:
        inputs = _inputs(influence)
        found = None if force else find_finished(names.LDS, _fingerprint(problem, influence))
        if found is not None:
            logger.info("reusing LDS run %s (same influence run, subsets, config and code)", found)
            if may_point:
                point_to(names.LDS, found, title, inputs)
            return Outcome(found, reused=True)
        train_run_id = influence.train_run_id
    if train_run_id is not None:
        checked_setup(problem, open_recording(train_run_id))  # what is wrong leaves no run behind
    with stage_run(names.LDS, None, title, {}) as run:
        if influence is None:
            made = magic_stage(problem, targets, train_run_id, force=force, may_point=False).run_id
            influence = Influence.open(made)
        run.tag({f"{names.INPUT}{name}": value for name, value in _inputs(influence).items()})
        run.fingerprint = _fingerprint(problem, influence)
        recording = open_recording(influence.train_run_id)
        _lds(problem, checked_setup(problem, recording), recording, influence, subsets, executor, run, force=force)
        return Outcome(run.run_id, reused=False)


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
    keep = problem.config.lds.keep_states
    with tempfile.TemporaryDirectory(prefix="tracked-replay-lds-") as folder:
        root = Path(folder)
        log_problem(problem, run)
        write_text(root / CONFIG, problem.config.to_toml())
        _checks(root, setup, recording, subsets, influence.config, run)
        require_recorded_measurements(setup, recording, influence)
        jobs = [RetrainingJob(s.id, s.removed, np.zeros(len(s.removed)), keep) for s in subsets]
        results, errors = retrain_all(problem, influence.train_run_id, jobs, run, executor, force=force)
        if errors:
            run.reusable = False  # so that the same command tries the missing ones again
            run.tag({names.FAILED: str(len(errors))})
            logger.warning(
                "%d of %d retrainings failed twice; they are missing from the result", len(errors), len(jobs)
            )
            _require_enough(subsets, results, errors)
        _conclude(root, problem, setup, recording, influence, subsets, results, run)
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


class Retrainings(NamedTuple):
    """What came of some retrainings.

    Attributes:
        results: by job ID.
        errors: why the others failed twice, by job ID.
    """

    results: dict[int, Retrained]
    errors: dict[int, str]


def retrain_all(
    problem: Problem,
    train_run_id: str,
    jobs: Sequence[RetrainingJob],
    run: StageRun,
    executor: Executor,
    *,
    force: bool = False,
) -> Retrainings:
    """Do the retrainings that no finished child run holds yet; each becomes a child run.

    Args:
        problem: config, task and data of the recorded run.
        train_run_id: the recorded run.
        jobs: the retrainings.
        run: parent of the child runs.
        executor: from :func:`~tracked_replay.executors.make_executor`.
        force: do all of them.
    """
    prints = {job.id: _retraining_fingerprint(problem, train_run_id, job) for job in jobs}
    known = {} if force else finished_children(names.RETRAINING, train_run_id)
    results: dict[int, Retrained] = {}
    errors: dict[int, str] = {}
    for job in jobs:
        found = known.get(prints[job.id])
        if found is not None:
            try:
                results[job.id] = _read_retraining(found, job.id)
            except RecordingError as error:
                logger.warning("run %s cannot be used, so retraining %d is done again: %s", found.run_id, job.id, error)
    if results:
        logger.info("%d of %d retrainings are finished already and are not done again", len(results), len(jobs))
    pending = [job for job in jobs if job.id not in results]
    make_setup = MakeSetup(problem.config.to_toml())
    for attempt in (1, 2):
        failed = []
        done = executor.run(make_setup, retrain, pending)
        for item in progress(done, len(pending), "retrain" if attempt == 1 else "retry", "run"):
            job, result = item.job, item.result
            if isinstance(result, Retrained):
                results[job.id] = result
                _record_retraining(run, train_run_id, result, prints[job.id])
                continue
            failed.append(job)
            why = f"{type(item.error).__name__}: {item.error}"
            logger.warning("retraining %d failed (attempt %d of 2): %s", job.id, attempt, why)
            if attempt == 2:
                errors[job.id] = why
                record_child(run.run_id, names.RETRAINING, f"retraining {job.id}", train_run_id, error=why)
        pending = failed
        if not pending:
            break
    return Retrainings(results, dict(sorted(errors.items())))


def _retraining_fingerprint(problem: Problem, train_run_id: str, job: RetrainingJob) -> str:
    return problem.fingerprint(
        names.RETRAINING,
        TRAIN_SECTIONS,
        {"train_run_id": train_run_id},
        indices=job.indices.tolist(),
        weights=[float(weight).hex() for weight in job.weights],
        keep_state=job.keep_state,
    )


def _record_retraining(run: StageRun, train_run_id: str, result: Retrained, fingerprint: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = pa.table({"evaluation_index": np.arange(len(result.measurements)), "measurement": result.measurements})
        write_aside(root / MEASUREMENTS, lambda temporary: pq.write_table(table, temporary))
        facts = dataclasses.asdict(result) | {"measurements": None, "state": None}
        write_json(root / "lds/retraining.json", {name: value for name, value in facts.items() if value is not None})
        if result.state is not None:
            (root / STATE).parent.mkdir()
            (root / STATE).write_bytes(result.state)
        metrics = {"evaluation_measurement": float(result.measurements.mean()), "seconds": result.seconds}
        if result.accuracy is not None:
            metrics["evaluation_accuracy"] = result.accuracy
        record_child(
            run.run_id,
            names.RETRAINING,
            f"retraining {result.id}",
            train_run_id,
            fingerprint=fingerprint,
            metrics=metrics,
            folder=root,
            digests=write_digests(root),
        )


def _read_retraining(run: FinishedChild, job_id: int) -> Retrained:
    recording = Recording(artifacts_of(run.run_id), run.digests)
    with recording.open("lds/retraining.json") as path:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with recording.open(MEASUREMENTS) as path:
        measurements = pq.read_table(path)["measurement"].to_numpy()
    return Retrained(job_id, measurements, facts.get("accuracy"), str(facts["final_digest"]), float(facts["seconds"]))


def combine(targets: Sequence[Target], measurements: np.ndarray) -> np.ndarray:
    """(targets,) measurements of targets from those of every evaluation example."""
    return np.array([measurements[list(target.indices)] @ np.array(target.coefficients) for target in targets])


def _conclude(
    root: Path,
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    influence: Influence,
    subsets: Sequence[Subset],
    results: Mapping[int, Retrained],
    run: StageRun,
) -> None:
    kept = [subset for subset in subsets if subset.id in results]
    targets = influence.targets
    actual = np.stack([combine(targets, results[subset.id].measurements) for subset in kept])
    scores = {METHOD: influence.scores}
    if problem.config.lds.baselines:
        scores |= baseline_scores(setup, recording, targets)
    predicted = {
        method: np.stack([predict(influence.measurements, values, s.removed, np.zeros(len(s.removed))) for s in kept])
        for method, values in scores.items()
    }
    _write_tables(root, kept, results, targets, predicted, actual)
    table = _correlations(problem, kept, predicted, actual, run)
    smoothness = None
    if problem.config.lds.metasmoothness:
        smoothness = metasmoothness(setup, kept[0].removed)
        run.metric("metasmoothness", smoothness)
        logger.info("%s", sentence(smoothness))
    write_json(root / SUMMARY, _summary(table, targets, smoothness))
    _figures(root, problem, kept, targets, predicted[METHOD], actual, table)
    _describe(problem, influence, table, smoothness, run)


def _write_tables(
    root: Path,
    subsets: Sequence[Subset],
    results: Mapping[int, Retrained],
    targets: Sequence[Target],
    predicted: Mapping[str, np.ndarray],
    actual: np.ndarray,
) -> None:
    ids, target_ids = [subset.id for subset in subsets], [target.id for target in targets]
    pairs = {"subset": np.repeat(ids, len(targets)), "target": np.tile(target_ids, len(ids))}
    tables = {
        SUBSETS: pa.table(
            {
                "subset": ids,
                "drop": [subset.drop for subset in subsets],
                "removed": pa.array([subset.removed for subset in subsets], pa.list_(pa.int64())),
                "final_digest": [results[subset.id].final_digest for subset in subsets],
            }
        ),
        OUTCOMES: pa.table(pairs | {"predicted": predicted[METHOD].reshape(-1), "actual": actual.reshape(-1)}),
        PREDICTIONS: pa.concat_tables(
            [
                pa.table({"method": [method] * values.size} | pairs | {"predicted": values.reshape(-1)})
                for method, values in predicted.items()
            ]
        ),
        LOSSES: pa.table(
            {
                "subset": np.repeat(ids, len(results[ids[0]].measurements)),
                "evaluation_index": np.tile(np.arange(len(results[ids[0]].measurements)), len(ids)),
                "loss": np.concatenate([results[i].measurements for i in ids]),
            }
        ),
    }
    for name, table in tables.items():
        write_aside(root / name, lambda temporary, table=table: pq.write_table(table, temporary))  # type: ignore[misc]


def _correlations(
    problem: Problem, subsets: Sequence[Subset], predicted: Mapping[str, np.ndarray], actual: np.ndarray, run: StageRun
) -> dict[float, dict[str, Correlation]]:
    """Correlation of every method at every drop share that has enough subsets."""
    config = problem.config
    shares = np.array([subset.drop for subset in subsets])
    table: dict[float, dict[str, Correlation]] = {}
    drops = parse_drop(config.lds.drop)
    for drop in drops:
        rows = shares == drop
        if rows.sum() < MINIMUM_SUBSETS:
            logger.warning("drop %g: only %d retrainings ended, too few for a correlation", drop, rows.sum())
            continue
        table[drop] = {}
        for method, values in predicted.items():
            seed = derive_component_seed(config.seed, "bootstrap", f"{drop:g}_{method}")
            found = correlate(
                values[rows],
                actual[rows],
                seed=seed,
                resamples=config.lds.resamples,
                confidence=config.lds.confidence,
            )
            table[drop][method] = found
            if found.undefined:
                logger.warning(
                    "drop %g, %s: the correlation is undefined for %d targets", drop, method, found.undefined
                )
            run.metric(f"lds/{method}", found.mean, round(drop * 10_000))
    # The number that people sort runs by: of the exact scores, at the first share that was asked for.
    first = table.get(drops[0])
    if first is not None:
        run.metric("lds", first[METHOD].mean)
        run.metric("lds_low", first[METHOD].low)
        run.metric("lds_high", first[METHOD].high)
    return table


def _summary(
    table: Mapping[float, Mapping[str, Correlation]], targets: Sequence[Target], smoothness: float | None
) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if np.isfinite(value) else None

    rows = [
        {
            "drop": drop,
            "method": method,
            "lds": number(found.mean),
            "low": number(found.low),
            "high": number(found.high),
            "undefined_targets": found.undefined,
            "targets": [
                {"target": target.id, "name": target.name}
                | {name: number(value) for name, value in dataclasses.asdict(one).items()}
                for target, one in zip(targets, found.targets, strict=True)
            ],
        }
        for drop, methods in table.items()
        for method, found in methods.items()
    ]
    return {"correlations": rows, "metasmoothness": None if smoothness is None else number(smoothness)}


def _figures(
    root: Path,
    problem: Problem,
    subsets: Sequence[Subset],
    targets: Sequence[Target],
    predicted: np.ndarray,
    actual: np.ndarray,
    table: Mapping[float, Mapping[str, Correlation]],
) -> None:
    shares = np.array([subset.drop for subset in subsets])
    for drop, methods in table.items():
        rows = shares == drop
        figure = report.lds_scatter_figure(
            predicted[rows],
            actual[rows],
            [target.name for target in targets],
            methods[METHOD].targets,
            f"{problem.task.name}: predicted and actual measurement, {drop:.3g} of the examples removed",
        )
        save_figure(root, f"lds-scatter-{drop:g}", figure)
    methods_shown = list(next(iter(table.values())))
    drops = sorted(table)

    def column(field: str) -> dict[str, np.ndarray]:
        return {method: np.array([getattr(table[drop][method], field) for drop in drops]) for method in methods_shown}

    figure = report.lds_by_drop_figure(
        np.array(drops), column("mean"), column("low"), column("high"), f"{problem.task.name}: LDS by share removed"
    )
    save_figure(root, "lds-by-drop", figure)


def _describe(
    problem: Problem,
    influence: Influence,
    table: Mapping[float, Mapping[str, Correlation]],
    smoothness: float | None,
    run: StageRun,
) -> None:
    rows: dict[str, list[Any]] = {name: [] for name in ("drop", "method", "lds", "low", "high")}
    for drop, methods in table.items():
        for method, found in methods.items():
            for column, value in zip(rows.values(), (drop, method, found.mean, found.low, found.high), strict=True):
                column.append(value)
    run.table(rows, "tables/lds.json")
    lines = ["| share removed | method | LDS | interval |", "|---|---|---|---|"]
    for drop, method, mean, low, high in zip(*rows.values(), strict=True):
        lines.append(f"| {drop:g} | {method} | {mean:.3f} | {low:.3f} to {high:.3f} |")
    confidence = f"{problem.config.lds.confidence:.0%}"
    text = (
        f"How well the scores of [{influence.run_id}]({ui_path(influence.run_id)}) predict what retraining without a "
        f"random subset does (Spearman correlation over subsets, mean over {len(influence.targets)} targets, "
        f"{confidence} bootstrap interval over subsets).\n\n" + "\n".join(lines) + "\n"
    )
    if smoothness is not None:
        text += f"\n{sentence(smoothness)}\n"
    if not influence.exact:
        text += "\nThe scores are tagged inexact.\n"
    run.describe(text)


def run_lds(
    magic_run_id: str | None = None,
    *,
    train_run_id: str | None = None,
    targets: str | int | Sequence[int] = LDS_TARGETS,
    config: Config | None = None,
    overrides: str | Mapping[str, Any] = "",
    data_root: str | None = None,
    force: bool = False,
) -> str:
    """Validate influence scores by retraining on random subsets.

    Args:
        magic_run_id: a finished ``magic`` run; its config holds, and ``overrides`` may change ``lds.*`` only.
        train_run_id: where no ``magic`` run is named: the recorded training to replay first.
        targets: see :func:`~tracked_replay.replay.parse_targets`; a named ``magic`` run has its own.
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
        influence.require_targets(targets, LDS_TARGETS, problem.data.num_evaluation)
    chosen = influence.targets if influence else parse_targets(targets, problem.data.num_evaluation)
    return lds_stage(problem, influence, chosen, train_run_id=train_run_id or None, force=force).run_id
