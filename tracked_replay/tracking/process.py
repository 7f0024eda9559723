"""Which process a run belongs to, and closing the runs of processes that are gone."""

from __future__ import annotations

import logging
import os
import platform

import psutil
from mlflow.tracking import MlflowClient

from tracked_replay.tracking import names

logger = logging.getLogger(__name__)

MAX_RUNS = 1000
CLOCK_TOLERANCE = 60.0  # seconds


def this_process() -> str:
    """This process, told apart from a later one with the same number: host, process number, start time."""
    return f"{_host()} {psutil.Process().pid} {psutil.Process().create_time():.2f}"


def _host() -> str:
    """This machine and, in a container, the container: process numbers mean nothing outside it."""
    try:
        return f"{platform.node()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no such thing outside Linux
        return platform.node()


def close_abandoned(experiment_id: str) -> None:
    """End runs as KILLED that are RUNNING although the process of this machine that made them is gone."""
    client = MlflowClient()
    running = client.search_runs(
        [experiment_id],
        filter_string=f"attributes.status = 'RUNNING' and tags.`{names.PROCESS}` LIKE '{_host()} %'",
        max_results=MAX_RUNS,
    )
    for run in running:
        tag = str(run.data.tags[names.PROCESS])
        try:
            _, pid, created = tag.rsplit(" ", 2)
            alive = _alive(int(pid), float(created))
        except (ValueError, OverflowError):
            continue  # not a tag of ours, whatever it is
        # Another process may have gone on with the run since it was listed.
        if not alive and client.get_run(run.info.run_id).data.tags.get(names.PROCESS) == tag:
            logger.warning("run %s was left RUNNING by a process that is gone; it is closed as KILLED", run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")


def _alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        # The start time is derived from the system clock, which may have been set since.
        same = abs(process.create_time() - created) < CLOCK_TOLERANCE
        # A killed process that nobody waits for (in a container without an init process) stays as a zombie.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
