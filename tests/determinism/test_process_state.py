import json
import os
import random

import numpy as np
import pytest
import torch

from tracked_replay.determinism import (
    derive_component_seed,
    deterministic_flags,
    require_deterministic,
    set_global_deterministic_state,
)
from tracked_replay.errors import ConfigError, ReplayError


def test_every_generator_continues_from_the_master_seed():
    set_global_deterministic_state(1234)
    drawn = (random.random(), np.random.random(), torch.rand(3))  # noqa: S311
    assert drawn[0] == random.Random(1234).random()  # noqa: S311
    assert drawn[1] == np.random.RandomState(derive_component_seed(1234, "numpy")).random_sample()
    assert torch.equal(drawn[2], torch.rand(3, generator=torch.Generator().manual_seed(1234)))


def test_numpy_and_torch_do_not_emit_the_same_words():
    def words() -> tuple[set[int], set[int]]:
        numpy_words = set(np.random.randint(0, 2**32, 200, dtype=np.uint32).tolist())
        # Torch joins two words to one number of 64 bits.
        numbers = torch.randint(0, 2**62, (100,)).tolist()
        return numpy_words, {number & 0xFFFFFFFF for number in numbers}

    np.random.seed(9)
    torch.manual_seed(9)
    same = words()
    assert len(same[0] & same[1]) > 50  # why one seed for both will not do
    set_global_deterministic_state(9)
    ours = words()
    assert len(ours[0] & ours[1]) < 5


def test_an_operation_without_a_deterministic_algorithm_raises():
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_global_deterministic_state(0)
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_flags_are_set():
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    torch.utils.deterministic.fill_uninitialized_memory = True
    set_global_deterministic_state(0)
    assert torch.backends.cudnn.deterministic is True
    assert torch.backends.cudnn.benchmark is False
    assert torch.utils.deterministic.fill_uninitialized_memory is False


@pytest.mark.parametrize("older", [True, False])
def test_no_float32_product_may_use_fewer_bits(older):
    backends = torch.backends
    if older:
        torch.set_float32_matmul_precision("medium")
        backends.cuda.matmul.allow_tf32 = True
        backends.cudnn.allow_tf32 = True
    else:
        backends.fp32_precision = "tf32"
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = "tf32"
        backends.cudnn.rnn.fp32_precision = "tf32"
        backends.mkldnn.matmul.fp32_precision = "bf16"
    set_global_deterministic_state(0)
    # Both the newer and the older switches answer, and agree: Torch raises where they do not.
    assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.cudnn.conv.fp32_precision == "ieee"
    assert backends.cudnn.rnn.fp32_precision == "ieee"
    assert backends.mkldnn.matmul.fp32_precision == "ieee"
    assert backends.cuda.matmul.allow_tf32 is False
    assert backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
    with backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        pass


def test_the_cublas_workspace_is_set_where_it_is_not(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_global_deterministic_state(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_smaller_cublas_workspace_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_global_deterministic_state(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_another_cublas_workspace_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ConfigError, match=":0:0"):
        set_global_deterministic_state(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_pinned():
    for threads in (2, 1):
        set_global_deterministic_state(0, threads=threads)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_thread_counts_that_are_none_are_refused(threads):
    with pytest.raises(ConfigError, match="threads"):
        set_global_deterministic_state(0, threads=threads)


def test_a_thread_count_that_does_not_take_raises(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(ConfigError, match="reports"):
        set_global_deterministic_state(0, threads=torch.get_num_threads() + 1)


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "1", None])
def test_seeds_that_a_generator_would_refuse_are_refused_first(seed):
    with pytest.raises(ConfigError, match="seed"):
        set_global_deterministic_state(seed)


def test_the_largest_seed_is_taken():
    set_global_deterministic_state(2**63 - 1)


def test_a_process_as_it_was_set_passes():
    set_global_deterministic_state(0, threads=1)
    require_deterministic(1)


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("deterministic_algorithms ", lambda: torch.use_deterministic_algorithms(False)),
        ("deterministic_algorithms_warn_only", lambda: torch.use_deterministic_algorithms(True, warn_only=True)),
        ("cudnn.deterministic", lambda: setattr(torch.backends.cudnn, "deterministic", False)),
        ("cudnn.benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True)),
        ("cuda.matmul.fp32_precision", lambda: torch.set_float32_matmul_precision("high")),
        ("cudnn.conv.fp32_precision", lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")),
        ("mkldnn.matmul.fp32_precision", lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")),
        ("CUBLAS_WORKSPACE_CONFIG", lambda: os.environ.pop("CUBLAS_WORKSPACE_CONFIG")),
        ("threads is 2, expected 1", lambda: torch.set_num_threads(2)),
    ],
)
def test_a_flag_that_was_switched_back_is_named(flag, change):
    set_global_deterministic_state(0, threads=1)
    change()
    with pytest.raises(ReplayError) as error:
        require_deterministic(1)
    assert flag in str(error.value)
    assert "expected" in str(error.value)


def test_flags_can_be_written_as_json_and_do_not_change_anything():
    set_global_deterministic_state(0, threads=1)
    flags = deterministic_flags()
    assert json.loads(json.dumps(flags)) == flags
    assert flags["threads"] == 1
    assert flags["deterministic_algorithms"] is True
    require_deterministic(1)


def test_flags_are_told_where_torch_refuses_to_sum_them_up():
    set_global_deterministic_state(0)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        torch.get_float32_matmul_precision()
    assert deterministic_flags()["float32_matmul_precision"] == "mixed"
    set_global_deterministic_state(0)
    assert deterministic_flags()["float32_matmul_precision"] == "highest"
