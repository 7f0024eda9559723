"""The process's random generators: seed them, capture them, put them back, keep them in a file without pickle."""

import hashlib
import json
import logging
import os
import random
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from tracked_replay.determinism._seeds import _as_int, derive_component_seed
from tracked_replay.errors import ConfigError, RecordingError, ReplayError

_log = logging.getLogger(__name__)

_FORMAT = 2
_MT_WORDS = 624
_METADATA_KEY = "generator_states"


def _cuda_reachable() -> bool:
    # A process forked after its parent used CUDA sees the devices but may not touch them; asking for their
    # generators there raises, although nothing in that process can draw from them.
    return torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()


def _check_seed(seed: int) -> int:
    """Return ``seed`` as an int in ``[0, 2**63)``, which every generator takes; anything else raises ConfigError."""
    value = _as_int(seed, "seed")
    if not 0 <= value < 2**63:
        raise ConfigError(f"seed must be in [0, 2**63), found {value}")
    return value


def _seed_python_and_numpy(seed: int) -> None:
    random.seed(seed)
    # NumPy's legacy generator and Torch's CPU generator are the same Mersenne Twister with the same initialisation:
    # one seed for both makes them emit the same words, so that a crop drawn by NumPy follows noise drawn by Torch.
    np.random.seed(derive_component_seed(seed, "numpy"))


def _seed_all_generators(seed: int) -> None:
    _seed_python_and_numpy(seed)
    # torch.manual_seed would also seed MPS and XPU generators, which are not captured and could not be put back.
    torch.default_generator.manual_seed(seed)
    if _cuda_reachable():
        torch.cuda.manual_seed_all(seed)


@dataclass(frozen=True, eq=False)
class GeneratorStates:
    """The states of the process's global generators at one moment.

    Attributes:
        python_version: version number of Python's generator state (3).
        python_words: uint32 array of shape (625,): 624 words and the position.
        python_gauss_next: the normal deviate that `random.gauss` has in store, or None.
        numpy_words: uint32 array of shape (624,), the words of NumPy's legacy MT19937.
        numpy_position: position in ``numpy_words``, 0 to 624.
        numpy_has_gauss: 1 where ``numpy_cached_gaussian`` is still to be given out, else 0.
        numpy_cached_gaussian: the normal deviate that NumPy has in store.
        torch_cpu: uint8 array of shape (bytes,).
        torch_cuda: one uint8 array of shape (bytes,) a CUDA device, in device order; empty without CUDA.
    """

    python_version: int
    python_words: np.ndarray
    python_gauss_next: float | None
    numpy_words: np.ndarray
    numpy_position: int
    numpy_has_gauss: int
    numpy_cached_gaussian: float
    torch_cpu: np.ndarray
    torch_cuda: tuple[np.ndarray, ...] = ()


@lru_cache(maxsize=1)
def _array(words: tuple[int, ...]) -> np.ndarray:
    """The same array for equal words, which is the case where nothing draws from Python's generator."""
    array = np.array(words, dtype=np.uint32)
    array.flags.writeable = False
    return array


def capture_generator_states() -> GeneratorStates:
    """Capture the states of Python's, NumPy's legacy global, Torch's CPU and all CUDA generators.

    Where CUDA is available this initialises it.

    Returns:
        Copies: drawing further numbers does not change them.

    Raises:
        ReplayError: NumPy's global generator was replaced by one that is not MT19937.
    """
    version, words, gauss_next = random.getstate()
    legacy = np.random.get_state(legacy=False)
    if not isinstance(legacy, dict) or legacy["bit_generator"] != "MT19937":
        found = legacy["bit_generator"] if isinstance(legacy, dict) else type(legacy).__name__
        raise ReplayError(f"NumPy's global generator must be MT19937 to be recorded, found {found}")
    cuda = torch.cuda.get_rng_state_all() if _cuda_reachable() else []
    return GeneratorStates(
        python_version=version,
        python_words=_array(words),
        python_gauss_next=gauss_next,
        numpy_words=np.array(legacy["state"]["key"], dtype=np.uint32),
        numpy_position=int(legacy["state"]["pos"]),
        numpy_has_gauss=int(legacy["has_gauss"]),
        numpy_cached_gaussian=float(legacy["gauss"]),
        torch_cpu=torch.get_rng_state().numpy().copy(),
        torch_cuda=tuple(state.cpu().numpy().copy() for state in cuda),
    )


