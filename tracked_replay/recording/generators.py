"""Generator states of a recording: files of many of them, and lines of text where each builds on the one before."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tracked_replay.determinism import GeneratorStates, save_generator_states

FOLDER = "rng"
ROWS_PER_FILE = 1000

_WORDS = ("python_words", "numpy_words")  # uint32
_BYTES = "torch_cpu"
_LISTS = "torch_cuda"
_FLOATS = ("python_gauss_next", "numpy_cached_gaussian")
_INTEGERS = ("python_version", "numpy_position", "numpy_has_gauss")


@dataclass
class GeneratorsWriter:
    """Collects generator states and writes ``rng/part-00000.safetensors``, … under ``root``, many to a file.

    Attributes:
        root: the recording's folder.
        digests: of what was written, by step.
    """

    root: Path
    digests: dict[int, str] = field(default_factory=dict)
    _held: dict[int, GeneratorStates] = field(default_factory=dict)
    _parts: int = 0

    def add(self, step: int, states: GeneratorStates) -> None:
        """Add the states before a step; the steps come in their order."""
        self._held[step] = states
        if len(self._held) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the states held so far, if any."""
        if not self._held:
            return
        path = self.root / FOLDER / f"part-{self._parts:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.digests |= save_generator_states(self._held, path)
        self._held, self._parts = {}, self._parts + 1


def changes(states: GeneratorStates, before: GeneratorStates | None) -> dict[str, Any]:
    """What differs from the states before, as JSON can hold it; most of it never changes in a training."""
    return {
        name: _plain(value)
        for name, value in vars(states).items()
        if before is None or not _same(value, getattr(before, name))
    }


def changed(before: GeneratorStates | None, found: dict[str, Any]) -> GeneratorStates:
    """The reverse of :func:`changes`. Raises KeyError, TypeError or ValueError on anything else."""
    values: dict[str, Any] = {} if before is None else dict(vars(before))
    for name, value in found.items():
        if name in _WORDS:
            values[name] = np.frombuffer(_bytes(value), dtype="<u4").astype(np.uint32)
        elif name == _BYTES:
            values[name] = np.frombuffer(_bytes(value), dtype=np.uint8)
        elif name == _LISTS:
            values[name] = tuple(np.frombuffer(_bytes(one), dtype=np.uint8) for one in value)
        elif name in _FLOATS:
            values[name] = None if value is None and name == _FLOATS[0] else float.fromhex(value)
        elif name in _INTEGERS:
            values[name] = int(value)
        else:
            raise KeyError(name)
    return GeneratorStates(**values)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value is other or np.array_equal(value, other)
    return bool(_plain(value) == _plain(other))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()).decode()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.hex() if isinstance(value, float) else value


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
