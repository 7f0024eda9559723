"""The self-test: true on a machine that repeats its bits, and telling where they differ first."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tracked_replay.determinism import (
    _self_test,
    deterministic_flags,
    set_global_deterministic_state,
    verify_reproducibility,
)
from tracked_replay.errors import ConfigError, TrackedReplayError


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test the start of a process."""
    monkeypatch.setattr(_self_test, "_in_fresh_process", lambda devices, threads: _self_test._iteration(devices, 1))


def test_this_machine_repeats_its_bits_wherever_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('not the torch of this process')")
    monkeypatch.chdir(tmp_path)
    found = verify_reproducibility(2, threads=1)
    assert found
    assert (found.identical, found.iterations, found.threads) == (True, 2, 1)
    assert {*found.digests, found.fresh_process_digest} == {found.digests[0]}
    assert (found.differing_iteration, found.difference) == (None, None)
    assert found.devices[0] == "cpu"
    assert found.seconds > 0


@pytest.mark.usefixtures("no_process")
def test_one_bit_in_one_iteration_is_found_and_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def drifting(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = cross_entropy(outputs, labels)
        if calls != 2 * len(devices) * _self_test._STEPS + 2:  # the second step of iteration 2
            return loss
        return loss + (torch.nextafter(loss.detach(), torch.full_like(loss, 9.0)) - loss.detach())

    devices = verify_reproducibility(2, threads=1).devices
    monkeypatch.setattr(_self_test, "cross_entropy", drifting)
    found = verify_reproducibility(4, threads=1)
    assert not found
    assert found.differing_iteration == 2
    assert found.difference == "iteration 2: cpu, step 1: loss"
    assert found.digests[0] == found.digests[1] == found.digests[3] == found.fresh_process_digest
    assert found.digests[2] != found.digests[0]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("drawer", "name", "what"),
    [
        (random, "sample", "draws of Python's generator"),
        (np.random, "standard_normal", "draws of NumPy's generator"),
        (torch, "randn", "draws of Torch's generator"),
    ],
)
def test_a_generator_that_is_not_repeated_is_named(
    drawer: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(drawer, name), []

    def drifting(*arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            real(*arguments, **more)
        return real(*arguments, **more)

    monkeypatch.setattr(_self_test, "_cuda_reachable", lambda: False)
    monkeypatch.setattr(drawer, name, drifting)
    assert verify_reproducibility(3, threads=1).difference == f"iteration 1: cpu, {what}"


def test_a_difference_that_only_a_fresh_process_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    change = """
import tracked_replay.determinism._self_test as here
real = here.cross_entropy
here.cross_entropy = lambda outputs, labels: real(outputs, labels) * 1.001
"""
    monkeypatch.setattr(_self_test, "_FRESH_PROCESS", change + _self_test._FRESH_PROCESS)
    found = verify_reproducibility(2, threads=1)
    assert not found.identical
    assert found.differing_iteration is None
    assert found.difference == "fresh process: cpu, step 0: loss"
    assert found.digests[0] == found.digests[1] != found.fresh_process_digest


def test_a_fresh_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_self_test, "_FRESH_PROCESS", "raise MemoryError('none left')")
    with pytest.raises(TrackedReplayError, match="fresh process ended with code 1: MemoryError: none left"):
        verify_reproducibility(2, threads=1)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high", "mixed"])
def test_flags_and_generators_are_afterwards_as_before(
    fails: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_global_deterministic_state(0, mode="seeds")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    torch.backends.cudnn.allow_tf32 = True
    if precision == "mixed":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    flags = deterministic_flags()
    if fails:
        monkeypatch.setattr(_self_test, "_small_training", lambda device: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            verify_reproducibility(2, threads=1)
    else:
        assert verify_reproducibility(2, threads=1).threads == 1
    assert deterministic_flags() == flags
    assert torch.backends.cudnn.allow_tf32 is True
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    drawn = (random.random(), np.random.random(), float(torch.rand(1)))  # noqa: S311
    expected = torch.Generator().manual_seed(7)
    assert drawn == (
        random.Random(5).random(),  # noqa: S311
        np.random.RandomState(6).random_sample(),
        float(torch.rand(1, generator=expected)),
    )


@pytest.mark.usefixtures("no_process")
def test_without_a_number_of_threads_it_stays() -> None:
    torch.set_num_threads(2)
    assert verify_reproducibility(2).threads == 2


@pytest.mark.parametrize("iterations", [1, 0, -3, 2.5, "ten", True, None])
def test_iterations_that_compare_nothing_are_refused(iterations: Any) -> None:
    with pytest.raises(ConfigError, match=r"iterations.*found"):
        verify_reproducibility(iterations)


def test_threads_that_are_none_are_refused_and_nothing_is_changed() -> None:
    flags = deterministic_flags()
    with pytest.raises(ConfigError, match="threads"):
        verify_reproducibility(2, threads=0)
    assert deterministic_flags() == flags
