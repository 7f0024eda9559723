"""Artifacts of a run as files: in place where the store is a folder here, fetched one by one where it is not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from tracked_replay.errors import RecordingError
from tracked_replay.recording import Fetch


def artifact_source(client: MlflowClient, run_id: str) -> Fetch:
    """Opens a run's artifacts by path; a fetched copy is deleted when its context closes."""
    uri = client.get_run(run_id).info.artifact_uri
    local = Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None

    @contextmanager
    def fetch(name: str) -> Iterator[Path]:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or not parts.parts:
            raise RecordingError(f"{name!r} is not a path inside a run's artifacts")
        if local is not None:
            path = local / name
            if not path.is_file():
                raise RecordingError(f"{name} is missing from the artifacts of run {run_id}")
            yield path
            return
        folder = Path(tempfile.mkdtemp(prefix="tracked-replay-"))
        try:
            yield _download(run_id, name, folder)
        finally:
            shutil.rmtree(folder)

    return fetch


def _download(run_id: str, name: str, folder: Path) -> Path:
    try:
        return Path(download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise RecordingError(f"{name} cannot be fetched from the artifacts of run {run_id}: {error}") from error
