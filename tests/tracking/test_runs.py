"""Stages as MLflow runs: how they start and end, how they are found, and what a run ID may be."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from PIL import Image
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ConfigError, RecordingError, RunError
from tracked_replay.tracking import (
    Workspace,
    artifacts_of,
    claimed,
    find_finished,
    names,
    point_to,
    resolve,
    stage_run,
)
from tracked_replay.tracking import runs as tracking
from tracked_replay.tracking.fingerprint import code_digest, fingerprint
from tracked_replay.tracking.process import close_abandoned, this_process

ROOT = Path(__file__).parents[2]


def finished(stage: str = "train", identity: str = "f" * 64) -> str:
    with stage_run(stage, identity, "a name", {}) as run:
        return run.run_id


def all_runs() -> list[mlflow.entities.Run]:
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def test_a_finished_run_has_stage_name_inputs_and_fingerprint(store: Path) -> None:
    with stage_run("magic", "ab", "a name", {"train_run_id": "x"}) as run:
        assert names.FINGERPRINT not in mlflow.get_run(run.run_id).data.tags  # only a finished run may be reused
        run.metric("a", 1.0, 3)
    found = mlflow.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a name"
    assert found.data.metrics["a"] == 1.0
    tags = {key: value for key, value in found.data.tags.items() if key.startswith("tracked_replay.")}
    expected = {"stage": "magic", "fingerprint": "ab", "input.train_run_id": "x"}
    assert expected.items() <= {key.removeprefix("tracked_replay."): value for key, value in tags.items()}.items()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (ConfigError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(), "KILLED"),
    ],
)
def test_a_run_that_breaks_off_is_closed_and_never_found(error: BaseException, status: str, store: Path) -> None:
    def outer() -> None:
        with stage_run("magic", None, "outer", {}), stage_run("train", "ab", "inner", {}):
            raise error

    with pytest.raises(type(error)):
        outer()
    assert [run.info.status for run in all_runs()] == [status, status]
    assert not any(names.FINGERPRINT in run.data.tags for run in all_runs())
    assert find_finished("train", "ab") is None
    assert mlflow.active_run() is None


def no_end(*_: object, **__: object) -> None:
    raise MlflowException("https://me:secret@host does not\nlet it end")


@pytest.mark.parametrize("error", [MlflowException("it went away"), ConfigError("x"), KeyboardInterrupt()])
def test_a_store_that_does_not_let_a_run_end_does_not_hide_what_broke_it_off(
    error: BaseException, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def outer() -> None:
        with stage_run("lds", None, "outer", {}), stage_run("magic", "ab", "inner", {}):
            monkeypatch.setattr(MlflowClient, "set_terminated", no_end)
            raise error

    with pytest.raises(type(error)) as caught:
        outer()
    assert caught.value is error
    status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
    known = {run.info.run_name: run.info.run_id for run in all_runs()}
    notes = [
        f"run {known[name]} could not be ended as {status}: https://me:***@host does not let it end"
        for name in ("inner", "outer")
    ]
    assert error.__notes__ == notes
    assert [record.getMessage() for record in caplog.records if "could not be ended" in record.getMessage()] == notes
    assert mlflow.active_run() is None


def test_a_result_that_the_store_does_not_let_end_is_an_error(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MlflowException, match="let it end"), stage_run("lds", "ab", "a name", {}):
        monkeypatch.setattr(MlflowClient, "set_terminated", no_end)


def test_a_store_in_a_folder_needs_no_cache(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "a file").write_text("no folder")
    monkeypatch.setenv("TRACKED_REPLAY_CACHE", str(store / "a file"))
    tr.magic(tr.train(tiny_config(train__epochs=1)), "0")


def test_a_nested_stage_is_a_child(store: Path) -> None:
    with stage_run("magic", "m", "outer", {}) as outer, stage_run("train", "t", "inner", {}) as inner:
        pass
    assert mlflow.get_run(inner.run_id).data.tags["mlflow.parentRunId"] == outer.run_id
    assert "mlflow.parentRunId" not in mlflow.get_run(outer.run_id).data.tags


def test_only_a_finished_run_of_the_stage_and_experiment_is_found_and_the_newest(store: Path) -> None:
    finished(identity="a")
    newest = finished(identity="a")
    finished("magic", identity="a")
    assert find_finished("train", "a") == newest
    MlflowClient().delete_run(newest)
    left = find_finished("train", "a")
    assert left not in (None, newest)
    MlflowClient().set_terminated(left, "FAILED")  # as a person may do by hand: the fingerprint stays
    assert find_finished("train", "a") is None
    MlflowClient().set_terminated(left, "FINISHED")
    assert find_finished("train", "a") == left
    mlflow.set_experiment("another")
    assert find_finished("train", "a") is None


@pytest.mark.parametrize(
    "run_id",
    ["", " ", "../x", "/etc/passwd", "x" * 9000, "a'b", 'a"b', "a\nb", "a\0b", "%00", "ü", "-x", None, 3, b"x"],
)
def test_a_run_id_of_another_form_is_refused_before_it_is_asked_for(run_id: object, store: Path) -> None:
    for ask in (tr.load_scores, lambda found: resolve(found, "train", "run_id")):
        with pytest.raises(RunError) as caught:
            ask(run_id)
        assert str(caught.value).startswith("run_id: found ")
        assert str(caught.value).endswith("allowed: the ID of a run, such as the 32 digits that a stage prints")
        assert len(str(caught.value)) < 250
        assert "\n" not in str(caught.value)


def test_runs_that_cannot_be_used_are_told_apart(store: Path) -> None:
    def why(run_id: str) -> str:
        with pytest.raises(RunError) as caught:
            resolve(run_id, "train", "train_run_id")
        return str(caught.value)

    assert why("0" * 32) == f"train_run_id: found '{'0' * 32}', but sqlite:///{store}/mlflow.db has no such run"
    magic = finished("magic")
    assert why(magic) == f"train_run_id: run {magic} is of stage 'magic'; allowed: a finished run of stage 'train'"
    with mlflow.start_run() as foreign:
        pass
    assert "was not made by tracked_replay" in why(foreign.info.run_id)
    with stage_run("train", "x", "open", {}) as run:
        assert why(run.run_id) == f"train_run_id: run {run.run_id} is RUNNING; allowed: a FINISHED run of stage 'train'"
    MlflowClient().set_terminated(run.run_id, "FAILED")
    assert f"run {run.run_id} is FAILED" in why(run.run_id)
    deleted = finished()
    MlflowClient().delete_run(deleted)
    assert why(deleted) == (
        f"train_run_id: run {deleted} is deleted; `mlflow runs restore --run-id {deleted}` brings it back"
    )


def test_a_run_that_points_to_a_result_leads_to_it_but_not_in_a_ring(store: Path) -> None:
    result, pointing, ring = finished(), finished(), finished()
    client = MlflowClient()
    client.set_tag(pointing, names.REUSES, result)
    client.set_tag(ring, names.REUSES, ring)
    assert resolve(pointing, "train", "x").info.run_id == result
    with pytest.raises(RunError, match="points on"):
        resolve(ring, "train", "x")
    client.set_tag(pointing, names.REUSES, "../../x")
    with pytest.raises(RunError, match=rf"the tag tracked_replay.reuses of run {pointing}: found '../../x'"):
        resolve(pointing, "train", "x")


@pytest.mark.parametrize("name", ["../mlflow.db", "/etc/passwd", "a/../../b", "", ".", "a\\b"])
def test_a_path_outside_a_runs_artifacts_is_refused(name: str, store: Path) -> None:
    with pytest.raises(RecordingError, match=r"not a path inside|is missing"), artifacts_of(finished())(name):
        pass


def test_metrics_are_sent_in_batches_and_all_arrive(store: Path) -> None:
    with stage_run("train", "x", "many", {}) as run:
        for step in range(2500):
            run.metric("m", step, step)
        run.params({f"p{number:03}": number for number in range(250)})
    history = MlflowClient().get_metric_history(run.run_id, "m")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, float(step)) for step in range(2500)]
    assert len(mlflow.get_run(run.run_id).data.params) == 250


def test_the_first_stage_takes_over_the_run_that_mlflow_made(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    made = MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    assert tracking.active_experiment() == experiment
    with stage_run("magic", "m", "outer", {}) as outer, stage_run("train", "t", "inner", {}) as inner:
        pass
    assert outer.run_id == made
    assert mlflow.get_run(inner.run_id).data.tags["mlflow.parentRunId"] == made
    assert mlflow.get_run(inner.run_id).info.experiment_id == experiment


def test_nothing_points_outside_mlflow_run(store: Path) -> None:
    assert point_to("train", finished(), "a name", {}) is None
    assert len(all_runs()) == 1


def test_a_reused_result_is_pointed_to_by_the_run_that_mlflow_made(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_config(write_task(store))
    train_run = tr.train(config)
    magic_run = tr.magic(train_run, "0")
    experiment = mlflow.get_run(train_run).info.experiment_id
    for again, expected in ((lambda: tr.train(config), train_run), (lambda: tr.magic(train_run, "0"), magic_run)):
        made = MlflowClient().create_run(experiment).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        assert again() == expected
        pointing = mlflow.get_run(made)
        assert pointing.info.status == "FINISHED"
        assert pointing.data.tags[names.REUSES] == expected
        assert names.FINGERPRINT not in pointing.data.tags
        assert "MLFLOW_RUN_ID" not in os.environ
    # What the pointing run answers is the result itself.
    assert tr.load_scores(made).equals(tr.load_scores(magic_run))
    assert mlflow.get_run(made).data.tags["tracked_replay.input.train_run_id"] == train_run


def test_a_fingerprint_follows_each_of_its_parts() -> None:
    parts = {"stage": "a", "config": {"x": 1}, "data": "d", "code": "c", "inputs": {"i": "r"}}
    base = fingerprint(**parts)
    assert len(base) == 64
    assert fingerprint(**parts) == base
    changes = [{"stage": "b"}, {"config": {"x": 2}}, {"config": {"x": 1.0}}, {"data": "e"}, {"code": "d"}]
    changes += [{"inputs": {"i": "s"}}, {"inputs": {"j": "r"}}, {"more": [1]}]
    assert len({base, *(fingerprint(**parts | change) for change in changes)}) == len(changes) + 1


def test_the_code_digest_follows_a_files_content_and_not_its_folder(tmp_path: Path) -> None:
    for folder, content in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(content)
    first, moved, edited = (code_digest([tmp_path / folder / "own.py"]) for folder in "abc")
    assert first == moved
    assert len({first, edited, code_digest()}) == 3


def test_what_is_shown_of_a_store_holds_no_password(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = finished()
    path = tracking.ui_path(run_id)
    monkeypatch.setattr(tracking, "ui_path", lambda _: path)
    for uri, hint in (
        ("https://me:secret@host:5000/", f"https://me:***@host:5000/{path}"),
        ("http://127.0.0.1:5000", f"http://127.0.0.1:5000/{path}"),
        ("postgresql://me:secret@host/db", 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'),
        ("sqlite:////a b/c.db", "mlflow ui --backend-store-uri 'sqlite:////a b/c.db'"),
    ):
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda uri=uri: uri)
        assert tracking.ui_hint(run_id).startswith(hint)
        assert "secret" not in tracking.ui_hint(run_id)


@pytest.fixture
def server_process(store: Path) -> Iterator[tuple[str, int]]:
    """A real tracking server that serves artifacts, with a store of its own; the tests' tracking URI points to it.

    Yields:
        Its URL and its process group.
    """
    folder = store / "server side"
    folder.mkdir()
    os.replace(store / "mlflow.db", folder / "mlflow.db")
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
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"
    log = (store / "server.log").open("w")
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for attempt in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (store / "server.log").read_text()
            assert attempt < 239, (store / "server.log").read_text()
            time.sleep(0.25)
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        mlflow.set_experiment("over http")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
        log.close()


@pytest.fixture
def server(server_process: tuple[str, int]) -> str:
    return server_process[0]


@pytest.mark.slow
def test_a_server_that_stops_in_a_training_is_told_of_in_one_sentence(
    server_process: tuple[str, int], store: Path
) -> None:
    url, group = server_process
    task = write_task(
        store,
        more=f"""
        calls = 0

        def per_example_loss(self, outputs, labels):
            Own.calls += 1
            if Own.calls == 6:  # the first epoch is logged
                import os
                os.killpg({group}, 9)
            return super().per_example_loss(outputs, labels)
        """,
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    fields = f"data.task={task},train.batch_size=8,train.epochs=2,train.threads=1"
    command = [sys.executable, "-m", "tracked_replay", "train", "--set", fields]
    done = subprocess.run(command, env=environment, cwd=store, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    assert said[-1].startswith(f"error: API request to {url}/api/2.0/mlflow/runs/log-batch failed")
    assert f"could not be ended as FAILED: API request to {url}/api/2.0/mlflow/runs/update failed" in said[-2]


@pytest.mark.slow
def test_train_and_magic_over_http_give_the_bits_of_a_local_store(
    server: str, store: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    scratch = store / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    config = tiny_config(train__epochs=1, record__every=2)
    train_run = tr.train(config)
    assert mlflow.get_run(train_run).info.artifact_uri.startswith("mlflow-artifacts:")
    scores, sent = {}, [0]
    for mode in ("stream", "memory"):
        scores[mode] = tr.load_scores(tr.magic(train_run, "0-1", overrides={"replay.mode": mode}, force=True))
        log = (store / "server.log").read_text()
        sent.append(len(re.findall(r'"GET \S+/checkpoints/step-\d+\.safetensors ', log)) - sum(sent))
    assert scores["stream"].equals(scores["memory"])
    # The second replay finds the states 0, 2 and 3 here. What is sent again is read outside of the replay.
    assert sent[1] - sent[2] == len(list((store / "cache/fetched" / train_run / "checkpoints").iterdir())) == 3
    assert tracking.ui_hint(train_run).startswith(f"{server}/#/experiments/")
    with (
        pytest.raises(RecordingError, match=r"^nothing\.txt cannot be fetched"),
        artifacts_of(train_run)("nothing.txt"),
    ):
        pass
    with pytest.raises(RunError, match=r"has no such run$"):
        tr.load_scores("0" * 32)
    assert list(scratch.glob("tracked-replay-*")) == []  # fetched copies are gone

    local = store / "local"
    local.mkdir()
    (local / "mlflow.db").write_bytes(empty_database.read_bytes())
    mlflow.set_tracking_uri(f"sqlite:///{local}/mlflow.db")
    mlflow.set_experiment("local")
    here = tr.load_scores(tr.magic(tr.train(config), "0-1"))
    np.testing.assert_array_equal(here["score"].to_numpy(), scores["stream"]["score"].to_numpy())


def test_one_process_at_a_time_goes_on_with_an_interrupted_run(store: Path) -> None:
    client = MlflowClient()
    run_id = client.create_run(mlflow.get_experiment_by_name("tests").experiment_id).info.run_id
    client.set_terminated(run_id, "KILLED")
    with claimed(run_id) as nothing_to_go_on_from:
        assert not nothing_to_go_on_from
    (Workspace.of(run_id).folder / "resume").mkdir(parents=True)
    with claimed(run_id) as first, claimed(run_id) as second:
        assert first
        assert not second
        program = f"from tracked_replay.tracking import claimed\nwith claimed({run_id!r}) as other: print(other)"
        environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert said == "False\n"
    with claimed(run_id) as again:
        assert again
    client.set_terminated(run_id, "FINISHED")
    with claimed(run_id) as ended:
        assert not ended
    assert list((Workspace.of(run_id).folder / "resume").iterdir()) == []


@pytest.mark.parametrize("tag", ["x y", "x", "1e999 1e999", "99999999999999999999 0"])
def test_a_process_tag_that_is_none_stops_nobody(tag: str, store: Path) -> None:
    client = MlflowClient()
    run_id = client.create_run(mlflow.get_experiment_by_name("tests").experiment_id).info.run_id
    client.set_tag(run_id, names.PROCESS, f"{this_process().rsplit(' ', 2)[0]} {tag}")
    close_abandoned(mlflow.get_experiment_by_name("tests").experiment_id)
    assert client.get_run(run_id).info.status in ("RUNNING", "KILLED")


def test_a_store_that_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_text("#!/bin/sh\n" * 1000)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/store.db", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tracked_replay", "verify", "--train-run-id", "0" * 32]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "file is not a database" in next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1, 3), (2, 3, 3)])
def test_an_image_of_any_shape_is_logged(shape: tuple[int, ...], store: Path) -> None:
    with stage_run(names.TRAIN, "print", "images", {}) as run:
        run.image(np.zeros(shape, dtype=np.uint8), key="long")
    folder = Path(local_file_uri_to_path(mlflow.get_run(run.run_id).info.artifact_uri)) / "images"
    (picture,) = folder.glob("*.png")
    with Image.open(picture) as image:
        width, height = image.size
    assert max(height, width) == max(shape[:2])
    assert max(height, width) <= 100 * min(height, width)
