"""Stages as MLflow runs: starting, finding, resolving by run ID."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import mlflow
import numpy as np
from filelock import FileLock, Timeout
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from tracked_replay.errors import RunError
from tracked_replay.recording import Fetch
from tracked_replay.recording.journal import FOLDER as RESUME
from tracked_replay.tracking import names
from tracked_replay.tracking.artifacts import Workspace, artifact_source, in_one_line, require_waiting
from tracked_replay.tracking.process import close_abandoned, this_process

logger = logging.getLogger(__name__)

MADE_BY_MLFLOW = "MLFLOW_RUN_ID"  # holds the run that `mlflow run` made before the stage started
METRICS_PER_CALL = 1000  # MLflow's own limit for one batch
PARAMS_PER_CALL = 100
LONGEST_SIDE = 100  # of an image, in units of the other
TRAINING_VIEW = "?workflowType=machine_learning"  # else MLflow's UI opens in its view of traces and prompts
INTERRUPTED = ("FAILED", "KILLED")
CANDIDATES = 20  # runs that are looked at in one request
RUN_ID_FORM = re.compile(r"[A-Za-z0-9][\w-]{0,255}", re.ASCII)  # what MLflow itself takes


class StageRun:
    """A run that a stage writes to.

    Attributes:
        run_id: its ID.
        fingerprint: identity of its result; a stage that only knows its inputs later sets it before it ends.
        reusable: whether a later stage may take the result for its own; a stage with parts missing says no.
        resumed: whether it goes on from an interruption; metrics and parameters that were logged before are then not
            logged again.
    """

    def __init__(self, run_id: str, fingerprint: str | None = None, *, resumed: bool = False) -> None:
        self.run_id = run_id
        self.fingerprint = fingerprint
        self.reusable = True
        self.resumed = resumed
        self._client = MlflowClient()
        self._metrics: list[Metric] = []
        self._logged: dict[str, int] = {}

    def identify(self, fingerprint: str) -> None:
        """Say what the result will be, once all inputs are known."""
        self.fingerprint = fingerprint
        self.tag({names.PENDING: fingerprint})

    def tag(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters for browsing; MLflow cuts long values, so the config artifact is the truth."""
        # Fields that the result does not depend on may have changed since; MLflow takes no second value.
        logged = self._client.get_run(self.run_id).data.params if self.resumed else {}
        rows = [Param(name, str(value)) for name, value in values.items() if name not in logged]
        for first in range(0, len(rows), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=rows[first : first + PARAMS_PER_CALL])

    def metric(self, name: str, value: float, step: int = 0) -> None:
        """Note a metric; it is sent by :meth:`flush` (collecting makes a metric some hundred times cheaper)."""
        if self.resumed:
            if step <= self._last_logged(name):
                return
            self._logged[name] = step
        self._metrics.append(Metric(name, float(value), get_current_time_millis(), step))

    def history(self, name: str) -> dict[int, float]:
        """Values of a metric by step, as far as they were sent."""
        return {row.step: row.value for row in self._client.get_metric_history(self.run_id, name)}

    def _last_logged(self, name: str) -> int:
        if name not in self._logged:
            self._logged[name] = max(self.history(name), default=-1)
        return self._logged[name]

    def flush(self) -> None:
        """Send the metrics noted so far."""
        rows, self._metrics = self._metrics, []
        for first in range(0, len(rows), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=rows[first : first + METRICS_PER_CALL])

    def artifacts(self, folder: Path) -> None:
        """Log all files under a folder, at the same paths."""
        self._client.log_artifacts(self.run_id, str(folder))

    def discard(self, *folders: str) -> None:
        """Remove what an interrupted attempt logged as tables or images, which MLflow would add to."""
        repository = get_artifact_repository(self._client.get_run(self.run_id).info.artifact_uri)
        for folder in folders:
            for file in repository.list_artifacts(folder):
                repository.delete_artifacts(file.path)

    def table(self, columns: Mapping[str, list[Any]], path: str) -> None:
        """Log a table that the UI shows (JSON)."""
        self._client.log_table(self.run_id, dict(columns), path)

    def image(self, pixels: np.ndarray, key: str, step: int = 0) -> None:
        """Log an image, uint8 of shape (H, W) or (H, W, 3), to the UI's grid."""
        self._client.log_image(self.run_id, _not_too_long(pixels), key=key, step=step)

    def describe(self, markdown: str) -> None:
        """Set the run's description."""
        self._client.set_tag(self.run_id, MLFLOW_RUN_NOTE, markdown)

    @property
    def description(self) -> str:
        """The run's description as it is now: people may have changed it."""
        return str(self._client.get_run(self.run_id).data.tags.get(MLFLOW_RUN_NOTE, ""))

    def link(self, artifact: str) -> str:
        """A link in Markdown to the place of an artifact in the UI, which may still have to be logged."""
        return f"[{artifact}]({ui_path(self.run_id, artifact)})"

    def dataset(self, inputs: np.ndarray, labels: np.ndarray, name: str, digest: str, context: str) -> None:
        """Log a data set as an input of the run.

        Args:
            inputs: (N, ...).
            labels: (N,).
            name: shown in the UI.
            digest: fingerprint of the data; MLflow takes 36 characters, the first 32 are used.
            context: ``training`` or ``evaluation``.
        """
        dataset = mlflow.data.from_numpy(inputs, targets=labels, name=name, digest=digest[:32])
        mlflow.log_input(dataset, context=context)


