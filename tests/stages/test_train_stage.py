"""Stage ``train`` under MLflow: what a run holds, and when it is reused."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from urllib.parse import quote

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from tiny import own_config, tiny_config, tiny_setup, write_task

import tracked_replay as tr
from tracked_replay.config import Config
from tracked_replay.recording import state_digest
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import SECTIONS, _going_on, open_recording
from tracked_replay.tracking import artifacts_of, names
from tracked_replay.training import train

CONFIG = tiny_config(record__every=2)


def files_of(run_id: str) -> dict[str, bytes]:
    root = Path(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(shared_store: Path) -> str:
    return tr.train(CONFIG)


def test_the_recording_is_that_of_a_training_without_mlflow(trained: str) -> None:
    recording = open_recording(trained)
    states = [record.before for record in train(tiny_setup(record__every=2))]
    assert recording.trace.state_digests == tuple(map(state_digest, states))
    assert recording.config == CONFIG
    assert [checkpoint.step for checkpoint in recording.checkpoints] == [0, 2, 4, 6, 8, 9]


def test_metrics_are_there_for_every_step_and_epoch(trained: str) -> None:
    client, trace = MlflowClient(), open_recording(trained).trace

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(trained, name))

    assert history("train/loss") == list(enumerate(trace.losses.tolist()))
    assert history("lr/weights") == list(enumerate(trace.learning_rates[:, 0].tolist()))
    assert history("lr/biases") == list(enumerate(trace.learning_rates[:, 1].tolist()))
    means = [(epoch, trace.losses[trace.epochs == epoch].mean()) for epoch in range(3)]
    assert history("epoch/train_loss") == means
    assert [epoch for epoch, _ in history("epoch/evaluation_measurement")] == [0, 1, 2]
    assert all(0 <= accuracy <= 1 for _, accuracy in history("epoch/evaluation_accuracy"))


def test_parameters_tags_and_data_sets_are_there_to_browse(trained: str) -> None:
    run = mlflow.get_run(trained)
    flat = {("master_seed" if name == "seed" else name): str(value) for name, value in CONFIG.flat().items()}
    assert flat == run.data.params
    assert run.data.tags[names.STAGE] == "train"
    assert run.data.tags[names.TASK] == "TinyTask"
    problem = Problem.load(CONFIG)
    assert run.data.tags[names.FINGERPRINT] == problem.fingerprint("train", SECTIONS, {})
    assert run.info.run_name == "train · TinyTask · seed 0"
    inputs = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert inputs.keys() == {"training", "evaluation"}
    assert inputs["training"].digest == problem.data.train.fingerprint()[:32]
    assert inputs["evaluation"].digest == problem.data.evaluation.fingerprint()[:32]
    assert json.loads(inputs["training"].profile)["features_shape"] == [48, 1, 4, 4]


def test_the_artifacts_of_the_contract_are_there(trained: str) -> None:
    found = files_of(trained)
    expected = {"config/config.toml", "seeds/derivations.json", "environment/environment.json", "digests.json"}
    expected |= {"checkpoints/manifest.parquet", "trace/part-00000.parquet", "figures/training.png", "config/data.json"}
    expected |= {f"checkpoints/step-{t:06}.safetensors" for t in (0, 2, 4, 6, 8, 9)} | {"rng/part-00000.safetensors"}
    assert expected <= found.keys()
    assert found["figures/training.png"].startswith(b"\x89PNG")
    assert Config.from_toml(found["config/config.toml"].decode()) == CONFIG
    assert found["config/task/tiny.py"] == (Path(__file__).parents[1] / "tiny.py").read_bytes()
    assert not [name for name in found if name.endswith((".part", ".tmp", ".pkl", ".pickle", ".pt"))]


def test_the_same_config_is_reused_and_force_gives_the_same_bytes(trained: str) -> None:
    assert tr.train(CONFIG) == trained
    assert tr.train(CONFIG.override({"data.root": "elsewhere", "replay.mode": "stream"})) == trained
    forced = tr.train(CONFIG, force=True)
    assert forced != trained
    first, second = files_of(trained), files_of(forced)
    assert first.keys() == second.keys()
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"environment/environment.json", "digests.json"}
    MlflowClient().delete_run(forced)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"train.lr": 0.051},
        {"record.every": 3},
        {"data.train_examples": 47},
        {"data.evaluation_examples": 9},
    ],
)
def test_another_seed_config_or_choice_of_data_is_another_run(change: dict, trained: str) -> None:
    first, second = (
        Problem.load(config).fingerprint("train", SECTIONS, {}) for config in (CONFIG, CONFIG.override(change))
    )
    assert first != second
    assert first == mlflow.get_run(trained).data.tags[names.FINGERPRINT]


def test_the_fingerprint_follows_data_and_code_of_a_users_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*changes: tuple[str, str], folder: Path = tmp_path) -> str:
        monkeypatch.chdir(folder)
        write_task(folder, *changes)
        return Problem.load(own_config("own.py:Own")).fingerprint("train", SECTIONS, {})

    base = found()
    assert found() == base
    (tmp_path / "moved").mkdir()
    assert found(folder=tmp_path / "moved") == base
    assert found(("nn.Tanh()", "nn.Tanh() ")) != base  # the code, even where it does the same
    assert found(("manual_seed(seed)", "manual_seed(seed + 1)")) != base
    data = tmp_path / "data.pt"
    reading = ("torch.randn(count, 5, generator=generator)", f"torch.load({str(data)!r})[:count]")
    prints = set()
    for value in (0.0, 1.0):
        torch.save(torch.full((40, 5), value), data)
        prints.add(found(reading))
    assert len(prints) == 2  # the same code, and another file of data


def test_the_fingerprint_follows_the_packages_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tracked_replay.tracking.fingerprint")
    before = Problem.load(CONFIG).fingerprint("train", SECTIONS, {})
    monkeypatch.setattr(module, "_package_digest", lambda: "other")
    assert Problem.load(CONFIG).fingerprint("train", SECTIONS, {}) != before


def test_a_task_of_ones_own_is_kept_with_the_run(store: Path) -> None:
    task = write_task(store)
    run_id = tr.train(own_config(task))
    with artifacts_of(run_id)("config/task/own.py") as path:
        assert path.read_bytes() == (store / "own.py").read_bytes()


def test_a_stage_nests_in_a_users_own_run(store: Path) -> None:
    config = own_config(write_task(store))
    with mlflow.start_run() as own:
        run_id = tr.train(config)
    assert mlflow.get_run(run_id).data.tags["mlflow.parentRunId"] == own.info.run_id
    assert mlflow.get_run(own.info.run_id).info.status == "FINISHED"


def test_nothing_is_left_behind_outside_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = store / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    tr.magic(tr.train(own_config(write_task(store))), "0")
    broken = write_task(store, more="def per_example_loss(self, o, y): return o.mean()", name="broken.py")
    with pytest.raises(tr.TrackedReplayError, match="per_example_loss"):
        tr.train(own_config(broken))
    assert list(scratch.iterdir()) == []
    assert {path.name for path in store.iterdir()} <= {"mlflow.db", "mlruns", "scratch", "own.py", "broken.py"}


def test_a_store_in_a_folder_with_odd_letters(tmp_path: Path, empty_database: Path) -> None:
    from stores import tracking_store

    folder = tmp_path / "it's 100% a ü folder"
    folder.mkdir()
    with tracking_store(folder, empty_database):
        mlflow.set_tracking_uri(f"sqlite:///{quote(str(folder))}/mlflow.db")  # MLflow's default looks like this
        mlflow.set_experiment("here")
        run_id = tr.train(own_config(write_task(folder)))
        table = tr.load_scores(tr.magic(run_id, "0"))
    assert np.isfinite(table["score"].to_numpy()).all()


@pytest.mark.parametrize(("step", "words"), [(0, "begins again"), (187, "going on at step 187")])
def test_what_is_said_of_an_interrupted_training_is_true_of_its_first_step_too(step: int, words: str) -> None:
    assert words in _going_on(step)
    assert "step 0" not in _going_on(step)
