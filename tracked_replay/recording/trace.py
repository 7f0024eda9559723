"""The batch trace: one row a step, in Parquet files of many steps each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from tracked_replay.errors import RecordingError
from tracked_replay.recording.files import write_aside

FOLDER = "trace"
ROWS_PER_FILE = 1000
BYTES_PER_FILE = 64 * 2**20  # pixels: a file is closed before it grows past this

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("indices", pa.list_(pa.int64()), nullable=False),
        pa.field("labels", pa.list_(pa.int64()), nullable=False),
        pa.field("lr", pa.list_(pa.float64()), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("state_digest", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Trace:
    """The trace of a whole run, in step order.

    Attributes:
        epochs: (steps,) int64.
        indices: (steps, batch) int64.
        labels: (steps, batch) int64.
        learning_rates: (steps, groups) float64.
        losses: (steps,) float64.
        state_digests: digest of the state before each step.
    """

    epochs: np.ndarray
    indices: np.ndarray
    labels: np.ndarray
    learning_rates: np.ndarray
    losses: np.ndarray
    state_digests: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.state_digests)


class TraceRow(NamedTuple):
    """One step.

    Attributes:
        step: the step.
        epoch: epoch it belongs to.
        indices: (batch,) int64.
        labels: (batch,) int64.
        lr: (groups,) float64.
        loss: weighted mean loss of the batch.
        state_digest: digest of the state before the step.
    """

    step: int
    epoch: int
    indices: np.ndarray
    labels: np.ndarray
    lr: np.ndarray
    loss: float
    state_digest: str


@dataclass
class TraceWriter:
    """Collects rows and writes ``trace/part-00000.parquet``, ``part-00001.parquet``, … under ``root``."""

    root: Path
    pixels: bool = False
    _rows: list[TraceRow] = field(default_factory=list)
    _pixels: list[np.ndarray] = field(default_factory=list)
    _parts: int = 0

    def add(self, row: TraceRow, inputs: Tensor | None = None) -> None:
        """Add the row of a step, with its model inputs (batch, ...) where pixels are kept."""
        self._rows.append(row)
        if self.pixels:
            assert inputs is not None
            self._pixels.append(inputs.detach().cpu().numpy())
        held = sum(pixels.nbytes for pixels in self._pixels[:1]) * len(self._pixels)
        if len(self._rows) >= ROWS_PER_FILE or held >= BYTES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the rows held so far, if any."""
        if not self._rows:
            return
        table = pa.Table.from_pylist([row._asdict() for row in self._rows], schema=SCHEMA)
        if self.pixels:
            tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(np.stack(self._pixels)))
            table = table.append_column("pixels", tensors)
        path = self.root / FOLDER / f"part-{self._parts:05d}.parquet"
        write_aside(path, lambda temporary: pq.write_table(table, temporary))
        self._rows, self._pixels, self._parts = [], [], self._parts + 1


def read_trace(paths: Sequence[Path]) -> Trace:
    """Read the parts of a trace.

    Raises:
        RecordingError: a part cannot be read, or the steps are not 0, 1, 2, … .
    """
    names = SCHEMA.names
    try:
        table = pa.concat_tables([pq.read_table(path, columns=names) for path in paths]).sort_by("step")
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(f"the trace cannot be read: {error}") from None
    steps = table["step"].to_numpy()
    if len(steps) == 0 or not np.array_equal(steps, np.arange(len(steps))):
        raise RecordingError(
            f"the trace must hold the steps 0, 1, 2, …; found {steps[:5].tolist()}… ({len(steps)} rows)"
        )

    def matrix(name: str) -> np.ndarray:
        lengths = pc.list_value_length(table[name])
        if lengths.null_count or pc.count_distinct(lengths).as_py() != 1:
            raise RecordingError(f"the trace must hold equally many {name} for each step; found different numbers")
        return table[name].combine_chunks().flatten().to_numpy().reshape(len(steps), -1)

    return Trace(
        epochs=table["epoch"].to_numpy(),
        indices=matrix("indices"),
        labels=matrix("labels"),
        learning_rates=matrix("lr"),
        losses=table["loss"].to_numpy(),
        state_digests=tuple(table["state_digest"].to_pylist()),
    )
