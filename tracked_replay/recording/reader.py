"""Reads a recorded training run back and checks every byte it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tracked_replay.config import Config
from tracked_replay.determinism import GeneratorStates, generator_state_steps, load_generator_states
from tracked_replay.errors import RecordingError
from tracked_replay.recording import recorder
from tracked_replay.recording.checkpoints import MANIFEST, Checkpoint, read_checkpoint, read_manifest
from tracked_replay.recording.files import file_sha256
from tracked_replay.recording.generators import FOLDER as GENERATORS
from tracked_replay.recording.trace import FOLDER as TRACE
from tracked_replay.recording.trace import Trace, read_trace
from tracked_replay.training.state import State

Fetch = Callable[[str], AbstractContextManager[Path]]


@runtime_checkable
class FetchAhead(Protocol):
    """A :data:`Fetch` that takes time for a file, and less for several at once."""

    def __call__(self, name: str) -> AbstractContextManager[Path]:
        """Open a file by its path."""

    def ahead(self, files: Sequence[str], *, cached: bool) -> AbstractContextManager[Fetch]:
        """Fetch files in the order in which they will be asked for; ``cached`` allows copies that were kept."""


class DamagedCopyError(RecordingError):
    """A copy that was kept of a file is damaged or gone; it was dropped, so that the next fetch brings a new one."""


def folder_source(root: Path) -> Fetch:
    """Fetch files from a folder, in place."""

    @contextmanager
    def fetch(name: str) -> Iterator[Path]:
        path = root / name
        if not path.is_file():
            raise RecordingError(f"{name} is missing from {root}")
        yield path

    return fetch


def parse_json(path: Path, name: str) -> Any:
    """The JSON in a file that the artifacts have as ``name``. Raises RecordingError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"{name} cannot be read as JSON: {str(error)[:200]}") from None


FIGURES = "figures/"


class Recording:
    """A recorded training run, wherever its files are.

    Args:
        fetch: opens a file by its path inside the run's artifacts; it may be a temporary copy that goes away when the
            context closes. Raises RecordingError where the file is missing.
        identity: SHA-256 of ``digests.json`` as it was recorded; ``None`` skips that check.
    """

    def __init__(self, fetch: Fetch, identity: str | None = None) -> None:
        self._fetch = fetch
        self._identity = identity

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the recorded files by path. Raises RecordingError where they were changed."""
        with self._fetch(recorder.DIGESTS) as path:
            found = file_sha256(path)
            if self._identity is not None and found != self._identity:
                raise RecordingError(
                    f"{recorder.DIGESTS} is damaged: its SHA-256 is {found}, recorded was {self._identity}"
                )
            digests = parse_json(path, recorder.DIGESTS)
            if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
                raise RecordingError(f"{recorder.DIGESTS} must hold the digest of each file by its name")
            return digests

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """A recorded file whose SHA-256 was checked.

        Raises:
            RecordingError: the file is not part of the recording, missing, or was changed.
        """
        if name not in self.digests:
            raise RecordingError(f"{name} is not part of the recording")
        with self._fetch(name) as path:
            found = file_sha256(path)
            if found != self.digests[name]:
                raise RecordingError(f"{name} is damaged: its SHA-256 is {found}, recorded was {self.digests[name]}")
            yield path

    @cached_property
    def config(self) -> Config:
        """The recorded config."""
        with self.open(recorder.CONFIG) as path:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise RecordingError(f"{recorder.CONFIG} cannot be read: {error}") from None
            return Config.from_toml(text)

    @cached_property
    def trace(self) -> Trace:
        """The recorded trace."""
        names = sorted(name for name in self.digests if name.startswith(f"{TRACE}/"))
        if not names:
            raise RecordingError("the recording has no trace")
        with ExitStack() as stack:  # a fetched copy lives only as long as its context
            return read_trace([stack.enter_context(self.open(name)) for name in names])

    @cached_property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """Rows of the manifest, sorted by step."""
        with self.open(MANIFEST) as path:
            return read_manifest(path)

    @cached_property
    def final(self) -> Checkpoint:
        """The checkpoint after the last step."""
        return self.checkpoints[-1]

    @cached_property
    def _generator_steps(self) -> dict[int, str]:
        """Files of random generators' states by the step that they stand before."""
        found: dict[int, str] = {}
        for name in sorted(name for name in self.digests if name.startswith(f"{GENERATORS}/")):
            with self.open(name) as path:
                found |= dict.fromkeys(generator_state_steps(path), name)
        return found

    @property
    def generator_steps(self) -> list[int]:
        """Steps before which the random generators' states were recorded, in their order."""
        return sorted(self._generator_steps)

    def generator_states(self, step: int) -> GeneratorStates:
        """The random generators' states before one of :attr:`generator_steps`."""
        with self.open(self._generator_steps[step]) as path:
            return load_generator_states(path)[step]

    def require_undamaged(self, *, figures: bool = True) -> None:
        """Hold every recorded file but the checkpoints against its digest.

        Args:
            figures: these too; nothing is computed from them, and a run may have lost them to ``clean``.

        Raises:
            RecordingError: naming the first that is missing or was changed.
        """
        for name in self.digests:
            if name.startswith(FIGURES) and not figures:
                continue
            with self.open(name):
                pass

    def state(self, checkpoint: Checkpoint) -> State:
        """Read a checkpoint. Raises RecordingError where its file is missing or was changed."""
        try:
            return self._state(checkpoint)
        except DamagedCopyError:
            return self._state(checkpoint)

    def _state(self, checkpoint: Checkpoint) -> State:
        with self._fetch(checkpoint.file) as path:
            return read_checkpoint(path, checkpoint)

    @contextmanager
    def ahead(self, checkpoints: Sequence[Checkpoint], *, cached: bool = False) -> Iterator[Recording]:
        """The same recording for whoever reads checkpoints in a known order: their files are fetched ahead.

        Where files are in place it is the recording itself.

        Args:
            checkpoints: in the order in which :meth:`state` will be called with them.
            cached: whether copies may be used that this machine kept, and new ones kept, instead of what the store has
                now; either way a state is what was recorded.
        """
        if not isinstance(self._fetch, FetchAhead):
            yield self
            return
        source = copy(self)  # with what was read of it before
        with self._fetch.ahead([checkpoint.file for checkpoint in checkpoints], cached=cached) as fetch:
            source._fetch = fetch
            yield source
