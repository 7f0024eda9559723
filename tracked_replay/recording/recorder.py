"""Records a training run into a folder while it goes on."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from tracked_replay.determinism import (
    GeneratorStates,
    capture_generator_states,
    environment_record,
    restore_generator_states,
)
from tracked_replay.errors import ConfigError
from tracked_replay.recording import checkpoints, files, trace
from tracked_replay.recording.generators import FOLDER as GENERATORS
from tracked_replay.recording.generators import GeneratorsWriter
from tracked_replay.recording.journal import FOLDER as RESUME
from tracked_replay.recording.journal import Journal, JournalRow, Unfinished
from tracked_replay.training.loop import StepRecord, TrainingSetup
from tracked_replay.training.state import State

CONFIG = "config/config.toml"
GROUPS = "config/parameter_groups.json"
SEEDS = "seeds/derivations.json"
ENVIRONMENT = "environment/environment.json"
DIGESTS = "digests.json"

MAX_PENDING = 4  # states that may wait to be written; more and the training waits too

BESIDE_A_STATE = 16 * 1024  # bytes of its generator states (10 KB) and its row in the manifest, at most
MANIFEST_BYTES = 4 * 1024  # bytes of the manifest without its rows, at most


def checkpoint_distance(setup: TrainingSetup) -> int:
    """Steps between two checkpoints: as few as ``record.every`` and ``record.budget`` allow.

    What counts are the folders of checkpoints and of generator states. Everything is decided from the config, the
    number of steps and the shapes of the initial state, so that equal configs give equal recordings.

    Raises:
        ConfigError: the first and the last state alone are more than the budget.
    """
    every, budget, steps = setup.config.record.every, setup.config.record.budget, setup.plan.steps
    if not budget:
        return every
    fixed = MANIFEST_BYTES + _bytes_with(setup.initial)
    each = _bytes_with(later_state(setup))
    between = (budget - fixed) // each  # all checkpoints but the first
    if between < 1:
        raise ConfigError(
            f"record.budget: found {budget} bytes; allowed: 0, or at least {fixed + each}, which the first and "
            f"the last state of this training take with their generator states"
        )
    return max(every, -(-steps // between))


def checkpoint_steps(setup: TrainingSetup) -> list[int]:
    """Numbers of the states that a recording of the training will keep. Raises ConfigError."""
    return [*range(0, setup.plan.steps, checkpoint_distance(setup)), setup.plan.steps]


def later_state(setup: TrainingSetup) -> State:
    """A state with the names, types and shapes of those after the first step."""
    momentum = setup.initial.parameters if setup.config.train.momentum else {}
    return replace(setup.initial, step=setup.plan.steps, momentum=momentum)


def _bytes_with(state: State) -> int:
    return checkpoints.checkpoint_bytes(state) + BESIDE_A_STATE


class Recorder:
    """Writes the contract's artifacts of a training run under a folder.

    One background thread writes while the next steps are taken; an error there is raised by the next :meth:`add` or by
    :meth:`finish`. It is given copies of the states with their digests, or makes both itself, which it may because
    states are immutable.

    Use it as a context manager; ``digests.json``, the last file, is written by :meth:`finish` only, so a folder that
    has it is complete. Until the context is left after that, a journal keeps what
    :func:`~tracked_replay.recording.find_unfinished` needs to go on after an interruption.

    Args:
        root: the folder. What an earlier recording left there is removed, unless ``unfinished`` goes on from it.
        setup: of the training.
        unfinished: an interrupted recording of the same training under ``root``. The process's generators are put
            back to where they were; the training must start from its state.
        copy_at_once: whether :meth:`add` copies the state, and not the thread; ``None`` for a training on the CPU, where
            a thread would take turns with it, and where holding on to states means new memory for the next ones.

    Raises:
        ConfigError: ``record.budget`` is too small; see :func:`checkpoint_distance`.
    """

    def __init__(
        self,
        root: Path,
        setup: TrainingSetup,
        unfinished: Unfinished | None = None,
        *,
        copy_at_once: bool | None = None,
    ) -> None:
        self._root = root
        self._every = checkpoint_distance(setup)
        self._trace = trace.TraceWriter(root, setup.config.record.pixels)
        self._rng = GeneratorsWriter(root)
        self._checkpoints: list[checkpoints.Checkpoint] = []
        self._copy_at_once = setup.device.type == "cpu" if copy_at_once is None else copy_at_once
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: list[Future[None]] = []
        self._buffers = [checkpoints.StateBuffer() for _ in range(MAX_PENDING)]  # those that are free
        self._finished = False
        (root / DIGESTS).unlink(missing_ok=True)
        for folder in (trace.FOLDER, GENERATORS, *(() if unfinished else (checkpoints.FOLDER,))):
            shutil.rmtree(root / folder, ignore_errors=True)
        for leftover in root.rglob(files.ASIDE):
            leftover.unlink()
        self._journal = Journal(root, () if unfinished is None else unfinished.rows)
        if unfinished is not None:
            self._go_on(setup, unfinished)
        self._generators = capture_generator_states()
        _write_setup(root, setup)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        self._journal.close()
        if self._finished and kind is None:
            self._journal.remove()

    def add(self, record: StepRecord) -> None:
        """Record a step; it returns before the step is on disk."""
        kept = record.before.step % self._every == 0
        row = trace.TraceRow(
            record.before.step,
            record.epoch,
            record.indices,
            record.labels,
            record.learning_rates,
            record.loss,
            state_digest="",  # comes with the copy
        )
        generators, self._generators = self._generators, capture_generator_states()  # the next step starts from these
        self._submit(record.before, generators if kept else None, row, record.inputs if self._trace.pixels else None)

    def wait(self) -> None:
        """Wait until all steps so far are on disk."""
        self._drain(0)

    def finish(self, final: State) -> str:
        """Record the final state, wait for all writing, write manifest and digests.

        Returns:
            SHA-256 of ``digests.json``: the identity of everything recorded.
        """
        self._submit(final, self._generators)
        self.wait()
        self._rng.flush()
        self._trace.flush()
        generators = self._rng.digests
        checkpoints.write_manifest(
            self._root, [replace(row, generators=generators[row.step]) for row in self._checkpoints]
        )
        identity = write_digests(self._root)
        self._finished = True
        return identity

    def _go_on(self, setup: TrainingSetup, unfinished: Unfinished) -> None:
        plan, labels = setup.plan, setup.data.train.labels.cpu().numpy()
        for row in unfinished.rows:
            t = row.step
            batch = setup.batch(t).inputs if self._trace.pixels else None
            self._trace.add(
                trace.TraceRow(
                    t,
                    int(plan.epochs[t]),
                    plan.indices[t],
                    labels[plan.indices[t]],
                    plan.learning_rates[t],
                    row.loss,
                    row.digest,
                ),
                batch,
            )
            if row.checkpoint is not None and row.generators is not None:
                self._checkpoints.append(row.checkpoint)
                self._rng.add(t, row.generators)
        restore_generator_states(unfinished.generators)

    def _submit(
        self,
        state: State,
        generators: GeneratorStates | None,
        row: trace.TraceRow | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        self._drain(MAX_PENDING - 1)
        if self._copy_at_once:
            self._pending.append(self._pool.submit(self._write, self._prepare(state, generators, row, inputs)))
        else:
            self._pending.append(self._pool.submit(self._prepare_and_write, state, generators, row, inputs))

    def _drain(self, allowed: int) -> None:
        while self._pending and (len(self._pending) > allowed or self._pending[0].done()):
            self._pending.pop(0).result()

    def _prepare(
        self,
        state: State,
        generators: GeneratorStates | None,
        row: trace.TraceRow | None,
        inputs: Tensor | None,
    ) -> _Prepared:
        """Everything that takes the interpreter, which the training waits for while a thread has it."""
        buffer, path, line = None, None, b""
        if generators is None:
            digest, size = files.state_digest(state), None
        else:
            buffer = self._buffers.pop()
            checkpoint = buffer.hold(state)
            self._checkpoints.append(checkpoint)
            self._rng.add(state.step, generators)
            path, digest, size = self._root / checkpoint.file, checkpoint.digest, checkpoint.bytes
        if row is not None:
            self._trace.add(row._replace(state_digest=digest), inputs)
            line = self._journal.line(JournalRow(state.step, row.loss, digest, size, generators))
        return _Prepared(buffer, path, line)

    def _prepare_and_write(
        self, state: State, generators: GeneratorStates | None, row: trace.TraceRow | None, inputs: Tensor | None
    ) -> None:
        self._write(self._prepare(state, generators, row, inputs))

    def _write(self, prepared: _Prepared) -> None:
        if prepared.buffer is not None and prepared.path is not None:
            prepared.buffer.write(prepared.path)
            self._buffers.append(prepared.buffer)
        if prepared.line:
            self._journal.append(prepared.line)


class _Prepared(NamedTuple):
    """A step as it goes to the disk.

    Attributes:
        buffer: holds its state, where that is kept.
        path: the checkpoint's.
        line: of the journal; empty after the last step.
    """

    buffer: checkpoints.StateBuffer | None
    path: Path | None
    line: bytes


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
    """Write ``digests.json``: SHA-256 of every file under ``root`` but those in ``resume/``, which will go.

    Checkpoints are covered through ``checkpoints/manifest.parquet``, which holds their own digests.

    Returns:
        SHA-256 of ``digests.json``.
    """
    found = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    covered = [
        path
        for path in found
        if path.parts[0] != RESUME and (path.parts[0] != checkpoints.FOLDER or path.suffix != ".safetensors")
    ]
    digests = {path.as_posix(): files.file_sha256(root / path) for path in covered if path.as_posix() != DIGESTS}
    files.write_json(root / DIGESTS, digests)
    return files.file_sha256(root / DIGESTS)
