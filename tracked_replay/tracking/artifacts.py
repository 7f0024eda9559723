"""Artifacts of a run as files: in place where the store is a folder here, fetched one by one where it is not."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

from mlflow.entities import Run
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from tracked_replay.errors import ConfigError, FetchError, RecordingError, TrackedReplayError
from tracked_replay.recording import Fetch
from tracked_replay.recording.journal import FOLDER as RESUME
from tracked_replay.recording.reader import DamagedCopyError
from tracked_replay.tracking import names
from tracked_replay.tracking.fetched import FetchedStates, cache_limit

CACHE = "TRACKED_REPLAY_CACHE"
CACHE_ALLOWED = "allowed: a folder that can be written to, or made"
WAITING = "runs"  # folder of the cache
FETCHES = 4  # files that are fetched at once, or wait on disk for their turn
PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")


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
        """The workspace of a run; its folder need not be there yet. Raises ConfigError as :func:`require_waiting`."""
        local = _local_folder(MlflowClient(), run_id)
        if local is None:
            _require_writable()
        return cls(run_id, local or waiting_folder(run_id), local is not None)

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
        except FetchError:
            raise  # a store that is away for a while costs nothing that was done
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
    """``$TRACKED_REPLAY_CACHE``, else the folder for this user's caches. Raises ConfigError."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get(CACHE) or Path(base) / "tracked-replay")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ConfigError(f"{CACHE}: found {str(folder)!r}, but there is no such home; {CACHE_ALLOWED}") from None


def waiting_folder(run_id: str) -> Path:
    """Where the files of a run wait for its end when its store is no folder here."""
    return cache_folder() / WAITING / run_id


def require_waiting(experiment_id: str) -> None:
    """Check that files can wait for the end of a run that an experiment is to get; where they need not, nothing.

    Raises:
        ConfigError: the store is no folder here, and this user's cache cannot be written to.
    """
    if not is_local_uri(MlflowClient().get_experiment(experiment_id).artifact_location):
        _require_writable()


def _require_writable() -> None:
    folder = cache_folder()
    try:
        (folder / WAITING).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / WAITING):  # asks the file system too, which may be read-only
            pass
    except OSError as error:
        raise ConfigError(
            f"{CACHE}: found {str(folder)!r}, in which no folder {WAITING!r} can be written to ({error.strerror}); "
            f"{CACHE_ALLOWED}"
        ) from None


def fetched_folder() -> Path:
    """Where states are kept that were fetched, those of each run in a folder named by its ID."""
    return cache_folder() / "fetched"


def _local_folder(client: MlflowClient, run_id: str) -> Path | None:
    return _folder_of(client.get_run(run_id))


def _folder_of(run: Run) -> Path | None:
    uri = run.info.artifact_uri
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None


def artifact_source(client: MlflowClient, run_id: str) -> Fetch:
    """Opens a run's artifacts by path; a fetched copy is deleted when its context closes.

    Raises:
        ConfigError: files would be fetched, and the limit of what is kept of them is none.
    """
    run = client.get_run(run_id)
    local = _folder_of(run)
    if local is None:
        return _Remote(client, run, FetchedStates(fetched_folder(), cache_limit()))

    @contextmanager
    def fetch(name: str) -> Iterator[Path]:
        _require_inside(name)
        path = local / name
        if not path.is_file():
            raise RecordingError(f"{name} is missing from the artifacts of run {run_id}{_cleaned(client, run_id)}")
        yield path

    return fetch


