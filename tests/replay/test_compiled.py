"""`replay.compile` held against what is not compiled and against real trainings; when it is refused or left out."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyTask, recorded, slope, tiny_config, tiny_setup
from torch import Tensor, nn

from tracked_replay.config import Config, ReplayConfig
from tracked_replay.errors import ConfigError, ReplayError
from tracked_replay.recording import Recording
from tracked_replay.replay import CompilingAdjoint, Replay, ScoreSum, StepAdjoint, Target, compiled
from tracked_replay.training import TrainingSetup, set_up

TARGETS = (Target.single(4), Target.single(7), Target.mean(range(10), "mean:all"))
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler for the CPU"
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code of these tests alone, shared by them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def compiling(setup: TrainingSetup, compile: str = "on", at_once: int = 0) -> CompilingAdjoint:
    return CompilingAdjoint(setup.step, ReplayConfig(compile=compile, targets_at_once=at_once), steps=setup.plan.steps)


def replayed(
    setup: TrainingSetup,
    recording: Recording,
    through: StepAdjoint,
    targets: tuple[Target, ...] = TARGETS,
    mode: str = "memory",
) -> np.ndarray:
    total = ScoreSum(targets, setup.data.num_train, setup.plan.steps)
    for step in Replay(setup, recording, targets, through, mode):
        total.add(step)
    return total.scores


def setup_of(layer: Callable[[], nn.Module], **changes: object) -> TrainingSetup:
    """The tiny network with another activation."""

    class Own(TinyTask):
        def model(self) -> nn.Module:
            layers = list(super().model())
            return nn.Sequential(*layers[:2], layer(), *layers[3:])

    config = tiny_config(**changes)
    return set_up(config, Own(config))


def not_compiled(
    monkeypatch: pytest.MonkeyPatch, scale: float = 1.0, *, in_the_last_digit: bool = False, apart: float = 0.0
) -> list[int]:
    """Let the function stand for its compiled form, times ``scale``, rounded otherwise, or with
    statistics that are ``apart``; lists the calls of it."""
    calls: list[int] = []

    def identity(function: Callable[..., list[Tensor]], arguments: object) -> Callable[..., list[Tensor]]:
        def run(*given: Any) -> list[Tensor]:
            calls.append(1)
            if in_the_last_digit:
                given = ([tensor * (1 + 3e-16) for tensor in given[0]], *given[1:])
            loss, statistics, *pulled = function(*given)
            return [loss, statistics + apart, *(tensor * scale for tensor in pulled)]

        return run

    monkeypatch.setattr(compiled, "_compiled", identity)
    return calls


@NEEDS_COMPILER
@pytest.mark.parametrize("targets", [1, 3])
def test_compiled_scores_are_those_without_compilation_and_the_slopes_of_real_trainings(
    targets: int, tmp_path: Path
) -> None:
    setup = tiny_setup(train__nesterov=True, train__schedule="cosine")
    recording, through = recorded(setup, tmp_path), compiling(setup)
    found = replayed(setup, recording, through, TARGETS[:targets])
    assert through.compiled is True
    assert through.deviation is not None
    assert through.deviation < 1e-13
    plain = replayed(setup, recording, StepAdjoint(setup.step), TARGETS[:targets])
    assert not np.array_equal(found, plain)  # it was another program
    np.testing.assert_allclose(found, plain, rtol=1e-12, atol=1e-14)
    for example in (0, 17):
        assert found[0, example] == pytest.approx(slope(setup, example, TARGETS[0].indices[0]), rel=1e-6)


@NEEDS_COMPILER
def test_scores_are_the_same_bits_in_both_modes_and_in_every_replay(tmp_path: Path) -> None:
    setup = tiny_setup(record__every=4)
    recording = recorded(setup, tmp_path)
    first = replayed(setup, recording, compiling(setup))
    for mode in ("memory", "stream"):
        again = replayed(setup, recording, compiling(setup), mode=mode)
        np.testing.assert_array_equal(again.view(np.int64), first.view(np.int64))


@NEEDS_COMPILER
def test_groups_of_targets_have_programs_of_their_own(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording, through = recorded(setup, tmp_path), compiling(setup, at_once=3)
    targets = (*TARGETS, Target.single(0))
    found = replayed(setup, recording, through, targets)
    assert sorted(through._programs) == [1, 3]
    plain = replayed(setup, recording, StepAdjoint(setup.step, ReplayConfig(targets_at_once=3)), targets)
    np.testing.assert_allclose(found, plain, rtol=1e-12, atol=1e-14)


COMPILE_ONCE = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
from tiny import tiny_setup
from torch._dynamo.utils import counters
from tracked_replay.config import ReplayConfig
from tracked_replay.replay import CompilingAdjoint, Target, measurement_cotangent
from tracked_replay.training import train

setup = tiny_setup()
*_, record = train(setup)
through = CompilingAdjoint(setup.step, ReplayConfig(compile="{compile}"), steps=10_000)
batch = setup.batch(record.before.step)
given = measurement_cotangent(through, setup.task, setup.data, record.after, Target.single(0))
rates = record.learning_rates.tolist()
through.pull_back(record.before, record.after, batch.inputs, batch.labels, rates, [given], record.loss)
print(through.compiled, counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


def compile_in_a_process(cache: Path, compile: str = "on", **variables: str) -> subprocess.CompletedProcess[str]:
    code = COMPILE_ONCE.format(tests=str(Path(__file__).parents[1]), compile=compile)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@NEEDS_COMPILER
def test_what_was_compiled_is_kept_for_the_next_process(tmp_path: Path) -> None:
    first = compile_in_a_process(tmp_path)
    assert first.stdout.split() == ["True", "0"], first.stderr
    kept = sorted(tmp_path.rglob("*.so"))
    assert kept
    second = compile_in_a_process(tmp_path)
    assert second.stdout.startswith("True "), second.stderr
    assert int(second.stdout.split()[1]) >= 1
    assert sorted(tmp_path.rglob("*.so")) == kept


@pytest.mark.slow
def test_without_a_compiler_it_is_refused_where_asked_for_and_left_out_where_not(tmp_path: Path) -> None:
    refused = compile_in_a_process(tmp_path, CXX="no-such-compiler")
    assert "replay.compile: found on, but the step cannot be compiled: " in refused.stderr
    left_out = compile_in_a_process(tmp_path, "auto", CXX="no-such-compiler")
    assert left_out.stdout.split() == ["False", "0"], left_out.stderr
    assert "the replay's step is not compiled: " in left_out.stderr


class Branching(nn.Module):
    """Takes another way in some steps, by a value that the state holds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.BatchNorm2d(1, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = int(self.count.num_batches_tracked)
        return torch.tanh(inputs) * (1 + steps % 2) + 0 * self.count(inputs[:, :1])


class Seeded(nn.Module):
    """Takes another way in some steps, by the seed that a step sets."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.other = other

    def forward(self, inputs: Tensor) -> Tensor:
        return self.other(inputs) if self.training and torch.initial_seed() % 2 else inputs.sin()


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.Dropout(0.3), "it draws random numbers, by aten."),
        (
            Branching,
            r"the model or the loss branches on a value, uses NumPy, or does else what cannot be traced \(\w+: ",
        ),
        (lambda: Seeded(torch.tanh), r"its forward pass in step \d is another than in step 0, by the seed alone"),
        (
            lambda: Seeded(lambda x: x * np.random.default_rng(torch.initial_seed()).random()),
            r"its forward pass in step \d is another",
        ),
    ],
    ids=["random numbers", "a branch on a value", "a branch on the seed", "a number from the seed"],
)
def test_a_model_that_cannot_be_traced_is_refused_or_left_as_it_is(
    layer: Callable[[], nn.Module],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = setup_of(layer)
    recording = recorded(setup, tmp_path)
    sentence = rf"^replay\.compile: found on, but the step cannot be compiled: {why}.*; allowed: off or auto$"
    with pytest.raises(ReplayError, match=sentence):
        replayed(setup, recording, compiling(setup))
    monkeypatch.setattr(compiled, "CALLS_THAT_PAY", setup.plan.steps)
    through = compiling(setup, "auto")
    with caplog.at_level(logging.WARNING):
        found = replayed(setup, recording, through)
    assert (through.compiled, through.deviation) == (False, None)
    assert re.search(f"the replay's step is not compiled: {why}", caplog.text)
    np.testing.assert_array_equal(found, replayed(setup, recording, StepAdjoint(setup.step)))


def test_a_compiled_function_that_is_another_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    not_compiled(monkeypatch, scale=1 + 1e-10)
    with pytest.raises(ReplayError, match=r"compiled: compiled, its derivatives are 1e-10 of themselves from uncomp"):
        replayed(setup, recording, compiling(setup))
    monkeypatch.setattr(compiled, "CALLS_THAT_PAY", 1)
    through = compiling(setup, "auto")
    found = replayed(setup, recording, through)
    assert through.compiled is False
    assert "the replay's step is not compiled: compiled, its derivatives are 1e-10" in caplog.text
    np.testing.assert_array_equal(found, replayed(setup, recording, StepAdjoint(setup.step)))


def test_a_compiled_function_without_second_derivatives_is_told_where_the_last_learning_rate_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tiny_setup(train__schedule="one_cycle", train__lr_end=0.0)
    assert not setup.plan.learning_rates[-1].any()  # so the first step's own cotangents of the gradients are 0

    def deaf(function: Callable[..., list[Tensor]], arguments: Any) -> Callable[..., list[Tensor]]:
        count = len(arguments.parameters)

        def run(*given: Any) -> list[Tensor]:
            tangents = [torch.zeros_like(tensor) for tensor in given[4][:count]] + given[4][count:]
            return function(*given[:4], tangents, *given[5:])

        return run

    monkeypatch.setattr(compiled, "_compiled", deaf)
    with pytest.raises(ReplayError, match=r"compiled: compiled, its derivatives are 1 of themselves from uncompiled"):
        replayed(setup, recorded(setup, tmp_path), compiling(setup))


def test_what_rounding_does_to_a_model_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    monkeypatch.setattr(compiled, "TOLERANCE", 0)
    not_compiled(monkeypatch, in_the_last_digit=True)
    through = compiling(setup)
    replayed(setup, recording, through)
    assert through.deviation is not None
    assert 0 < through.deviation < 1e-13
    monkeypatch.setattr(compiled, "ROUNDING", 0)
    with pytest.raises(ReplayError, match=r"compiled: compiled, its derivatives are .*e-1[0-9] of themselves"):
        replayed(setup, recording, compiling(setup))


def test_other_running_statistics_than_those_of_the_training_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tiny_setup()
    not_compiled(monkeypatch, apart=1e-9)
    with pytest.raises(
        ReplayError, match=r"^step 8: the compiled step gives running statistics that are 1e-09 of them"
    ):
        replayed(setup, recorded(setup, tmp_path), compiling(setup))


def test_how_far_statistics_are_apart() -> None:
    recorded = {"a.running_mean": torch.tensor([3.0, 4.0]), "a.running_var": torch.tensor([9.0, 16.0])}
    found = {name: tensor.clone() for name, tensor in recorded.items()}
    assert compiled._apart(found, recorded, torch.tensor(0.0)) == 0
    found["a.running_mean"][0] += 1
    assert compiled._apart(found, recorded, torch.tensor(0.0)).item() == pytest.approx(1 / (5 + 5))
    found["a.running_var"][0] += 1
    assert compiled._apart(found, recorded, torch.tensor(0.0)).item() == pytest.approx(1 / (5 + 5))
    found["a.running_var"][0] += 5
    assert compiled._apart(found, recorded, torch.tensor(0.0)).item() == pytest.approx(6 / 337**0.5)


@NEEDS_COMPILER
def test_tensors_of_the_tasks_own_are_constants(tmp_path: Path) -> None:
    class Weighted(TinyTask):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.weights = torch.tensor([1.0, 2.0, 0.5])

        def per_example_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().per_example_loss(outputs, labels) * self.weights[labels]

    config = tiny_config(train__dtype="float32")
    setup = set_up(config, Weighted(config))
    recording, through = recorded(setup, tmp_path), compiling(setup)
    found = replayed(setup, recording, through, TARGETS[:1])
    assert through.compiled
    plain = replayed(setup, recording, StepAdjoint(setup.step), TARGETS[:1])
    assert np.abs(found - plain).max() <= 1e-5 * np.abs(plain).max()


def test_it_is_on_by_itself_where_there_are_steps_enough_of_one_target_or_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    steps = setup.plan.steps
    calls = not_compiled(monkeypatch)

    def chosen(pays: int, targets: int = 1, **changes: object) -> bool | None:
        monkeypatch.setattr(compiled, "CALLS_THAT_PAY", pays)
        through = CompilingAdjoint(setup.step, ReplayConfig(**changes), steps=steps)
        replayed(setup, recording, through, TARGETS[:targets])
        return through.compiled

    assert chosen(steps) is True
    assert len(calls) == steps + 1  # each step, and one to hold it against the other way
    assert chosen(steps + 1) is False
    assert chosen(3 * steps, targets=3) is False  # they go together, so each step is one call
    assert chosen(3 * steps, targets=3, targets_at_once=1) is True
    assert chosen(1, compile="off") is False
    assert chosen(1, clip_parameters=True) is False
    monkeypatch.setattr(compiled, "SMALL_ACTIVATION", 16 * 4 * 4 * 8 - 1)  # the inputs have a byte more
    assert chosen(1) is True  # one target
    assert chosen(1, targets=2) is False


def test_an_adjoint_that_is_not_used_for_a_whole_training_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tiny_setup()
    calls = not_compiled(monkeypatch)
    replayed(setup, recorded(setup, tmp_path), StepAdjoint(setup.step, ReplayConfig(compile="on")))
    assert not calls


@pytest.mark.parametrize("clip", ["clip_gradient", "clip_parameters"])
def test_it_is_refused_beside_clipping(clip: str) -> None:
    with pytest.raises(ConfigError, match=r"compile is on beside clip_gradient or clip_parameters; allowed: compile"):
        Config().override({"replay.compile": "on", f"replay.{clip}": True})


def test_what_keeps_torch_from_compiling_is_told_before_it_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path / "recording")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        with pytest.raises(ReplayError, match=r"the environment variable TORCHDYNAMO_DISABLE switches it off"):
            replayed(setup, recording, compiling(setup))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "with a space"))
    with pytest.raises(ReplayError, match=r"folder whose path has a space, found '.*/with a space' \(TORCHINDUCTOR_"):
        replayed(setup, recording, compiling(setup))
