"""Records a training run into a folder while it goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tracked_replay.determinism import (
    GeneratorStates,
    capture_generator_states,
    environment_record,
    save_generator_states,
)
from tracked_replay.recording import checkpoints, files, trace
from tracked_replay.training.loop import StepRecord, TrainingSetup
from tracked_replay.training.state import State

CONFIG = "config/config.toml"
GROUPS = "config/parameter_groups.json"
SEEDS = "seeds/derivations.json"
ENVIRONMENT = "environment/environment.json"
DIGESTS = "digests.json"

MAX_PENDING = 8  # states that may wait to be written; more and the training waits too


class Recorder:
    """Writes the contract's artifacts of a training run under a folder.

    States are immutable, so digests, serialisation and writing happen on one background thread while the next steps
    are taken. An error there is raised by the next :meth:`add` or by :meth:`finish`.

    Use it as a context manager; ``digests.json``, the last file, is written by :meth:`finish` only, so a folder that
    has it is complete.
    """

    def __init__(self, root: Path, setup: TrainingSetup) -> None:
        self._root = root
        self._every = setup.config.record.every
        self._trace = trace.TraceWriter(root, setup.config.record.pixels)
        self._checkpoints: list[checkpoints.Checkpoint] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: list[Future[None]] = []
        _write_setup(root, setup)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def add(self, record: StepRecord) -> None:
        """Record a step; returns before it is on disk."""
        kept = record.before.step % self._every == 0
        generators = capture_generator_states() if kept else None
        self._submit(record.before, generators, record)

    def finish(self, final: State) -> str:
        """Record the final state, wait for all writing, write manifest and digests.

        Returns:
            SHA-256 of ``digests.json``: the identity of everything recorded.
        """
        self._submit(final, capture_generator_states(), None)
        self._drain(0)
        self._trace.flush()
        checkpoints.write_manifest(self._root, self._checkpoints)
        return write_digests(self._root)

    def _submit(self, state: State, generators: GeneratorStates | None, record: StepRecord | None) -> None:
        self._drain(MAX_PENDING)
        self._pending.append(self._pool.submit(self._write, state, generators, record))

    def _drain(self, allowed: int) -> None:
        while self._pending and (len(self._pending) > allowed or self._pending[0].done()):
            self._pending.pop(0).result()

    def _write(self, state: State, generators: GeneratorStates | None, record: StepRecord | None) -> None:
        if generators is None:
            digest = files.state_digest(state)
        else:
            checkpoint = checkpoints.write_checkpoint(self._root, state)
            self._checkpoints.append(checkpoint)
            path = self._root / "rng" / f"step-{state.step:06d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_generator_states(generators, path)
            digest = checkpoint.digest
        if record is not None:
            self._trace.add(record, digest)


def _write_setup(root: Path, setup: TrainingSetup) -> None:
    files.write_text(root / CONFIG, setup.config.to_toml())
    groups = [
        {"name": group.name, "parameters": list(group.parameters), "lr_scale": group.lr_scale, **group.sgd_arguments}
        for group in setup.step.groups
    ]
    files.write_json(root / GROUPS, groups)
    files.write_json(root / SEEDS, setup.seeds.to_json_dict())
    files.write_json(root / ENVIRONMENT, environment_record())


def write_digests(root: Path) -> str:
    """Write ``digests.json``: SHA-256 of every file under ``root``.

    Checkpoints are covered through ``checkpoints/manifest.parquet``, which holds their own digests.

    Returns:
        SHA-256 of ``digests.json``.
    """
    found = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    covered = [path for path in found if path.parts[0] != checkpoints.FOLDER or path.suffix != ".safetensors"]
    digests = {path.as_posix(): files.file_sha256(root / path) for path in covered if path.as_posix() != DIGESTS}
    files.write_json(root / DIGESTS, digests)
    return files.file_sha256(root / DIGESTS)