def restore_generator_states(states: GeneratorStates) -> None:
    """Put the process's global generators back to captured states.

    States without CUDA states leave CUDA generators alone: the run that they come from used none.

    Args:
        states: what `capture_generator_states` or `load_generator_states` returned.

    Raises:
        ReplayError: the states hold CUDA states of another number of devices than this process has. Nothing is
            restored then.
    """
    if states.torch_cuda:
        devices = torch.cuda.device_count() if _cuda_reachable() else 0
        if len(states.torch_cuda) != devices:
            raise ReplayError(
                f"the generator states are of {len(states.torch_cuda)} CUDA device(s), but this process has {devices}: "
                "restore them where the number of visible devices is the same"
            )
    random.setstate((states.python_version, tuple(states.python_words.tolist()), states.python_gauss_next))
    np.random.set_state(
        (
            "MT19937",
            states.numpy_words,
            states.numpy_position,
            states.numpy_has_gauss,
            states.numpy_cached_gaussian,
        )
    )
    # from_numpy warns about arrays that cannot be written to, which the caller's may be, so the bytes are copied.
    torch.set_rng_state(torch.from_numpy(states.torch_cpu.copy()))
    if states.torch_cuda:
        torch.cuda.set_rng_state_all([torch.from_numpy(state.copy()) for state in states.torch_cuda])


@contextmanager
def deterministic_context(seed: int, name: str = "operation") -> Iterator[None]:
    """Run a block on freshly seeded generators and put all of them back afterwards, also after an exception.

    Inside, Python's, Torch's CPU and all CUDA generators are seeded with ``seed``, and NumPy's with
    ``derive_component_seed(seed, "numpy")``, because NumPy and Torch would emit the same words from the same seed.
    Contexts may be nested.

    Args:
        seed: in ``[0, 2**63)``.
        name: what the block does, for the log.

    Raises:
        ConfigError: ``seed`` is no integer or out of range.
    """
    value = _check_seed(seed)
    outer = capture_generator_states()
    _log.debug("%s runs on seed %d", name, value)
    try:
        _seed_all_generators(value)
        yield
    finally:
        restore_generator_states(outer)


def _arrays_of(states: GeneratorStates) -> dict[str, np.ndarray]:
    arrays = {
        "numpy_words": states.numpy_words,
        "python_words": states.python_words,
        "torch_cpu": states.torch_cpu,
    }
    arrays.update({f"torch_cuda.{device}": state for device, state in enumerate(states.torch_cuda)})
    return arrays


def _scalars_of(states: GeneratorStates) -> dict[str, Any]:
    gauss = states.python_gauss_next
    return {
        "numpy_cached_gaussian": states.numpy_cached_gaussian.hex(),
        "numpy_has_gauss": states.numpy_has_gauss,
        "numpy_position": states.numpy_position,
        "python_gauss_next": None if gauss is None else gauss.hex(),
        "python_version": states.python_version,
    }


def _digest(step: int, arrays: dict[str, np.ndarray], scalars: dict[str, Any]) -> str:
    """SHA-256 over the step, names, types, shapes and bytes of the arrays, and over the scalars."""
    sha = hashlib.sha256(json.dumps({"step": step, **scalars}, sort_keys=True).encode("utf-8"))
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def save_generator_states(states: Mapping[int, GeneratorStates], path: str | os.PathLike[str]) -> dict[int, str]:
    """Write generator states of several moments as a safetensors file, the same bytes for the same states.

    The tensors are ``python_words``, ``numpy_words``, ``torch_cpu`` and ``torch_cuda.{device}``, one row a moment in
    the order of the steps. The metadata have one key, ``generator_states``: JSON with the format number and ``rows``,
    each with its ``step``, the scalars (floats as `float.hex` strings, which are exact) and ``digest``, a SHA-256 over
    the row. The file is written beside its place and moved there.

    Args:
        states: by step; all with tensors of the same shapes.
        path: the file; its folder must exist.

    Returns:
        The digests by step.

    Raises:
        ValueError: there are none, or their shapes differ.
        OSError: the file cannot be written.
    """
    steps = sorted(states)
    arrays = [_arrays_of(states[step]) for step in steps]
    stacked = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]} if steps else {}
    if not steps or any(row.keys() != stacked.keys() for row in arrays):
        raise ValueError("generator states of a file must be of the same generators, and at least one")
    rows: list[dict[str, Any]] = []
    for step, row in zip(steps, arrays, strict=True):
        scalars = _scalars_of(states[step])
        rows.append({"step": step, "digest": _digest(step, row, scalars), "scalars": scalars})
    # One key only: safetensors writes several metadata keys in an order that changes from process to process.
    description = json.dumps({"format": _FORMAT, "rows": rows}, sort_keys=True)
    target = Path(path)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with aside.open("xb") as file:
            file.write(safetensors.numpy.save(stacked, {_METADATA_KEY: description}))
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return {row["step"]: row["digest"] for row in rows}


