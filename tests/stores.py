"""A tracking store for a test. Not in conftest.py: two folders have one, and only one answers to the name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tracking_store(folder: Path, empty_database: Path) -> Iterator[Path]:
    """Make ``folder`` the working directory and an empty store in it MLflow's."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in list(os.environ):
            if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY":
                patch.delenv(name)
        patch.setenv("TRACKED_REPLAY_CACHE", str(folder / "cache"))  # not the one of whoever runs the tests
        shutil.copyfile(empty_database, folder / "mlflow.db")
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment("tests")
        yield folder
        while mlflow.active_run():
            mlflow.end_run()
        mlflow.set_tracking_uri(before)
