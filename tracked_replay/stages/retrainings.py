"""Retrainings as child runs: each is done once, recorded when it has ended, and found again by its weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.errors import RecordingError
from tracked_replay.executors import Executor, InGroups
from tracked_replay.lds import (
    MakeSetup,
    Retrained,
    RetrainingJob,
    retrain,
    retrain_together,
)
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_aside, write_digests, write_json
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import SECTIONS as TRAIN_SECTIONS
from tracked_replay.tracking import (
    FinishedChild,
    StageRun,
    artifacts_of,
    finished_children,
    names,
    record_child,
    ui_path,
)

logger = logging.getLogger(__name__)

MEASUREMENTS = "lds/measurements.parquet"
SHOWN_EXAMPLES = 12  # in a description
STATE = "checkpoints/final.safetensors"


class Retrainings(NamedTuple):
    """What came of some retrainings.

    Attributes:
        results: by job ID.
        errors: why the others failed twice, by job ID.
    """

    results: dict[int, Retrained]
    errors: dict[int, str]


def retrain_all(
    problem: Problem,
    train_run_id: str,
    jobs: Sequence[RetrainingJob],
    run: StageRun,
    executor: Executor,
    *,
    force: bool = False,
    models_at_once: int = 1,
) -> Retrainings:
    """Do the retrainings that no finished child run holds yet; each becomes a child run.

    Args:
        problem: config, task and data of the recorded run.
        train_run_id: the recorded run.
        jobs: the retrainings.
        run: parent of the child runs.
        executor: from :func:`~tracked_replay.executors.make_executor`.
        force: do all of them.
        models_at_once: retrainings in one batched step; see :func:`~tracked_replay.lds.retrain_together`.
    """
    prints = {job.id: _retraining_fingerprint(problem, train_run_id, job, models_at_once) for job in jobs}
    known = {} if force else finished_children(names.RETRAINING, train_run_id)
    results: dict[int, Retrained] = {}
    errors: dict[int, str] = {}
    for job in jobs:
        found = known.get(prints[job.id])
        if found is not None:
            try:
                results[job.id] = _read_retraining(found, job.id)
            except RecordingError as error:
                logger.warning("run %s cannot be used, so retraining %d is done again: %s", found.run_id, job.id, error)
    if results:
        logger.info("%d of %d retrainings are finished already and are not done again", len(results), len(jobs))
    pending = [job for job in jobs if job.id not in results]
    describe = _Descriptions(problem, run.run_id, train_run_id)
    make_setup = MakeSetup(problem.config.to_toml())
    for attempt in (1, 2):
        failed = []
        if models_at_once == 1:
            done = executor.run(make_setup, retrain, pending)
        else:  # what failed beside others is tried again by itself, in the same arithmetic, so that it costs no other
            together = InGroups(executor, models_at_once if attempt == 1 else 1)
            done = together.run(make_setup, partial(retrain_together, models=models_at_once), pending)
        for item in progress(done, len(pending), "retrain" if attempt == 1 else "retry", "run"):
            job, result = item.job, item.result
            if isinstance(result, Retrained):
                results[job.id] = result
                task, description = problem.task.name, describe(job, result)
                _record_retraining(run, train_run_id, result, prints[job.id], task, description)
                continue
            failed.append(job)
            why = f"{type(item.error).__name__}: {item.error}"
            logger.warning("retraining %d failed (attempt %d of 2): %s", job.id, attempt, why)
            if attempt == 2:
                errors[job.id] = why
                record_child(
                    run.run_id,
                    names.RETRAINING,
                    f"retraining {job.id}",
                    train_run_id,
                    task=problem.task.name,
                    description=describe(job, None),
                    error=why,
                )
        pending = failed
        if not pending:
            break
    return Retrainings(results, dict(sorted(errors.items())))


def _retraining_fingerprint(problem: Problem, train_run_id: str, job: RetrainingJob, models_at_once: int) -> str:
    return problem.fingerprint(
        names.RETRAINING,
        TRAIN_SECTIONS,
        {"train_run_id": train_run_id},
        indices=job.indices.tolist(),
        weights=[float(weight).hex() for weight in job.weights],
        keep_state=job.keep_state,
        models_at_once=models_at_once,
    )


class _Descriptions:
    """Describes retrainings; the links are made once for all of them."""

    def __init__(self, problem: Problem, parent_run_id: str, train_run_id: str) -> None:
        self._task = report.markdown_text(problem.task.name)
        self._num_train = problem.data.num_train
        self._links = (
            f"- training run: [{train_run_id}]({ui_path(train_run_id)})\n"
            f"- part of: [{parent_run_id}]({ui_path(parent_run_id)})\n"
        )

    def __call__(self, job: RetrainingJob, result: Retrained | None) -> str:
        """The description of a retraining, which failed where there is no result."""
        words = f"{self._task}, {self._num_train} training examples, retrained {weights_in_words(job)}"
        if result is None:
            return f"**Failed twice**, see the tag `error`: {words}.\n\n{self._links}"
        found = f"evaluation measurement {result.measurements.mean():.4g}"
        if result.accuracy is not None:
            found = f"accuracy {result.accuracy:.1%}, {found}"
        return f"**{found}**: {words}.\n\n{self._links}"


def weights_in_words(job: RetrainingJob) -> str:
    """Which examples have another weight."""
    removed = not job.weights.any()
    pairs = list(zip(job.indices.tolist(), job.weights.tolist(), strict=True))[:SHOWN_EXAMPLES]
    shown = ", ".join(str(index) if removed else f"{index}: {weight:g}" for index, weight in pairs)
    more = ", …" if len(job.indices) > SHOWN_EXAMPLES else ""
    return (
        f"{'without' if removed else 'with another weight for'} {examples_in_words(len(job.indices))} ({shown}{more})"
    )


def examples_in_words(count: int) -> str:
    """A number of examples."""
    return f"{count} example{'s' * (count != 1)}"


def _record_retraining(
    run: StageRun, train_run_id: str, result: Retrained, fingerprint: str, task: str, description: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = pa.table({"evaluation_index": np.arange(len(result.measurements)), "measurement": result.measurements})
        write_aside(root / MEASUREMENTS, lambda temporary: pq.write_table(table, temporary))
        facts = dataclasses.asdict(result) | {"measurements": None, "state": None}
        write_json(root / "lds/retraining.json", {name: value for name, value in facts.items() if value is not None})
        if result.state is not None:
            (root / STATE).parent.mkdir()
            (root / STATE).write_bytes(result.state)
        metrics = {"evaluation_measurement": float(result.measurements.mean()), "seconds": result.seconds}
        if result.accuracy is not None:
            metrics["evaluation_accuracy"] = result.accuracy
        record_child(
            run.run_id,
            names.RETRAINING,
            f"retraining {result.id}" + (f", {result.models_at_once} at once" if result.models_at_once > 1 else ""),
            train_run_id,
            task=task,
            description=description,
            fingerprint=fingerprint,
            metrics=metrics,
            folder=root,
            digests=write_digests(root),
        )


def _read_retraining(run: FinishedChild, job_id: int) -> Retrained:
    recording = Recording(artifacts_of(run.run_id), run.digests)
    with recording.open("lds/retraining.json") as path:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with recording.open(MEASUREMENTS) as path:
        measurements = pq.read_table(path)["measurement"].to_numpy()
    return Retrained(
        job_id,
        measurements,
        facts.get("accuracy"),
        str(facts["final_digest"]),
        float(facts["seconds"]),
        models_at_once=int(facts["models_at_once"]),
    )
