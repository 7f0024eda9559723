"""Writing files so that none is ever half there, and digests of files and states."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tracked_replay.training.state import State

PLAIN = (torch.float32, torch.float64, torch.int64)  # what states mostly hold, and NumPy has too
ASIDE = ".*.part"  # what an interruption may leave of a file that was being written


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then move the file into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        _name(error, path)
        raise
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


PARTS_PER_CALL = 512  # half of what the system takes in one call


def write_new(path: Path, parts: Sequence[bytes | memoryview], written: Callable[[int], None] | None = None) -> None:
    """Write a file in its place, for one that nothing reads before it is entered elsewhere as whole.

    That saves moving it. An error leaves no file; of a killed process a part may stay, and is written over.

    Args:
        path: the file.
        parts: its content, in order; bytes or C-contiguous memory.
        written: called with the open file's number after the last part.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with path.open("wb", buffering=0 if hasattr(os, "writev") else -1) as stream:
            if hasattr(os, "writev"):
                for first in range(0, len(parts), PARTS_PER_CALL):
                    _write_all(stream.fileno(), parts[first : first + PARTS_PER_CALL])
            else:
                stream.writelines(parts)
                stream.flush()
            if written is not None:
                written(stream.fileno())
    except FileNotFoundError:
        if path.parent.is_dir():
            raise
        path.parent.mkdir(parents=True)
        write_new(path, parts, written)
    except BaseException as error:
        path.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Let an error of a full disk, which does not say so itself, name the file that was written."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = str(path)


def _write_all(file: int, parts: Sequence[bytes | memoryview]) -> None:
    rest = deque(memoryview(part).cast("B") for part in parts)
    while rest:
        count = os.writev(file, rest)  # may be less than all
        while rest and count >= len(rest[0]):
            count -= len(rest.popleft())
        if count:
            rest[0] = rest[0][count:]


class PageCache:
    """Keeps what is written one after the other from filling the machine's memory.

    The kernel keeps a written file in memory, first until it is on the disk and then in case it is read. Each file is
    handed to the disk at once here, which does not wait for it, and its memory is given back when the next one has
    been written. Where the system has no such call, it keeps the copies.
    """

    def __init__(self) -> None:
        self._last: int | None = None

    def let_go(self, file: int) -> None:
        """Of an open file, by its number, that is all written; it may be closed then."""
        if not hasattr(os, "posix_fadvise"):
            return
        self.close()
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        self._last = os.dup(file)

    def close(self) -> None:
        """Give the last one's memory back, as far as it is on the disk."""
        if self._last is not None:
            last, self._last = self._last, None
            os.posix_fadvise(last, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(last)


def content_digest(content: bytes) -> str:
    """xxh3-128 of bytes, 32 hex digits: fast, for finding damage; not for identity against an adversary."""
    return xxhash.xxh3_128_hexdigest(content)


def bits(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order."""
    if tensor.device.type == "cpu" and tensor.dtype in PLAIN and tensor.is_contiguous() and tensor.numel():
        return tensor.detach().numpy().data.cast("B")  # the same at half the price
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
