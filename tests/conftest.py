"""Fixtures that several test folders share: a tracking store of its own for each test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stores import tracking_store

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


SLOW_MINUTES = float(os.environ.get("TRACKED_REPLAY_SLOW_MINUTES", "17"))
STARTED = time.monotonic()


def pytest_configure() -> None:
    """A shell starts a background job with SIGINT ignored, and what the tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests last, the largest first: they are begun as far as time allows."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path in slow, item.path.name != "test_written_commands.py"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On a slow machine not all slow tests are begun; those left out are listed at the end of a run."""
    if item.get_closest_marker("slow") and time.monotonic() - STARTED > 60 * SLOW_MINUTES:
        pytest.skip(f"slow, and the run is older than {SLOW_MINUTES:g} minutes (TRACKED_REPLAY_SLOW_MINUTES)")


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
