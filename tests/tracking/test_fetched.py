"""States of a store that is no folder here: fetched several at a time, kept on this machine up to a limit."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.store.artifact import artifact_repository_registry as registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient
from tiny import tiny_config, tiny_setup

import tracked_replay as tr
from tracked_replay.debugging import choose_checkpoints, rank_examples
from tracked_replay.errors import ConfigError, FetchError, RecordingError, TrackedReplayError
from tracked_replay.lds import baseline_scores
from tracked_replay.recording import Recording, folder_source
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target, states_backward
from tracked_replay.stages.clean import describe, run_clean
from tracked_replay.stages.compare import run_compare
from tracked_replay.stages.reproduce import run_reproduce
from tracked_replay.stages.train import open_recording
from tracked_replay.stages.verify import run_verify
from tracked_replay.tracking import Workspace, artifacts_of
from tracked_replay.tracking.artifacts import FETCHES
from tracked_replay.tracking.fetched import FetchedStates, cache_limit

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(train__epochs=4)  # 12 steps, 13 states
TARGETS = (Target.single(4),)


class SlowRepository(ArtifactRepository):
    """A store that is reached by a scheme of its own and counts what it is asked for.

    Attributes:
        root: where all its files are.
        fetched: paths in the order in which they were asked for, those that it does not have among them.
        seconds: that a file takes.
        most: files that were on the way at once.
    """

    root: Path
    fetched: list[str]
    seconds = 0.0
    most = 0
    _now = 0
    _lock = threading.Lock()

    @classmethod
    def reset(cls, root: Path) -> None:
        cls.root, cls.fetched, cls.seconds, cls.most, cls._now = root, [], 0.0, 0, 0

    @property
    def folder(self) -> Path:
        return self.root / self.artifact_uri.partition("://")[2]

    @property
    def max_workers(self) -> int:
        return 20  # more than are fetched at once, so that it is not MLflow that holds them back

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        LocalArtifactRepository(str(self.folder)).log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        LocalArtifactRepository(str(self.folder)).log_artifacts(local_dir, artifact_path)

    def list_artifacts(self, path: str | None = None) -> list:
        return LocalArtifactRepository(str(self.folder)).list_artifacts(path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        LocalArtifactRepository(str(self.folder)).delete_artifacts(artifact_path)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        with self._lock:
            type(self).fetched.append(remote_file_path)
            type(self)._now += 1
            type(self).most = max(self.most, self._now)
        try:
            time.sleep(self.seconds)
            shutil.copyfile(self.folder / remote_file_path, local_path)
        finally:
            with self._lock:
                type(self)._now -= 1


@pytest.fixture(scope="module")
def trained(shared_store: Path) -> Iterator[str]:
    """A recording in a store that is reached as one far away."""
    SlowRepository.reset(shared_store / "far")
    known = registry._artifact_repository_registry
    known.register("slow", SlowRepository)
    MlflowClient().create_experiment("far", "slow://store")
    mlflow.set_experiment("far")
    yield tr.train(CONFIG)
    del known._registry["slow"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the counts of the store are set back."""
    monkeypatch.setenv("TRACKED_REPLAY_CACHE", str(tmp_path / "cache"))
    SlowRepository.reset(SlowRepository.root)
    return tmp_path / "cache"


def stored(run_id: str) -> Path:
    """Where the store has the artifacts of a run."""
    return SlowRepository.root / mlflow.get_run(run_id).info.artifact_uri.partition("://")[2]


def state_file(step: int) -> str:
    return f"checkpoints/step-{step:06d}.safetensors"


def kept(cache: Path) -> dict[str, int]:
    """Files that are kept and their sizes, by path inside the cache."""
    found = (path for path in cache.rglob("*") if path.is_file() and path.name not in {"lock", "bytes"})
    return {path.relative_to(cache).as_posix(): path.stat().st_size for path in found}


def scores_of(recording: Recording, mode: str = "stream") -> np.ndarray:
    setup = tiny_setup(train__epochs=4)
    total = ScoreSum(TARGETS, setup.data.num_train, setup.plan.steps)
    for step in Replay(setup, recording, TARGETS, StepAdjoint(setup.step), mode):
        total.add(step)
    return total.scores


