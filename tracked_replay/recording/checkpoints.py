"""Checkpoints: one safetensors file a recorded state, and the manifest that lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tracked_replay.errors import RecordingError
from tracked_replay.recording.files import (
    PAGE,
    digest_line,
    page_memory,
    parts_digest,
    state_digest,
    write_aside,
    write_directly,
)
from tracked_replay.training.state import State, Tensors

FOLDER = "checkpoints"
MANIFEST = f"{FOLDER}/manifest.parquet"

ALIGNMENT = 16  # bytes that the tensors begin at a multiple of: the largest element there is

Shapes = tuple[tuple[str, torch.dtype, torch.Size], ...]  # of all tensors of a state, in its order

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("generators", pa.string()),
    ]
)


@dataclass(frozen=True)
class Checkpoint:
    """A row of the manifest.

    Attributes:
        step: steps taken before the state was saved.
        file: path inside the run's artifacts.
        digest: :func:`~tracked_replay.recording.files.state_digest` of the state.
        bytes: size of the file.
        generators: digest of the random generators' states before the step, where they are kept.
    """

    step: int
    file: str
    digest: str
    bytes: int
    generators: str | None = None


def checkpoint_file(step: int) -> str:
    """Where the state before a step is kept, inside the run's artifacts."""
    return f"{FOLDER}/step-{step:06d}.safetensors"


def checkpoint_bytes(state: State) -> int:
    """Size of a state's checkpoint file."""
    return len(_layout(_shapes(state.flat())).header(state.step)) + state.nbytes


def _shapes(tensors: Tensors) -> Shapes:
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


class _Layout(NamedTuple):
    """How tensors of some shapes lie in a file.

    Attributes:
        rows: what safetensors itself says about them in the header's JSON, after the metadata's comma.
        order: their names in their order.
        size: bytes that they take.
    """

    rows: str
    order: list[str]
    size: int

    def header(self, step: int) -> bytes:
        """What stands before the tensors.

        It ends with spaces, as the format allows, so many that the file ends with a page where that can be.
        """
        # One metadata entry only: safetensors writes several in an order that changes from process to process.
        text = f'{{"__metadata__":{{"step":"{step}"}},{self.rows}'.encode()
        spaces = -(8 + len(text)) % ALIGNMENT
        spaces += -(8 + len(text) + spaces + self.size) % PAGE // ALIGNMENT * ALIGNMENT
        return (len(text) + spaces).to_bytes(8, "little") + text + b" " * spaces


@lru_cache(maxsize=2)  # before and after the first step, which makes the momentum
def _layout(shapes: Shapes) -> _Layout:
    content = safetensors.torch.save({name: torch.empty(shape, dtype=dtype) for name, dtype, shape in shapes})
    length = int.from_bytes(content[:8], "little")
    rows = json.loads(content[8 : 8 + length])
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    order = sorted(rows, key=lambda name: rows[name]["data_offsets"])
    return _Layout(text.removeprefix("{"), order, len(content) - 8 - length)


class StateBuffer:
    """Memory of its own for one state, in which it lies as in its checkpoint file.

    ``safetensors.torch.save`` would allocate new memory for every state and copy it twice. The library still makes the
    header, once for each set of tensors.
    """

    def __init__(self) -> None:
        self._shapes: Shapes = ()
        self._layout = _Layout("", [], 0)
        self._start = 0  # of the tensors
        self._memory = memoryview(b"")
        self._names: list[str] = []
        self._tensors: list[Tensor] = []
        self._parts: list[tuple[bytes, memoryview]] = []

    def hold(self, state: State) -> Checkpoint:
        """Copy a state, which may be on any device, over the one before.

        Returns:
            Its row in the manifest.
        """
        flat = state.flat()
        shapes = _shapes(flat)
        known = shapes == self._shapes
        if not known:
            self._shapes, self._layout = shapes, _layout(shapes)
        header = self._layout.header(state.step)
        if not known or len(header) != self._start:
            self._arrange(len(header), {name: flat[name] for name in self._layout.order})
        self._memory[: len(header)] = header
        if self._names:
            torch._foreach_copy_(self._tensors, [flat[name].detach() for name in self._names])
        return Checkpoint(state.step, checkpoint_file(state.step), parts_digest(self._parts), self._size)

    @property
    def _size(self) -> int:
        return self._start + self._layout.size

    def _arrange(self, start: int, tensors: Tensors) -> None:
        self._start = start
        if len(self._memory) < self._size:
            self._memory = page_memory(self._size)
        parts, ours = {}, {}
        for name, tensor in tensors.items():
            parts[name] = digest_line(name, tensor.dtype, tensor.shape), self._memory[start : start + tensor.nbytes]
            if tensor.nbytes:
                copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                ours[name] = copy.view(tensor.shape)
            start += tensor.nbytes
        self._names, self._tensors = list(ours), list(ours.values())
        self._parts = [parts[name] for name in sorted(parts)]

    def write(self, path: Path) -> None:
        """Write the state that is held; the same state always gives the same bytes. Raises OSError.

        The file is not moved into place: it counts from when the manifest or the journal names it.
        """
        write_directly(path, self._memory, self._size)


def write_checkpoint(root: Path, state: State) -> Checkpoint:
    """Save one state under ``root/checkpoints``. Raises OSError."""
    buffer = StateBuffer()
    checkpoint = buffer.hold(state)
    buffer.write(root / checkpoint.file)
    return checkpoint


def read_checkpoint(path: Path, checkpoint: Checkpoint) -> State:
    """Read a state back and check it against the manifest, every byte of the file that says anything.

    Raises:
        RecordingError: the file is not the one that was written.
    """
    content = path.read_bytes()
    try:
        state = State.from_flat(checkpoint.step, safetensors.torch.load(content))
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise RecordingError(f"{checkpoint.file} is damaged: it is no checkpoint ({str(error)[:200]})") from None
    found = state_digest(state)
    if (found, len(content), metadata) != (checkpoint.digest, checkpoint.bytes, {"step": str(checkpoint.step)}):
        raise RecordingError(
            f"{checkpoint.file} is damaged: its {len(content)} bytes have the metadata {str(metadata)[:200]} and the "
            f"state digest {found}, recorded were {checkpoint.bytes} bytes of step {checkpoint.step} with "
            f"{checkpoint.digest}"
        )
    return state


def write_manifest(root: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Write ``checkpoints/manifest.parquet``, sorted by step."""
    rows = [asdict(checkpoint) for checkpoint in sorted(checkpoints, key=lambda row: row.step)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    write_aside(root / MANIFEST, lambda temporary: pq.write_table(table, temporary))


def read_manifest(path: Path) -> Sequence[Checkpoint]:
    """Rows of the manifest, sorted by step. Raises RecordingError."""
    try:
        found = [name for name in MANIFEST_SCHEMA.names if name in pq.read_schema(path).names]
        schema = pa.schema([field for field in MANIFEST_SCHEMA if field.name in found or not field.nullable])
        table = pq.read_table(path, columns=schema.names).cast(schema)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RecordingError(f"{MANIFEST} cannot be read: {str(error)[:200]}") from None
    if not len(table):
        raise RecordingError(f"{MANIFEST} lists no checkpoint")
    return [Checkpoint(**row) for row in table.to_pylist()]
