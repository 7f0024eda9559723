"""Process-wide flags that make Torch deterministic, and the check that they are in force."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from tracked_replay.determinism._generators import _check_seed, _seed_python_and_numpy
from tracked_replay.determinism._seeds import _as_int
from tracked_replay.errors import ConfigError, ReplayError

_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# The two settings with which cuBLAS is deterministic on several streams.
_CUBLAS_ALLOWED = (":4096:8", ":16:8")

Reproducibility = Literal["full", "kernels", "seeds"]

# The mode that this process was last put into; None where it was put into none.
_mode: Reproducibility | None = None

# Torch gives these modules their attributes at run time, where a type checker does not see them.
_backends: Any = torch.backends
_deterministic: Any = torch.utils.deterministic


def _fp32_holders() -> dict[str, Any]:
    """The places that hold a float32 precision, parents before children: setting a parent may reset its children."""
    return {
        "fp32_precision": _backends,
        "cuda.matmul.fp32_precision": _backends.cuda.matmul,
        "cudnn.fp32_precision": _backends.cudnn,
        "cudnn.conv.fp32_precision": _backends.cudnn.conv,
        "cudnn.rnn.fp32_precision": _backends.cudnn.rnn,
        "mkldnn.fp32_precision": _backends.mkldnn,
        "mkldnn.matmul.fp32_precision": _backends.mkldnn.matmul,
        "mkldnn.conv.fp32_precision": _backends.mkldnn.conv,
        "mkldnn.rnn.fp32_precision": _backends.mkldnn.rnn,
    }


def _forbid_reduced_precision() -> None:
    # Torch keeps the older switches beside fp32_precision and refuses to answer (torch.backends.cudnn.flags, for
    # one) where the two disagree. Setting an older switch resets the newer ones, so the older come first.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for holder in _fp32_holders().values():
        holder.fp32_precision = "ieee"


def _require_cublas_workspace() -> None:
    found = os.environ.setdefault(_CUBLAS_VARIABLE, _CUBLAS_ALLOWED[0])
    if found not in _CUBLAS_ALLOWED:
        raise ConfigError(
            f"{_CUBLAS_VARIABLE} is {found!r}, with which cuBLAS is not deterministic: "
            f"unset it or set it to one of {', '.join(_CUBLAS_ALLOWED)}"
        )


def _pin_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    found = torch.get_num_threads()
    if found != threads:
        raise ConfigError(f"Torch was set to {threads} thread(s) but reports {found}")


def set_global_deterministic_state(
    master_seed: int, threads: int | None = None, mode: Reproducibility = "full"
) -> None:
    """Seed every generator of this process and make its results repeatable as far as the mode says.

    In every mode Python's, Torch's and all CUDA generators are seeded with ``master_seed``, and NumPy's with
    ``derive_component_seed(master_seed, "numpy")``, because NumPy and Torch would emit the same words from the same
    seed. In every mode cuDNN does not choose kernels by timing them, and float32 products are computed in float32, no
    TF32 and no bfloat16: that is a matter of being right, not of being repeatable.

    - ``"full"``: an operation that has no deterministic algorithm raises instead of warning, cuDNN is deterministic,
      and the number of threads is pinned.
    - ``"kernels"``: the same, but the number of threads stays as it is.
    - ``"seeds"``: Torch and cuDNN may use algorithms that are not deterministic, also where an earlier call forbade
      them, and the number of threads stays as it is.

    Call it before the process first uses CUDA: cuBLAS reads ``CUBLAS_WORKSPACE_CONFIG`` when it starts. The mode
    ``"seeds"`` leaves that variable alone.

    Args:
        master_seed: the run's seed, in ``[0, 2**63)``.
        threads: number of threads within one operation, for the mode ``"full"``; the others only check it. The same
            step differs bitwise between thread counts. None leaves the number as it is.
        mode: ``"full"``, ``"kernels"`` or ``"seeds"``.

    Raises:
        ConfigError: ``master_seed``, ``threads`` or ``mode`` is out of range, ``CUBLAS_WORKSPACE_CONFIG`` has a value
            with which cuBLAS is not deterministic, or Torch did not take the number of threads.
    """
    global _mode
    seed = _check_seed(master_seed)
    if threads is not None and _as_int(threads, "threads") < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}")
    if mode not in get_args(Reproducibility):
        raise ConfigError(f"mode: found {mode!r}; allowed: {', '.join(get_args(Reproducibility))}")
    strict = mode != "seeds"
    if strict:
        _require_cublas_workspace()
    if threads is not None and mode == "full":
        _pin_threads(threads)
    torch.use_deterministic_algorithms(strict, warn_only=False)
    # With this flag Torch writes NaN into every tensor that an operation allocates before it overwrites it: about 4 %
    # of a convolutional training step. It changes results only where memory is read that nothing wrote, which Torch's
    # own operations do not do. Models, where a forgotten initialisation is likely, are created with the flag on.
    _deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = strict
    torch.backends.cudnn.benchmark = False
    _forbid_reduced_precision()
    _seed_python_and_numpy(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    _mode = mode


@contextmanager
def _flags_put_back() -> Iterator[None]:
    """Run a block and put back what `set_global_deterministic_state` sets in it, but for the generators."""
    global _mode
    before = deterministic_flags()
    mode, threads = _mode, torch.get_num_threads()
    cudnn_tf32 = _cudnn_tf32()
    try:
        yield
    finally:
        _mode = mode
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(
            bool(before["deterministic_algorithms"]), warn_only=bool(before["deterministic_algorithms_warn_only"])
        )
        _deterministic.fill_uninitialized_memory = before["fill_uninitialized_memory"]
        torch.backends.cudnn.deterministic = bool(before["cudnn.deterministic"])
        torch.backends.cudnn.benchmark = bool(before["cudnn.benchmark"])
        _put_back_precision(before, cudnn_tf32)
        workspace = before[_CUBLAS_VARIABLE]
        if workspace is None:
            os.environ.pop(_CUBLAS_VARIABLE, None)
        else:
            os.environ[_CUBLAS_VARIABLE] = str(workspace)


def _cudnn_tf32() -> bool | None:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the older switch and the newer ones disagree
        return None


def _put_back_precision(before: dict[str, object], cudnn_tf32: bool | None) -> None:
    # As in _forbid_reduced_precision the older switches come first. One that could not be read keeps what it has now:
    # where the two disagree it is the newer ones that Torch computes by.
    if before["float32_matmul_precision"] != "mixed":
        torch.set_float32_matmul_precision(str(before["float32_matmul_precision"]))
    if cudnn_tf32 is not None:
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
    for name, holder in _fp32_holders().items():
        holder.fp32_precision = before[name]


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Torch raises where older and newer switches disagree; the newer ones are listed one by one beside this.
        return "mixed"


def deterministic_flags() -> dict[str, object]:
    """Return every setting of this process that decides whether Torch's results can be repeated.

    Returns:
        A dict that JSON can hold: ``mode`` (what `set_global_deterministic_state` was last called with, None where it
        was not; the others say what holds now), ``deterministic_algorithms``, ``deterministic_algorithms_warn_only``,
        ``fill_uninitialized_memory``, ``cudnn.deterministic``, ``cudnn.benchmark``, ``float32_matmul_precision``,
        ``[cuda|cudnn|mkldnn].*fp32_precision``, ``CUBLAS_WORKSPACE_CONFIG`` (None where not set), ``threads``,
        ``interop_threads``.
    """
    flags: dict[str, object] = {
        "mode": _mode,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_algorithms_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": bool(_deterministic.fill_uninitialized_memory),
        "cudnn.deterministic": bool(torch.backends.cudnn.deterministic),
        "cudnn.benchmark": bool(torch.backends.cudnn.benchmark),
        "float32_matmul_precision": _matmul_precision(),
    }
    for name, holder in _fp32_holders().items():
        flags[name] = str(holder.fp32_precision)
    flags[_CUBLAS_VARIABLE] = os.environ.get(_CUBLAS_VARIABLE)
    flags["threads"] = torch.get_num_threads()
    flags["interop_threads"] = torch.get_num_interop_threads()
    return flags


def require_deterministic(threads: int) -> None:
    """Check that this process is as `set_global_deterministic_state` leaves it in mode ``"full"``.

    Libraries that start worker processes each set the number of threads in their own way, and user code can switch
    any flag back. What is checked is what holds now, whatever mode was asked for.

    Args:
        threads: the number of threads within one operation that the run was recorded with.

    Raises:
        ReplayError: a flag is not as expected; the message names the first, with what was found and expected.
    """
    expected: dict[str, tuple[object, ...]] = {
        "deterministic_algorithms": (True,),
        "deterministic_algorithms_warn_only": (False,),
        "cudnn.deterministic": (True,),
        "cudnn.benchmark": (False,),
        # Before their sum, which only says that they disagree.
        **{name: ("ieee",) for name in _fp32_holders()},
        "float32_matmul_precision": ("highest",),
        _CUBLAS_VARIABLE: _CUBLAS_ALLOWED,
        "threads": (threads,),
    }
    found = deterministic_flags()
    for name, allowed in expected.items():
        if found[name] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ReplayError(f"this process is not deterministic: {name} is {found[name]!r}, expected {wanted}")
