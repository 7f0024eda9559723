"""Time a state takes to come from a tracking server of this machine, by the ways of asking for it.

    PYTHONPATH=. python tests/benchmarks/fetching.py [--megabytes 0.8,3.3,82] [--files 20,20,4] [--rounds 5]

A real `mlflow server` serves files of random bytes. A state is asked for by the run's ID, as MLflow's function for
users does; one by one; four at a time, and from the copies of this machine, as a replay does; and as a part of a file
that holds all states of a size. Each way reads what it fetched. Not among the benchmarks of `run.py`: the numbers are
milliseconds, of a server that shares the cores with its client.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
from measuring import Row, in_turn, numbers, run_alone
from mlflow.tracking import MlflowClient

from tracked_replay.tracking.artifacts import CACHE, artifact_source

QUICK = {"megabytes": "0.01", "files": "5", "rounds": 1}
ALL = "all.bin"
EXPERIMENT = "fetching"
ANSWERED = 120.0  # seconds


def measure(megabytes: str = "0.8,3.3,82", files: str = "20,20,4", rounds: int = 5) -> list[Row]:
    """Serve files of each size and fetch them in turn by each way.

    Args:
        megabytes: sizes of a state.
        files: how many of each size.
        rounds: of everything.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as store:
        os.environ[CACHE] = str(Path(folder, "cache"))
        for size, count in zip(megabytes.split(","), numbers(files), strict=True):
            times = in_turn(_works(store, round(float(size) * 1e6), count), rounds)
            at = {"megabytes": float(size), "files": count}
            for way, taken in times.items():
                milliseconds = [1000 * seconds / count for seconds in taken]
                rows.append(Row(f"{way}_{size}", f"{size} MB, {way}", milliseconds, "ms", None, at))
    return rows


def _works(store: Path, size: int, count: int) -> dict[str, Callable[[], object]]:
    """The ways of fetching ``count`` files of a run of their own."""
    client = MlflowClient()
    run_id = client.create_run(mlflow.get_experiment_by_name(EXPERIMENT).experiment_id).info.run_id
    client.log_text(run_id, "", "placed.txt")
    client.set_terminated(run_id)
    (root,) = (path.parent for path in store.rglob("placed.txt") if run_id in path.parts)
    (root / "checkpoints").mkdir()
    content = random.randbytes(size)  # noqa: S311
    names = [f"checkpoints/step-{step:06d}.safetensors" for step in range(count)]
    with (root / ALL).open("wb") as together:
        for name in names:
            (root / name).write_bytes(content)
            together.write(content)
    source = artifact_source(client, run_id)

    def one_by_one(wanted: Sequence[str] = names) -> None:
        for name in wanted:
            with source(name) as path:
                path.read_bytes()

    def ahead(cached: bool) -> None:
        with source.ahead(names, cached=cached) as fetch:
            for name in names:
                with fetch(name) as path:
                    path.read_bytes()

    ahead(cached=True)
    return {
        "by the run's ID": lambda: _by_run(run_id, names),
        "one by one": one_by_one,
        "four at a time": lambda: ahead(cached=False),
        "from copies": lambda: ahead(cached=True),
        "all in one file": lambda: one_by_one([ALL]),
    }


def _by_run(run_id: str, names: Sequence[str]) -> None:
    for name in names:
        folder = tempfile.mkdtemp()
        Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=folder)).read_bytes()
        shutil.rmtree(folder)


@contextmanager
def served(folder: Path) -> Iterator[Path]:
    """Start a tracking server whose files lie under ``folder``, and make it MLflow's; yields where artifacts are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            started = time.monotonic()
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if server.poll() is not None or time.monotonic() > started + ANSWERED:
                    raise SystemExit(f"fetching: the server did not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.25)
            mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
            mlflow.set_experiment(EXPERIMENT)
            yield folder / "files"
        finally:
            os.killpg(server.pid, 15)
            server.wait(60)


if __name__ == "__main__":
    run_alone(measure, QUICK)
