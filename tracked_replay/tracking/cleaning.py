"""A run that has ended, to remove artifacts from: which there are, which other runs read them, and removing them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.uri import is_local_uri

from tracked_replay.errors import RecordingError, RunError
from tracked_replay.tracking import names
from tracked_replay.tracking.artifacts import cache_folder, fetched_folder, waiting_folder
from tracked_replay.tracking.process import close_abandoned
from tracked_replay.tracking.runs import existing_run

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[\w.+~/-]+", re.ASCII)  # means itself in a URL


class StoredFile(NamedTuple):
    """A file among a run's artifacts.

    Attributes:
        path: inside the run's artifacts.
        bytes: its size; 0 where the store does not say.
    """

    path: str
    bytes: int


class Reader(NamedTuple):
    """A run that has another one as an input.

    Attributes:
        run_id: its ID.
        stage: what made it.
        status: FINISHED or RUNNING.
        cleaned: kinds of its own artifacts that were removed.
    """

    run_id: str
    stage: str
    status: str
    cleaned: frozenset[str]


class EndedRun:
    """A run of any stage that has ended, however it did.

    Attributes:
        run_id: its ID.
        stage: what made it.
        cleaned: kinds of its artifacts that were removed.
    """

    def __init__(self, run: Run) -> None:
        self.run_id = str(run.info.run_id)
        self.stage = str(run.data.tags[names.STAGE])
        self.cleaned = _cleaned(run)
        self._run = run

    @classmethod
    def open(cls, run_id: str) -> EndedRun:
        """Open the run that ``run_id`` names; follows a run that only points to an earlier result.

        Raises:
            RunError: there is no such run, it is deleted, was not made by this package, or has not ended.
        """
        run = _ended(run_id, "run_id")
        if names.REUSES not in run.data.tags:
            return cls(run)
        reused = _ended(run.data.tags[names.REUSES], f"run_id: the tag {names.REUSES} of run {run_id}")
        if names.REUSES in reused.data.tags:
            raise RunError(f"run_id: run {run_id} points to run {reused.info.run_id}, which points on to another run")
        logger.info("run %s has no artifacts of its own: it points to run %s", run_id, reused.info.run_id)
        return cls(reused)

    def retrainings(self) -> tuple[EndedRun, ...]:
        """The retrainings that are its children."""
        wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and tags.`{names.STAGE}` = '{names.RETRAINING}'"
        found = mlflow.search_runs([self._run.info.experiment_id], wanted, output_format="list")
        return tuple(EndedRun(run) for run in found)

    def readers(self, parameter: str) -> tuple[Reader, ...]:
        """The runs of all experiments that have this one as an input: the RUNNING ones, then the FINISHED ones.

        Args:
            parameter: by which a FINISHED one must name it, for example ``train_run_id``.
        """
        finished = _everywhere(f"attributes.status = 'FINISHED' and tags.`{names.INPUT}{parameter}` = '{self.run_id}'")
        running = [run for run in _everywhere("attributes.status = 'RUNNING'") if self._is_input_of(run)]
        running = [run for run in map(_closed_if_abandoned, running) if not _has_ended(run)]
        return tuple(
            Reader(str(run.info.run_id), run.data.tags.get(names.STAGE, ""), str(run.info.status), _cleaned(run))
            for run in (*running, *finished)
            if names.REUSES not in run.data.tags
        )

    def _is_input_of(self, run: Run) -> bool:
        return any(key.startswith(names.INPUT) and value == self.run_id for key, value in run.data.tags.items())

    def mark(self, kinds: Sequence[str], *, reusable: bool) -> None:
        """Note that artifacts are about to be removed.

        Args:
            kinds: all kinds that are or were removed.
            reusable: whether what is left is still the run's result; else no stage takes it or goes on with it.
        """
        client = MlflowClient()
        # A FINISHED run is only ever reused, so it may keep what says what it computed.
        tags = [names.FINGERPRINT] if self._run.info.status == "FINISHED" else [names.FINGERPRINT, names.PENDING]
        found = [tag for tag in tags if tag in self._run.data.tags and not reusable]
        for tag in found:
            client.delete_tag(self.run_id, tag)
        if found:
            logger.info("run %s is no longer reused: the same command computes its result again", self.run_id)
        client.set_tag(self.run_id, names.CLEANED, ",".join(kinds))

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All artifacts, as they were when first asked for. Raises RecordingError for a link among them."""
        return self._store.files

    def require_removable(self, paths: Collection[str]) -> None:
        """Check that exactly these of :attr:`files` can be removed. Raises RecordingError."""
        self._store.require_removable(paths)

    def remove(self, paths: Collection[str]) -> None:
        """Remove some of :attr:`files`. Raises RecordingError where one cannot be removed."""
        self._store.remove(paths)

    def here(self, *, waiting: bool) -> tuple[StoredFile, ...]:
        """What this user's cache on this machine holds of the run; paths inside the cache.

        Args:
            waiting: what an interruption left, to be gone on from and sent at the end, as well as fetched states.
        """
        found = (path for folder in self._folders_here(waiting) for path in folder.rglob("*") if path.is_file())
        return tuple(
            sorted(StoredFile(path.relative_to(cache_folder()).as_posix(), path.stat().st_size) for path in found)
        )

    def remove_here(self, *, waiting: bool) -> None:
        """Remove what :meth:`here` lists. Raises RecordingError where that fails."""
        for folder in self._folders_here(waiting):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise RecordingError(f"{folder} cannot be removed: {error}") from error

    def _folders_here(self, waiting: bool) -> list[Path]:
        folders = [fetched_folder() / self.run_id, *([waiting_folder(self.run_id)] if waiting else [])]
        return [folder for folder in folders if folder.is_dir()]

    @cached_property
    def _store(self) -> _Folder | _Remote:
        uri = self._run.info.artifact_uri
        if is_local_uri(uri):
            return _Folder(Path(local_file_uri_to_path(uri)), self.run_id)
        return _Remote(get_artifact_repository(uri), self.run_id)


