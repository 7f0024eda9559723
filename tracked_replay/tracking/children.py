"""Child runs that hold one piece of a stage's work each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis

from tracked_replay.tracking import names
from tracked_replay.tracking.process import this_process
from tracked_replay.tracking.runs import active_experiment

PAGE = 1000


def record_child(
    parent_run_id: str,
    stage: str,
    name: str,
    train_run_id: str,
    *,
    task: str = "",
    description: str = "",
    fingerprint: str = "",
    metrics: Mapping[str, float] | None = None,
    folder: Path | None = None,
    digests: str = "",
    error: str = "",
) -> str:
    """Record a piece of work that has ended as a child run: FINISHED, or FAILED where there is an error.

    It is made when the work is over, so that an interrupted stage hardly ever leaves a child RUNNING, and has the tag
    by which the next stage closes one that it left; the fingerprint is set after the artifacts, so that a half-recorded
    child is never reused.

    Args:
        parent_run_id: the stage's run.
        stage: name of the piece of work.
        name: shown in the UI.
        train_run_id: the recorded run it is about.
        task: name of the learning problem.
        description: Markdown that the UI shows on the run's page.
        fingerprint: identity of its result.
        metrics: what it measured; ``seconds`` says when it started.
        folder: its artifacts.
        digests: SHA-256 of the artifacts' ``digests.json``.
        error: why it failed.

    Returns:
        The child's run ID.
    """
    client = MlflowClient()
    experiment = client.get_run(parent_run_id).info.experiment_id
    now = get_current_time_millis()
    started = now - round(1000 * (metrics or {}).get("seconds", 0.0))
    tags = {MLFLOW_PARENT_RUN_ID: parent_run_id, names.STAGE: stage, f"{names.INPUT}train_run_id": train_run_id}
    tags[names.PROCESS] = this_process()
    # With the call that makes the run: there may be hundreds of them.
    tags |= {key: value for key, value in ((names.TASK, task), (MLFLOW_RUN_NOTE, description)) if value}
    run_id = str(client.create_run(experiment, start_time=started, tags=tags, run_name=name).info.run_id)
    rows = [Metric(key, value, now, 0) for key, value in (metrics or {}).items()]
    if folder is not None:
        client.log_artifacts(run_id, str(folder))
    extra = {"error": error[:500]} if error else {names.DIGESTS: digests, names.FINGERPRINT: fingerprint}
    client.log_batch(run_id, metrics=rows, tags=[RunTag(key, value) for key, value in extra.items()])
    client.set_terminated(run_id, "FAILED" if error else "FINISHED", now)
    return run_id


class FinishedChild(NamedTuple):
    """A piece of work that is done.

    Attributes:
        run_id: its run.
        digests: SHA-256 of its ``digests.json``.
    """

    run_id: str
    digests: str


def finished_children(stage: str, train_run_id: str) -> dict[str, FinishedChild]:
    """The FINISHED pieces of work on a recorded run by fingerprint, whoever their parent is."""
    client = MlflowClient()
    found: dict[str, FinishedChild] = {}
    token = None
    while True:
        page = client.search_runs(
            [active_experiment()],
            filter_string=(
                f"tags.`{names.STAGE}` = '{stage}' and tags.`{names.INPUT}train_run_id` = '{train_run_id}' "
                "and attributes.status = 'FINISHED'"
            ),
            max_results=PAGE,
            page_token=token,
        )
        for run in page:
            tags = run.data.tags
            if names.FINGERPRINT in tags:
                found[tags[names.FINGERPRINT]] = FinishedChild(run.info.run_id, tags.get(names.DIGESTS, ""))
        token = page.token
        if not token:
            return found
