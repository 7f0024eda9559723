"""Records a training run into a folder while it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
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

MAX_PENDING = 4  # steps that may wait to be written; more and the training waits too

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
        copy_at_once: whether :meth:`add` copies the state, and not the thread; ``None`` for a training on the CPU,
            where a thread would take turns with it, and holding on to states means new memory for the next ones.

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
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._free: SimpleQueue[checkpoints.StateBuffer] = SimpleQueue()  # one for each step that may wait
        for _ in range(MAX_PENDING):
            self._free.put(checkpoints.StateBuffer())
        self._error: BaseException | None = None  # after one the thread writes nothing any more
        self._thread = Thread(target=self._run, name="recorder", daemon=True)
        self._finished = False
        (root / DIGESTS).unlink(missing_ok=True)
        for folder in (trace.FOLDER, GENERATORS, *(() if unfinished else (checkpoints.FOLDER,))):
            shutil.rmtree(root / folder, ignore_errors=True)
        for leftover in root.rglob(files.ASIDE):
            leftover.unlink()
        self._journal = Journal(root, unfinished)
        if unfinished is not None:
            self._go_on(setup, unfinished)
        self._generators = capture_generator_states()
        _write_setup(root, setup)
        self._thread.start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if self._error is None:
            self._error = error
        self._jobs.put(None)
        self._thread.join()
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
        inputs = record.inputs if self._trace.pixels else None
        self._submit(_Step(record.before, generators if kept else None, row, inputs))

    def wait(self) -> None:
        """Wait until all steps so far are on disk."""
        free = [self._free.get() for _ in range(MAX_PENDING)]
        for buffer in free:
            self._free.put(buffer)
        self._require_no_error()

    def finish(self, final: State) -> str:
        """Record the final state, wait for all writing, write manifest and digests.

        Returns:
            SHA-256 of ``digests.json``: the identity of everything recorded.
        """
        self._submit(_Step(final, self._generators))
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

    def _submit(self, step: _Step) -> None:
        self._require_no_error()
        buffer = self._free.get()  # waits where too many do
        if self._copy_at_once:
            self._jobs.put(_Job(buffer, partial(self._write, *self._prepare(buffer, step))))
        else:
            self._jobs.put(_Job(buffer, lambda: self._write(*self._prepare(buffer, step))))

    def _require_no_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job.work()
            except BaseException as error:  # raised where the training goes on
                self._error = error
            finally:
                self._free.put(job.buffer)
                del job  # and the state with it, while there is nothing to do

    def _prepare(
        self, buffer: checkpoints.StateBuffer, step: _Step
    ) -> tuple[checkpoints.StateBuffer, Path | None, bytes]:
        """Everything that takes the interpreter, which the training waits for while a thread has it.

        Returns:
            What :meth:`_write` takes.
        """
        path, line = None, b""
        if step.generators is None:
            digest, size = files.state_digest(step.state), None
        else:
            checkpoint = buffer.hold(step.state)
            self._checkpoints.append(checkpoint)
            self._rng.add(checkpoint.step, step.generators)
            path, digest, size = self._root / checkpoint.file, checkpoint.digest, checkpoint.bytes
            if checkpoint.step == self._journal.known:
                path = None  # the file that was just read
        if step.row is not None:
            self._trace.add(step.row._replace(state_digest=digest), step.inputs)
            line = self._journal.line(JournalRow(step.row.step, step.row.loss, digest, size, step.generators))
        return buffer, path, line

    def _write(self, buffer: checkpoints.StateBuffer, path: Path | None, line: bytes) -> None:
        """Write a checkpoint, where there is a path for one, and then the journal's line, where there is one."""
        if path is not None:
            buffer.write(path)
        if line:
            self._journal.append(line)


class _Step(NamedTuple):
    """A step as it is recorded.

    Attributes:
        state: the one before it.
        generators: the process's generators before it, where the state is kept.
        row: of the trace; none after the last step.
        inputs: of the model, (B, ...), where pixels are kept.
    """

    state: State
    generators: GeneratorStates | None
    row: trace.TraceRow | None = None
    inputs: Tensor | None = None


class _Job(NamedTuple):
    """What the thread does, and the buffer that is free then."""

    buffer: checkpoints.StateBuffer
    work: Callable[[], None]


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
