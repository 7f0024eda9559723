"""What a search for suspects found: tables, figure, metrics and the run's description."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.debugging import Detection, Ranking, Suspicion, detection
from tracked_replay.errors import RecordingError
from tracked_replay.recording import Recording, write_aside, write_json, write_text
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.pictures import thumbnail
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import save_figure
from tracked_replay.tracking import StageRun, artifacts_of, names, resolve, tag_of, ui_path

SUSPECTS = "suspects/suspects.parquet"
LONG, SHOWN_LETTERS = 1000, 60  # of a label: what is looked at, and shown
REMOVED = "suspects/removed.parquet"
SUMMARY = "suspects/summary.json"
TOP = "suspects/top.txt"
NAMED = 3  # examples in the first lines of the description
LISTED = 10  # examples in the terminal, and in the command that is given as the next one
SHOWN = 32  # examples in the figure, and of each ranking in the table of the UI


@dataclass(frozen=True)
class Removal:
    """What the evaluation gives after a training without some examples.

    Attributes:
        name: ``nothing``, ``suspects``, ``random`` or ``flipped``.
        indices: (removed,) int64.
        accuracy: share of evaluation examples predicted right, or ``None`` where outputs are not one value a class.
        measurement: mean over the evaluation examples.
    """

    name: str
    indices: np.ndarray
    accuracy: float | None
    measurement: float


@dataclass(frozen=True)
class Suspects:
    """A finished ``suspects`` run, read back.

    Attributes:
        table: one row a training example, the most suspicious by the first ranking first.
        summary: rankings with their questions, and how they and removals did where labels were flipped.
    """

    table: pa.Table
    summary: dict[str, Any]


def conclude(
    root: Path,
    problem: Problem,
    influence: Influence,
    suspicion: Suspicion,
    count: int,
    removals: Sequence[Removal],
    run: StageRun,
) -> None:
    """Write and log the result.

    Args:
        root: folder that is logged as the run's artifacts.
        problem: config, task and data.
        influence: the scores behind ``harm``.
        suspicion: all rankings.
        count: examples that count as the top of a ranking.
        removals: retrainings where labels were flipped; else empty.
        run: gets metrics, the table and the description.
    """
    flipped = problem.data.flipped.indices
    found = {ranking.name: detection(ranking, flipped, count) for ranking in suspicion.rankings if len(flipped)}
    table = _table(problem, suspicion)
    write_aside(root / SUSPECTS, lambda temporary: pq.write_table(table, temporary))
    write_text(root / TOP, _top(problem, suspicion, count))
    if removals:
        removed = pa.table(
            {
                "removal": np.repeat([one.name for one in removals], [len(one.indices) for one in removals]),
                "train_index": np.concatenate([one.indices for one in removals]),
            }
        )
        write_aside(root / REMOVED, lambda temporary: pq.write_table(removed, temporary))
    write_json(root / SUMMARY, _summary(problem, suspicion.rankings, found, count, removals))
    save_figure(root, "suspects", _figure(problem, suspicion))
    run.table(_shown(root, problem, suspicion), "tables/suspects.json")
    _metrics(found, removals, run)
    run.describe(_description(problem, influence, suspicion, found, count, removals, run.link("figures/suspects.png")))


def _table(problem: Problem, suspicion: Suspicion) -> pa.Table:
    order, final = suspicion.rankings[0].order, suspicion.final
    columns: dict[str, Any] = {
        "rank": pa.array(np.arange(1, len(order) + 1)),
        "train_index": pa.array(order),
        "label": pa.array(problem.data.train.labels.cpu().numpy()[order]),
        "predicted_label": _optional(final.predictions, order, pa.int64()),
        "probability": _optional(final.probabilities, order, pa.float64()),
    }
    return pa.table(columns | {ranking.name: pa.array(ranking.values[order]) for ranking in suspicion.rankings})


def _optional(values: np.ndarray | None, order: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.nulls(len(order), kind) if values is None else pa.array(values[order], kind)


def _top(problem: Problem, suspicion: Suspicion, count: int) -> str:
    """The top of the first ranking, an index a line, each with a comment that says what it is."""
    first = suspicion.rankings[0]
    heading = f"# the {count} most suspicious of {problem.data.num_train} training examples by {first.name}"
    if suspicion.final.predictions is not None:
        disagrees = _disagreements(problem, suspicion, first.order[:count])
        heading += f"; the model says another class than the label of {disagrees}, and agrees with {count - disagrees}"
    lines = [f"{index}  # {_words(problem, suspicion, index)}" for index in first.order[:count].tolist()]
    return "\n".join([heading, *lines]) + "\n"


def _disagreements(problem: Problem, suspicion: Suspicion, indices: np.ndarray) -> int:
    """Of how many of these examples the model says another class than the label."""
    predictions = suspicion.final.predictions
    labels = problem.data.train.labels.cpu().numpy()
    return 0 if predictions is None else int((predictions[indices] != labels[indices]).sum())


def _words(problem: Problem, suspicion: Suspicion, index: int, *, probable: bool = True) -> str:
    final = suspicion.final
    label, predicted, probability = int(problem.data.train.labels[index]), None, None
    if final.predictions is not None and final.probabilities is not None:
        predicted, probability = int(final.predictions[index]), float(final.probabilities[index])
    return _in_words(problem.task.label_names, label, predicted, probability if probable else None)


def _in_words(label_names: Sequence[str], label: int, predicted: int | None, probability: float | None) -> str:
    """What an example is labelled and what the model says of it, on one line whatever the names of the labels hold."""
    words = f"labelled {_one_line(label_names[label])}"
    if predicted is None:
        return words
    words += ", the model agrees" if predicted == label else f", the model says {_one_line(label_names[predicted])}"
    return words if probability is None else f"{words} ({probability:.0%})"


def _one_line(text: str) -> str:
    """A name from outside, for a terminal: what turns a line around or is not seen is escaped."""
    return report.plain_text(" ".join(text[:LONG].split()), SHOWN_LETTERS)


def _summary(
    problem: Problem,
    rankings: Sequence[Ranking],
    found: Mapping[str, Detection],
    count: int,
    removals: Sequence[Removal],
) -> dict[str, Any]:
    flipped = problem.data.flipped.indices
    return {
        "label_names": list(problem.task.label_names),
        "top": count,
        "flipped": len(flipped),
        "rankings": [
            {"name": ranking.name, "question": ranking.question}
            | (found[ranking.name]._asdict() if ranking.name in found else {})
            for ranking in rankings
        ],
        "removals": [
            {
                "removal": one.name,
                "removed": len(one.indices),
                "flipped": int(np.isin(one.indices, flipped).sum()),
                "evaluation_accuracy": one.accuracy,
                "evaluation_measurement": one.measurement,
            }
            for one in removals
        ],
    }


def _figure(problem: Problem, suspicion: Suspicion) -> Any:
    data, label_names, final, first = problem.data, problem.task.label_names, suspicion.final, suspicion.rankings[0]
    true_labels = dict(zip(data.flipped.indices.tolist(), data.flipped.true_labels.tolist(), strict=True))
    suspects = []
    for index in first.order[:SHOWN].tolist():
        label = int(data.train.labels[index])
        caption = f"truly {label_names[true_labels[index]]}" if index in true_labels else ""
        pixels = problem.task.draw(data.train.inputs[index].cpu())
        picture = report.Picture(pixels, label_names[label], index, caption=caption)
        if final.predictions is None or final.probabilities is None:
            suspects.append(report.Suspect(picture))
            continue
        said = int(final.predictions[index])
        says = f"→ {'agrees' if said == label else label_names[said]} {final.probabilities[index]:.0%}"
        suspects.append(report.Suspect(picture, says, differs=said != label))
    title = f"{problem.task.name}: the {len(suspects)} most suspicious training examples by {first.name}"
    return report.suspects_figure(suspects, title, first.question)


def _shown(root: Path, problem: Problem, suspicion: Suspicion) -> dict[str, list[Any]]:
    """The top of every ranking as MLflow shows it, the best ranking first; thumbnails are written under ``root``."""
    label_names, final = problem.task.label_names, suspicion.final
    rows = []
    for ranking in suspicion.rankings:
        for rank, index in enumerate(ranking.order[:SHOWN].tolist(), start=1):
            label, says, agrees, probability = int(problem.data.train.labels[index]), "", None, None
            if final.predictions is not None and final.probabilities is not None:
                says, probability = label_names[final.predictions[index]], float(final.probabilities[index])
                agrees = bool(final.predictions[index] == label)
            rows.append(
                {
                    "ranking": ranking.name,
                    "question": ranking.question,
                    "rank": rank,
                    "picture": thumbnail(root, problem, index),
                    "train_index": index,
                    "label": label_names[label],
                    "model_says": says,
                    "model_agrees": agrees,
                    "probability": probability,
                    "value": float(ranking.values[index]),
                }
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _metrics(found: Mapping[str, Detection], removals: Sequence[Removal], run: StageRun) -> None:
    for name, one in found.items():
        run.metric(f"auc/{name}", one.auc)
    for removal in removals:
        if removal.accuracy is not None:
            run.metric(f"evaluation_accuracy/removed_{removal.name}", removal.accuracy)
        run.metric(f"evaluation_measurement/removed_{removal.name}", removal.measurement)


def _description(
    problem: Problem,
    influence: Influence,
    suspicion: Suspicion,
    found: Mapping[str, Detection],
    count: int,
    removals: Sequence[Removal],
    look: str,
) -> str:
    train_run_id, flipped = influence.train_run_id, problem.data.flipped.indices
    first = suspicion.rankings[0]
    # The first lines are what MLflow shows before "Show more".
    lines = [f"{_headline(problem, suspicion, found, count)}\n"]
    agreeing = ""
    if suspicion.final.predictions is not None:
        disagrees = _disagreements(problem, suspicion, first.order[:count])
        agreeing = f"; the model agrees with the label of {count - disagrees} of these"
    lines.append(
        f"All {problem.data.num_train} training examples are ranked, from the training run "
        f"[{train_run_id}]({ui_path(train_run_id)}). `{SUSPECTS}` holds all of them, `tables/suspects.json` the top of "
        f"each ranking, `{TOP}` the top {count} by `{first.name}`{agreeing}.\n"
    )
    if not influence.exact:
        lines.append("The scores behind `harm` are tagged inexact.\n")
    lines += ["| ranking | what it answers |", "|---|---|"]
    lines += [f"| {ranking.name} | {ranking.question} |" for ranking in suspicion.rankings]
    if found:
        lines += [
            f"\n{len(flipped)} labels were flipped on purpose. Among the top {count}:\n",
            "| ranking | AUC | precision | recall |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {one.auc:.4f} | {one.precision:.3f} | {one.recall:.3f} |" for name, one in found.items()]
    if removals:
        lines += [
            "\n| removed | examples | flipped among them | evaluation accuracy | mean evaluation measurement |",
            "|---|---|---|---|---|",
        ]
        for one in removals:
            accuracy = "–" if one.accuracy is None else f"{one.accuracy:.4f}"
            hits = int(np.isin(one.indices, flipped).sum())
            lines.append(f"| {one.name} | {len(one.indices)} | {hits} | {accuracy} | {one.measurement:.6g} |")
    lines += [
        f"\n- to look at: {look} among the artifacts",
        f"- scores: [{influence.run_id}]({ui_path(influence.run_id)})",
        f"- to remove all {count}: `{TOP}`, downloaded, is what `remove` of `counterfactual` takes",
        f"- next: `{next_command(train_run_id, first.order.tolist())}`",
    ]
    return "\n".join(lines) + "\n"


def _headline(problem: Problem, suspicion: Suspicion, found: Mapping[str, Detection], count: int) -> str:
    """The most suspicious examples and, where labels were flipped, how many of those were found."""
    first = suspicion.rankings[0]
    shown = [
        f"#{index} ({report.markdown_text(_words(problem, suspicion, index, probable=False))})"
        for index in first.order[:NAMED].tolist()
    ]
    flipped = len(problem.data.flipped.indices)
    caught = ""
    if first.name in found:
        one = found[first.name]
        caught = f"**{one.recall:.0%} of {flipped} flipped labels** are among the top {count} (AUC {one.auc:.4f}). "
    task = report.markdown_text(_one_line(problem.task.name))
    return f"{caught}The most suspicious training examples of {task}, by `{first.name}`: {'; '.join(shown)}."


def next_command(train_run_id: str, order: Iterable[int]) -> str:
    """What to do next: retrain without the examples that :func:`describe` lists.

    Args:
        train_run_id: the recording.
        order: training examples, the most suspicious first.
    """
    listed = ",".join(str(index) for index in islice(order, LISTED))
    return f"tracked-replay counterfactual --train-run-id {train_run_id} --targets mean:all --remove {listed}"


def describe(found: Suspects, count: int = LISTED) -> str:
    """The most suspicious examples as lines of text, under the question that their ranking answers."""
    first, label_names, table = found.summary["rankings"][0], found.summary["label_names"], found.table
    lines = [f"most suspicious by {first['name']}: {first['question']}"]
    if table["predicted_label"].null_count == 0:
        disagrees = int((table["predicted_label"].to_numpy() != table["label"].to_numpy()).sum())
        lines.append(f"the model says another class than the label of {disagrees} of all {table.num_rows} examples")
    for row in table.slice(0, count).to_pylist():
        words = _in_words(label_names, row["label"], row["predicted_label"], row["probability"])
        lines.append(f"{row['rank']:4d}. training example {row['train_index']}: {words}")
    if "auc" in first:
        lines.append(
            f"of {found.summary['flipped']} flipped labels {first['recall']:.0%} are among the top "
            f"{found.summary['top']} (AUC {first['auc']:.4f})"
        )
    return "\n".join(lines)


def read_suspects(run_id: str) -> Suspects:
    """Rankings and summary of a finished ``suspects`` run. Raises RunError, RecordingError."""
    run = resolve(run_id, names.SUSPECTS, "run_id")
    identity = tag_of(run, names.DIGESTS)
    if identity is None:
        raise RecordingError(f"run_id: run {run_id} has no tag {names.DIGESTS}, so its files cannot be checked")
    recording = Recording(artifacts_of(run.info.run_id), identity)
    with recording.open(SUSPECTS) as path:
        table = pq.read_table(path)
    with recording.open(SUMMARY) as path:
        summary = json.loads(path.read_text(encoding="utf-8"))
    return Suspects(table, summary)
