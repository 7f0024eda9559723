"""Stages in processes of their own that are killed at a chosen moment.

Run as a script it imports everything once and forks a process for each stage that it is asked for: a line of JSON in,
a line of JSON out.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
IMPORTED_LATE = (
    "alembic.command",
    "git",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_store",
    "tracked_replay.stages.magic",
)


class Forks:
    """Runs stages in forked processes.

    Args:
        process: this file, run as a script.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, stage: str, config: Any, moment: str = "", step: int = 0, **more: Any) -> int:
        """Run a stage in the test's store and experiment, in a process that kills itself at a moment.

        Args:
            stage: ``train`` or ``magic``.
            config: of the stage.
            moment: one of :data:`MOMENTS`; to its end where it is empty.
            step: that the moment is about.
            more: ``train_run_id`` and ``targets`` of magic; ``environment``, variables of the process; ``constants``,
                values by ``module.NAME``.

        Returns:
            The signal that ended the process, 0 for none.
        """
        import mlflow

        experiment = mlflow.tracking.fluent._get_experiment_id()
        job = {"stage": stage, "config": config.to_toml(), "moment": moment, "step": step, "folder": os.getcwd()}
        job |= {"uri": mlflow.get_tracking_uri(), "experiment": experiment, **more}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ended: dict[str, int] = json.loads(self._process.stdout.readline())
        log = Path("fork.log").read_text(encoding="utf-8", errors="replace")
        assert ended["code"] == 0, log
        assert (ended["signal"] == signal.SIGKILL) == bool(moment), log
        return ended["signal"]


@contextmanager
def forks(empty_database: Path) -> Iterator[Forks]:
    """Start the process that forks; it tries MLflow out on a copy of a database."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with subprocess.Popen(
        [sys.executable, __file__, str(empty_database)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def serve(empty_database: str) -> None:
    """Fork a process for each line of standard input."""
    import torch

    from tracked_replay.recording import recorder

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    recorder.environment_record = dict  # takes longer than a small training
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    _rehearse(empty_database)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        _, status = os.waitpid(pid, 0)
        ended = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        print(json.dumps(ended | {"code": 0 if ended["signal"] else os.WEXITSTATUS(status)}), flush=True)


def _rehearse(empty_database: str) -> None:
    """Make a run here, so that what MLflow and its database layer make once is not made in every fork."""
    import mlflow
    import numpy as np

    from tracked_replay.tracking import find_interrupted, stage_run

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(empty_database, f"{folder}/mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment(experiment_id="0")
        find_interrupted("rehearsal", "x")
        with redirect_stdout(sys.stderr), stage_run("rehearsal", "x", "x", {}) as run:
            run.params({"a": 1})
            run.metric("a", 1.0)
            run.dataset(np.zeros((2, 2)), np.zeros(2), "a", "b" * 32, "training")


def _run(job: dict[str, Any]) -> None:
    try:
        log = os.open(Path(job["folder"], "fork.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _stage(job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _stage(job: dict[str, Any]) -> None:
    import mlflow

    import tracked_replay as tr
    from tracked_replay.config import Config

    os.chdir(job["folder"])
    os.environ.update(job.get("environment", {}))
    mlflow.set_tracking_uri(job["uri"])
    mlflow.set_experiment(experiment_id=job["experiment"])
    for name, value in job.get("constants", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(f"tracked_replay.{module}"), constant, value)
    if job["moment"]:
        MOMENTS[job["moment"]](job["step"])
    config = Config.from_toml(job["config"])
    if job["stage"] == "train":
        tr.train(config)
    elif "train_run_id" in job:
        tr.magic(job["train_run_id"], job["targets"], overrides=job["overrides"])
    else:
        tr.magic(config=config, targets=job["targets"])


def die(*_: object) -> None:
    """End this process at once: nothing is closed, flushed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # not a line further


