"""Runs that ``mlflow run`` makes for commands that make no run of their own, or that are refused before they do."""

from __future__ import annotations

import logging

from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from tracked_replay.tracking import names

logger = logging.getLogger(__name__)


def close_unused(run_id: str, name: str, markdown: str, status: str) -> None:
    """Name, describe and end a run that ``mlflow run`` made, unless a stage took it over.

    It gets no tag of a stage, so that nobody takes it for a result. Nothing is raised: what became of the command
    counts, not what is written about it.

    Args:
        run_id: the run.
        name: shown in the UI.
        markdown: its description.
        status: FINISHED, FAILED or KILLED.
    """
    client = MlflowClient()
    try:
        run = client.get_run(run_id)
        if names.STAGE in run.data.tags or run.info.status != "RUNNING":
            return
        client.log_batch(run_id, tags=[RunTag(MLFLOW_RUN_NAME, name), RunTag(MLFLOW_RUN_NOTE, markdown)])
        client.set_terminated(run_id, status)
    except Exception as error:  # of MLflow, of its database: there is no common class
        logger.warning("the run %s that `mlflow run` made is left without a name: %s", run_id, error)
