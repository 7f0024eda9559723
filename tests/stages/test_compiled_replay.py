"""Stage `magic` with `replay.compile`: what the run says of it, and that an interruption changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from stage_runs import bits, runs_of, statuses
from tiny import own_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ReplayError
from tracked_replay.replay import CompilingAdjoint, Replay, load_replay
from tracked_replay.stages import magic
from tracked_replay.tracking import Workspace, names

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler for the CPU"
)
ON = "replay.compile=on"


def scores_of(run_id: str) -> np.ndarray:
    return tr.load_scores(run_id)["score"].to_numpy()


@pytest.fixture(scope="module")
def trained(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A training to replay; compiled code goes to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield tr.train(own_config(write_task(shared_store), train__epochs=4))


def test_a_run_says_that_its_replay_was_compiled_and_how_far_that_is_from_the_other_way(trained: str) -> None:
    plain, compiled = (tr.magic(trained, "0-2", overrides=changes) for changes in ("", ON))
    assert plain != compiled
    runs = {used: mlflow.get_run(run_id) for used, run_id in (("False", plain), ("True", compiled))}
    for used, run in runs.items():
        assert run.data.params["replay_compile_used"] == used
        assert run.data.tags[names.EXACT] == "true"
        assert ("checks/compiled_deviation" in run.data.metrics) == (used == "True")
    assert runs["True"].data.metrics["checks/compiled_deviation"] < 1e-13
    assert runs["True"].data.metrics["replay/compile_seconds"] > 0
    found, expected = scores_of(compiled), scores_of(plain)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert (found != expected).any()


def interrupted(train_run_id: str, targets: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compiled replay that was stopped in the middle; its run ID. Finished ones will not be found in its place."""
    for run in runs_of(names.MAGIC):
        mlflow.MlflowClient().set_tag(run.info.run_id, names.FINGERPRINT, "another")
    monkeypatch.setattr(magic, "SECONDS_BETWEEN_SAVES", 0.0)
    real = magic.save_replay

    def save(folder: Path, replay: Replay, *more: object) -> None:
        real(folder, replay, *more)
        if replay.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(magic, "save_replay", save)
        with pytest.raises(KeyboardInterrupt):
            tr.magic(train_run_id, targets, overrides=ON, force=True)
    (stopped,) = mlflow.search_runs(filter_string="attributes.status = 'KILLED'", output_format="list")
    return str(stopped.info.run_id)


def test_an_interrupted_compiled_replay_ends_with_the_same_bits(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tr.magic(trained, "0-2", overrides=ON)
    stopped = interrupted(trained, "0-2", monkeypatch)
    assert tr.magic(trained, "0-2", overrides=ON) == stopped
    np.testing.assert_array_equal(bits(scores_of(stopped)), bits(scores_of(whole)))


def test_a_replay_that_was_compiled_does_not_go_on_without(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = interrupted(trained, "0-2", monkeypatch)
    folder = Workspace.of(stopped).folder / magic.RESUME
    saved = load_replay(folder, "cpu")
    assert saved is not None
    assert saved.compiled is True
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(CompilingAdjoint, "_pays", lambda *_: False)  # what `auto` would say now
    real = CompilingAdjoint.__post_init__

    def automatic(self: CompilingAdjoint) -> None:
        self.config = self.config.model_copy(update={"compile": "auto"})
        real(self)

    monkeypatch.setattr(CompilingAdjoint, "__post_init__", automatic)
    with pytest.raises(
        ReplayError, match=r"^replay\.compile: the interrupted replay was compiled, but the step cannot be"
    ):
        tr.magic(trained, "0-2", overrides=ON)
    assert mlflow.get_run(stopped).info.status == "FAILED"


def test_a_model_that_cannot_be_compiled_leaves_a_failed_run_and_none_that_runs(
    trained: str, shared_store: Path
) -> None:
    failed = statuses().count("magic FAILED")
    task = write_task(shared_store, ("nn.Tanh()", "nn.Dropout(0.2)"), name="dropout.py")
    with pytest.raises(ReplayError, match=r"replay\.compile: found on, but the step cannot be compiled: it draws"):
        tr.magic(config=own_config(task), targets="0", overrides=ON)
    assert statuses().count("magic FAILED") == failed + 1
    assert not any("RUNNING" in status for status in statuses())
