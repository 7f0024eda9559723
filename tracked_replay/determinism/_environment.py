"""What a run was computed with: packages, processor, accelerators, threads and flags."""

import importlib.metadata
import os
import platform
import re
import sys
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tracked_replay.determinism._generators import _cuda_reachable
from tracked_replay.determinism._process import deterministic_flags

_UNKNOWN = "unknown on this platform"

_DEPENDENCIES = (
    "click",
    "filelock",
    "jinja2",
    "matplotlib",
    "mlflow",
    "numpy",
    "pillow",
    "psutil",
    "pyarrow",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tomli-w",
    "torch",
    "torchvision",
    "tqdm",
    "xxhash",
)

# Other variables may hold passwords and tokens, and none of them changes a result.
_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS")
_VARIABLE_PREFIXES = ("KMP_", "MKL_", "PYTORCH_", "TORCH_")
_SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")


def environment_record() -> dict[str, Any]:
    """Describe everything outside the config that can change a result's bits.

    What a platform does not tell is recorded as ``"unknown on this platform"``. Where CUDA is available this
    initialises it.

    Returns:
        A dict that JSON can hold, with the keys ``packages`` (``project``: name to version, None where not
        installed; ``installed``: every distribution, sorted by name), ``python``, ``platform``, ``torch``, ``blas``,
        ``cpu`` (memory in bytes), ``threads``, ``cuda`` (memory in bytes), ``determinism`` (see
        `deterministic_flags`) and ``variables`` (of OMP_NUM_THREADS, CUBLAS_WORKSPACE_CONFIG, KMP_*, MKL_*, PYTORCH_*
        and TORCH_* those that are set).
    """
    return {
        "packages": _packages(),
        "python": {
            "version": sys.version,
            "implementation": platform.python_implementation(),
            "compiler": platform.python_compiler(),
        },
        "platform": {
            "description": platform.platform(),
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()).strip() or _UNKNOWN,
            "byte_order": sys.byteorder,
        },
        "torch": {
            "version": torch.__version__,
            "build": torch.__config__.show(),
            "parallel": torch.__config__.parallel_info(),
        },
        "blas": _blas(),
        "cpu": _cpu(),
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "cuda": _cuda(),
        "determinism": deterministic_flags(),
        "variables": _variables(),
    }


def _packages() -> dict[str, dict[str, Any]]:
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # The headers only: the package's whole description stands below them.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        headers = HeaderParser().parsestr(text.partition("\n\n")[0])
        # Of two with one name the first on the path is the one that is imported; a broken one has no name.
        if headers["Name"]:
            installed.setdefault(headers["Name"], headers["Version"] or "")
    by_plain_name = {_plain(name): version for name, version in reversed(installed.items())}
    return {
        "project": {name: by_plain_name.get(_plain(name)) for name in _DEPENDENCIES},
        "installed": dict(sorted(installed.items(), key=lambda item: (item[0].lower(), item[0]))),
    }


def _plain(name: str) -> str:
    """A distribution's name as names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _blas() -> dict[str, Any]:
    build = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    numpy_config: Any = np.show_config(mode="dicts")
    numpy_blas = numpy_config.get("Build Dependencies", {}).get("blas", {})
    return {
        "torch": build.group(1) if build else "unknown to this build of Torch",
        "torch_mkl": torch.backends.mkl.is_available(),
        "torch_mkldnn": torch.backends.mkldnn.is_available(),
        "numpy": {name: numpy_blas.get(name) for name in ("name", "version", "openblas configuration")},
    }


def _cpu() -> dict[str, Any]:
    fields = _cpuinfo()
    return {
        # ARM kernels write "Features" instead of "flags", and often no model name.
        "model": fields.get("model name") or platform.processor() or _UNKNOWN,
        "flags": sorted((fields.get("flags") or fields.get("Features") or "").split()) or _UNKNOWN,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": psutil.cpu_count(logical=True),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _UNKNOWN,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in ``/proc/cpuinfo``; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _cuda() -> dict[str, Any]:
    return {
        "available": torch.cuda.is_available(),
        "build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": _nvidia_driver(),
        "devices": _cuda_devices(),
    }


def _cuda_devices() -> list[dict[str, Any]]:
    if not _cuda_reachable():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _nvidia_driver() -> str | None:
    """Version of the NVIDIA kernel driver, None without one."""
    if platform.system() != "Linux":
        return _UNKNOWN
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    version = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return version.group(1) if version else text.splitlines()[0]


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES))
        and not any(part in name.upper() for part in _SECRET_PARTS)
    }
