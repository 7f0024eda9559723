"""What a stage works on: a config, the task and data it names, and their identity."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException

import tracked_replay
from tracked_replay.config import Config
from tracked_replay.errors import ConfigError, TaskError, TrackedReplayError
from tracked_replay.recording import write_digests
from tracked_replay.tasks import BUILT_IN_TASKS, Task, TaskData, load_task
from tracked_replay.tracking import StageRun, code_digest, fingerprint, names


@dataclass(frozen=True)
class Problem:
    """A config with its task and data loaded: everything that can be wrong about them is found before a run starts."""

    config: Config
    task: Task
    data: TaskData
    data_fingerprint: str
    code: str

    @classmethod
    def load(cls, config: Config) -> Problem:
        """Load the task and its data. Raises ConfigError, DataError, TaskError."""
        with task_errors(config):
            task = load_task(config)
            data = TaskData(task, config)
            _check_pictures(task, data)
            own = () if config.data.task in BUILT_IN_TASKS else task.source_files()
            for path in own:
                if not path.is_file():
                    raise TaskError(f"{task.name}.source_files: found {str(path)!r}; allowed: files that exist")
            return cls(config, task, data, data.fingerprint(), code_digest(own))

    def fingerprint(self, stage: str, sections: tuple[str, ...], inputs: dict[str, str], **extra: Any) -> str:
        """Fingerprint of a stage that reads some sections of the config."""
        identity = self.config.identity(*sections)
        if self.config.train.reproducibility != "full":  # nothing pins the threads then, and they decide the bits
            extra["threads"] = torch.get_num_threads()
        return fingerprint(stage, identity, self.data_fingerprint, self.code, inputs, **extra)


@contextmanager
def task_errors(config: Config) -> Iterator[None]:
    """Turn what the code of a user's own task raises into one sentence that names the line.

    Raises:
        TaskError: with the exception as its cause.
    """
    try:
        yield
    except (TrackedReplayError, MlflowException):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise ConfigError(
                f"train.batch_size: found {config.train.batch_size}, of which a BatchNorm of the model gets a single "
                f"value a channel and has no variance; allowed: 2 or more"
            ) from error
        place = _own_line(error)
        if config.data.task in BUILT_IN_TASKS or (isinstance(error, OSError) and not place):
            raise
        raise TaskError(f"data.task: {config.data.task} failed{place}: {type(error).__name__}: {error}") from error


def _own_line(error: BaseException) -> str:
    """Where a user's code raised an error, or called what did; nothing where none of it took part."""
    package = str(Path(tracked_replay.__file__).parent)
    libraries = (package, str(Path(traceback.__file__).parent))  # the standard library holds site-packages, too
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "site-packages" not in frame.filename and not frame.filename.startswith((*libraries, "<")):
            return f" in {frame.name}, {frame.filename}, line {frame.lineno}"
    return ""


def _check_pictures(task: Task, data: TaskData) -> None:
    """Draw one example: a task whose pictures are wrong is found now and not after a long replay."""
    found = task.draw(data.train.inputs[0].cpu())
    array = isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.size > 0
    if not array or not (found.ndim == 2 or (found.ndim == 3 and found.shape[2] == 3)):
        form = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise TaskError(f"{task.name}.draw: found {form}; allowed: a uint8 array of shape (H, W) or (H, W, 3)")


def publish(run: StageRun, root: Path) -> None:
    """Log a folder as the run's artifacts, with the digests of its files and, in a tag, the digest of those."""
    run.tag({names.DIGESTS: write_digests(root)})
    run.artifacts(root)