def load_generator_states(path: str | os.PathLike[str]) -> dict[int, GeneratorStates]:
    """Read generator states that `save_generator_states` wrote.

    Args:
        path: the file.

    Returns:
        The states by step, bit for bit as they were saved.

    Raises:
        RecordingError: the file is missing, is no safetensors file, lacks a key or does not match its digests; the
            message names the path.
    """
    with _reading(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
        return _states_of(arrays, _rows_of(file))


def generator_state_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the rows of a file of generator states. Raises RecordingError where it is none."""
    with _reading(path) as file:
        return [int(row["step"]) for row in _rows_of(file)]


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file that is open; what goes wrong with it is said as a RecordingError that names it."""
    target = Path(path)
    try:
        with safetensors.safe_open(target, framework="np") as file:
            yield file
    except KeyError as error:
        raise RecordingError(f"{target}: the generator states lack the key {error}") from error
    except (OSError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise RecordingError(f"{target}: cannot be read as generator states: {error}") from error


def _rows_of(file: Any) -> list[dict[str, Any]]:
    description = json.loads((file.metadata() or {})[_METADATA_KEY])
    if not isinstance(description, dict):
        raise ValueError("the metadata is no JSON object")
    if description["format"] != _FORMAT:
        raise ValueError(f"format {description['format']!r} is not known, only {_FORMAT}")
    rows = description["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("the rows are no list of JSON objects")
    return rows


def _states_of(arrays: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> dict[int, GeneratorStates]:
    """Assemble the states of a file; raises KeyError, ValueError or TypeError on anything that is not as written."""
    _check_array(arrays, "python_words", np.uint32, len(rows), _MT_WORDS + 1)
    _check_array(arrays, "numpy_words", np.uint32, len(rows), _MT_WORDS)
    _check_array(arrays, "torch_cpu", np.uint8, len(rows))
    devices = len(arrays) - 3
    for device in range(devices):
        _check_array(arrays, f"torch_cuda.{device}", np.uint8, len(rows))
    found = {}
    for place, row in enumerate(rows):
        step, scalars = int(row["step"]), row["scalars"]
        if not isinstance(scalars, dict):
            raise ValueError("the scalars are no JSON object")
        if _digest(step, {name: array[place] for name, array in arrays.items()}, scalars) != row["digest"]:
            raise ValueError("the content does not match its digest")
        gauss = scalars["python_gauss_next"]
        found[step] = GeneratorStates(
            python_version=int(scalars["python_version"]),
            python_words=arrays["python_words"][place],
            python_gauss_next=None if gauss is None else float.fromhex(gauss),
            numpy_words=arrays["numpy_words"][place],
            numpy_position=int(scalars["numpy_position"]),
            numpy_has_gauss=int(scalars["numpy_has_gauss"]),
            numpy_cached_gaussian=float.fromhex(scalars["numpy_cached_gaussian"]),
            torch_cpu=arrays["torch_cpu"][place],
            torch_cuda=tuple(arrays[f"torch_cuda.{device}"][place] for device in range(devices)),
        )
    return found


def _check_array(
    arrays: dict[str, np.ndarray], name: str, dtype: type[np.generic], rows: int, size: int | None = None
) -> None:
    array = arrays[name]
    if array.dtype != dtype or array.ndim != 2 or len(array) != rows or (size is not None and array.shape[1] != size):
        raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}")
