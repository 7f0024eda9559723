"""Fixtures that several test folders share: a tracking store of its own for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Give back the process-wide torch settings that a stage pins."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite tracking store without runs: MLflow needs seconds to make one, copying it takes none."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@contextmanager
def tracking_store(folder: Path, empty_database: Path) -> Iterator[Path]:
    """Make ``folder`` the working directory and an empty store in it MLflow's."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in list(os.environ):
            if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY":
                patch.delenv(name)
        shutil.copyfile(empty_database, folder / "mlflow.db")
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment("tests")
        yield folder
        while mlflow.active_run():
            mlflow.end_run()
        mlflow.set_tracking_uri(before)


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Iterator[Path]:
    """An empty SQLite tracking store in a folder of its own, which is the working directory too."""
    with tracking_store(tmp_path, empty_database):
        yield tmp_path


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """As ``store``, one for the tests of a module, which leave its runs as they found them."""
    folder = tmp_path_factory.mktemp("store")
    with tracking_store(folder, empty_database):
        yield folder
