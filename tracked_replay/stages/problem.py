"""What a stage works on: a config, the task and data it names, and their identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracked_replay.config import Config
from tracked_replay.tasks import BUILT_IN_TASKS, Task, TaskData, load_task
from tracked_replay.tracking import code_digest, fingerprint


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
        """Load the task and its data. Raises ConfigError, DataError."""
        task = load_task(config)
        data = TaskData(task, config)
        own = () if config.data.task in BUILT_IN_TASKS else task.source_files()
        return cls(config, task, data, data.fingerprint(), code_digest(own))

    def fingerprint(self, stage: str, sections: tuple[str, ...], inputs: dict[str, str], **extra: Any) -> str:
        """Fingerprint of a stage that reads some sections of the config."""
        identity = self.config.identity(*sections)
        return fingerprint(stage, identity, self.data_fingerprint, self.code, inputs, **extra)
