"""Writing files so that none is ever half there, and digests of files and states."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


PAGE = 4096  # what reaches a disk directly begins and ends in memory and in the file at a multiple of its blocks
HUGE_PAGE = 2 * 2**20


def page_memory(size: int) -> memoryview:
    """Zeros of at least ``size`` bytes for :func:`write_directly`, in the largest pages that the system gives."""
    size = max(size, 1)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return memoryview(mmap.mmap(-1, -(-size // PAGE) * PAGE))
    size = -(-size // HUGE_PAGE) * HUGE_PAGE if size > HUGE_PAGE // 2 else -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        memory.madvise(mmap.MADV_HUGEPAGE)  # the disk is told of a few pieces instead of hundreds
    return memoryview(memory)


def write_directly(path: Path, memory: memoryview, size: int) -> None:
    """Write a file in its place, past the page cache where system and file system allow.

    The file takes no memory then, neither until it is on the disk nor after, and nothing is copied once more. It is for
    files that nothing reads before they are entered elsewhere as whole, which saves moving them: an error leaves no
    file; of a killed process a part may stay, and is written over.

    Args:
        path: the file.
        memory: of :func:`page_memory`.
        size: bytes of it to write.

    Raises:
        OSError: the file cannot be written.
    """
    direct = getattr(os, "O_DIRECT", 0)
    try:
        with _new_file(path, direct) as file:
            written = write_all(file, memory[: -(-size // PAGE) * PAGE] if direct else memory[:size])
            if written > size:
                os.ftruncate(file, size)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:  # what a file system says that knows of no such way
            raise
        with _new_file(path, 0) as file:
            write_all(file, memory[:size])


@contextmanager
def _new_file(path: Path, flags: int) -> Iterator[int]:
    """Number of a file that is open for writing, empty; an error removes it."""
    flags |= os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, flags, 0o666)
    try:
        yield file
    except BaseException as error:
        path.unlink(missing_ok=True)
        _name(error, path)
        raise
    finally:
        os.close(file)


def _name(error: BaseException, path: Path) -> None:
    """Let an error of a full disk, which does not say so itself, name the file that was written."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = str(path)


def write_all(file: int, content: memoryview) -> int:
    """Write to an open file, by its number; returns the number of bytes."""
    written = 0
    while written < len(content):
        written += os.write(file, content[written:])  # may be less than all
    return written


def content_digest(content: bytes | memoryview) -> str:
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


def state_digest(state: State) -> str:
    """xxh3-128 over the bits of a state, 32 hex digits.

    Fed in the order of sorted tensor names: the line ``name dtype shape`` (for example
    ``parameters/head.bias float32 10``, dimensions joined by ``x``), a newline, and the tensor's bytes in C order,
    little-endian. Two states have the same digest exactly when all tensors agree bit for bit, −0.0 and NaN payloads
    included; the step number is not part of it.

    Args:
        state: on any device.
    """
    tensors = sorted(state.flat().items())
    return parts_digest((digest_line(name, tensor.dtype, tensor.shape), bits(tensor)) for name, tensor in tensors)


def digest_line(name: str, dtype: torch.dtype, shape: torch.Size) -> bytes:
    """What :func:`state_digest` takes before a tensor's bytes."""
    return f"{name} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}\n".encode()


def parts_digest(parts: Iterable[tuple[bytes, memoryview]]) -> str:
    """:func:`state_digest` of a state, from lines and bytes of its tensors in the order of their names."""
    digest = xxhash.xxh3_128()
    for line, content in parts:
        digest.update(line)
        digest.update(content)
    return digest.hexdigest()
