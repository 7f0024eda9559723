"""Artifacts of a run as files: in place where the store is a folder here, fetched one by one where it is not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from tracked_replay.errors import RecordingError, TrackedReplayError
from tracked_replay.recording import Fetch
from tracked_replay.recording.journal import FOLDER as RESUME
from tracked_replay.tracking import names

CACHE = "TRACKED_REPLAY_CACHE"


@dataclass(frozen=True)
class Workspace:
    """A folder that a run's artifacts are written to while it goes on, and that outlives an interruption.

    Attributes:
        run_id: the run.
        folder: the run's own artifact folder where the store is a folder here, else one in this user's cache.
        in_place: whether it is the run's artifact folder.
    """

    run_id: str
    folder: Path
    in_place: bool

    @classmethod
    def of(cls, run_id: str) -> Workspace:
        """The workspace of a run; its folder need not be there yet."""
        local = _local_folder(MlflowClient(), run_id)
        return cls(run_id, local or cache_folder() / "runs" / run_id, local is not None)

    @contextmanager
    def opened(self, name: str = "") -> Iterator[Path]:
        """The workspace, or a folder in it that is needed until the end only; made here.

        An interruption leaves it to be gone on from. An error of ours removes it, and so does the end, which leaves
        nothing but the run's artifacts.

        Args:
            name: of the folder; the whole workspace where it is empty.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except TrackedReplayError:
            self._remove(folder)  # it would come again at the same step, so nothing is half there for nothing
            raise
        if name or not self.in_place:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder if self.in_place else self.folder)

    def publish(self) -> None:
        """Make what is in the workspace the run's artifacts, but for what it is gone on from."""
        if self.in_place:
            return
        client = MlflowClient()
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name != RESUME:
                client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                client.log_artifact(self.run_id, str(path))


def cache_folder() -> Path:
    """``$TRACKED_REPLAY_CACHE``, else the folder for this user's caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or Path(base) / "tracked-replay").expanduser()


def _local_folder(client: MlflowClient, run_id: str) -> Path | None:
    uri = client.get_run(run_id).info.artifact_uri
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None


def artifact_source(client: MlflowClient, run_id: str) -> Fetch:
    """Opens a run's artifacts by path; a fetched copy is deleted when its context closes."""
    local = _local_folder(client, run_id)

    @contextmanager
    def fetch(name: str) -> Iterator[Path]:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or not parts.parts:
            raise RecordingError(f"{name!r} is not a path inside a run's artifacts")
        if local is not None:
            path = local / name
            if not path.is_file():
                raise RecordingError(f"{name} is missing from the artifacts of run {run_id}{_cleaned(client, run_id)}")
            yield path
            return
        folder = Path(tempfile.mkdtemp(prefix="tracked-replay-"))
        try:
            yield _download(client, run_id, name, folder)
        finally:
            shutil.rmtree(folder)

    return fetch


def _cleaned(client: MlflowClient, run_id: str) -> str:
    kinds = client.get_run(run_id).data.tags.get(names.CLEANED)
    return f"; clean removed its {kinds}" if kinds else ""


def _download(client: MlflowClient, run_id: str, name: str, folder: Path) -> Path:
    try:
        return Path(download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise RecordingError(
            f"{name} cannot be fetched from the artifacts of run {run_id}{_cleaned(client, run_id)}: {error}"
        ) from error