def before(owner: Any, name: str, is_now: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Die when a function is called with arguments that ``is_now`` is true of, before it does anything."""
    real = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if is_now(*arguments, **keywords):
            die()
        return real(*arguments, **keywords)

    setattr(owner, name, call)


def after(owner: Any, name: str, is_now: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Likewise, when it has done everything."""
    real = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        result = real(*arguments, **keywords)
        if is_now(*arguments, **keywords):
            die()
        return result

    setattr(owner, name, call)


def moving(end: str, count: int = 1) -> None:
    """Die before a file whose path ends so is moved into place, at the ``count``-th time."""
    seen = iter(range(1, count))
    before(os, "replace", lambda _, path: str(path).endswith(end) and next(seen, None) is None)


def _half_a_file(end: str) -> None:
    """Die when half of a recorded file whose path ends so is in its place."""
    checkpoints = _module("recording.checkpoints")
    real = checkpoints.write_directly

    def write_directly(path: Path, memory: memoryview, size: int) -> None:
        if str(path).endswith(end):
            real(path, memory, size // 2)
            die()
        real(path, memory, size)

    checkpoints.write_directly = write_directly


def _written(step: int) -> None:
    from tracked_replay.recording import Recorder

    real = Recorder.add

    def add(self: Recorder, record: Any) -> None:
        real(self, record)
        if record.before.step == step:
            self.wait()
            die()

    Recorder.add = add  # type: ignore[method-assign]


def _half_a_line(step: int) -> None:
    from tracked_replay.recording.journal import Journal

    real = Journal.append

    def append(self: Journal, line: bytes) -> None:
        if _is_of(line, step):
            real(self, line[: len(line) // 2])
            die()
        real(self, line)

    Journal.append = append  # type: ignore[method-assign]


def _is_of(line: bytes, step: int) -> bool:
    """Whether a line of the journal is that of a step."""
    return bool(json.loads(line.partition(b" ")[2])[0] == step)


def _half_the_metrics(epoch: int) -> None:
    """Die when an epoch's losses are sent and its other metrics are not."""
    from tracked_replay.tracking import runs

    runs.METRICS_PER_CALL = 1
    before(
        runs.MlflowClient,
        "log_batch",
        lambda *_, metrics=(), **__: any((row.key, row.step) == ("epoch/train_loss", epoch) for row in metrics),
    )


def _recorder() -> Any:
    from tracked_replay.recording import Recorder

    return Recorder


def _module(name: str) -> Any:
    return importlib.import_module(f"tracked_replay.{name}")


MOMENTS: dict[str, Callable[[int], None]] = {
    # A step of the training: in the loop, and in the thread that writes what was recorded.
    "taken": lambda step: before(_recorder(), "add", lambda _, record: record.before.step == step),
    "handed over": lambda step: after(_recorder(), "add", lambda _, record: record.before.step == step),
    "written": _written,
    "checkpoint": lambda step: _half_a_file(f"checkpoints/step-{step:06d}.safetensors"),
    "line": lambda step: before(_module("recording.journal").Journal, "append", lambda _, line: _is_of(line, step)),
    "half a line": _half_a_line,
    # The end of an epoch, and of the training.
    "evaluation": lambda step: before(_module("stages.train"), "evaluate", lambda _, state: state.step == step),
    "evaluated": lambda step: after(_module("stages.train"), "evaluate", lambda _, state: state.step == step),
    "half the metrics": _half_the_metrics,
    "figure": lambda _: before(_module("stages.train"), "_figure"),
    "generators": lambda _: moving("rng/part-00000.safetensors"),
    "digests": lambda _: before(_module("recording.recorder"), "write_digests"),
    "digested": lambda _: after(_module("recording.recorder"), "write_digests"),
    "publishing": lambda _: before(_module("tracking").Workspace, "publish"),
    "published": lambda _: after(_module("tracking").Workspace, "publish"),
    # A replay: a step, and what is made of all of them.
    "replayed": lambda step: before(_module("stages.magic"), "save_replay", lambda _, replay, *__: replay.step == step),
    "half saved": lambda step: moving("/replay.saved", step),
    "saved": lambda step: after(_module("stages.magic"), "save_replay", lambda _, replay, *__: replay.step == step),
    "figures": lambda _: before(_module("stages.magic"), "_figures"),
    "table": lambda _: after(_module("tracking").StageRun, "table"),
    "scores": lambda _: before(_module("stages.magic"), "publish"),
    "all but the end": lambda _: after(_module("stages.magic"), "publish"),
}


if __name__ == "__main__":
    serve(sys.argv[1])
