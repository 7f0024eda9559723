"""The certificate: its hash over every step, its JSON form, and what tampering is found."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from recorded import NAMES, nudge_at, record

from tracked_replay.compare.certificate import (
    Certificate,
    certify,
    check_certificate,
    environment_summary,
    merkle_root,
    merkle_tree_root,
)
from tracked_replay.compare.result import Tolerance
from tracked_replay.compare.runs import compare_recordings
from tracked_replay.errors import RecordingError
from tracked_replay.recording import Recording

FINGERPRINT = "f" * 64
DATE = datetime(2025, 1, 31, 12, 30, 5, 999, tzinfo=UTC)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def certificate(base: Recording) -> Certificate:
    return certify(compare_recordings(base, base, NAMES), base, base, FINGERPRINT, DATE)


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it stands there."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + recursive_root(leaves[:k]) + recursive_root(leaves[k:])).digest()


@pytest.mark.parametrize("count", range(1, 18))
def test_the_tree_is_that_of_rfc_6962(count: int) -> None:
    leaves = [bytes([i]) * i for i in range(count)]
    assert merkle_tree_root(leaves) == recursive_root(leaves)


def test_a_known_root() -> None:
    """From the test vectors of Certificate Transparency's reference implementation."""
    leaves = [bytes.fromhex(leaf) for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
    leaves.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
    assert merkle_tree_root(leaves).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_the_root_covers_every_step_and_the_final_state(base: Recording) -> None:
    def bits(value: float) -> str:
        return struct.pack(">d", value).hex()

    trace, leaves = base.trace, []
    for t in range(9):
        lr = ",".join(f'"{bits(rate)}"' for rate in trace.learning_rates[t])
        lists = [",".join(map(str, rows[t])) for rows in (trace.indices, trace.labels)]
        leaves.append(
            f'{{"step":{t},"epoch":{trace.epochs[t]},"indices":[{lists[0]}],"labels":[{lists[1]}],"lr":[{lr}],'
            f'"loss":"{bits(trace.losses[t])}","state_digest":"{trace.state_digests[t]}"}}'
        )
    leaves.append(f'{{"step":9,"state_digest":"{base.final.digest}"}}')
    assert merkle_root(base) == recursive_root([leaf.encode() for leaf in leaves]).hex()


@pytest.mark.parametrize(
    "changes",
    [
        {"change_state": nudge_at(9, "parameters/4.weight")},
        {"change_record": lambda taken: taken._replace(epoch=5) if taken.before.step == 4 else taken},
        {"change_record": lambda taken: taken._replace(labels=taken.labels[::-1].copy())},
        {"change_record": lambda taken: taken._replace(indices=taken.indices[::-1].copy())},
        {"change_record": lambda taken: taken._replace(loss=taken.loss * (1 + 2**-52))},
        {"change_record": lambda taken: taken._replace(learning_rates=-taken.learning_rates)},
        {"steps": 8},
    ],
)
def test_any_change_of_a_row_changes_the_root(base: Recording, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert merkle_root(record(tmp_path / "same")) == merkle_root(base)
    assert merkle_root(record(tmp_path / "changed", **changes)) != merkle_root(base)


def test_a_certificate_says_what_was_reproduced(base: Recording, tmp_path: Path) -> None:
    other = record(tmp_path, change_state=nudge_at(9, "parameters/4.weight"))
    tolerance = Tolerance(max_ulp=1, ignore=("momentum/*",))
    found = certify(compare_recordings(base, other, NAMES, tolerance), base, other, FINGERPRINT, DATE)
    assert (found.run_id, found.reproduced_run_id) == NAMES
    assert (found.merkle_root, found.reproduced_merkle_root) == (merkle_root(base), merkle_root(other))
    assert (found.verdict, found.tolerance, found.steps) == ("identical", tolerance, 9)
    assert found.date == "2025-01-31T12:30:05+00:00"
    assert found.environment == environment_summary(base)
    assert found.environment["threads"] == "1"
    assert found.environment["torch"]
    assert Certificate.from_json(found.to_json()) == found
    assert check_certificate(found, base, FINGERPRINT, other)


def test_reading_gives_back_what_was_written(certificate: Certificate) -> None:
    text = certificate.to_json()
    assert Certificate.from_json(text) == certificate
    assert Certificate.from_json(text).to_json() == text
    assert set(json.loads(text)) == {*certificate.__dataclass_fields__, "digest"}


def test_a_certificate_that_holds(certificate: Certificate, base: Recording) -> None:
    checked = check_certificate(certificate, base, FINGERPRINT)
    assert checked == ["fingerprint", "code", "steps", "merkle_root", "environment", "reproduced_merkle_root"]
    assert check_certificate(certificate, base, FINGERPRINT, base)[-1] == "reproduced_environment"


OTHER = {
    "run_id": "run-c",
    "fingerprint": "0" * 64,
    "code": "c" * 64,
    "steps": 8,
    "merkle_root": "0" * 64,
    "reproduced_run_id": "run-c",
    "reproduced_merkle_root": "0" * 64,
    "verdict": "different",
    "tolerance": {"max_ulp": 1, "ignore": []},
    "environment": {"torch": "2.0"},
    "reproduced_environment": {"torch": "2.0"},
    "date": "2025-01-31T12:30:06+00:00",
}


@pytest.mark.parametrize("name", [*OTHER, "digest"])
def test_a_changed_field_is_found_by_the_digest(certificate: Certificate, name: str) -> None:
    content = json.loads(certificate.to_json())
    assert content[name] != OTHER.get(name)
    content[name] = OTHER.get(name, "0" * 64)
    with pytest.raises(RecordingError, match="the certificate is damaged"):
        Certificate.from_json(json.dumps(content))


def test_every_field_but_the_format_is_tampered_with(certificate: Certificate) -> None:
    assert OTHER.keys() == certificate.__dataclass_fields__.keys() - {"format"}


@pytest.mark.parametrize(
    "name", ["fingerprint", "code", "steps", "merkle_root", "environment", "reproduced_merkle_root"]
)
def test_a_forged_field_is_found_by_the_recording(certificate: Certificate, base: Recording, name: str) -> None:
    forged = Certificate.from_json(replace(certificate, **{name: OTHER[name]}).to_json())  # with a digest that fits
    with pytest.raises(RecordingError, match=f"the certificate does not hold, {name}: found "):
        check_certificate(forged, base, FINGERPRINT)


def test_the_reproduced_run_is_checked_where_it_is_there(
    certificate: Certificate, base: Recording, tmp_path: Path
) -> None:
    other = record(tmp_path, seed=1)
    with pytest.raises(RecordingError, match="reproduced_merkle_root: found "):
        check_certificate(certificate, base, FINGERPRINT, other)
    with pytest.raises(RecordingError, match="merkle_root: found "):
        check_certificate(certificate, other, FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "more: unknown field"),
        ({"tolerance": {"max_ulp": 0, "ignore": [], "more": 1}}, "tolerance.more: unknown field"),
        ({"tolerance": {"max_ulp": "0", "ignore": []}}, "tolerance.max_ulp: found '0'"),
        ({"tolerance": {"max_ulp": True, "ignore": []}}, "tolerance.max_ulp: found True"),
        ({"format": 2}, "format: found 2"),
        ({"format": True}, "format: found True"),
        ({"steps": "9"}, "steps: found '9'"),
        ({"steps": 9.0}, "steps: found 9.0"),
        ({"steps": 0}, "steps: found 0"),
        ({"run_id": ""}, "run_id: found ''"),
        ({"run_id": None}, "run_id: found None"),
        ({"verdict": "same"}, "verdict: found 'same'"),
        ({"merkle_root": "F" * 64}, "merkle_root: found 'FF"),
        ({"merkle_root": "f" * 63}, "merkle_root: found 'ff"),
        ({"merkle_root": "f" * 64 + "\n"}, "merkle_root: found 'ff"),
        ({"environment": {"torch": 2}}, "environment.torch: found 2"),
        ({"date": "yesterday"}, "date: found 'yesterday'"),
        ({"date": "2025-01-31"}, "date: found "),
        ({"date": "2025-01-31T12:30:05"}, "date: found "),
        ({"date": "2025-01-31T12:30:05+01:00"}, "date: found "),
        ({"date": "2025-02-31T12:30:05+00:00"}, "date: found "),
    ],
)
def test_a_field_of_the_wrong_form_is_named(certificate: Certificate, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        Certificate.from_json(json.dumps(json.loads(certificate.to_json()) | change))


@pytest.mark.parametrize("name", ["format", *OTHER])
def test_a_missing_field_is_named(certificate: Certificate, name: str) -> None:
    content = json.loads(certificate.to_json())
    del content[name]
    with pytest.raises(RecordingError, match=f"{name}: missing"):
        Certificate.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "found list; allowed: a JSON object"),
        ("null", "found NoneType"),
        ('{"steps": 1, "steps": 2}', "steps: given twice"),
    ],
)
def test_what_is_no_certificate_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        Certificate.from_json(text)


def test_a_certificate_without_digest_is_refused(certificate: Certificate) -> None:
    content = json.loads(certificate.to_json())
    del content["digest"]
    with pytest.raises(RecordingError, match="it says None"):
        Certificate.from_json(json.dumps(content))
