"""Stage ``reproduce``: train a recorded run again from its own artifacts, compare, and certify what came out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tracked_replay.compare import Certificate, Comparison, Difference, Tolerance, certify, check_certificate
from tracked_replay.compare.facts import differences, environment, flatten
from tracked_replay.compare.runs import require_whole
from tracked_replay.determinism import environment_record
from tracked_replay.errors import RecordingError, RunError, TrackedReplayError
from tracked_replay.recording import Recording
from tracked_replay.stages.compare import Compared, compare_two, log_comparison
from tracked_replay.stages.magic import recorded_setup
from tracked_replay.stages.problem import Problem, task_errors
from tracked_replay.stages.train import SECTIONS, log_problem, open_recording, train_stage
from tracked_replay.tracking import StageRun, artifacts_of, names, resolve, stage_run, tag_of

logger = logging.getLogger(__name__)

CERTIFICATE = "compare/certificate.json"
SHOWN = 20  # environment differences named one by one


class Reproduced(NamedTuple):
    """What a reproduction gives.

    Attributes:
        run_id: the ``reproduce`` run.
        compared: recorded and new training run.
        certificate: what can be checked again later.
    """

    run_id: str
    compared: Compared
    certificate: Certificate

    @property
    def comparison(self) -> Comparison:
        """The recorded run beside the new one."""
        return self.compared.comparisons[0, 1]


def run_reproduce(run_id: str, *, data_root: str | None = None) -> Reproduced:
    """Train a recorded run again with its own config in this environment, and compare.

    Args:
        run_id: a finished ``train`` run.
        data_root: where the data are now.

    Raises:
        TrackedReplayError: the run, its files or its data cannot be used, or the training fails.
    """
    recorded = resolve(run_id, names.TRAIN, "run_id")
    run_id = str(recorded.info.run_id)
    fingerprint = tag_of(recorded, names.FINGERPRINT) or tag_of(recorded, names.PENDING)
    if fingerprint is None:
        raise RunError(f"run_id: run {run_id} has no tag {names.FINGERPRINT}, so nothing says what it computed")
    recording = open_recording(run_id)
    require_whole(recording, figures=False)  # damage is said before a training, not after
    problem = Problem.load(recording.config.override({"data.root": data_root} if data_root else {}))
    with task_errors(problem.config):
        recorded_setup(problem, recording)  # other data, a device that is not there: said before a run starts
    _show_environment(differences(environment(recording), flatten(environment_record())))
    inputs = {"train_run_id": run_id}
    identity = problem.fingerprint(names.REPRODUCE, SECTIONS, inputs)
    with stage_run(names.REPRODUCE, identity, f"reproduce · {problem.task.name} · {run_id[:8]}", inputs) as run:
        log_problem(problem, run)
        again = train_stage(problem, force=True, reproduces=run_id).run_id
        run.tag({f"{names.INPUT}reproduced_run_id": again})
        return _certify(run, run_id, again, fingerprint, data_root)


def _show_environment(differing: Sequence[Difference]) -> None:
    if not differing:
        logger.info("this environment is the recorded one")
        return
    count = f"{len(differing)} value{'s' * (len(differing) != 1)}"
    logger.info("this environment differs from the recorded one in %s:", count)
    for name, *sides in differing[:SHOWN]:
        recorded, here = ("not there" if side is None else side for side in sides)
        logger.info("  %s: recorded %s, here %s", name, recorded, here)
    if len(differing) > SHOWN:
        logger.info("  and %d more", len(differing) - SHOWN)


def _certify(run: StageRun, recorded: str, again: str, fingerprint: str, data_root: str | None) -> Reproduced:
    one, other = open_recording(recorded), open_recording(again)
    comparison = compare_two(one, other, (recorded, again), Tolerance(), data_root)
    certificate = certify(comparison, one, other, fingerprint)
    compared = Compared(run.run_id, (recorded, again), {(0, 1): comparison})
    # A is the run that was recorded, B the one that was trained now.
    check = f"tracked-replay verify --certificate {run.run_id}"
    log_comparison(run, compared, {CERTIFICATE: certificate.to_json()}, next_command=check)
    return Reproduced(run.run_id, compared, certificate)


class Checked(NamedTuple):
    """A certificate that holds.

    Attributes:
        certificate: what it says.
        held: what was checked, for people.
    """

    certificate: Certificate
    held: list[str]


def run_check_certificate(certificate: str, train_run_id: str = "") -> Checked:
    """Check a certificate against the run it is about, without training.

    Args:
        certificate: a file, or the ID of the ``reproduce`` run that made it.
        train_run_id: the run it must be about; the one it names where this is empty.

    Returns:
        The certificate and what of it was checked; its verdict may well be ``different``.

    Raises:
        TrackedReplayError: naming the first thing that does not hold.
    """
    found = _read_certificate(certificate)
    tolerance = found.tolerance
    if tolerance != Tolerance():
        raise RecordingError(
            f"the certificate does not hold, tolerance: found max_ulp {tolerance.max_ulp:g} and "
            f"{len(tolerance.ignore)} patterns left out; allowed: bit for bit, as every reproduction is compared"
        )
    if train_run_id and str(resolve(train_run_id, names.TRAIN, "train_run_id").info.run_id) != found.run_id:
        raise RecordingError(f"certificate: it is about run {found.run_id}, train_run_id is {train_run_id}")
    recorded = resolve(found.run_id, names.TRAIN, "certificate: its run_id")
    fingerprint = tag_of(recorded, names.FINGERPRINT) or tag_of(recorded, names.PENDING) or ""
    try:
        resolve(found.reproduced_run_id, names.TRAIN, "certificate: its reproduced_run_id")
        reproduced = open_recording(found.reproduced_run_id)
    except TrackedReplayError as error:
        logger.warning("the reproduced run is not checked: %s", error)
        reproduced = None
    return Checked(found, check_certificate(found, open_recording(found.run_id), fingerprint, reproduced))


def _read_certificate(text: str) -> Certificate:
    path = Path(text)
    if path.is_file():
        return Certificate.from_json(path.read_text(encoding="utf-8", errors="replace"))
    if "/" in text or text.endswith(".json"):
        raise RecordingError(f"certificate: the file {text!r} does not exist")
    run = resolve(text, names.REPRODUCE, "certificate")
    identity = tag_of(run, names.DIGESTS)
    if identity is None:
        raise RecordingError(f"certificate: run {text} has no tag {names.DIGESTS}, so its files cannot be checked")
    with Recording(artifacts_of(str(run.info.run_id)), identity).open(CERTIFICATE) as found:
        return Certificate.from_json(found.read_text(encoding="utf-8", errors="replace"))


def reproduce(run_id: str, *, data_root: str | None = None) -> Comparison:
    """Train a recorded run again from its own artifacts and compare, bit by bit.

    Args:
        run_id: a finished ``train`` run.
        data_root: where the data are now.

    Returns:
        The recorded run beside the new one; the MLflow run holds it with a certificate.

    Raises:
        TrackedReplayError: one clear sentence about why it cannot be trained again.
    """
    return run_reproduce(run_id, data_root=data_root).comparison