def _not_too_long(pixels: np.ndarray) -> np.ndarray:
    """An image as (H, W, C), with white around one so long that MLflow's small copy of it would have no height."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    least = -(-max(pixels.shape[:2]) // LONGEST_SIDE)
    missing = [max(0, least - side) for side in pixels.shape[:2]]
    around = [(space // 2, space - space // 2) for space in missing]
    return np.pad(pixels, [*around, (0, 0)], constant_values=255) if any(missing) else pixels


@contextmanager
def stage_run(
    stage: str, fingerprint: str | None, name: str, inputs: Mapping[str, str], resume: str | None = None
) -> Iterator[StageRun]:
    """Start a stage's run, nested where another stage's run is active.

    Under ``mlflow run`` the first stage takes over the run that MLflow made. The run ends FINISHED, FAILED on an
    error, or KILLED on an interrupt or a termination signal; the fingerprint is set at the very end, so that a run
    that did not finish is never reused. A store that does not let a broken run end is told of in a note on the error
    that broke it off, which is the one that is raised.

    Args:
        stage: name of the stage.
        fingerprint: identity of its result.
        name: shown in the UI.
        inputs: upstream run IDs by parameter name.
        resume: an interrupted run of the stage that is gone on with, instead of a new one.

    Raises:
        ConfigError: the files of the stage cannot wait here for the end of the run.
    """
    parent = mlflow.active_run()
    experiment = active_experiment()
    if stage in (names.TRAIN, names.MAGIC):
        require_waiting(experiment)
    close_abandoned(experiment)
    made_by_mlflow = os.environ.get(MADE_BY_MLFLOW)
    with _termination_as_interrupt():
        run = mlflow.start_run(run_id=resume, nested=parent is not None, log_system_metrics=True)
        try:
            stage_run = StageRun(run.info.run_id, fingerprint, resumed=resume is not None)
            tags = {MLFLOW_RUN_NAME: name, names.STAGE: stage, names.PROCESS: this_process()}
            tags |= {names.PENDING: fingerprint} if fingerprint else {}
            tags |= {MLFLOW_PARENT_RUN_ID: parent.info.run_id} if resume and parent else {}
            stage_run.tag(tags | {f"{names.INPUT}{key}": value for key, value in inputs.items()})
            yield stage_run
            stage_run.flush()
            if stage_run.fingerprint is None:
                raise RuntimeError(f"stage {stage} ends without a fingerprint")
            if stage_run.reusable:
                stage_run.tag({names.FINGERPRINT: stage_run.fingerprint})
        except (KeyboardInterrupt, SystemExit) as error:
            _ignore_termination()
            _end_broken(run.info.run_id, "KILLED", error)
            raise
        except BaseException as error:
            _end_broken(run.info.run_id, "FAILED", error)
            raise
        mlflow.end_run("FINISHED")
        if resume and made_by_mlflow:
            os.environ[MADE_BY_MLFLOW] = made_by_mlflow  # not taken over, and MLflow forgets it when any run ends


def _end_broken(run_id: str, status: str, first: BaseException) -> None:
    """End the active run after an error, which the store's own error about that does not hide."""
    try:
        mlflow.end_run(status)
    except Exception as error:  # of MLflow, of its database: there is no common class
        note = f"run {run_id} could not be ended as {status}: {in_one_line(error)}"
        first.add_note(note)
        logger.warning("%s", note)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt while a run is open, so that the run is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore_termination() -> None:
    """`mlflow run` answers Ctrl-C with a SIGTERM of its own; it must not break off the closing of the run."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def active_experiment() -> str:
    """ID of the experiment that runs go to: the active run's, else MLflow's own rules."""
    active = mlflow.active_run()
    if active is not None:
        return str(active.info.experiment_id)
    if MADE_BY_MLFLOW in os.environ:
        return str(MlflowClient().get_run(os.environ[MADE_BY_MLFLOW]).info.experiment_id)
    return str(mlflow.tracking.fluent._get_experiment_id())


def find_finished(stage: str, fingerprint: str) -> str | None:
    """Run ID of the newest FINISHED run of this experiment with the same fingerprint.

    One that ``reproduce`` made only where there is no other: what hangs on the run that it repeats is still found.
    """
    client, experiment = MlflowClient(), active_experiment()
    wanted = (
        f"tags.`{names.FINGERPRINT}` = '{fingerprint}' and tags.`{names.STAGE}` = '{stage}' "
        "and attributes.status = 'FINISHED'"
    )
    reproduction, page = None, None
    while True:
        found = client.search_runs(
            [experiment],
            filter_string=wanted,
            order_by=["attributes.start_time DESC"],
            max_results=CANDIDATES,
            page_token=page,
        )
        for run in found:
            if names.REPRODUCES not in run.data.tags:
                return str(run.info.run_id)
            reproduction = reproduction or str(run.info.run_id)
        page = found.token
        if not page:
            return reproduction


def find_interrupted(stage: str, fingerprint: str) -> Sequence[str]:
    """IDs of the runs that were to have a fingerprint but did not finish, newest first; none that still goes on."""
    experiment = active_experiment()
    close_abandoned(experiment)
    found = MlflowClient().search_runs(
        [experiment],
        filter_string=f"tags.`{names.PENDING}` = '{fingerprint}' and tags.`{names.STAGE}` = '{stage}'",
        order_by=["attributes.start_time DESC"],
        max_results=CANDIDATES,
    )
    return [str(run.info.run_id) for run in found if run.info.status in INTERRUPTED]


@contextmanager
def claimed(run_id: str) -> Iterator[bool]:
    """Whether this process may go on with an interrupted run, and no other while the context is open.

    There must be something to go on from: its workspace has the folder for that.
    """
    path = Workspace.of(run_id).folder / RESUME / "lock"
    if not path.parent.is_dir():
        yield False
        return
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        # Whoever held it before may have gone on with the run, and ended it.
        yield MlflowClient().get_run(run_id).info.status in INTERRUPTED
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def resolve(run_id: str, stage: str, parameter: str) -> Run:
    """The FINISHED run of a stage that a parameter names; follows a run that only points to an earlier result.

    Raises:
        RunError: the run does not exist, is deleted, is of another stage, or is not FINISHED.
    """
    run = existing_run(run_id, parameter)
    if run.info.lifecycle_stage != "active":
        raise RunError(f"{parameter}: run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` brings it back")
    found = run.data.tags.get(names.STAGE)
    if found != stage:
        what = f"is of stage {found!r}" if found else "was not made by tracked_replay"
        raise RunError(f"{parameter}: run {run_id} {what}; allowed: a finished run of stage {stage!r}")
    if run.info.status != "FINISHED":
        raise RunError(f"{parameter}: run {run_id} is {run.info.status}; allowed: a FINISHED run of stage {stage!r}")
    if names.REUSES not in run.data.tags:
        return run
    # One hop only: a stage never points to a run that points on, and tags that people set could form a ring.
    reused = existing_run(run.data.tags[names.REUSES], f"{parameter}: the tag {names.REUSES} of run {run_id}")
    if names.REUSES in reused.data.tags:
        raise RunError(f"{parameter}: run {run_id} points to run {reused.info.run_id}, which points on to another run")
    return resolve(reused.info.run_id, stage, parameter)


def stage_of(run_id: str, parameter: str) -> str | None:
    """The stage that made a run, whatever its status; ``None`` for a run of another program. Raises RunError."""
    return tag_of(existing_run(run_id, parameter), names.STAGE)


def existing_run(run_id: str, parameter: str) -> Run:
    """The run that a parameter names, whatever its stage and status. Raises RunError."""
    if not isinstance(run_id, str) or not RUN_ID_FORM.fullmatch(run_id):
        shown = repr(run_id) if len(repr(run_id)) <= 80 else f"{repr(run_id)[:80]}…"
        raise RunError(
            f"{parameter}: found {shown}; allowed: the ID of a run, such as the 32 digits that a stage prints"
        )
    try:
        return MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        raise RunError(f"{parameter}: found {run_id!r}, but {shown_uri()} has no such run") from None


def input_of(run: Run, name: str) -> str:
    """Upstream run ID of a run, for example ``train_run_id``."""
    return str(run.data.tags[f"{names.INPUT}{name}"])


def input_by_id(run_id: str, name: str) -> str:
    """Upstream run ID of the run with an ID."""
    return input_of(MlflowClient().get_run(run_id), name)


def tag_of(run: Run, name: str) -> str | None:
    """A tag's value, or None."""
    value = run.data.tags.get(name)
    return None if value is None else str(value)


