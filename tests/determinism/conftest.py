"""Every test here may change the process; each leaves it as it was."""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


def _holders() -> list[Any]:
    """The holders of a float32 precision, parents before children."""
    b: Any = torch.backends
    return [
        b,
        b.cuda.matmul,
        b.cudnn,
        b.cudnn.conv,
        b.cudnn.rnn,
        b.mkldnn,
        b.mkldnn.matmul,
        b.mkldnn.conv,
        b.mkldnn.rnn,
    ]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    # Written with the libraries' own calls: the package's are what is tested.
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    precisions = [holder.fp32_precision for holder in _holders()]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    # The older switches reset the newer ones, so they come first.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = precisions[3] == "tf32"
    for holder, precision in zip(_holders(), precisions, strict=True):
        holder.fp32_precision = precision
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    else:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
