"""A self-test: does this machine give the same bits when the same small training is computed again?"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tracked_replay.determinism._generators import _cuda_reachable, deterministic_context
from tracked_replay.determinism._process import _flags_put_back, set_global_deterministic_state
from tracked_replay.determinism._seeds import _as_int
from tracked_replay.errors import ConfigError, TrackedReplayError

_SEED = 20240229
_BATCH = 64
_STEPS = 3

# From the name of everything that an iteration drew or computed, in that order, to the SHA-256 of its bytes.
_Results = dict[str, str]

_FRESH_PROCESS = """
import json
from tracked_replay.determinism._self_test import _iteration
print(json.dumps(_iteration({devices}, {threads})))
"""


@dataclass(frozen=True)
class SelfTest:
    """What `verify_reproducibility` found; true where everything was identical.

    Attributes:
        identical: whether all iterations and the fresh process agree bit for bit.
        iterations: how often it was computed in this process.
        digests: one SHA-256 an iteration, over all that it drew and computed.
        fresh_process_digest: the same of a process that was started for it.
        differing_iteration: number of the first iteration that differs from iteration 0; None where none does.
        difference: where and what differed first, for example ``"iteration 3: cpu, step 0: gradient of 0.weight"`` or
            ``"fresh process: cpu, step 0: outputs"``; None where nothing did.
        devices: what it was computed on.
        threads: number of threads within one operation.
        seconds: time it took.
    """

    identical: bool
    iterations: int
    digests: tuple[str, ...]
    fresh_process_digest: str
    differing_iteration: int | None
    difference: str | None
    devices: tuple[str, ...]
    threads: int
    seconds: float

    def __bool__(self) -> bool:
        return self.identical


def verify_reproducibility(iterations: int = 10, threads: int | None = None) -> SelfTest:
    """Compute the same small training again and again, also in a fresh process, and compare every bit.

    It is computed under the flags of a training, see `set_global_deterministic_state`: draws of Python's, NumPy's and
    Torch's generators, then steps of SGD through convolutions, BatchNorm, a linear layer and cross-entropy, in float32
    on the CPU and, where there is one, on the current CUDA device. The fresh process shows what depends on addresses,
    on hashing or on what ran before. Flags and generators are afterwards as they were before.

    Identical results are no proof for another model: they say that nothing basic is wrong on this machine.

    Args:
        iterations: how often in this process, at least 2.
        threads: number of threads within one operation; None leaves the number as it is.

    Returns:
        What was found; usable as a truth value: ``assert verify_reproducibility(10)``.

    Raises:
        ConfigError: ``iterations`` is less than 2 or no integer, or see `set_global_deterministic_state`.
        TrackedReplayError: the fresh process failed.
    """
    count = _as_int(iterations, "iterations")
    if count < 2:
        raise ConfigError(f"iterations: found {count}; allowed: integer >= 2")
    started = time.perf_counter()
    devices = ("cpu", "cuda") if _cuda_reachable() else ("cpu",)
    with _flags_put_back(), deterministic_context(_SEED, "self-test"):
        results = [_iteration(devices, threads) for _ in range(count)]
        used_threads = torch.get_num_threads()
        fresh = _in_fresh_process(devices, used_threads)
    differing = next((number for number, found in enumerate(results) if found != results[0]), None)
    difference = None
    if differing is not None:
        difference = f"iteration {differing}: {_first_difference(results[0], results[differing])}"
    elif fresh != results[0]:
        difference = f"fresh process: {_first_difference(results[0], fresh)}"
    return SelfTest(
        identical=difference is None,
        iterations=count,
        digests=tuple(map(_summary, results)),
        fresh_process_digest=_summary(fresh),
        differing_iteration=differing,
        difference=difference,
        devices=devices,
        threads=used_threads,
        seconds=time.perf_counter() - started,
    )


def _iteration(devices: Sequence[str], threads: int | None) -> _Results:
    """Seed and pin this process as a training does, then compute once, on each device."""
    results: _Results = {}
    for device in devices:
        set_global_deterministic_state(_SEED, threads)
        results |= {f"{device}, {name}": digest for name, digest in _small_training(device).items()}
    return results


def _small_training(device: str) -> _Results:
    order = random.sample(range(_BATCH), _BATCH)
    noise = np.random.standard_normal((_BATCH, 3, 16, 16)).astype(np.float32)
    inputs = torch.from_numpy(noise)[order].to(device) + torch.randn(_BATCH, 3, 16, 16, device=device)
    labels = torch.randint(10, (_BATCH,), device=device)
    results = {
        "draws of Python's generator": _sha256(torch.tensor(order)),
        "draws of NumPy's generator": _sha256(torch.from_numpy(noise)),
        "draws of Torch's generator": _sha256(inputs, labels),
    }
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(_STEPS):
        outputs = model(inputs)
        loss = cross_entropy(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        results |= {f"step {step}: outputs": _sha256(outputs), f"step {step}: loss": _sha256(loss)}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            results[f"step {step}: gradient of {name}"] = _sha256(parameter.grad)
        optimizer.step()
        results |= {f"step {step}: {name} after it": _sha256(tensor) for name, tensor in model.state_dict().items()}
    return results


def _in_fresh_process(devices: Sequence[str], threads: int) -> _Results:
    # Not multiprocessing: its "spawn" imports the caller's script again, which may have no guard for that, and its
    # "fork" would inherit what is to be fresh. -P and PYTHONPATH: the same modules are found as here.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(  # noqa: S603 - this interpreter, with a program of this module
        [sys.executable, "-P", "-c", _FRESH_PROCESS.format(devices=devices, threads=threads)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrackedReplayError(f"the self-test's fresh process ended with code {done.returncode}: {why}")
    found: _Results = json.loads(done.stdout.splitlines()[-1])
    return found


def _first_difference(expected: _Results, found: _Results) -> str:
    return next(name for name in {**expected, **found} if expected.get(name) != found.get(name))


def _sha256(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _summary(results: _Results) -> str:
    return hashlib.sha256(json.dumps(results).encode()).hexdigest()
