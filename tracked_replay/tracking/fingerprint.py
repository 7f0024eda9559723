"""The identity of a stage's result: when two fingerprints agree, the earlier result is the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tracked_replay


def fingerprint(
    stage: str, config: Mapping[str, Any], data: str, code: str, inputs: Mapping[str, str], **extra: Any
) -> str:
    """SHA-256, 64 hex digits, over the canonical JSON of everything that decides a stage's result.

    Args:
        stage: name of the stage.
        config: typed values of the config sections that the stage reads.
        data: fingerprint of the data.
        code: from :func:`code_digest`.
        inputs: upstream run IDs by parameter name.
        extra: further JSON-able parameters of the stage.
    """
    content = {"stage": stage, "config": config, "data": data, "code": code, "inputs": inputs, "extra": extra}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def code_digest(more: Sequence[Path] = ()) -> str:
    """SHA-256 of this package's source as it lies on disk (uncommitted changes included) and of further files.

    Args:
        more: files of the user's own task; named by file name only, so that a moved file is the same code.
    """
    digest = hashlib.sha256(_package_digest().encode())
    for path in sorted(more, key=lambda path: path.name):
        digest.update(f"\n{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _package_digest() -> str:
    root = Path(tracked_replay.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"\n{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
