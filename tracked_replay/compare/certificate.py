"""The certificate of a reproduction: what was trained again, what came out, and a hash over every step of both runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tracked_replay.compare.facts import DATA, environment, read_json
from tracked_replay.compare.result import Comparison, Tolerance, Verdict
from tracked_replay.compare.states import recorded_digests
from tracked_replay.errors import RecordingError
from tracked_replay.recording import Recording

FORMAT = 1

LEAF, NODE = b"\x00", b"\x01"  # RFC 6962: no leaf can be passed off as an inner node

SUMMARY = {
    "python": "python.version",
    "torch": "torch.version",
    "numpy": "packages.installed.numpy",
    "platform": "platform.description",
    "processor": "cpu.model",
    "capability": "cpu.torch_capability",
    "threads": "threads.intra_op",
    "gpu": "cuda.devices.0.name",
    "driver": "cuda.driver",
}


def _utc(text: str) -> str:
    date = datetime.fromisoformat(text)
    if date.tzinfo is not UTC or date.isoformat(timespec="seconds") != text:
        raise ValueError("allowed: a date as 2025-01-31T12:00:00+00:00")
    return text


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Identity = Annotated[str, Field(min_length=1)]
Date = Annotated[str, AfterValidator(_utc)]
Environment = dict[str, str | None]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Certificate:
    """What a reproduction came to.

    Attributes:
        format: version of this form.
        run_id: the run that was reproduced.
        fingerprint: of that run, as in its tag.
        code: digest of the code that recorded it; ``None`` where the recording does not say.
        steps: its number of steps.
        merkle_root: :func:`merkle_root` of its recording.
        reproduced_run_id: the run that was trained again.
        reproduced_merkle_root: of its recording.
        verdict: of their comparison.
        tolerance: under which it was made.
        environment: of the run that was reproduced, in short (:func:`environment_summary`).
        reproduced_environment: of the other.
        date: when the certificate was made, ISO 8601 in UTC, to the second.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    run_id: Identity
    fingerprint: Sha256
    code: Identity | None
    steps: Annotated[int, Field(ge=1)]
    merkle_root: Sha256
    reproduced_run_id: Identity
    reproduced_merkle_root: Sha256
    verdict: Verdict
    tolerance: Tolerance
    environment: Environment
    reproduced_environment: Environment
    date: Date

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, which finds damage and careless changes. It is no signature."""
        return hashlib.sha256(_canonical(_ADAPTER.dump_python(self, mode="json"))).hexdigest()

    def to_json(self) -> str:
        """Indented JSON that :meth:`from_json` reads: the fields and their ``digest``."""
        content = _ADAPTER.dump_python(self, mode="json") | {"digest": self.digest}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read a certificate.

        Raises:
            RecordingError: it is no JSON object, a field is unknown, missing, given twice or of the wrong form, or
                the content does not match its digest.
        """
        content = _parse(text)
        digest = content.pop("digest", None)
        try:
            certificate = _ADAPTER.validate_json(json.dumps(content))
        except ValidationError as error:
            raise RecordingError(f"the certificate is not valid: {_explain(error)}") from None
        if digest != certificate.digest:
            raise RecordingError(
                f"the certificate is damaged: its content has the digest {certificate.digest}, it says "
                f"{repr(digest)[:200]}"
            )
        return certificate


_ADAPTER = TypeAdapter(Certificate)


