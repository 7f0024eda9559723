"""A training or replay that was stopped, even killed, goes on under its own run ID and ends bit for bit the same."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from interruptions import Forks, forks
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from stage_runs import folder_of
from tiny import own_config, write_task

import tracked_replay as tr
from tracked_replay.compare import compare_recordings
from tracked_replay.config import Config
from tracked_replay.errors import NumericalError
from tracked_replay.recording import Recorder, Unfinished, find_unfinished, recorder
from tracked_replay.replay import Replay, StepAdjoint, saved, scores
from tracked_replay.stages import magic, problem
from tracked_replay.stages import train as train_stage
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import open_recording
from tracked_replay.tracking import find_interrupted, names
from tracked_replay.tracking.process import this_process
from tracked_replay.training import StepRecord, TrainingSetup

FREE = {"environment/environment.json", "digests.json"}  # what may differ between two recordings of one training
PAGE = "report/index.html"  # names its run
EPOCHS, STEPS = 6, 12
# Draws from Python's and NumPy's generators, which keep every second normal deviate in store, and from torch's.
DRAWING = (
    "return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))",
    """import random
        import numpy as np
        class Drawing(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))
            def forward(self, x):
                return self.body(x * (1 + random.gauss(0, 0.1)) + np.random.normal(0, 0.1))
        return Drawing()""",
)
DROPOUT = ("nn.Tanh()", "nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(0.2)")
PER_FILE = 5  # steps in a file of scores step by step
EVERY_STEP = {
    "stages.magic.SECONDS_BETWEEN_SAVES": 0.0,
    "replay.scores.STEPS_PER_FILE": PER_FILE,
    "replay.saved.STEPS_PER_FILE": PER_FILE,
}


@pytest.fixture(scope="module")
def forked(empty_database: Path) -> Iterator[Forks]:
    with forks(empty_database) as found:
        yield found


@pytest.fixture(autouse=True)
def _experiment(shared_store: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment of its own for each test, since runs are gone on with inside one."""
    mlflow.set_experiment(request.node.name)
    monkeypatch.setattr(recorder, "environment_record", dict)  # takes longer than a small training


@pytest.fixture
def every_step_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magic, "SECONDS_BETWEEN_SAVES", 0.0)
    for module in (scores, saved):
        monkeypatch.setattr(module, "STEPS_PER_FILE", PER_FILE)


@pytest.fixture(scope="module")
def config(shared_store: Path) -> Config:
    """Of a training whose model draws from all generators."""
    task = write_task(shared_store, DRAWING, name="drawing.py")
    return own_config(task, train__epochs=EPOCHS, record__every=2)


@pytest.fixture(scope="module")
def whole(config: Config) -> str:
    """That training, not stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "environment_record", dict)
        mlflow.set_experiment("whole")
        return tr.train(config)


@pytest.fixture(scope="module")
def trained(shared_store: Path) -> str:
    """A training that can be replayed."""
    mlflow.set_experiment("whole")
    return tr.train(own_config(write_task(shared_store, DROPOUT), train__epochs=EPOCHS, record__every=2))


def runs(stage: str = names.TRAIN) -> list[mlflow.entities.Run]:
    """All runs of a stage in the experiment."""
    return [run for run in mlflow.search_runs(output_format="list") if run.data.tags.get(names.STAGE) == stage]


def the_run(stage: str = names.TRAIN) -> str:
    """The only run of a stage in the experiment: its ID."""
    (run,) = runs(stage)
    return str(run.info.run_id)


def status_of(run_id: str) -> str:
    return str(mlflow.get_run(run_id).info.status)


def saved_step(run_id: str) -> int | None:
    """The step at which a training is gone on with."""
    unfinished = find_unfinished(folder_of(run_id))
    return None if unfinished is None else unfinished.state.step


def files_of(run_id: str) -> dict[str, bytes]:
    root = folder_of(run_id)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def metrics_of(run_id: str) -> dict[str, list[tuple[int, float]]]:
    """All values of each metric, MLflow's own and times left out."""
    found = mlflow.get_run(run_id).data.metrics
    wanted = sorted(name for name in found if not name.startswith("system/") and name != "replay/seconds")
    client = MlflowClient()
    return {name: sorted((row.step, row.value) for row in client.get_metric_history(run_id, name)) for name in wanted}