def threads() -> list[str]:
    return [name for thread in threading.enumerate() if (name := thread.name).startswith(("fetch-", "read-"))]


@pytest.mark.parametrize("mode", ["stream", "memory"])
def test_a_replay_from_afar_gives_the_bits_of_a_folder_and_the_second_fetches_no_state(
    mode: str, trained: str, cache: Path
) -> None:
    here = scores_of(Recording(folder_source(stored(trained))), mode)
    for fetched in ([state_file(step) for step in range(12, -1, -1)], []):
        SlowRepository.fetched = []
        scores = scores_of(open_recording(trained), mode)
        np.testing.assert_array_equal(scores.view(np.int64), here.view(np.int64))
        assert sorted(name for name in SlowRepository.fetched if "step-" in name) == sorted(fetched)
    states = {path.name: path.read_bytes() for path in stored(trained).glob("checkpoints/step-*")}
    copies = {path.name: path.read_bytes() for path in cache.glob(f"fetched/{trained}/checkpoints/*")}
    assert copies == states  # states, and nothing else
    assert set(kept(cache)) == {f"fetched/{trained}/checkpoints/{name}" for name in states}
    assert threads() == []


def test_a_repository_is_made_once_and_the_run_is_not_looked_up_for_every_file(
    trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Counter[str]()
    make, look_up = SlowRepository.__init__, MlflowClient.get_run

    def made(self: SlowRepository, *arguments: object, **more: object) -> None:
        asked["made"] += 1
        make(self, *arguments, **more)  # type: ignore[arg-type]

    def looked_up(self: MlflowClient, run_id: str) -> object:
        asked["looked up"] += 1
        return look_up(self, run_id)

    recording = open_recording(trained)
    monkeypatch.setattr(SlowRepository, "__init__", made)
    monkeypatch.setattr(MlflowClient, "get_run", looked_up)
    scores_of(recording)
    assert asked == {"made": 1}


@pytest.mark.parametrize("limit", ["1GB", "0"])
def test_files_are_fetched_four_at_a_time_and_few_wait_on_disk(
    limit: str, trained: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("TRACKED_REPLAY_CACHE_LIMIT", limit)
    recording = open_recording(trained)
    _ = recording.trace, recording.checkpoints
    SlowRepository.seconds, SlowRepository.fetched = 0.02, []
    setup = tiny_setup(train__epochs=4, replay__budget=2 * recording.final.bytes)  # nothing is read ahead
    states = states_backward(setup, recording, "stream")
    for step in range(12, -1, -1):
        assert next(states).step == step
        deadline = time.monotonic() + 10
        expected = min(13, 13 - step + FETCHES)
        while len(SlowRepository.fetched) < expected or SlowRepository._now:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(SlowRepository.fetched) == expected  # and no further
        assert len(list((tmp_path / "scratch").iterdir())) <= FETCHES
    states.close()
    assert 1 < SlowRepository.most <= FETCHES == 4
    assert (threads(), list((tmp_path / "scratch").iterdir())) == ([], [])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_replay_that_is_left_leaves_no_thread_and_no_temporary_file(
    after: int, trained: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    recording = open_recording(trained)
    _ = recording.trace, recording.checkpoints
    SlowRepository.seconds = 0.02
    states = states_backward(tiny_setup(train__epochs=4), recording, "stream")
    for _ in range(after):
        next(states)
    assert bool(threads()) == bool(after)
    states.close()
    assert (threads(), list((tmp_path / "scratch").iterdir())) == ([], [])


def test_a_file_that_cannot_be_fetched_is_an_error_when_its_state_is_due(trained: str, cache: Path) -> None:
    path = stored(trained) / state_file(6)
    content = path.read_bytes()
    path.unlink()
    seen = []
    try:
        message = rf"^{state_file(6)} cannot be fetched from the artifacts of run {trained}: [^\n]*No such file"
        with pytest.raises(RecordingError, match=message):  # noqa: PT012
            for state in states_backward(tiny_setup(train__epochs=4), open_recording(trained), "stream"):
                seen.append(state.step)
    finally:
        path.write_bytes(content)
    assert seen == [12, 11, 10, 9, 8, 7]
    assert threads() == []


def test_a_store_that_is_away_costs_nothing_that_was_done(tmp_path: Path) -> None:
    for error, kept in ((FetchError("a server is away"), True), (RecordingError("it is damaged"), False)):
        workspace = Workspace("a" * 32, tmp_path / str(kept), in_place=False)
        with pytest.raises(type(error)), workspace.opened("resume") as folder:  # noqa: PT012
            (folder / "replay.saved").write_bytes(b"what was done")
            raise error
        assert (workspace.folder / "resume" / "replay.saved").is_file() == kept


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "another state"])
def test_a_damaged_copy_is_dropped_and_fetched_once_more(damage: str, trained: str, cache: Path) -> None:
    here = scores_of(Recording(folder_source(stored(trained))))
    scores_of(open_recording(trained))
    path = cache / "fetched" / trained / state_file(6)
    whole = path.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    other = (stored(trained) / state_file(5)).read_bytes()
    path.write_bytes({"truncated": whole[:100], "changed": changed, "empty": b"", "another state": other}[damage])
    for fetched in ([state_file(6)], []):
        SlowRepository.fetched = []
        assert np.array_equal(scores_of(open_recording(trained)), here)
        assert [name for name in SlowRepository.fetched if "step-" in name] == fetched
        assert path.read_bytes() == whole


def test_a_copy_that_another_process_removes_before_it_is_read_is_fetched(
    trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = scores_of(Recording(folder_source(stored(trained))))
    scores_of(open_recording(trained))
    find = FetchedStates.find

    def and_gone(self: FetchedStates, run_id: str, name: str) -> Path | None:
        path = find(self, run_id, name)
        if path is not None:
            path.unlink()
        return path

    monkeypatch.setattr(FetchedStates, "find", and_gone)
    SlowRepository.fetched = []
    assert np.array_equal(scores_of(open_recording(trained)), here)
    assert len([name for name in SlowRepository.fetched if "step-" in name]) == 13


def test_what_the_store_damaged_is_not_kept_and_is_found_by_whoever_looks_at_the_store(
    trained: str, cache: Path
) -> None:
    path, other = stored(trained) / state_file(6), tr.train(CONFIG, force=True)
    whole = path.read_bytes()
    damaged = rf"{state_file(6)} is damaged"
    try:
        path.write_bytes(whole[:-1])
        with pytest.raises(RecordingError, match=damaged):
            scores_of(open_recording(trained))
        assert f"fetched/{trained}/{state_file(6)}" not in kept(cache)
        path.write_bytes(whole)
        scores = scores_of(open_recording(trained))  # nothing damaged stayed behind
        path.write_bytes(whole[:-1])

        assert np.array_equal(scores_of(open_recording(trained)), scores)  # from the copy, which is whole
        recording = open_recording(trained)
        for look in (
            lambda: run_verify(trained, overrides={"lds.subsets": 3, "lds.drop": "0.1"}),
            lambda: run_compare(trained, other, check_files=True),
            lambda: run_reproduce(trained),
            lambda: recording.state(recording.checkpoints[6]),
            lambda: list(states_backward(tiny_setup(train__epochs=4), recording, "stream")),
        ):
            with pytest.raises(TrackedReplayError, match=damaged):
                look()
    finally:
        path.write_bytes(whole)


def test_without_a_limit_nothing_is_kept(trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKED_REPLAY_CACHE_LIMIT", "0")
    here = scores_of(Recording(folder_source(stored(trained))))
    for _ in range(2):
        SlowRepository.fetched = []
        assert np.array_equal(scores_of(open_recording(trained)), here)
        assert len([name for name in SlowRepository.fetched if "step-" in name]) == 13
    assert not cache.exists()


def test_a_limit_smaller_than_the_states_ahead_costs_time_and_no_bit(
    trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = scores_of(Recording(folder_source(stored(trained))))
    size = open_recording(trained).final.bytes
    for states in (0.5, 1, 2.5):
        monkeypatch.setenv("TRACKED_REPLAY_CACHE_LIMIT", str(int(states * size)))
        for _ in range(2):
            assert np.array_equal(scores_of(open_recording(trained)), here)
            assert len(kept(cache)) <= states
            assert sum(kept(cache).values()) <= states * size


@pytest.mark.parametrize(
    ("text", "limit"), [("", 10**10), ("0", 0), ("500", 500), ("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29)]
)
def test_the_limit_is_a_size_as_those_of_the_config(text: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKED_REPLAY_CACHE_LIMIT", text)
    assert cache_limit() == limit


@pytest.mark.parametrize("text", ["much", "-1", "1,5GB", "5 parsecs", "nan", "x" * 1000])
def test_a_limit_that_is_none_is_one_sentence_and_leaves_no_run_behind(
    text: str, trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED_REPLAY_CACHE_LIMIT", text)
    before = len(mlflow.search_runs(output_format="list"))
    message = f"TRACKED_REPLAY_CACHE_LIMIT: found {text[:80]!r}; allowed: bytes >= 0, as a number or as 500MB"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        tr.magic(trained, "0")
    assert len(mlflow.search_runs(output_format="list")) == before


def break_cache(fault: str, folder: Path) -> None:
    """Make a cache that no run can wait in; what is at ``folder`` is not there yet."""
    if fault == "a file":
        folder.write_text("a file")
    elif fault == "no permission":
        folder.mkdir(mode=0o500)
    else:
        folder.mkdir()
        (folder / "runs").write_text("a file")


ONLY_USERS = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
FAULTS = ["a file", "under a file", "runs is a file", pytest.param("no permission", marks=ONLY_USERS)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_cannot_be_written_to_is_one_sentence_and_leaves_no_run_behind(
    fault: str, trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_cache(fault.removeprefix("under "), cache)
    found = cache / "x" if fault == "under a file" else cache
    monkeypatch.setenv("TRACKED_REPLAY_CACHE", str(found))
    before = len(mlflow.search_runs(output_format="list"))
    message = f"TRACKED_REPLAY_CACHE: found {str(found)!r}, in which no folder 'runs' can be written to ("
    for begin in (
        lambda: tr.train(CONFIG, force=True),
        lambda: tr.magic(trained, "0", force=True),
        lambda: Workspace.of(trained),  # of a run that is there already
    ):
        with pytest.raises(ConfigError, match=rf"^{re.escape(message)}[A-Z][^\n()]*\); allowed: a folder [^\n]*$"):
            begin()
    assert len(mlflow.search_runs(output_format="list")) == before


def test_a_cache_in_a_home_that_is_none_is_one_sentence(
    trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED_REPLAY_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ConfigError, match=r"^TRACKED_REPLAY_CACHE: found '~nobody-of-this-name/cache', but [^\n]*$"):
        tr.magic(trained, "0", force=True)


@pytest.mark.parametrize("place", ["", "checkpoints", state_file(6)])
def test_a_link_among_the_copies_is_removed_and_what_it_leads_to_is_left_alone(
    place: str, trained: str, cache: Path, tmp_path: Path
) -> None:
    scores = scores_of(open_recording(trained))
    link, elsewhere = cache / "fetched" / trained / place, tmp_path / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    files = [path for path in (elsewhere, *elsewhere.rglob("*")) if path.is_file()]
    for path in files:
        os.utime(path, (1, 1))
    SlowRepository.fetched = []
    assert np.array_equal(scores_of(open_recording(trained)), scores)
    assert (
        len([name for name in SlowRepository.fetched if "step-" in name]) == len(files) == (1 if "." in place else 13)
    )
    assert not link.is_symlink()
    assert len(kept(cache)) == 13
    assert {path.stat().st_mtime for path in files} == {1}


@pytest.mark.parametrize("place", ["run", "run/checkpoints", f"run/{state_file(1)}"])
def test_nothing_is_added_or_dropped_where_a_link_leads(place: str, tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    states = FetchedStates(cache, 100)
    for change in (lambda: put(states, tmp_path, 1, 30), lambda: states.drop("run", state_file(1))):
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(elsewhere, ignore_errors=True)
        put(states, tmp_path, 1, 20)
        (cache / place).rename(elsewhere)
        (cache / place).symlink_to(elsewhere)
        change()
        assert not (cache / place).is_symlink()
        assert [path.stat().st_size for path in (elsewhere, *elsewhere.rglob("*")) if path.is_file()] == [20]
        elsewhere.unlink() if elsewhere.is_file() else shutil.rmtree(elsewhere)


def test_the_note_of_the_size_is_not_written_where_a_link_leads(tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    elsewhere.write_text("20")
    (cache / "bytes").symlink_to(elsewhere)
    put(FetchedStates(cache, 100), tmp_path, 1, 30)
    assert elsewhere.read_text() == "20"
    assert (cache / "bytes").read_text() == "30"


def test_baselines_and_rankings_from_afar_are_those_of_a_folder_and_fetch_several_states_at_once(
    trained: str, cache: Path
) -> None:
    setup = tiny_setup(train__epochs=4)
    here = Recording(folder_source(stored(trained)))
    SlowRepository.seconds = 0.02

    def rank(recording: Recording) -> dict[str, np.ndarray]:
        chosen = choose_checkpoints(recording, 4)
        with recording.ahead([*chosen, recording.final]) as source:
            found = rank_examples(setup, source, chosen, TARGETS[0], np.zeros(setup.data.num_train))
        return {ranking.name: ranking.values for ranking in found.rankings}

    for values in (lambda recording: baseline_scores(setup, recording, TARGETS), rank):
        SlowRepository.most, SlowRepository.fetched = 0, []
        expected, found = values(here), values(open_recording(trained))
        assert found.keys() == expected.keys()
        for name in found:
            # Kernels of many small products may round by where in memory a tensor lies.
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-13, err_msg=name)
        assert 1 < SlowRepository.most <= FETCHES
        assert set(Counter(SlowRepository.fetched).values()) == {1}  # the trace is not read anew
        assert len([name for name in SlowRepository.fetched if "step-" in name]) == 5
    assert threads() == []


@pytest.mark.parametrize(
    ("run_id", "name"),
    [
        ("a" * 32, "checkpoints/manifest.parquet"),
        ("a" * 32, "trace/part-00000.parquet"),
        ("a" * 32, "checkpoints/../x.safetensors"),
        ("a" * 32, "checkpoints/a/b.safetensors"),
        ("a" * 32, "checkpoints/.x.safetensors"),
        ("a" * 32, "checkpoints/a b.safetensors"),
        ("a" * 32, "checkpoints\\x.safetensors"),
        ("a" * 32, "/checkpoints/x.safetensors"),
        ("a" * 32, "checkpoints/x.safetensors\n"),
        ("..", state_file(1)),
        ("", state_file(1)),
        ("a/b", state_file(1)),
        ("a" * 31 + "\n", state_file(1)),
    ],
)
def test_other_files_and_odd_names_are_not_kept(run_id: str, name: str, tmp_path: Path) -> None:
    assert not FetchedStates(tmp_path, 100).takes(run_id, name)
    assert FetchedStates(tmp_path, 100).takes("a" * 32, state_file(1))
    assert not FetchedStates(tmp_path, 0).takes("a" * 32, state_file(1))


def test_files_of_a_run_that_still_goes_on_are_not_kept(trained: str, cache: Path) -> None:
    client = MlflowClient()
    run_id = client.create_run(mlflow.get_experiment_by_name("far").experiment_id).info.run_id
    folder = stored(run_id) / "checkpoints"
    folder.mkdir(parents=True)
    for content in (b"first", b"second"):
        (folder / "step-000001.safetensors").write_bytes(content)
        with (
            artifacts_of(run_id).ahead([state_file(1)], cached=True) as fetch,  # type: ignore[attr-defined]
            fetch(state_file(1)) as path,
        ):
            assert path.read_bytes() == content
    client.set_terminated(run_id, "FAILED")
    assert kept(cache) == {}


def put(states: FetchedStates, folder: Path, number: int, size: int, run_id: str = "run") -> None:
    file = folder / f"incoming-{number}"
    file.write_bytes(bytes(size))
    states.add(run_id, state_file(number), file)


def test_the_least_recently_used_files_go_and_the_limit_holds(tmp_path: Path) -> None:
    """Against a list in order of use; a sequence of uses drawn at random, by several users of one folder."""
    draw = random.Random(1)  # noqa: S311
    cache, limit = tmp_path / "cache", 1000
    users = [FetchedStates(cache, limit) for _ in range(3)]
    order: list[int] = []  # of the files that may still be there, least recently used first
    sizes: dict[int, int] = {}
    gone = 0
    for _ in range(400):
        number, user = draw.randrange(40), draw.choice(users)
        present = {int(Path(name).stem[5:]) for name in kept(cache)}
        assert (user.find("run", state_file(number)) is not None) == (number in present)
        if number in present:
            order.remove(number)
            order.append(number)
            continue
        sizes[number] = draw.choice([10, 40, 90, 200])
        put(user, tmp_path, number, sizes[number])
        found = {int(Path(name).stem[5:]) for name in kept(cache)}
        assert sum(kept(cache).values()) <= limit
        assert number in found
        lost = [other for other in order if other not in found]
        assert lost == order[: len(lost)]  # the least recently used, in their order, and none besides
        if lost:
            # Not more than the new file needs, and a sixteenth at most.
            assert sum(sizes[other] for other in order[len(lost) - 1 :]) + sizes[number] > limit - limit // 16
            gone += 1
        order = [*order[len(lost) :], number]
    assert gone > 50
    assert not [path for path in cache.rglob("*") if path.name.endswith(".part")]
    assert not list(tmp_path.glob("incoming-*"))


def test_what_is_larger_than_the_limit_is_left_where_it_is(tmp_path: Path) -> None:
    states = FetchedStates(tmp_path / "cache", 100)
    put(states, tmp_path, 1, 60)
    put(states, tmp_path, 2, 101)
    assert set(kept(tmp_path / "cache")) == {f"run/{state_file(1)}"}
    assert (tmp_path / "incoming-2").exists()


def test_a_note_of_the_size_that_is_lost_or_wrong_does_no_harm(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    states = FetchedStates(cache, 100)
    for number, note in enumerate(["", "x", "99999", None, "0x1", "30"]):
        put(states, tmp_path, number, 30)
        assert sum(kept(cache).values()) <= 100
        if note is None:
            (cache / "bytes").unlink()
        else:
            (cache / "bytes").write_text(note)
    shutil.rmtree(cache)  # by hand
    put(states, tmp_path, 1, 30)
    assert states.find("run", state_file(1)) is not None


def test_what_an_interruption_left_aside_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, hours in (("left", 2), ("written", 0)):
        (cache / f".{name}.part").write_bytes(bytes(90))
        os.utime(cache / f".{name}.part", (time.time() - hours * 3600,) * 2)
    put(FetchedStates(cache, 100), tmp_path, 1, 60)
    assert set(kept(cache)) == {f"run/{state_file(1)}", ".written.part"}


HAMMER = """
import os, random, sys, time
from pathlib import Path
from filelock import FileLock
from tracked_replay.tracking.fetched import FetchedStates

cache, seed = Path(sys.argv[1]), int(sys.argv[2])
states, draw = FetchedStates(cache, 1000), random.Random(seed)
incoming = cache.parent / f"incoming-{seed}"
replace = os.replace

def late(source, target):
    time.sleep(0.001)  # room was made, and the file is not there yet
    replace(source, target)

os.replace = late
print("ready", flush=True)
sys.stdin.readline()
for _ in range(300):
    name = f"checkpoints/step-{draw.randrange(30):06d}.safetensors"
    path = states.find("run", name)
    if path is None:
        incoming.write_bytes(name.encode() * draw.choice([1, 3, 6]))
        states.add("run", name, incoming)
        with FileLock(cache / "lock"):  # nobody adds a file meanwhile
            total = sum(file.stat().st_size for file in cache.rglob("*.safetensors"))
        assert total <= 1000, total
        continue
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        continue
    assert content and content == name.encode() * (len(content) // len(name)), content
"""


@pytest.mark.slow
def test_two_processes_at_once_keep_the_limit_and_whole_files(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", HAMMER, str(cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [*command, str(seed)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert 500 < sum(kept(cache).values()) <= 1000
    assert all(name.endswith(".safetensors") for name in kept(cache))


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_where_nothing_can_be_kept_the_replay_goes_on_and_says_so_once(
    fault: str, trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = scores_of(Recording(folder_source(stored(trained))))
    if fault == "no folder":
        cache.mkdir()
        (cache / "fetched").write_text("a file")
    else:
        move = shutil.move

        def full(source: Path, target: Path) -> None:
            if "step-000009" in str(source):  # some are kept before
                target.write_bytes(b"a part of it")
                raise OSError(28, "No space left on device")
            move(source, target)

        monkeypatch.setattr("tracked_replay.tracking.fetched.shutil.move", full)
    assert np.array_equal(scores_of(open_recording(trained)), here)
    said = [record.getMessage() for record in caplog.records if "are not kept" in record.getMessage()]
    assert len(said) == 1
    assert str(cache / "fetched") in said[0]
    assert len(kept(cache)) == (12 if fault == "full" else 1)
    assert not list(cache.rglob(".*.part"))


def test_clean_drops_the_copies_with_the_checkpoints(trained: str, cache: Path) -> None:
    again = tr.train(CONFIG, force=True)
    for run_id in (trained, again):
        scores_of(open_recording(run_id))
    copies = {name: size for name, size in kept(cache).items() if again in name}
    assert len(copies) == 13
    run_clean(again, "trace", dry_run=True)
    run_clean(again, "figures")
    would = run_clean(again, "checkpoints", dry_run=True)
    assert dict(would.here) == copies
    assert "cache of this machine     13 files" in describe(would)
    assert len(kept(cache)) == 26
    assert run_clean(again, "checkpoints").removed
    assert set(kept(cache)) == {f"fetched/{trained}/{state_file(step)}" for step in range(13)}
    assert run_clean(again, "checkpoints").count == 0

    (cache / "fetched" / again / "checkpoints").mkdir(parents=True)  # cleaned from another machine
    (cache / "fetched" / again / state_file(0)).write_bytes(b"x")
    assert run_clean(again, "checkpoints").removed
    assert len(kept(cache)) == 13


def test_clean_of_all_removes_what_an_interruption_left_in_the_cache(trained: str, cache: Path) -> None:
    client = MlflowClient()
    run = client.create_run(mlflow.get_experiment_by_name("far").experiment_id)
    run_id = run.info.run_id
    for name, value in {"stage": "train", "pending": "abc"}.items():
        client.set_tag(run_id, f"tracked_replay.{name}", value)
    client.set_terminated(run_id, "KILLED")
    folder = Workspace.of(run_id).folder
    assert folder == cache / "runs" / run_id
    (folder / "checkpoints").mkdir(parents=True)
    (folder / state_file(0)).write_bytes(bytes(1000))
    (folder / "resume").mkdir()
    (folder / "resume/x").write_bytes(bytes(10))

    assert run_clean(run_id, "checkpoints").count == 0  # it could not be gone on from without
    assert len(kept(cache)) == 2
    would = run_clean(run_id, "all", dry_run=True)
    assert (would.count, would.bytes, would.removed) == (2, 1010, False)
    assert len(kept(cache)) == 2
    found = run_clean(run_id, "all")
    assert (found.count, found.bytes, found.removed) == (2, 1010, True)
    assert "removed from run" in describe(found)
    assert not folder.exists()
    assert "tracked_replay.pending" not in client.get_run(run_id).data.tags  # nothing to go on from
    assert run_clean(run_id, "all").count == 0


def test_no_password_is_in_the_sentence_about_a_file_that_cannot_be_fetched(
    trained: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SlowRepository, path: str | None = None) -> list:
        raise ImportError("no driver for\nhttp://me:secret@host/api, or other")

    monkeypatch.setattr(SlowRepository, "list_artifacts", refuse)
    with pytest.raises(RecordingError, match=r": no driver for http://me:\*\*\*@host/api, or other$"):
        _ = open_recording(trained).digests
