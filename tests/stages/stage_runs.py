"""What the tests of stages that retrain share: commands, artifacts, and a training written with torch alone."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
from mlflow.tracking import MlflowClient
from tiny import TinyTask

from tracked_replay.cli import main
from tracked_replay.recording.recorder import write_digests
from tracked_replay.tracking import names


def runs_of(stage: str) -> list[mlflow.entities.Run]:
    """All runs of a stage in the store, oldest first."""
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return sorted(
        (run for run in runs if run.data.tags.get(names.STAGE) == stage), key=lambda run: run.info.end_time or 0
    )


def statuses() -> list[str]:
    """``stage STATUS`` of every run in the store."""
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return sorted(f"{run.data.tags.get(names.STAGE)} {run.info.status}" for run in runs)


def folder_of(run_id: str) -> Path:
    """Where a run's artifacts are."""
    return Path(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://"))


def table_of(run_id: str, name: str) -> pa.Table:
    """A Parquet artifact."""
    return pq.read_table(folder_of(run_id) / name)


def bits(values: object) -> np.ndarray:
    """float64 values as integers, so that equal means the same bits."""
    return np.asarray(values, dtype=np.float64).view(np.int64)


def command(*arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, standard output, standard error."""
    logger = logging.getLogger("tracked_replay")
    before = (logger.level, logger.propagate, logger.handlers[:])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
    logger.level, logger.propagate, logger.handlers[:] = before
    return code, out.getvalue(), err.getvalue()


def refusal(*arguments: object) -> str:
    """The one sentence of a command that is refused; no run is started or left open."""
    before = statuses()
    code, out, err = command(*arguments, "--log-level", "ERROR")
    lines = err.splitlines()
    assert code == 1, (code, out, err)
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 600
    assert statuses() == before
    return lines[0].removeprefix("error: ")


def edit_recording(run_id: str, edit: Callable[[Path], None]) -> None:
    """Change a recorded run's files and bring all its digests in line, as somebody who forges it would."""
    root = folder_of(run_id)
    edit(root)
    (root / "digests.json").unlink()
    MlflowClient().set_tag(run_id, names.DIGESTS, write_digests(root))


def plain_retraining(train_run: str, weights: np.ndarray) -> np.ndarray:
    """Measurements after training the tiny task with torch.optim.SGD on the weighted loss, in the recorded order.

    Only the recording's files are used, and nothing of the package that steps or retrains.
    """
    root = folder_of(train_run)
    trace = pq.read_table(root / "trace/part-00000.parquet").to_pylist()
    recorded = safetensors.torch.load_file(root / "checkpoints/step-000000.safetensors")
    task = TinyTask.__new__(TinyTask)
    model = task.model().double()
    model.load_state_dict(
        {
            name.split("/", 1)[1]: tensor
            for name, tensor in recorded.items()
            if name.startswith(("parameters/", "buffers/"))
        }
    )
    train, evaluation = task.train_examples(), task.evaluation_examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.8, weight_decay=0.01)
    per_example = torch.from_numpy(weights)
    for row in trace:
        (optimizer.param_groups[0]["lr"],) = set(row["lr"])
        optimizer.zero_grad()
        outputs = model(train.inputs[row["indices"]].double())
        losses = F.cross_entropy(outputs, train.labels[row["indices"]], reduction="none")
        ((losses * per_example[row["indices"]]).sum() / len(row["indices"])).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(evaluation.inputs.double()), evaluation.labels, reduction="none").numpy()
