"""States that were fetched from a store, kept on this machine up to a limit; the least recently used goes first."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from tracked_replay.config import SIZE_ALLOWED, Bytes
from tracked_replay.errors import ConfigError

logger = logging.getLogger(__name__)

LIMIT = "TRACKED_REPLAY_CACHE_LIMIT"
DEFAULT_LIMIT = "10GB"
STATE_FILE = re.compile(r"checkpoints/\w[\w.-]*\.safetensors", re.ASCII)
RUN_FOLDER = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
SIZE = TypeAdapter(Bytes)
LOCK_SECONDS = 10.0
ASIDE = ".part"
ASIDE_SECONDS = 3600.0  # after which nobody is writing a file any more
SLACK = 16  # a sixteenth of the limit is freed at once, so that not every file that is added has all others looked at


def cache_limit() -> int:
    """Bytes that fetched states may take on this machine: ``$TRACKED_REPLAY_CACHE_LIMIT``. Raises ConfigError."""
    found = os.environ.get(LIMIT) or DEFAULT_LIMIT
    try:
        return int(SIZE.validate_python(found))
    except ValidationError:
        raise ConfigError(f"{LIMIT}: found {found[:80]!r}; allowed: {SIZE_ALLOWED['allowed']}") from None


class _Kept(NamedTuple):
    used: int
    bytes: int
    path: Path


class FetchedStates:
    """Checkpoints of finished runs that were fetched before, as files in a folder that several processes may share.

    A file's modification time says when it was last used. Nobody holds a file while it is read: one that is gone or
    damaged is fetched again by whoever meets that. What cannot be kept, on a full disk for example, is left out. A link
    is no copy of ours: it is removed, and what it leads to is neither read nor changed.

    Args:
        folder: of the files; made when the first is added.
        limit: bytes that they may take together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._warned = False

    def takes(self, run_id: str, name: str) -> bool:
        """Whether a file of a run is one that may be kept: a checkpoint, by a name that is safe as a path."""
        return self._limit > 0 and bool(RUN_FOLDER.fullmatch(run_id) and STATE_FILE.fullmatch(name))

    def find(self, run_id: str, name: str) -> Path | None:
        """A file that :meth:`takes` allows, where it is kept; counts as its use."""
        path = self._path(run_id, name)
        try:
            self._remove_links(path)
            if not stat.S_ISREG(path.lstat().st_mode):
                return None
            _mark_used(path)
        except OSError:
            return None
        return path

    def add(self, run_id: str, name: str, file: Path) -> None:
        """Move a file that :meth:`takes` allows here; one that is larger than the limit stays where it is."""
        if file.stat().st_size > self._limit:
            return
        aside = self._folder / f".{uuid4().hex}{ASIDE}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.move(file, aside)
            _mark_used(aside)
            with FileLock(self._folder / "lock", timeout=LOCK_SECONDS):
                self._make_room(aside.stat().st_size)
                path = self._path(run_id, name)
                self._remove_links(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside, path)
        except OSError as error:
            self._warn(error)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def drop(self, run_id: str, name: str) -> None:
        """Remove a file that :meth:`takes` allows, where it is kept."""
        path = self._path(run_id, name)
        with suppress(OSError):
            self._remove_links(path)
            path.unlink(missing_ok=True)

    def _path(self, run_id: str, name: str) -> Path:
        return self._folder / run_id / name

    def _remove_links(self, path: Path) -> None:
        """Remove each part of a path that is a link; the folder of all files may be one."""
        parts = path.relative_to(self._folder).parts
        for place in range(1, len(parts) + 1):
            part = self._folder.joinpath(*parts[:place])
            if part.is_symlink():
                part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what was used least recently until ``size`` bytes more are within the limit; only under the lock."""
        note = self._folder / "bytes"
        self._remove_links(note)
        try:
            # What files that were dropped or deleted by hand had is still in it: it is never too little.
            total = int(note.read_text(encoding="ascii")) + size
        except (OSError, ValueError):
            total = sum(file.bytes for file in self._kept()) + size
        if total > self._limit:
            kept = sorted(self._kept())
            total = sum(file.bytes for file in kept) + size
            allowed = min(self._limit, self._limit - self._limit // SLACK + size)
            for file in kept:
                if total <= allowed:
                    break
                file.path.unlink(missing_ok=True)
                total -= file.bytes
                with suppress(OSError):  # other files are in it
                    file.path.parent.rmdir()
                    file.path.parent.parent.rmdir()
        note.write_text(str(total), encoding="ascii")

    def _kept(self) -> Iterator[_Kept]:
        """All files; those that an interruption left aside are removed."""
        for parent, _, names in os.walk(self._folder):
            for path in (Path(parent, name) for name in names if name.endswith(".safetensors")):
                with suppress(OSError):  # it was removed meanwhile
                    status = path.lstat()
                    yield _Kept(status.st_mtime_ns, status.st_size, path)
        for path in self._folder.glob(f".*{ASIDE}"):
            with suppress(OSError):
                if path.lstat().st_mtime < time.time() - ASIDE_SECONDS:
                    path.unlink()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("fetched states are not kept in %s: %s", self._folder, error)


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # the system's own notion of now is some milliseconds coarse
    os.utime(path, ns=(now, now))
