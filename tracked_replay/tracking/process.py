"""Which process a run belongs to, and closing the runs of processes that are gone."""

from __future__ import annotations

import logging
import platform

import psutil
from mlflow.tracking import MlflowClient

from tracked_replay.tracking import names

logger = logging.getLogger(__name__)

MAX_RUNS = 1000


def this_process() -> str:
    """This process, told apart from a later one with the same number."""
    return f"{platform.node()} {psutil.Process().pid} {psutil.Process().create_time():.2f}"


def close_abandoned(experiment_id: str) -> None:
    """End runs as KILLED that are RUNNING although the process of this machine that made them is gone."""
    client = MlflowClient()
    host = platform.node()
    running = client.search_runs(
        [experiment_id],
        filter_string=f"attributes.status = 'RUNNING' and tags.`{names.PROCESS}` LIKE '{host} %'",
        max_results=MAX_RUNS,
    )
    for run in running:
        _, pid, created = str(run.data.tags[names.PROCESS]).rsplit(" ", 2)
        try:
            process = psutil.Process(int(pid))
            # A killed process that nobody waits for (in a container without an init process) stays as a zombie.
            alive = f"{process.create_time():.2f}" == created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            logger.warning("run %s was left RUNNING by a process that is gone; it is closed as KILLED", run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")
