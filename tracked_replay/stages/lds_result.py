"""What a validation found: tables, correlations, figures and the run's description."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.config import parse_drop
from tracked_replay.determinism import derive_component_seed
from tracked_replay.lds import (
    MINIMUM_SUBSETS,
    Correlation,
    Retrained,
    Subset,
    baseline_scores,
    correlate,
    metasmoothness,
    predict,
)
from tracked_replay.lds.metasmoothness import sentence
from tracked_replay.recording import Recording, write_aside, write_json
from tracked_replay.replay import Target, combine
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.influence_report import PAGE, write_lds_report
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import save_figure
from tracked_replay.tracking import StageRun, artifacts_of, names, resolve, tag_of, ui_path
from tracked_replay.training import TrainingSetup

logger = logging.getLogger(__name__)

SUBSETS = "lds/subsets.parquet"
OUTCOMES = "lds/outcomes.parquet"
PREDICTIONS = "lds/predictions.parquet"
LOSSES = "lds/validation_losses.parquet"
SUMMARY = "lds/summary.json"
METHOD = "magic"
BY_DROP = "lds_by_basis_points_removed"  # 1 % of the training examples is 100 basis points


def conclude(
    root: Path,
    problem: Problem,
    setup: TrainingSetup,
    recording: Recording,
    influence: Influence,
    subsets: Sequence[Subset],
    results: Mapping[int, Retrained],
    run: StageRun,
) -> None:
    """Write and log the result of a validation.

    Args:
        root: folder that is logged as the run's artifacts.
        problem: config, task and data.
        setup: of the recorded run.
        recording: the recorded run, for the baselines.
        influence: the scores.
        subsets: all subsets that were drawn.
        results: retrainings by subset ID; a subset whose retraining failed is missing.
        run: gets metrics, the table and the description.
    """
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
    retrainings = Counter(subset.drop for subset in kept)
    write_json(root / SUMMARY, _summary(table, targets, smoothness, retrainings))
    _figures(root, problem, kept, targets, predicted[METHOD], actual, table)
    write_lds_report(
        root, problem, setup, recording, influence, kept, predicted[METHOD], actual, table, smoothness, run
    )
    _describe(problem, influence, table, smoothness, retrainings, run)


def headlines(run_id: str) -> list[str]:
    """What a finished ``lds`` run found, a line for each share. Raises RunError, RecordingError."""
    run = resolve(run_id, names.LDS, "run_id")
    with Recording(artifacts_of(run.info.run_id), tag_of(run, names.DIGESTS) or "").open(SUMMARY) as path:
        rows = json.loads(path.read_text(encoding="utf-8"))["correlations"]
    lines = []
    for drop in dict.fromkeys(row["drop"] for row in rows):
        found = {row["method"]: row for row in rows if row["drop"] == drop}
        own = found.pop(METHOD)
        interval = f" [{_shown(own['low'])}, {_shown(own['high'])}]"
        others = ", ".join(f"{method} {_shown(row['lds'])}" for method, row in found.items())
        shown = f"LDS, {drop * 100:.3g} % removed: {_shown(own['lds'])}{interval}{f' ({others})' if others else ''}"
        lines.append(f"{shown}{_few(own.get('retrainings'))}")
    return lines


def next_line(train_run_id: str) -> str:
    """What a description advises after a validation."""
    return f"- next, which training examples to doubt: `tracked-replay suspects --train-run-id {train_run_id}`"


def _few(retrainings: int | None) -> str:
    """A warning where so few retrainings say nothing."""
    if retrainings is None or retrainings >= report.FEW_RETRAININGS:
        return ""
    return f", from only {retrainings} retrainings: too few to say how well"


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


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
            # MLflow's axis takes whole numbers, and a share below 1 % is common.
            run.metric(f"{BY_DROP}/{method}", found.mean, round(drop * 10_000))
    # The number that people sort runs by: of the exact scores, at the first share that was asked for.
    first = table.get(drops[0])
    if first is not None:
        run.metric("lds", first[METHOD].mean)
        run.metric("lds_low", first[METHOD].low)
        run.metric("lds_high", first[METHOD].high)
    return table


def _summary(
    table: Mapping[float, Mapping[str, Correlation]],
    targets: Sequence[Target],
    smoothness: float | None,
    retrainings: Mapping[float, int],
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
            "retrainings": retrainings[drop],
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
    retrainings: Mapping[float, int],
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
    drop, methods = next(iter(table.items()))
    found, targets = methods[METHOD], len(influence.targets)
    # The first lines are what MLflow shows before "Show more".
    text = (
        f"**LDS {found.mean:.3f}** [{found.low:.3f}, {found.high:.3f}]{_few(retrainings[drop])}, with {drop:.3g} of "
        f"the training examples of {report.markdown_text(problem.task.name)} removed: how well the scores predict what "
        f"retraining without a random subset does (Spearman correlation over subsets, mean over {targets} "
        f"target{'s' * (targets != 1)}, "
        f"{confidence} bootstrap interval over subsets): [open the report]({ui_path(run.run_id, PAGE)}).\n\n"
        + "\n".join(lines)
        + "\n"
    )
    if smoothness is not None:
        text += f"\n{sentence(smoothness)}\n"
    if not influence.exact:
        text += "\nThe scores are tagged inexact.\n"
    train_run_id = influence.train_run_id
    text += (
        f"\n- to look at: `{PAGE}` among the artifacts, and `figures/lds-scatter-{drop:g}.png`\n"
        f"- scores: [{influence.run_id}]({ui_path(influence.run_id)})\n"
        f"- training run: [{train_run_id}]({ui_path(train_run_id)})\n"
        f"{next_line(train_run_id)}\n"
    )
    run.describe(text)
