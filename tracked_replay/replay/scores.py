"""Influence scores as tables: summed over steps, and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracked_replay.recording import write_aside
from tracked_replay.replay.targets import Target
from tracked_replay.replay.traversal import StepScores

INFLUENCE = "scores/influence.parquet"
TARGETS = "scores/targets.json"
PER_STEP = "scores/per_step"
STEPS_PER_FILE = 100

INFLUENCE_SCHEMA = pa.schema(
    [
        pa.field("target", pa.int64(), nullable=False),
        pa.field("train_index", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)
PER_STEP_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("target", pa.int64(), nullable=False),
        pa.field("indices", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
    ]
)


class ScoreSum:
    """Sums what the steps give into one score an example and target, in float64, in the order of the replay.

    Attributes:
        scores: (targets, training examples).
        absolute: (targets, steps) sum of the absolute scores of a step's examples.
    """

    def __init__(self, targets: Sequence[Target], num_train: int, num_steps: int) -> None:
        self.scores = np.zeros((len(targets), num_train))
        self.absolute = np.zeros((len(targets), num_steps))

    def add(self, step: StepScores) -> None:
        """Add a step; an example may stand in it more than once."""
        self.absolute[:, step.step] = np.abs(step.scores).sum(axis=1)
        for total, scores in zip(self.scores, step.scores, strict=True):
            np.add.at(total, step.indices, scores)


def influence_table(targets: Sequence[Target], scores: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Scores of shape (targets, training examples) with labels (training examples,) as the contract's table."""
    count = scores.shape[1]
    return pa.table(
        {
            "target": np.repeat([target.id for target in targets], count),
            "train_index": np.tile(np.arange(count), len(targets)),
            "label": np.tile(labels, len(targets)),
            "score": scores.reshape(-1),
        },
        schema=INFLUENCE_SCHEMA,
    )


def write_influence(root: Path, table: pa.Table) -> None:
    """Write ``scores/influence.parquet``."""
    write_aside(root / INFLUENCE, lambda temporary: pq.write_table(table, temporary))


class PerStepWriter:
    """Writes ``scores/per_step/part-00000.parquet``, … under ``root``: a row a step and target.

    Attributes:
        parts: number of parts written.
        held: steps that are not written yet.
    """

    def __init__(self, root: Path, targets: Sequence[Target]) -> None:
        self._root = root
        self._targets = targets
        self.parts = 0
        self.held: list[StepScores] = []

    def add(self, step: StepScores) -> None:
        """Add a step."""
        self.held.append(step)
        if len(self.held) == STEPS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the steps held so far, if any."""
        if not self.held:
            return
        rows = [
            {"step": step.step, "target": target.id, "indices": step.indices, "scores": scores}
            for step in self.held
            for target, scores in zip(self._targets, step.scores, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=PER_STEP_SCHEMA)
        path = self._root / PER_STEP / f"part-{self.parts:05d}.parquet"
        write_aside(path, lambda temporary: pq.write_table(table, temporary))
        self.held, self.parts = [], self.parts + 1


def curves(root: Path, target: Target, examples: Sequence[int], num_steps: int) -> np.ndarray:
    """Cumulative influence of some examples along training.

    Args:
        root: folder that holds ``scores/per_step``.
        target: one target.
        examples: training indices.
        num_steps: steps of the training.

    Returns:
        (examples, steps) float64: the sum over steps up to and including each.
    """
    found = np.zeros((len(examples), num_steps))
    position = {int(index): row for row, index in enumerate(examples)}
    for path in sorted((root / PER_STEP).glob("part-*.parquet")):
        table = pq.read_table(path, filters=pc.field("target") == target.id)
        for step, indices, scores in zip(table["step"].to_pylist(), table["indices"], table["scores"], strict=True):
            values = np.asarray(indices.values)
            for place in np.flatnonzero(np.isin(values, examples)):
                found[position[int(values[place])], step] += scores.values[int(place)].as_py()
    return found.cumsum(axis=1)
