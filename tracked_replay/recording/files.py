"""Writing files so that none is ever half there, and digests of files and states."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tracked_replay.training.state import State

ASIDE = ".*.part"  # what an interruption may leave of a file that was being written


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then move the file into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes aside and move them into place."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_aside(path, write)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text aside and move it into place."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON (no NaN) aside and move it into place."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def let_go_from_memory(path: Path) -> None:
    """Ask the kernel to bring a file to the disk and to keep no copy of it in memory; returns at once.

    The kernel lets go only of what is on the disk already: the first call begins the writing, a later one ends with
    the memory free. Where the system has no such call, it keeps the copy.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def content_digest(content: bytes) -> str:
    """xxh3-128 of bytes, 32 hex digits: fast, for finding damage; not for identity against an adversary."""
    return xxhash.xxh3_128_hexdigest(content)


def bits(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_digest(state: State, content: Mapping[str, memoryview] | None = None) -> str:
    """xxh3-128 over the bits of a state, 32 hex digits.

    Fed in the order of sorted tensor names: the line ``name dtype shape`` (for example
    ``parameters/head.bias float32 10``, dimensions joined by ``x``), a newline, and the tensor's bytes in C order,
    little-endian. Two states have the same digest exactly when all tensors agree bit for bit, −0.0 and NaN payloads
    included; the step number is not part of it.

    Args:
        state: on any device.
        content: :func:`bits` of all its tensors by name, where they are at hand.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.flat().items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {'x'.join(map(str, tensor.shape))}\n".encode())
        digest.update(bits(tensor) if content is None else content[name])
    return digest.hexdigest()
