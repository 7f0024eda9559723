"""The modes of reproducibility: what each sets, whatever the process was in before, and that it can be seen."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_setup

from tracked_replay.config import Config
from tracked_replay.determinism import (
    deterministic_flags,
    environment_record,
    require_deterministic,
    set_global_deterministic_state,
)
from tracked_replay.errors import ConfigError, ReplayError

MODES: tuple[Any, ...] = ("full", "kernels", "seeds")


def loosened() -> None:
    """A process in which nothing is deterministic and float32 is not float32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [*MODES, None])
def test_a_mode_sets_its_flags_whatever_was_set_before(mode: Any, before: Any) -> None:
    loosened() if before is None else set_global_deterministic_state(1, 1, before)
    torch.set_num_threads(2)
    set_global_deterministic_state(0, 1, mode)
    strict = mode != "seeds"
    assert torch.are_deterministic_algorithms_enabled() is strict
    assert torch.is_deterministic_algorithms_warn_only_enabled() is False
    assert torch.backends.cudnn.deterministic is strict
    assert torch.backends.cudnn.benchmark is False
    assert torch.get_num_threads() == (1 if mode == "full" else 2)
    # What is called float32 is float32 in every mode.
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("mode", MODES)
def test_an_operation_without_a_deterministic_algorithm(mode: Any) -> None:
    set_global_deterministic_state(0, mode=mode)
    place, indices, ones = torch.zeros(3), torch.tensor([0, 0]), torch.ones(2)
    if mode == "seeds":
        place.put_(indices, ones)
    else:
        with pytest.raises(RuntimeError, match="deterministic"):
            place.put_(indices, ones)


def test_every_mode_seeds_alike() -> None:
    draws = []
    for mode in MODES:
        set_global_deterministic_state(8, mode=mode)
        draws.append((random.random(), np.random.random(), float(torch.rand(1))))  # noqa: S311
    assert draws[0] == draws[1] == draws[2]


def test_the_cublas_workspace_matters_to_all_modes_but_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    set_global_deterministic_state(0, mode="seeds")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"
    with pytest.raises(ConfigError, match=":0:0"):
        set_global_deterministic_state(0, mode="kernels")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_global_deterministic_state(0, mode="seeds")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_global_deterministic_state(0, mode="kernels")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_can_be_seen(mode: Any) -> None:
    set_global_deterministic_state(0, 1, mode)
    assert deterministic_flags()["mode"] == mode
    assert json.loads(json.dumps(environment_record()))["determinism"]["mode"] == mode


def test_no_mode_passes_for_a_stricter_one() -> None:
    torch.set_num_threads(1)
    set_global_deterministic_state(0, 2, "seeds")
    with pytest.raises(ReplayError, match="deterministic_algorithms is False"):
        require_deterministic(1)
    set_global_deterministic_state(0, 2, "kernels")
    require_deterministic(1)
    with pytest.raises(ReplayError, match="threads is 1, expected 2"):
        require_deterministic(2)


@pytest.mark.parametrize("mode", ["FULL", "", "none", None, True, ["full"]])
def test_a_mode_that_there_is_not_is_refused_before_anything_changes(mode: Any) -> None:
    set_global_deterministic_state(0, 1, "seeds")
    flags, state = deterministic_flags(), torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"mode: found .*; allowed: full, kernels, seeds"):
        set_global_deterministic_state(1, 2, mode)
    assert deterministic_flags() == flags
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
def test_a_training_is_set_up_in_the_mode_of_its_config(mode: str) -> None:
    torch.set_num_threads(2)
    tiny_setup(train__reproducibility=mode, train__threads=1)
    flags = deterministic_flags()
    assert (flags["mode"], flags["threads"]) == (mode, 1 if mode == "full" else 2)


def test_the_mode_is_a_field_of_the_config_and_part_of_its_identity() -> None:
    assert Config().train.reproducibility == "full"
    recorded_before = tiny_config().to_toml().replace('reproducibility = "full"\n', "")
    assert Config.from_toml(recorded_before) == tiny_config()
    assert tiny_config(train__reproducibility="seeds").identity("train") != tiny_config().identity("train")
    with pytest.raises(ConfigError, match=r"reproducibility: found 'some'; allowed: one of full, kernels, seeds"):
        tiny_config(train__reproducibility="some")
