"""What the tests hand to executors. Imports little: each worker imports it anew."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def add_pid(context: Any, job: int) -> tuple[int, int, Any]:
    if job < 0:
        raise ValueError(f"job {job} is negative")
    return 10 * job, os.getpid(), context


def die_on_three(context: Any, job: int) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def sleepy(context: Any, job: float) -> int:
    time.sleep(job)
    return os.getpid()


class Count:
    """Leaves a file for each context that is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> str:
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        (self.folder / name).touch()
        return name


class Unlucky:
    """Has no context to give."""

    def __call__(self) -> None:
        raise OSError("no data here")


class StrangeError(Exception):
    """Cannot be unpickled: its constructor wants two arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(one + other)


def strange(context: Any, job: int) -> int:
    if job == 1:
        raise StrangeError(job, job)
    return job
