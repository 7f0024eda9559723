"""Checkpoints: one safetensors file a recorded state, and the manifest that lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
import xxhash

from tracked_replay.errors import RecordingError
from tracked_replay.recording.files import PageCache, bits, content_digest, state_digest, write_aside, write_new
from tracked_replay.training.state import State

FOLDER = "checkpoints"
MANIFEST = f"{FOLDER}/manifest.parquet"

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("file_digest", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Checkpoint:
    """A row of the manifest.

    Attributes:
        step: steps taken before the state was saved.
        file: path inside the run's artifacts.
        digest: :func:`~tracked_replay.recording.files.state_digest` of the state.
        file_digest: xxh3-128 of the file's bytes.
        bytes: size of the file.
    """

    step: int
    file: str
    digest: str
    file_digest: str
    bytes: int


def checkpoint_file(step: int) -> str:
    """Where the state before a step is kept, inside the run's artifacts."""
    return f"{FOLDER}/step-{step:06d}.safetensors"


def write_checkpoint(root: Path, state: State, pages: PageCache | None = None) -> Checkpoint:
    """Save a state under ``root/checkpoints``; the same state always gives the same bytes.

    The file is not moved into place: it counts from when the manifest or the journal names it. Its bytes are those of
    ``safetensors.torch.save``, written from the tensors' own memory; the library first makes a copy of all of it.

    Args:
        root: the recording's folder.
        state: on any device.
        pages: lets go of the file where one is given.
    """
    file = checkpoint_file(state.step)
    content = {name: bits(tensor) for name, tensor in state.flat().items()}
    rows, order = _layout(tuple((name, tensor.dtype, tensor.shape) for name, tensor in state.flat().items()))
    # One metadata entry only: safetensors writes several in an order that changes from process to process.
    header = f'{{"__metadata__":{{"step":"{state.step}"}},{rows}'.encode()
    header += b" " * (-len(header) % 8)
    parts: list[bytes | memoryview] = [len(header).to_bytes(8, "little") + header, *(content[name] for name in order)]
    write_new(root / file, parts, None if pages is None else pages.let_go)
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    size = sum(len(part) for part in parts)
    return Checkpoint(state.step, file, state_digest(state, content), digest.hexdigest(), size)


@lru_cache(maxsize=2)  # before and after the first step, which makes the momentum
def _layout(shapes: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> tuple[str, list[str]]:
    """What safetensors itself says about tensors of such shapes in a file's header, and their order in the file.

    Returns:
        The header's JSON after the metadata's comma, and the tensors' names.
    """
    content = safetensors.torch.save({name: torch.empty(shape, dtype=dtype) for name, dtype, shape in shapes})
    rows = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return text.removeprefix("{"), sorted(rows, key=lambda name: rows[name]["data_offsets"])


def read_checkpoint(path: Path, checkpoint: Checkpoint) -> State:
    """Read a state back and check it against the manifest.

    Raises:
        RecordingError: the file's bytes are not those that were written.
    """
    content = path.read_bytes()
    if content_digest(content) != checkpoint.file_digest:
        raise RecordingError(
            f"{checkpoint.file} is damaged: its {len(content)} bytes have the digest {content_digest(content)}, "
            f"recorded were {checkpoint.bytes} bytes with {checkpoint.file_digest}"
        )
    try:
        return State.from_flat(checkpoint.step, safetensors.torch.load(content))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise RecordingError(f"{checkpoint.file} is no checkpoint: {str(error)[:200]}") from None


def write_manifest(root: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Write ``checkpoints/manifest.parquet``, sorted by step."""
    rows = [asdict(checkpoint) for checkpoint in sorted(checkpoints, key=lambda row: row.step)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    write_aside(root / MANIFEST, lambda temporary: pq.write_table(table, temporary))


def read_manifest(path: Path) -> Sequence[Checkpoint]:
    """Rows of the manifest, sorted by step. Raises RecordingError."""
    try:
        table = pq.read_table(path, columns=MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RecordingError(f"{MANIFEST} cannot be read: {str(error)[:200]}") from None
    if not len(table):
        raise RecordingError(f"{MANIFEST} lists no checkpoint")
    return [Checkpoint(**{name: row[name] for name in MANIFEST_SCHEMA.names}) for row in table.to_pylist()]