def browsed(run_id: str) -> tuple:
    """What else a run shows: status, parameters, data sets, tags that say what it is."""
    run = mlflow.get_run(run_id)
    tags = {name: run.data.tags.get(name) for name in (names.STAGE, names.FINGERPRINT, names.TASK, "mlflow.runName")}
    free = ("replay.mode", "replay_mode_used", "replay_plan_")  # where states are kept does not change a result
    params = {name: value for name, value in run.data.params.items() if not name.startswith(free)}
    return run.info.status, params, sorted(item.dataset.digest for item in run.inputs.dataset_inputs), tags


def require_same_training(run_id: str, whole: str) -> None:
    """Files, metrics, parameters and tags are those of a training that was not stopped."""
    found, expected = files_of(run_id), files_of(whole)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= FREE
    metrics = metrics_of(run_id)
    assert metrics == metrics_of(whole)
    assert [step for step, _ in metrics["train/loss"]] == list(range(STEPS))
    assert [epoch for epoch, _ in metrics["epoch/train_loss"]] == list(range(EPOCHS))
    assert [epoch for epoch, _ in metrics["epoch/evaluation_accuracy"]] == list(range(EPOCHS))
    assert browsed(run_id) == browsed(whole)
    assert status_of(run_id) == "FINISHED"


def require_same_scores(run_id: str, whole: str, mode: str = "auto") -> None:
    """Likewise of a replay; MLflow's names for pictures of its grid are never the same."""
    found, expected = files_of(run_id), files_of(whole)
    named = {name for name in expected if not name.startswith("images/")}
    assert {name for name in found if not name.startswith("images/")} == named
    assert {"scores/per_step/part-00002.parquet", "figures/score-histogram.png", "tables/top_examples.json"} <= named
    assert len(found) == len(expected)
    if PAGE in found:
        found[PAGE] = found[PAGE].replace(run_id.encode(), whole.encode())
    may_differ = {"digests.json"} if mode == "auto" else {"digests.json", "config/config.toml"}
    assert {name for name in named if found[name] != expected[name]} <= may_differ
    configs = [Config.from_toml(files["config/config.toml"].decode()) for files in (found, expected)]
    assert configs[0] == configs[1].override({"replay.mode": mode})
    assert metrics_of(run_id) == metrics_of(whole)
    assert browsed(run_id) == browsed(whole)
    assert status_of(run_id) == "FINISHED"


MOMENTS_OF_A_STEP = ("taken", "handed over", "written", "checkpoint", "line", "half a line")


@pytest.mark.slow
def test_a_training_killed_at_any_step_ends_with_the_same_bits_under_the_same_id(
    forked: Forks, config: Config, whole: str
) -> None:
    drawn = random.Random(0)  # noqa: S311
    for number in range(20):
        moment, step = MOMENTS_OF_A_STEP[number % len(MOMENTS_OF_A_STEP)], drawn.randrange(2, STEPS)
        step -= step % 2 if moment == "checkpoint" else 0  # only these have files
        mlflow.set_experiment(f"killed {number}")
        forked.run("train", config, moment, step)
        killed = the_run()
        assert status_of(killed) == "RUNNING"
        assert "digests.json" not in files_of(killed)
        if moment not in ("taken", "handed over"):  # else the thread that writes may be some steps behind
            last = step if moment == "written" else step - 1
            assert saved_step(killed) == last // 2 * 2, (moment, step)
        assert tr.train(config) == killed, (moment, step)
        assert the_run() == killed
        require_same_training(killed, whole)
        if number < 2:
            pair = (open_recording(whole), open_recording(killed))
            assert compare_recordings(*pair, (whole, killed), check_files=True).verdict == "identical"


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("evaluation", 4),
        ("evaluated", 6),
        ("half the metrics", 2),
        ("figure", 0),
        ("digests", 0),
        ("digested", 0),
        ("publishing", 0),
    ],
)
@pytest.mark.slow
def test_a_training_killed_between_its_steps_ends_the_same(
    moment: str, step: int, forked: Forks, config: Config, whole: str
) -> None:
    forked.run("train", config, moment, step)
    killed = the_run()
    assert tr.train(config) == killed
    require_same_training(killed, whole)


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_the_same(forked: Forks, config: Config, whole: str) -> None:
    forked.run("train", config, "line", 5)
    assert saved_step(the_run()) == 4
    forked.run("train", config, "half the metrics", 4)
    assert saved_step(the_run()) == 8
    forked.run("train", config, "half a line", 10)
    killed = the_run()
    assert saved_step(killed) == 8
    assert tr.train(config) == killed
    require_same_training(killed, whole)


