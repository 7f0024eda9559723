"""Budgets of memory and of disk: the same bits under each, never more held or written than allowed."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from test_exactness import recorded, replayed
from tiny import tiny_config, tiny_setup

import tracked_replay as tr
from tracked_replay.config import Config
from tracked_replay.determinism import load_generator_states
from tracked_replay.errors import ConfigError, NumericalError, RecordingError, ReplayError
from tracked_replay.recording import Checkpoint, Recorder, Recording, recorder
from tracked_replay.recording.checkpoints import checkpoint_bytes
from tracked_replay.recording.recorder import BESIDE_A_STATE, MANIFEST_BYTES, checkpoint_distance
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target, choose_plan, require_budget, states_backward
from tracked_replay.replay.plan import least_states
from tracked_replay.training import State, TrainingSetup

TARGETS = (Target.single(4), Target.mean(range(10), "mean:all"))
STEPS = 12  # with the epochs below


@pytest.fixture(autouse=True)
def _quick_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "store" not in request.fixturenames:  # a stage's report reads the record
        monkeypatch.setattr(recorder, "environment_record", dict)


def setup_of(**changes: object) -> TrainingSetup:
    return tiny_setup(**{"train__epochs": 4, "train__nesterov": True, **changes})


@dataclass
class Watch:
    """Counts states while they are alive, by the tensors that only they hold.

    Attributes:
        most: states that were alive at once.
        taken: training steps.
        read: steps of the checkpoints in the order in which they were read, and the name of the thread.
    """

    most: int = 0
    taken: int = 0
    read: list[tuple[int, str]] = field(default_factory=list)
    _alive: list[weakref.ref] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def born(self, state: State) -> None:
        with self._lock:
            self._alive.append(weakref.ref(state.parameters["0.weight"]))
            self._alive = [reference for reference in self._alive if reference() is not None]
            self.most = max(self.most, len(self._alive))

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self._alive)


@contextmanager
def watched(before_read: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Iterator[Watch]:
    """Count the states that are read and made meanwhile."""
    watch, take, read = Watch(), TrainingSetup.take, Recording.state

    def watched_take(self: TrainingSetup, state: State, weights: Any = None) -> Any:
        found = take(self, state, weights)
        watch.taken += 1
        watch.born(found[0].state)
        return found

    def watched_read(self: Recording, checkpoint: Checkpoint) -> State:
        before_read(checkpoint)
        state = read(self, checkpoint)
        watch.read.append((checkpoint.step, threading.current_thread().name))
        watch.born(state)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSetup, "take", watched_take)
        patch.setattr(Recording, "state", watched_read)
        yield watch


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def with_budget(setup: TrainingSetup, budget: int) -> TrainingSetup:
    return replace(setup, config=setup.config.override({"replay.budget": budget}))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    setup = setup_of()
    assert setup.plan.steps == STEPS
    return replayed(setup, recorded(setup, tmp_path_factory.mktemp("reference")), TARGETS)


@pytest.mark.parametrize("every", [1, 3, 5, 100])
@pytest.mark.parametrize("mode", ["auto", "memory", "stream"])
def test_any_budget_gives_the_same_bits_and_is_kept(
    mode: str, every: int, tmp_path: Path, reference: np.ndarray
) -> None:
    setup = setup_of(record__every=every)
    recording = recorded(setup, tmp_path)
    of_state = recording.final.bytes
    least = least_states([checkpoint.step for checkpoint in recording.checkpoints], STEPS)
    kinds = set()
    for states in (*range(least, 8), STEPS, STEPS + 1, STEPS + 3, 1000):
        limited = with_budget(setup, states * of_state + of_state - 1)
        plan = choose_plan(mode, limited, recording)
        kinds.add(plan.keeps)
        with watched() as watch:
            scores = replayed(limited, recording, TARGETS, plan if states % 2 else mode)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scores.view(np.int64), reference.view(np.int64))
        assert watch.most <= plan.held <= states, states
        # All that may be held is held. What is read ahead may come a moment late.
        assert watch.most >= plan.held - plan.read_ahead, states
        assert watch.taken == plan.needed + plan.recomputed
        assert (watch.alive, readers()) == (0, [])
    assert kinds >= {"stream": {"segment"}, "memory": {"all"}, "auto": {"all"}}[mode]
    assert (every == 1) or "some" in kinds


def test_without_a_budget_memory_keeps_all_and_auto_what_fits_into_half_of_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(record__every=6)
    recording = recorded(setup, tmp_path)

    class Free:
        available = 0

    monkeypatch.setattr("tracked_replay.replay.states.psutil.virtual_memory", Free)
    expected = {26: ("all", 13), 25: ("segment", 9), 18: ("segment", 9), 14: ("segment", 7), 12: ("some", 6)}
    for states, (keeps, held) in (expected | {0: ("some", 3)}).items():
        Free.available = states * recording.final.bytes
        plan = choose_plan("auto", setup, recording)
        assert (plan.keeps, plan.held) == (keeps, held)
        assert choose_plan("memory", setup, recording).keeps == "all"
        assert choose_plan("stream", setup, recording).keeps == ("segment" if keeps == "all" else keeps)


@pytest.mark.parametrize(("every", "least"), [(1, 2), (3, 3)])
@pytest.mark.parametrize("mode", ["auto", "memory", "stream"])
def test_a_budget_of_memory_that_is_too_small_is_refused_with_the_least_one(
    mode: str, every: int, least: int, tmp_path: Path
) -> None:
    setup = setup_of(record__every=every)
    recording = recorded(setup, tmp_path)
    needed = least * recording.final.bytes
    message = f"replay.budget: found {needed - 1} bytes; allowed: 0, or at least {needed}, in which {least} states of "
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose_plan(mode, with_budget(setup, needed - 1), recording)
    with pytest.raises(ConfigError, match=re.escape(message)):
        replayed(with_budget(setup, needed - 1), recording, TARGETS, mode)
    assert choose_plan(mode, with_budget(setup, needed), recording).held <= least
    # Before the training the size is known to some bytes a tensor, and never taken for less.
    with pytest.raises(ConfigError, match=r"^replay.budget: found 1 bytes"):
        require_budget(with_budget(setup, 1))
    with pytest.raises(ConfigError, match=r"^replay.budget"):
        require_budget(with_budget(setup, needed - 1))
    require_budget(with_budget(setup, needed + least * 1000))


def test_checkpoints_are_read_ahead_by_one_thread_and_no_further_than_two(tmp_path: Path) -> None:
    setup = setup_of(record__every=2)
    recording = recorded(setup, tmp_path)
    arrived = {step: threading.Event() for step in (12, 10, 8, 6, 4, 2, 0)}
    with watched(lambda checkpoint: arrived[checkpoint.step].set()) as watch:
        states = states_backward(setup, recording, "stream")
        for expected in range(STEPS, -1, -1):
            state = next(states)
            assert state.step == expected
            # The two segments before this one are read although nobody asked for them yet, and no third.
            ahead = [step for step in arrived if step < expected - expected % 2][:2]
            assert all(arrived[step].wait(10) for step in ahead)
            assert [step for step, event in arrived.items() if event.is_set()] == [
                step for step in arrived if step >= min(ahead, default=0)
            ]
        assert len(readers()) == 1
        assert next(states, None) is None
    assert readers() == []
    assert [step for step, _ in watch.read] == list(arrived)
    assert {name.rpartition("_")[0] for _, name in watch.read} == {"read-ahead"}


def test_nothing_is_read_ahead_where_there_is_no_memory_for_it(tmp_path: Path) -> None:
    setup = setup_of(record__every=2)
    recording = recorded(setup, tmp_path)
    with watched() as watch:
        for _ in states_backward(with_budget(setup, 3 * recording.final.bytes), recording, "stream"):
            assert readers() == []
    assert {name for _, name in watch.read} == {"MainThread"}


@pytest.mark.parametrize("mode", ["memory", "stream"])
def test_an_error_of_the_reading_thread_is_raised_when_its_state_is_due(mode: str, tmp_path: Path) -> None:
    setup = setup_of(record__every=2)
    recording = recorded(setup, tmp_path)
    (tmp_path / "checkpoints/step-000006.safetensors").unlink()
    seen = []
    with pytest.raises(RecordingError, match=r"step-000006\.safetensors is missing"):  # noqa: PT012
        for state in states_backward(setup, recording, mode):
            seen.append(state.step)
    assert seen == ([12, 11, 10, 9, 8] if mode == "stream" else [])
    assert readers() == []


@pytest.mark.parametrize("budget", [0, 3], ids=["ahead", "when due"])
def test_a_checkpoint_that_is_another_state_than_was_recorded_is_refused(
    budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(record__every=2)
    recording = recorded(setup, tmp_path)
    read = Recording.state

    def other(self: Recording, checkpoint: Checkpoint) -> State:
        state = read(self, checkpoint)
        return replace(state, momentum={}) if checkpoint.step == 6 else state

    monkeypatch.setattr(Recording, "state", other)
    states = states_backward(with_budget(setup, budget * recording.final.bytes), recording, "stream")
    assert [next(states).step for _ in range(5)] == [12, 11, 10, 9, 8]
    with pytest.raises(ReplayError, match=r"^step 6: the replayed state has the digest"):
        next(states)


def test_the_reading_thread_is_gone_after_an_error_of_the_replay_or_when_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(record__every=2)
    recording = recorded(setup, tmp_path)
    states = states_backward(setup, recording, "stream")
    next(states)
    assert len(readers()) == 1
    states.close()
    assert readers() == []

    real = StepAdjoint.pull_back

    def fail(self: StepAdjoint, before: State, *rest: Any) -> Any:
        if before.step == 7:
            raise NumericalError("NaN")
        return real(self, before, *rest)

    monkeypatch.setattr(StepAdjoint, "pull_back", fail)
    total = ScoreSum(TARGETS, setup.data.num_train, STEPS)
    with pytest.raises(NumericalError) as caught:  # noqa: PT012 - the error keeps the frames alive, and not the thread
        for step in Replay(setup, recording, TARGETS, StepAdjoint(setup.step), "stream"):
            total.add(step)
            assert len(readers()) == 1
    assert readers() == []
    assert caught.value.__traceback__ is not None


def test_a_replay_that_goes_on_follows_a_plan_for_what_is_left(tmp_path: Path) -> None:
    setup = setup_of(record__every=5)
    recording = recorded(setup, tmp_path)
    limited = with_budget(setup, 4 * recording.final.bytes)
    for last in range(STEPS + 1):
        plan = choose_plan("auto", limited, recording, last)
        with watched() as watch:
            assert [state.step for state in states_backward(limited, recording, plan, last)] == [*range(last, -1, -1)]
        assert watch.taken == plan.needed + plan.recomputed
        assert watch.most <= 4


def on_disk(root: Path) -> int:
    return sum(path.stat().st_size for folder in ("checkpoints", "rng") for path in (root / folder).iterdir())


def kept_steps(root: Path) -> list[int]:
    return sorted(step for path in (root / "rng").iterdir() for step in load_generator_states(path))


def bound(setup: TrainingSetup, every: int) -> int:
    """Bytes of a recording with a distance, from the sizes that may be counted on."""
    momentum = setup.initial.parameters if setup.config.train.momentum else {}
    later = State(setup.plan.steps, setup.initial.parameters, setup.initial.buffers, momentum)
    count = len(range(0, setup.plan.steps, every))  # after the first state, the final one among them
    states = checkpoint_bytes(setup.initial) + count * checkpoint_bytes(later)
    return states + (count + 1) * BESIDE_A_STATE + MANIFEST_BYTES


@pytest.mark.parametrize("changes", [{}, {"train__momentum": 0.0, "train__nesterov": False}], ids=["momentum", "plain"])
@pytest.mark.parametrize("epochs", [1, 2, 4, 7])
def test_a_recording_keeps_within_its_budget_of_disk_with_as_many_states_as_fit(
    epochs: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = setup_of(train__epochs=epochs, **changes)
    steps = plain.plan.steps
    assert steps == 3 * epochs
    distances = set()
    for every in (1, 2):
        for budget in np.linspace(bound(plain, steps), bound(plain, 1) + 1, 8).astype(int):
            setup = setup_of(train__epochs=epochs, record__budget=int(budget), record__every=every, **changes)
            found = checkpoint_distance(setup)
            assert found == min(k for k in range(every, steps + every) if bound(setup, k) <= budget)
            distances.add(found)
            root = tmp_path / f"{every}-{budget}"
            recording = recorded(setup, root)
            assert on_disk(root) <= budget
            assert [row.step for row in recording.checkpoints] == [*range(0, steps, found), steps] == kept_steps(root)
    assert {1, steps} <= distances


def test_the_sizes_that_are_counted_on_are_those_of_the_files_and_for_generators_no_less(tmp_path: Path) -> None:
    setup = setup_of()
    recording = recorded(setup, tmp_path)
    for checkpoint in recording.checkpoints:
        state = recording.state(checkpoint)
        counted = checkpoint_bytes(state)
        assert checkpoint.bytes == counted
        assert counted <= bound(setup, STEPS)
    generators = sum(path.stat().st_size for path in (tmp_path / "rng").iterdir())
    count = len(recording.checkpoints)
    manifest = (tmp_path / "checkpoints/manifest.parquet").stat().st_size
    assert generators + manifest <= count * BESIDE_A_STATE + MANIFEST_BYTES


def test_the_manifest_of_many_states_is_counted_in(tmp_path: Path) -> None:
    rows = []
    for step in range(20_000):
        digest = np.random.default_rng(step).bytes(16).hex()
        rows.append(Checkpoint(step, f"checkpoints/step-{step:06d}.safetensors", digest, 10**9 + step))
    for count in (2, 100, 20_000):
        recorder.checkpoints.write_manifest(tmp_path, rows[:count])
        size = (tmp_path / "checkpoints/manifest.parquet").stat().st_size
        assert size <= MANIFEST_BYTES + count * (BESIDE_A_STATE - 12_000)  # the generators take 10 KB


def test_the_same_config_keeps_the_same_states_whatever_the_generators_are_at(tmp_path: Path) -> None:
    budget = bound(setup_of(), 3)
    kept = []
    for attempt in range(2):
        np.random.default_rng(attempt)
        recorded(setup_of(record__budget=budget), tmp_path / str(attempt))
        kept.append(kept_steps(tmp_path / str(attempt)))
    assert kept == [[0, 3, 6, 9, 12]] * 2


def test_a_budget_of_disk_that_is_too_small_for_two_states_is_refused_with_the_least_one(tmp_path: Path) -> None:
    least = bound(setup_of(), STEPS)
    with pytest.raises(ConfigError) as caught:
        Recorder(tmp_path, setup_of(record__budget=least - 1))
    assert str(caught.value) == (
        f"record.budget: found {least - 1} bytes; allowed: 0, or at least {least}, which the first and the last state "
        "of this training take with their generator states"
    )
    assert checkpoint_distance(setup_of(record__budget=least)) == STEPS
    assert not list(tmp_path.iterdir())


SIZES = {
    "0": 0,
    "12345": 12345,
    "500MB": 500 * 10**6,
    "2GB": 2 * 10**9,
    "1.5 GiB": 3 * 2**29,
    "9007199254740993": 2**53 + 1,
    12345: 12345,
}


@pytest.mark.parametrize("name", ["record.budget", "replay.budget"])
@pytest.mark.parametrize("value", SIZES)
def test_a_size_is_taken_in_bytes_or_with_a_unit_and_written_in_bytes(name: str, value: str | int) -> None:
    config = Config().override({name: value})
    assert config.value(name) == SIZES[value]
    assert f"budget = {SIZES[value]}\n" in config.to_toml()
    assert Config.from_toml(config.to_toml()) == config
    assert config == Config().override({name: SIZES[value]})


@pytest.mark.parametrize("value", ["-1", "1,5GB", "2GB/day", "5Mbit", "1e9", "", "GB", "٣", -1, 1.5, True, 2**63])
def test_what_is_no_size_is_refused(value: object) -> None:
    for name in ("record.budget", "replay.budget"):
        with pytest.raises(ConfigError) as caught:
            Config().override({name: value})
        assert str(caught.value) == (
            f"{name}: found {value!r}; allowed: bytes >= 0, as a number or as 500MB, 1.5GB, 2GiB"
        )


def test_what_is_kept_on_disk_is_part_of_a_recordings_identity_and_what_is_held_in_memory_of_none() -> None:
    config = Config()
    assert config.override({"replay.budget": "1GB"}).identity("record", "replay") == config.identity("record", "replay")
    assert config.override({"record.budget": "1GB"}).identity("record") != config.identity("record")


def test_a_runs_parameters_and_log_say_which_states_are_kept(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tracked_replay")
    config = tiny_config(train__epochs=4, record__budget=bound(setup_of(train__nesterov=False), 4))
    train_run = tr.train(config)
    assert mlflow.get_run(train_run).data.params["record_every_used"] == "4"
    assert "keeping 4 states, one every 4 steps (record.budget)" in caplog.text
    root = Path(mlflow.get_run(train_run).info.artifact_uri.removeprefix("file://"))
    assert kept_steps(root) == [0, 4, 8, 12]
    assert on_disk(root) <= config.record.budget
    of_state = (root / "checkpoints/step-000012.safetensors").stat().st_size
    magic_run = tr.magic(train_run, "0", overrides={"replay.budget": 3 * of_state})
    params = mlflow.get_run(magic_run).data.params
    assert {name: value for name, value in params.items() if name.startswith(("replay_plan", "replay_mode"))} == {
        "replay_mode_used": "stream",
        "replay_plan_keeps": "some",
        "replay_plan_states": "3",
        "replay_plan_bytes": str(3 * of_state),
        "replay_plan_needed_steps": "9",
        "replay_plan_recomputed_steps": "9",
    }
    assert re.search(
        r"replaying 12 steps for 1 target \(stream mode\): some states of a segment between two checkpoints, at most "
        r"3 states in memory, [\d.]+ KB; 9 training steps are taken again, and 9 more because a segment does not fit, "
        r"in about \d+\.\d s",
        caplog.text,
    )
    # Where states are kept is no part of the result: it is there already.
    assert tr.magic(train_run, "0") == magic_run


def test_a_budget_that_is_too_small_leaves_no_run_behind(store: Path) -> None:
    def runs() -> int:
        return len(mlflow.search_runs())

    with pytest.raises(ConfigError, match=r"^record.budget: found 1000 bytes"):
        tr.train(tiny_config(record__budget="1kB"))
    for name in ("record.budget", "replay.budget"):
        with pytest.raises(ConfigError, match=rf"^{name}: found 1000 bytes"):
            tr.magic(config=tiny_config().override({name: "1kB"}))
    assert runs() == 0
    train_run = tr.train(tiny_config())
    with pytest.raises(ConfigError, match=r"^replay.budget: found 1000 bytes"):
        tr.magic(train_run, overrides="replay.budget=1kB")
    assert runs() == 1
