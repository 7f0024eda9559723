"""`mlflow run` as a user types it: from a path with a space, twice, with both environment managers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clones import copy_project

QUICK = "train.epochs=1,train.threads=1,data.train_examples=300,train.batch_size=100,data.evaluation_examples=20"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what `mlflow run` needs, in a folder whose path holds spaces."""
    return copy_project(tmp_path / "a folder" / "the project")


def mlflow_run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # As in an activated environment: `mlflow run` starts the first `python` on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return subprocess.run(
        [sys.executable, "-m", "mlflow", "run", ".", *arguments],
        cwd=project,
        env=clean | {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def runs(project: Path) -> list:
    from mlflow.tracking import MlflowClient

    return list(MlflowClient(f"sqlite:///{project}/mlflow.db").search_runs(["0"]))


@pytest.mark.slow
def test_magic_twice_from_a_path_with_a_space(project: Path) -> None:
    arguments = ("-e", "magic", "--env-manager", "local", "-P", "targets=0-1")
    first = mlflow_run(project, *arguments, "-P", f"set={QUICK}")
    assert first.returncode == 0, first.stderr
    by_stage = {run.data.tags["tracked_replay.stage"]: run for run in runs(project)}
    assert {stage: run.info.status for stage, run in by_stage.items()} == {"train": "FINISHED", "magic": "FINISHED"}
    trained = by_stage["train"].info.run_id
    assert by_stage["train"].data.tags["mlflow.parentRunId"] == by_stage["magic"].info.run_id
    assert by_stage["magic"].data.tags["tracked_replay.input.train_run_id"] == trained
    assert by_stage["magic"].data.tags["mlflow.project.entryPoint"] == "magic"

    other = mlflow_run(project, *arguments, "-P", f"set={QUICK},report.examples=3")
    assert other.returncode == 0, other.stderr
    assert f"reusing training run {trained}" in other.stderr + other.stdout
    assert sum(run.data.tags["tracked_replay.stage"] == "train" for run in runs(project)) == 1

    again = mlflow_run(project, *arguments, "-P", f"set={QUICK}")
    assert again.returncode == 0, again.stderr
    assert f"reusing magic run {by_stage['magic'].info.run_id}" in again.stderr + again.stdout
    assert f"magic run: {by_stage['magic'].info.run_id}" in again.stdout
    assert {run.info.status for run in runs(project)} == {"FINISHED"}


@pytest.mark.slow
def test_a_wrong_parameter_leaves_one_failed_run_and_one_sentence(project: Path) -> None:
    done = mlflow_run(project, "-e", "magic", "--env-manager", "local", "-P", "set=train.epoch=1")
    assert done.returncode != 0
    assert re.search(r"^error: train\.epoch: unknown config field.*did you mean train\.epochs\?", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert [run.info.status for run in runs(project)] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("pyenv") is None, reason="MLflow's default environment manager needs pyenv")
def test_magic_in_the_environment_that_mlflow_makes(project: Path, tmp_path: Path) -> None:
    done = mlflow_run(project, "-e", "magic", "-P", f"set={QUICK}", MLFLOW_ENV_ROOT=str(tmp_path / "environments"))
    shutil.rmtree(tmp_path / "environments", ignore_errors=True)  # gigabytes
    assert done.returncode == 0, done.stderr[-3000:]
    assert {run.info.status for run in runs(project)} == {"FINISHED"}
    assert len(runs(project)) == 2