class StoppedError(MlflowException):
    """Something that is no error of the package: a tracking server that went away."""


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def stopped(config: Config, at: int = 7, error: BaseException | None = None, *, force: bool = False) -> str:
    """A training that was stopped in this process; its run ID."""
    error = error or KeyboardInterrupt()
    real = Recorder.add

    def add(self: Recorder, record: StepRecord) -> None:
        if record.before.step == at:
            self.wait()
            raise error
        real(self, record)

    known = {run.info.run_id for run in runs()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "add", add)
        with pytest.raises(type(error)):
            tr.train(config, force=force)
    (run,) = (run for run in runs() if run.info.run_id not in known)
    assert run.info.status == ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    return str(run.info.run_id)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoppedError("gone")], ids=["interrupt", "error"])
def test_a_training_that_was_interrupted_or_broke_off_goes_on(error: BaseException, config: Config, whole: str) -> None:
    run_id = stopped(config, 7, error)
    assert tr.train(config) == run_id
    require_same_training(run_id, whole)


def require_left_alone(run_id: str, how: Callable[[], str]) -> str:
    """A call trains from the start, in another run; returns its ID."""
    before, status = files_of(run_id), status_of(run_id)
    other = how()
    assert other != run_id
    assert status_of(other) == "FINISHED"
    assert (files_of(run_id), status_of(run_id)) == (before, status)
    return other


def test_force_trains_from_the_start(config: Config, whole: str) -> None:
    other = require_left_alone(stopped(config), lambda: tr.train(config, force=True))
    require_same_training(other, whole)


@pytest.mark.parametrize("change", [{"train.lr": 0.051}, {"seed": 1}, {"record.every": 3}, {"record.pixels": True}])
def test_another_config_is_another_training(change: dict[str, Any], config: Config) -> None:
    require_left_alone(stopped(config), lambda: tr.train(config.override(change)))


