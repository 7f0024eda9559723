"""The only place that knows MLflow: a stage as a run, lineage, artifacts, lookup by fingerprint."""

from tracked_replay.tracking import names
from tracked_replay.tracking.artifacts import Workspace
from tracked_replay.tracking.children import FinishedChild, finished_children, record_child
from tracked_replay.tracking.fingerprint import code_digest, fingerprint
from tracked_replay.tracking.runs import (
    StageRun,
    artifacts_of,
    claimed,
    find_finished,
    find_interrupted,
    input_by_id,
    input_of,
    note_validation,
    point_to,
    resolve,
    shown_uri,
    stage_of,
    stage_run,
    tag_of,
    ui_hint,
    ui_path,
)
from tracked_replay.tracking.server import require_server
from tracked_replay.tracking.unused import close_unused

__all__ = [
    "FinishedChild",
    "StageRun",
    "Workspace",
    "artifacts_of",
    "claimed",
    "close_unused",
    "code_digest",
    "find_finished",
    "find_interrupted",
    "fingerprint",
    "finished_children",
    "input_by_id",
    "input_of",
    "names",
    "note_validation",
    "point_to",
    "record_child",
    "require_server",
    "resolve",
    "shown_uri",
    "stage_of",
    "stage_run",
    "tag_of",
    "ui_hint",
    "ui_path",
]