def _ended(run_id: str, parameter: str) -> Run:
    run = existing_run(run_id, parameter)
    if run.info.lifecycle_stage != "active":
        raise RunError(
            f"{parameter}: run {run_id} is deleted; `mlflow gc --tracking-uri URI` removes deleted runs with their "
            f"artifacts, `mlflow runs restore --run-id {run_id}` brings it back"
        )
    if names.STAGE not in run.data.tags:
        raise RunError(f"{parameter}: run {run_id} was not made by tracked_replay; allowed: a run of one of its stages")
    run = _closed_if_abandoned(run)
    if not _has_ended(run):
        raise RunError(f"{parameter}: run {run_id} is {run.info.status}; allowed: a run that has ended")
    return run


def _everywhere(wanted: str) -> list[Run]:
    found: list[Run] = mlflow.search_runs(filter_string=wanted, search_all_experiments=True, output_format="list")
    return found


def _has_ended(run: Run) -> bool:
    return bool(RunStatus.is_terminated(RunStatus.from_string(run.info.status)))


def _closed_if_abandoned(run: Run) -> Run:
    if _has_ended(run):
        return run
    close_abandoned(run.info.experiment_id)
    return MlflowClient().get_run(run.info.run_id)


def _cleaned(run: Run) -> frozenset[str]:
    return frozenset(filter(None, run.data.tags.get(names.CLEANED, "").split(",")))


class _Folder:
    """Artifacts in a folder of this machine.

    MLflow's own deletion is not used for them: it decodes ``%`` in a path as in a URL, so that it would remove ``a b``
    for ``a%20b``.
    """

    def __init__(self, root: Path, run_id: str) -> None:
        self._root = root
        self._run_id = run_id

    @cached_property
    def files(self) -> tuple[StoredFile, ...]:
        return tuple(sorted(self._walk())) if self._root.is_dir() else ()

    def _walk(self) -> Iterator[StoredFile]:
        for folder in (self._root, self._root.parent):
            if folder.is_symlink():
                raise RecordingError(
                    f"run {self._run_id}: its folder {folder} is a link, and what it leads to may not be the run's; "
                    f"remove the link by hand"
                )
        for parent, folders, files in os.walk(self._root, onerror=_raise):
            for name in (*folders, *files):
                path = Path(parent, name)
                inside = _require_inside(path.relative_to(self._root).as_posix(), self._run_id)
                if path.is_symlink():
                    raise RecordingError(
                        f"run {self._run_id}: {inside} is a link, and what it leads to may not be the run's; "
                        f"remove the link by hand"
                    )
                if name in files:
                    yield StoredFile(inside, path.stat().st_size)

    def require_removable(self, paths: Collection[str]) -> None:
        for path in paths:
            _require_inside(path, self._run_id)

    def remove(self, paths: Collection[str]) -> None:
        self.require_removable(paths)
        for path in paths:
            try:
                (self._root / path).unlink(missing_ok=True)
            except OSError as error:
                raise _not_removed(path, self._run_id, error) from error
        folders = {parent for path in paths for parent in PurePosixPath(path).parents if parent.parts}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # it holds other files
                (self._root / folder).rmdir()


def _raise(error: OSError) -> None:
    raise error


class _Remote:
    """Artifacts that MLflow reaches over a network."""

    def __init__(self, repository: ArtifactRepository, run_id: str) -> None:
        self._repository = repository
        self._run_id = run_id

    @cached_property
    def files(self) -> tuple[StoredFile, ...]:
        return tuple(sorted(self._listed(None)))

    def _listed(self, folder: str | None) -> Iterator[StoredFile]:
        for item in self._repository.list_artifacts(folder):
            path = _require_inside(item.path, self._run_id)
            if folder is not None and not path.startswith(f"{folder}/"):
                raise RecordingError(f"run {self._run_id}: the store lists {path!r} among the files of {folder}")
            if item.is_dir:
                yield from self._listed(path)
            else:
                yield StoredFile(path, int(item.file_size or 0))

    def require_removable(self, paths: Collection[str]) -> None:
        for path in self._deletions(paths):
            if not PLAIN_NAME.fullmatch(_require_inside(path, self._run_id)):
                raise RecordingError(
                    f"run {self._run_id}: {path!r} cannot be removed through MLflow, which would read its name as a "
                    f"piece of a URL; remove it in the store itself"
                )

    def remove(self, paths: Collection[str]) -> None:
        self.require_removable(paths)
        for path in self._deletions(paths):
            try:
                self._repository.delete_artifacts(path)
            except (MlflowException, OSError) as error:
                raise _not_removed(path, self._run_id, error) from error
        left = {file.path for file in self._listed(None)} & set(paths)
        if left:
            raise _not_removed(min(left), self._run_id, "the store still lists it")

    def _deletions(self, paths: Collection[str]) -> list[str]:
        """Single files, and the topmost folders of which nothing is kept: less requests, and no empty folder stays."""
        kept = {_top(file.path) for file in self.files if file.path not in paths}
        return sorted({path if _top(path) in kept else _top(path) for path in paths})


def _top(path: str) -> str:
    return path.partition("/")[0]


def _require_inside(path: str, run_id: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or not parts.parts:
        raise RecordingError(f"run {run_id}: {path!r} is not a path inside a run's artifacts")
    return path


def _not_removed(path: str, run_id: str, why: object) -> RecordingError:
    return RecordingError(f"{path} cannot be removed from the artifacts of run {run_id}: {why}")