def test_other_code_is_another_training(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = stopped(config)
    monkeypatch.setattr(problem, "code_digest", lambda *_: "other")
    require_left_alone(run_id, lambda: tr.train(config))


def test_a_run_of_a_process_that_is_there_is_not_taken_over(config: Config) -> None:
    run_id = stopped(config)
    MlflowClient().update_run(run_id, status="RUNNING")
    MlflowClient().set_tag(run_id, names.PROCESS, this_process())
    require_left_alone(run_id, lambda: tr.train(config))
    # Its process is gone: the start of this one is not the one that it tells.
    MlflowClient().set_tag(run_id, names.PROCESS, f"{this_process().rpartition(' ')[0]} 1.00")
    other = find_interrupted(names.TRAIN, Problem.load(config).fingerprint(names.TRAIN, train_stage.SECTIONS, {}))
    assert other == [run_id]
    assert status_of(run_id) == "KILLED"


def test_a_run_whose_files_are_gone_is_trained_anew(config: Config, whole: str) -> None:
    run_id = stopped(config)
    shutil.rmtree(folder_of(run_id))
    other = tr.train(config)
    assert other != run_id
    require_same_training(other, whole)


def test_the_newest_of_two_interrupted_trainings_goes_on(config: Config, whole: str) -> None:
    first = stopped(config, 9)
    second = stopped(config, 5, force=True)
    assert tr.train(config) == second
    assert status_of(first) == "KILLED"
    require_same_training(second, whole)


def test_an_older_one_goes_on_where_the_newest_has_nothing_left(config: Config, whole: str) -> None:
    first = stopped(config, 5)
    shutil.rmtree(folder_of(stopped(config, 9, force=True)) / "checkpoints")
    assert tr.train(config) == first
    require_same_training(first, whole)


def test_fields_that_the_training_does_not_depend_on_may_change_meanwhile(config: Config, whole: str) -> None:
    run_id = stopped(config)
    assert tr.train(config.override({"data.root": "elsewhere", "lds.subsets": 9, "replay.mode": "stream"})) == run_id
    found, expected = files_of(run_id), files_of(whole)
    assert {name for name in found if found[name] != expected[name]} == {"config/config.toml", "digests.json"}
    assert browsed(run_id)[1] == browsed(whole)[1]  # MLflow takes no second value of a parameter


@pytest.mark.parametrize("at", [1, 7])
def test_a_recording_whose_bits_are_not_repeated_here_is_left_alone(
    at: int, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = stopped(config, at)
    real = train_stage.set_up

    def other_machine(*arguments: Any) -> TrainingSetup:
        setup = real(*arguments)
        for tensor in (*setup.initial.parameters.values(), setup.data.train.inputs):
            tensor.mul_(1 + 1e-6)
        return setup

    monkeypatch.setattr(train_stage, "set_up", other_machine)
    # The second model, which it makes, would be this machine's.
    monkeypatch.setattr("tracked_replay.training.loop._require_repeatable_model", lambda _: None)
    require_left_alone(run_id, lambda: tr.train(config))
    assert f"the interrupted training run {run_id} is left alone: its bits are not repeated here" in caplog.text


def test_a_recording_of_another_number_of_devices_is_left_alone(
    config: Config, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = stopped(config)
    real = train_stage.find_unfinished

    def on_two_devices(*arguments: Any, **keywords: Any) -> Unfinished | None:
        found = real(*arguments, **keywords)
        generators = replace(found.generators, torch_cuda=(found.generators.torch_cpu,) * 2)
        return found._replace(generators=generators)

    monkeypatch.setattr(train_stage, "find_unfinished", on_two_devices)
    other = require_left_alone(run_id, lambda: tr.train(config))
    require_same_training(other, whole)


def test_a_training_that_diverges_leaves_no_files_and_nothing_to_go_on_with(config: Config) -> None:
    diverging = config.override({"train.lr": 1e200})
    for _ in range(2):
        with pytest.raises(NumericalError, match=r"^step \d"):
            tr.train(diverging)
    assert [run.info.status for run in runs()] == ["FAILED", "FAILED"]
    assert [files_of(run.info.run_id) for run in runs()] == [{}, {}]


def made_by_mlflow(monkeypatch: pytest.MonkeyPatch) -> str:
    """A run as `mlflow run` makes it before the command starts."""
    run_id = str(MlflowClient().create_run(mlflow.tracking.fluent._get_experiment_id()).info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


def require_points(run_id: str, to: str) -> None:
    run = mlflow.get_run(run_id)
    assert (run.info.status, run.data.tags[names.REUSES]) == ("FINISHED", to)
    assert names.FINGERPRINT not in run.data.tags
    assert "MLFLOW_RUN_ID" not in os.environ


def test_under_mlflow_run_the_run_that_mlflow_made_points_to_the_one_gone_on_with(
    config: Config, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made_by_mlflow(monkeypatch)
    stopped(config)
    assert status_of(first) == "KILLED"  # the first attempt took over the run that MLflow had made
    again = made_by_mlflow(monkeypatch)
    assert tr.train(config) == first
    require_points(again, first)
    require_same_training(first, whole)


def test_under_mlflow_run_a_replay_is_gone_on_with_likewise(
    trained: str, monkeypatch: pytest.MonkeyPatch, every_step_saved: None
) -> None:
    first = made_by_mlflow(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(magic, "_figures", raising(StoppedError("gone")))
        with pytest.raises(StoppedError):
            tr.magic(trained, "0")
    assert status_of(first) == "FAILED"
    again = made_by_mlflow(monkeypatch)
    assert tr.magic(trained, "0") == first
    require_points(again, first)
    assert status_of(first) == "FINISHED"


TARGETS = "0;mean:1-3"
PER_STEP = {"replay.per_step": True}


@pytest.fixture
def replayed(trained: str, every_step_saved: None) -> str:
    """A replay that was not stopped."""
    here = mlflow.tracking.fluent._get_experiment_id()
    mlflow.set_experiment("whole")
    run_id = tr.magic(trained, TARGETS, overrides=PER_STEP)
    mlflow.set_experiment(experiment_id=here)
    return run_id


def kill_replay(forked: Forks, train_run: str, moment: str, step: int = 0, **changes: Any) -> str:
    """A replay that was killed; its run ID."""
    arguments = {"train_run_id": train_run, "targets": TARGETS, "overrides": PER_STEP | changes}
    forked.run("magic", open_recording(train_run).config, moment, step, constants=EVERY_STEP, **arguments)
    assert status_of(the_run(names.MAGIC)) == "RUNNING"
    return the_run(names.MAGIC)


def position(run_id: str) -> int | None:
    """The state that a replay is gone on with from."""
    found = saved.load_replay(folder_of(run_id) / "resume", "cpu")
    return None if found is None else found.step


@pytest.mark.slow
def test_a_replay_killed_at_any_step_ends_with_the_same_bits_under_the_same_id(
    forked: Forks, trained: str, replayed: str
) -> None:
    drawn = random.Random(1)  # noqa: S311
    for number in range(10):
        moment, step = ("saved", "replayed", "half saved")[number % 3], drawn.randrange(STEPS - 1)
        mode = ("memory", "stream")[number % 2]
        at = STEPS - step if moment == "half saved" else step  # the number of the save, or of the step
        mlflow.set_experiment(f"replay killed {number}")
        run_id = kill_replay(forked, trained, moment, at, **{"replay.mode": mode})
        assert position(run_id) == (step if moment == "saved" else step + 1), (moment, step)
        assert tr.magic(trained, TARGETS, overrides=PER_STEP | {"replay.mode": mode}) == run_id
        assert the_run(names.MAGIC) == run_id
        require_same_scores(run_id, replayed, mode)
        assert mlflow.get_run(run_id).data.params["replay_mode_used"] == mode


@pytest.mark.parametrize("moment", ["figures", "table", "scores", "all but the end"])
@pytest.mark.slow
def test_a_replay_killed_after_its_last_step_ends_the_same(
    moment: str, forked: Forks, trained: str, replayed: str
) -> None:
    run_id = kill_replay(forked, trained, moment)
    assert position(run_id) == 0
    # Where states are kept is no part of the result; the first choice stays on record.
    other = {"memory": "stream", "stream": "memory"}[mlflow.get_run(run_id).data.params["replay_mode_used"]]
    assert tr.magic(trained, TARGETS, overrides=PER_STEP | {"replay.mode": other}) == run_id
    require_same_scores(run_id, replayed, other)


@pytest.mark.slow
def test_a_replay_killed_again_and_again_ends_the_same(forked: Forks, trained: str, replayed: str) -> None:
    for moment, step, expected in (("saved", 9, 9), ("replayed", 5, 6), ("half saved", 4, 3)):
        run_id = kill_replay(forked, trained, moment, step)
        assert position(run_id) == expected
    assert tr.magic(trained, TARGETS, overrides=PER_STEP) == run_id
    require_same_scores(run_id, replayed)


def stop_replay(train_run: str, at: int = 3) -> str:
    """A replay that broke off in this process before it saved a step."""
    real = magic.save_replay

    def save(folder: Path, replay: Replay, *rest: Any) -> None:
        if replay.step == at:
            raise StoppedError("gone")
        real(folder, replay, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magic, "save_replay", save)
        with pytest.raises(StoppedError):
            tr.magic(train_run, TARGETS, overrides=PER_STEP)
    assert position(the_run(names.MAGIC)) == at + 1
    return the_run(names.MAGIC)


def test_a_replay_of_other_inputs_starts_from_the_end(trained: str, replayed: str) -> None:
    run_id = stop_replay(trained)
    require_left_alone(run_id, lambda: tr.magic(trained, "0", overrides=PER_STEP))
    require_left_alone(run_id, lambda: tr.magic(trained, TARGETS))
    other = require_left_alone(run_id, lambda: tr.magic(trained, TARGETS, overrides=PER_STEP, force=True))
    require_same_scores(other, replayed)


@pytest.mark.parametrize("name", ["resume/replay.saved", "resume/scores/per_step/part-00000.parquet"])
@pytest.mark.parametrize("how", ["cut", "zeroed", "deleted"])
def test_a_replay_with_a_damaged_file_starts_from_the_end(name: str, how: str, trained: str, replayed: str) -> None:
    run_id = stop_replay(trained)
    path = folder_of(run_id) / name
    content = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"\0" * len(content))
    other = require_left_alone(run_id, lambda: tr.magic(trained, TARGETS, overrides=PER_STEP))
    require_same_scores(other, replayed)


def test_a_replay_that_cannot_go_on_leaves_no_files(
    trained: str, every_step_saved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepAdjoint, "pull_back", after_some(StepAdjoint.pull_back, NumericalError("NaN")))
    with pytest.raises(NumericalError):
        tr.magic(trained, TARGETS)
    assert status_of(the_run(names.MAGIC)) == "FAILED"
    assert files_of(the_run(names.MAGIC)) == {}


def after_some(real: Callable[..., Any], error: BaseException, calls: int = 4) -> Callable[..., Any]:
    """A function that works some times and then raises."""
    left = iter(range(calls))

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(left, None) is None:
            raise error
        return real(*arguments, **keywords)

    return call


@pytest.mark.slow
def test_a_training_killed_inside_magic_goes_on_inside_the_next_one(forked: Forks, trained: str, replayed: str) -> None:
    config = open_recording(trained).config
    forked.run("magic", config, "written", 7, targets=TARGETS)
    killed, train_run = the_run(names.MAGIC), the_run()
    magic_run = tr.magic(config=config, targets=TARGETS)
    assert magic_run != killed
    assert the_run() == train_run
    assert mlflow.get_run(train_run).data.tags["mlflow.parentRunId"] == magic_run
    assert sorted(run.info.status for run in runs(names.MAGIC)) == ["FINISHED", "KILLED"]
    require_same_training(train_run, trained)
    assert files_of(magic_run)["scores/influence.parquet"] == files_of(replayed)["scores/influence.parquet"]


@contextmanager
def server(folder: Path, empty_database: Path) -> Iterator[None]:
    """A real tracking server that keeps the artifacts; MLflow's tracking URI points to it."""
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    before, uri = mlflow.get_tracking_uri(), f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 300
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.25)
            mlflow.set_tracking_uri(uri)
            mlflow.set_experiment("over http")
            yield
        finally:
            mlflow.set_tracking_uri(before)
            os.killpg(process.pid, 15)
            process.wait(60)


def fetched(run_id: str, folder: Path) -> dict[str, bytes]:
    """All artifacts of a run on the server."""
    if not MlflowClient().list_artifacts(run_id):
        return {}
    root = Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="", dst_path=str(folder / run_id)))
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("images/")}


@pytest.mark.slow
def test_on_a_server_the_files_wait_in_the_cache_of_this_user(
    forked: Forks,
    trained: str,
    replayed: str,
    tmp_path: Path,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    variables = {"TRACKED_REPLAY_CACHE": str(cache), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config, metrics = open_recording(trained).config, metrics_of(trained)
    expected = {
        run_id: {name: content for name, content in files_of(run_id).items() if not name.startswith("images/")}
        for run_id in (trained, replayed)
    }

    with server(tmp_path / "server", empty_database):
        forked.run("train", config, "written", 7, environment=variables)
        run_id = the_run()
        assert find_unfinished(cache / "runs" / run_id).state.step == 6
        assert fetched(run_id, tmp_path / "a") == {}
        forked.run("train", config, "published", environment=variables)
        assert find_unfinished(cache / "runs" / run_id).state.step == 10
        assert not [name for name in fetched(run_id, tmp_path / "b") if name.startswith("resume/")]
        assert tr.train(config) == run_id
        assert list((cache / "runs").iterdir()) == []
        found = fetched(run_id, tmp_path / "c")
        assert found.keys() == expected[trained].keys()
        assert {name for name in found if found[name] != expected[trained][name]} <= FREE
        assert metrics_of(run_id) == metrics

        arguments = {"train_run_id": run_id, "targets": TARGETS, "overrides": PER_STEP, "constants": EVERY_STEP}
        forked.run("magic", config, "saved", 5, environment=variables, **arguments)
        magic_run = the_run(names.MAGIC)
        assert saved.load_replay(cache / "runs" / magic_run / "resume", "cpu").step == 5
        forked.run("magic", config, "all but the end", environment=variables, **arguments)
        assert tr.magic(run_id, TARGETS, overrides=PER_STEP) == magic_run
        assert list((cache / "runs").iterdir()) == []
        again, whole = fetched(magic_run, tmp_path / "d"), expected[replayed]
        assert again.keys() == whole.keys()
        # The page names the runs that it is about.
        assert {name for name in again if again[name] != whole[name]} <= {"report/index.html", "digests.json"}

        with pytest.raises(NumericalError):
            tr.train(config.override({"train.lr": 1e200}))
        monkeypatch.setattr(StepAdjoint, "pull_back", after_some(StepAdjoint.pull_back, NumericalError("NaN")))
        with pytest.raises(NumericalError):
            tr.magic(run_id, "1")
        assert list((cache / "runs").iterdir()) == []