class _Remote:
    """Artifacts that MLflow fetches; it asks a repository that is made once, and not for the run and its models too.

    Args:
        client: of the store.
        run: whose artifacts they are.
        kept: where states go that are read with ``cached``.
    """

    def __init__(self, client: MlflowClient, run: Run, kept: FetchedStates) -> None:
        self._client = client
        self._run_id = str(run.info.run_id)
        self._uri = str(run.info.artifact_uri)
        self._finished = run.info.status == "FINISHED"  # what it recorded does not change any more
        self._kept = kept
        if not MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.is_set():
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # one a file, across the replay's own bar

    def __call__(self, name: str) -> AbstractContextManager[Path]:
        """A file as the store has it."""
        return self._opened(name)

    @contextmanager
    def ahead(self, files: Sequence[str], *, cached: bool) -> Iterator[Fetch]:
        """Fetch files in their order before they are asked for, at most ``FETCHES`` at once and on disk unread.

        Args:
            files: paths inside the run's artifacts. Any other, and one that is asked for again, is fetched when asked.
            cached: whether states of finished runs are taken from this machine's copies, and kept there unless the
                reader finds a fault with them.

        Yields:
            What opens the files. What went wrong with one is raised when that one is opened.
        """
        waiting, begun = deque(dict.fromkeys(files)), dict[str, Future[_Entered]]()
        turn = Lock()
        pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch-ahead")

        def begin() -> None:
            if waiting:
                name = waiting.popleft()
                begun[name] = pool.submit(self._enter, name, cached=cached)

        def taken(name: str) -> Future[_Entered] | None:
            with turn:
                future = begun.pop(name, None)
                if future is not None:
                    begin()
            return future

        @contextmanager
        def fetch(name: str) -> Iterator[Path]:
            future = taken(name)
            if future is None:
                with self._opened(name, cached=cached) as path:
                    yield path
                return
            path, open_file = future.result()
            with open_file:
                yield path

        for _ in range(FETCHES):
            begin()
        try:
            yield fetch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in begun.values():
                if not future.cancelled() and future.exception() is None:
                    future.result().open_file.close()

    def _enter(self, name: str, *, cached: bool) -> _Entered:
        with ExitStack() as stack:
            path = stack.enter_context(self._opened(name, cached=cached))
            return _Entered(path, stack.pop_all())

    @contextmanager
    def _opened(self, name: str, *, cached: bool = False) -> Iterator[Path]:
        _require_inside(name)
        cached = cached and self._finished and self._kept.takes(self._run_id, name)
        copy = self._kept.find(self._run_id, name) if cached else None
        if copy is not None:
            try:
                yield copy
            except (RecordingError, OSError) as error:  # OSError: another process removed it to make room
                self._kept.drop(self._run_id, name)
                raise DamagedCopyError(str(error)) from error
            return
        folder = Path(tempfile.mkdtemp(prefix="tracked-replay-"))
        try:
            path = self._download(name, folder)
            yield path
            if cached:
                self._kept.add(self._run_id, name, path)
        finally:
            shutil.rmtree(folder)

    @cached_property
    def _repository(self) -> ArtifactRepository:
        return get_artifact_repository(self._uri)

    def _download(self, name: str, folder: Path) -> Path:
        try:
            path = Path(self._repository.download_artifacts(name, str(folder)))
        except Exception as error:  # each kind of store raises errors of its own library
            raise self._not_fetched(name, in_one_line(error)) from error
        if not path.is_file():
            raise self._not_fetched(name, "it is a folder there")
        return path

    def _not_fetched(self, name: str, why: str) -> FetchError:
        cleaned = _cleaned(self._client, self._run_id)
        return FetchError(f"{name} cannot be fetched from the artifacts of run {self._run_id}{cleaned}: {why}")


def in_one_line(error: Exception) -> str:
    """The beginning of what a library says, without the passwords in it."""
    return " ".join(PASSWORD.sub(r"\1:***@", str(error)).split())[:300]


class _Entered(NamedTuple):
    """A file that was opened, and what closes it."""

    path: Path
    open_file: ExitStack


def _require_inside(name: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not parts.parts:
        raise RecordingError(f"{name!r} is not a path inside a run's artifacts")


def _cleaned(client: MlflowClient, run_id: str) -> str:
    try:
        kinds = client.get_run(run_id).data.tags.get(names.CLEANED)
    except MlflowException:  # the server is gone too
        return ""
    return f"; clean removed its {kinds}" if kinds else ""