def artifacts_of(run_id: str) -> Fetch:
    """Opens a run's artifacts by path."""
    return artifact_source(MlflowClient(), run_id)


def point_to(stage: str, run_id: str, name: str, inputs: Mapping[str, str]) -> str | None:
    """Under ``mlflow run``, let the run that MLflow made point to the earlier result that answers it.

    Returns:
        The ID of the pointing run, or None where there is none to close.
    """
    if MADE_BY_MLFLOW not in os.environ:
        return None
    with mlflow.start_run() as run:
        pointing = StageRun(run.info.run_id)
        tags = {names.STAGE: stage, names.REUSES: run_id, MLFLOW_RUN_NAME: f"reused · {name}"}
        pointing.tag(tags | {f"{names.INPUT}{key}": value for key, value in inputs.items()})
        pointing.describe(f"The same result was there already: [run {run_id}]({ui_path(run_id)}).")
        return str(run.info.run_id)


def note_validation(magic_run_id: str, lds_run_id: str, found: str, page: str, next_line: str) -> None:
    """Say in a ``magic`` run's description what a validation of it found; a store that refuses is only told of.

    Args:
        magic_run_id: the run that is written to.
        lds_run_id: the finished validation.
        found: its result in one line.
        page: path of its report, which knows more than the one of the ``magic`` run.
        next_line: stands instead of the advice to validate.
    """
    run = StageRun(magic_run_id)
    links = f"[its report]({ui_path(lds_run_id, page)}), [run {lds_run_id}]({ui_path(lds_run_id)})"
    line = f"{names.HELD} {found} ({links})"
    known, untried = (re.compile(rf"^{re.escape(start)}.*$", re.MULTILINE) for start in (names.HELD, names.UNTRIED))
    try:
        before = untried.sub(lambda _: next_line, run.description)
        after = known.sub(lambda _: line, before, count=1) if known.search(before) else f"{line}\n\n{before}"
        if len(after) <= MAX_TAG_VAL_LENGTH:  # MLflow would cut what people wrote
            run.describe(after)
        run.tag({names.VALIDATED_BY: lds_run_id})
    except MlflowException as error:  # perhaps somebody else's run, which must not cost the validation
        logger.warning("run %s does not say that run %s validated it: %s", magic_run_id, lds_run_id, error)


def ui_path(run_id: str, artifact: str = "") -> str:
    """Path inside the MLflow UI of a run's page, or of one of its artifacts there."""
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    inside = f"/artifacts/{quote(artifact)}" if artifact else ""
    return f"#/experiments/{experiment}/runs/{run_id}{inside}{TRAINING_VIEW}"


def ui_hint(run_id: str) -> str:
    """What a user opens to see a run: a URL, with the command that serves it where no server does."""
    uri, path = mlflow.get_tracking_uri(), ui_path(run_id)
    if uri.startswith(("http://", "https://")):
        return f"{shown_uri().rstrip('/')}/{path}"
    # A password is not printed; MLflow's own variable holds it.
    store = shlex.quote(uri) if shown_uri() == uri else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {store}  then  http://127.0.0.1:5000/{path}"


def shown_uri() -> str:
    """The tracking URI without the password that it may hold."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", mlflow.get_tracking_uri())


def is_child(run: Run) -> bool:
    """Whether a run is nested in another."""
    return MLFLOW_PARENT_RUN_ID in run.data.tags