def certify(
    comparison: Comparison, recording: Recording, reproduced: Recording, fingerprint: str, date: datetime | None = None
) -> Certificate:
    """The certificate of a reproduction.

    Args:
        comparison: of the recorded run with the reproduced one, in this order.
        recording: the recorded run.
        reproduced: the run that was trained again.
        fingerprint: of the recorded run.
        date: when; now where it is ``None``.

    Raises:
        RecordingError: a recorded file is missing or damaged.
    """
    return Certificate(
        format=FORMAT,
        run_id=comparison.a,
        fingerprint=fingerprint,
        code=_code(recording),
        steps=recording.trace.steps,
        merkle_root=merkle_root(recording),
        reproduced_run_id=comparison.b,
        reproduced_merkle_root=merkle_root(reproduced),
        verdict=comparison.verdict,
        tolerance=comparison.tolerance,
        environment=environment_summary(recording),
        reproduced_environment=environment_summary(reproduced),
        date=(date or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
    )


def check_certificate(
    certificate: Certificate, recording: Recording, fingerprint: str, reproduced: Recording | None = None
) -> list[str]:
    """Check a certificate against the run that it is about, without training.

    Args:
        certificate: to be checked.
        recording: the run that it says was reproduced.
        fingerprint: of that run.
        reproduced: the run that was trained again, where it is still there.

    Returns:
        What was checked, for people.

    Raises:
        RecordingError: naming the first field that does not hold, or a recorded file that is missing or damaged.
    """
    if certificate.reproduced_run_id == certificate.run_id:
        raise RecordingError("the certificate does not hold, reproduced_run_id: it is the reproduced run itself")
    exact = certificate.verdict == "identical" and certificate.tolerance == Tolerance()
    expected: list[tuple[str, Any]] = [
        ("fingerprint", fingerprint),
        ("code", _code(recording)),
        ("steps", recording.trace.steps),
        ("merkle_root", merkle_root(recording)),
        ("environment", environment_summary(recording)),
    ]
    if exact:
        expected.append(("reproduced_merkle_root", certificate.merkle_root))
    if reproduced is not None:
        expected.append(("reproduced_merkle_root", merkle_root(reproduced)))
        expected.append(("reproduced_environment", environment_summary(reproduced)))
    for name, value in expected:
        found = getattr(certificate, name)
        if found != value:
            raise RecordingError(f"the certificate does not hold, {name}: found {found!r}, recorded was {value!r}")
    return list(dict.fromkeys(name for name, _ in expected))


def environment_summary(recording: Recording) -> Environment:
    """The parts of a recorded environment that people ask for first; ``None`` where it does not say."""
    found = environment(recording)
    return {
        name: ", ".join(value) if isinstance(value := found.get(key), tuple) else value for name, key in SUMMARY.items()
    }


def merkle_root(recording: Recording) -> str:
    """SHA-256 over every step of a run and its final state, as the root of a tree: 64 hex digits.

    The tree is that of RFC 6962: a leaf is SHA-256 of the byte 0 and a row, an inner node SHA-256 of the byte 1 and
    its two children. There is a row for each step, and a last one for the final state. A row is JSON without spaces,
    keys in this order: ``{"step":0,"epoch":0,"indices":[…],"labels":[…],"lr":["3fa999999999999a",…],"loss":
    "3ff1…","state_digest":"…"}`` with floats as the 16 hex digits of their float64 bits; the last row is
    ``{"step":T,"state_digest":"…"}``.

    Raises:
        RecordingError: a recorded file is missing or damaged.
    """
    return merkle_tree_root([_canonical(row) for row in _rows(recording)]).hex()


def merkle_tree_root(leaves: Sequence[bytes]) -> bytes:
    """Root of RFC 6962's tree over at least one leaf."""
    level = [hashlib.sha256(LEAF + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        alone = level[-1:] if len(level) % 2 else []  # goes up as it is
        level = [hashlib.sha256(NODE + left + right).digest() for left, right in pairs] + alone
    return level[0]


def _rows(recording: Recording) -> Iterator[dict[str, Any]]:
    trace, digests = recording.trace, recorded_digests(recording)
    for t in range(trace.steps):
        yield {
            "step": t,
            "epoch": int(trace.epochs[t]),
            "indices": trace.indices[t].tolist(),
            "labels": trace.labels[t].tolist(),
            "lr": [_bits(rate) for rate in trace.learning_rates[t]],
            "loss": _bits(trace.losses[t]),
            "state_digest": digests[t],
        }
    yield {"step": trace.steps, "state_digest": digests[trace.steps]}


def _bits(value: float) -> str:
    return f"{int(np.float64(value).view(np.uint64)):016x}"


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _code(recording: Recording) -> str | None:
    code: str | None = (read_json(recording, DATA) or {}).get("code")
    return code


def _parse(text: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RecordingError(f"the certificate is not valid: {twice}: given twice")
        return content

    try:
        content = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"the certificate is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise RecordingError(f"the certificate is not valid: found {type(content).__name__}; allowed: a JSON object")
    return content


def _explain(error: ValidationError) -> str:
    """The first wrong field: its name, and what is wrong with it."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name}: missing"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name}: unknown field"
    shown = repr(problem["input"])
    return f"{name}: found {shown if len(shown) <= 200 else f'{shown[:200]}…'}; {problem['msg']}"
