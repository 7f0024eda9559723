"""Runs that `mlflow run` makes for commands that make none of their own, or that are refused: name, words, status."""

from __future__ import annotations

import logging
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from stage_runs import command
from tiny import write_task

from tracked_replay import cli
from tracked_replay.errors import RunError
from tracked_replay.tracking import close_unused, find_finished, find_interrupted, names, resolve, stage_run
from tracked_replay.tracking.cleaning import EndedRun

NOTE = "mlflow.note.content"


@pytest.fixture
def made(store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run as `mlflow run` makes it before it starts a command."""
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    tags = {"mlflow.project.entryPoint": "something", "mlflow.runName": "brave-stoat-12"}
    run_id = str(MlflowClient().create_run(experiment, tags=tags).info.run_id)
    monkeypatch.setenv(cli.MADE_BY_MLFLOW, run_id)
    return run_id


def page(run_id: str) -> tuple[str, str, str]:
    """Name, status and description of a run that no stage took over."""
    run = mlflow.get_run(run_id)
    assert not [tag for tag in run.data.tags if tag.startswith(names.PREFIX)]
    return run.info.run_name, run.info.status, run.data.tags[NOTE]


def test_show_config_leaves_the_config_that_it_printed(made: str) -> None:
    code, out, _ = command("show_config", "--set", "train.epochs=3")
    assert code == 0
    name, status, text = page(made)
    assert (name, status) == ("show_config · digits", "FINISHED")
    assert text.startswith("`show_config` makes no run of its own. It printed:\n\n    ")
    assert f"    {next(line for line in out.splitlines() if line.startswith('epochs = 3'))}\n" in text
    assert len(text) < 8000  # what MLflow takes


def test_clean_leaves_what_it_removed(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.MADE_BY_MLFLOW)
    with stage_run("train", "f" * 64, "a name", {}) as run:
        MlflowClient().log_text(run.run_id, "x", "figures/a.txt")
    monkeypatch.setenv(cli.MADE_BY_MLFLOW, made)
    code, out, _ = command("clean", "--run-id", run.run_id, "--what", "figures", "--dry-run")
    assert code == 0
    name, status, text = page(made)
    assert (name, status) == (f"clean · {run.run_id[:8]}", "FINISHED")
    assert f"    would be removed from run {run.run_id}:" in text
    assert all(f"    {line}" in text for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["magic", "--targets", "7-3"], "targets: the range '7-3' runs backwards"),
        (["train", "--set", "train.epoch=1"], "train.epoch: unknown config field"),
        (["train", "--force", "maybe"], "force: found 'maybe'"),
        (["clean", "--run-id", "../x", "--what", "all"], "run_id: found '../x'"),
        (["verify"], "train_run_id: nothing was given"),
        (["compare", "--run-a", "0" * 32, "--run-b", "1" * 32], "run_a: found"),
        (["reproduce", "--run-id", "<img src=x>`*"], "run_id: found '<img src=x>`*'"),
    ],
)
def test_a_refused_command_leaves_its_sentence(arguments: list[str], sentence: str, made: str) -> None:
    code, out, err = command(*arguments)
    assert code in (1, 2)
    assert out == ""
    assert f"error: {sentence}" in err
    name, status, text = page(made)
    assert name.startswith(f"{arguments[0]} · refused: {sentence.split()[0]}")
    assert len(name) < 100
    assert status == "FAILED"
    assert text == f"`{arguments[0]}` was refused before it made a run:\n\n    {err.strip().splitlines()[-1]}\n"


def test_compared_files_leave_their_verdict_and_its_exit_code(made: str, store: Path) -> None:
    import safetensors.torch
    import torch

    for name, value in (("a", 1.0), ("b", 2.0)):
        safetensors.torch.save_file({"parameters/w": torch.tensor([value])}, store / f"{name}.safetensors")
    code, out, _ = command("compare", "--run-a", store / "a.safetensors", "--run-b", store / "b.safetensors")
    assert code == 1
    name, status, text = page(made)
    assert (name, status) == ("compare · a.safetensors · b.safetensors", "FINISHED")
    assert f"    {out.splitlines()[0]}\n" in text


def test_an_interrupted_command_is_killed_and_a_broken_one_failed(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise error

    from tracked_replay.stages import show_config

    monkeypatch.setattr(show_config, "describe", broken)
    error: BaseException = KeyboardInterrupt()
    assert command("show_config")[0] == 130
    assert page(made) == ("show_config · interrupted", "KILLED", "`show_config` was interrupted.")
    MlflowClient().update_run(made, status="RUNNING")
    error = ZeroDivisionError("once")
    with pytest.raises(ZeroDivisionError):
        cli.main(["show_config"])
    assert page(made) == ("show_config · failed: once", "FAILED", "`show_config` failed:\n\n    error: once\n")


def test_a_stage_keeps_the_run_that_it_took_over(made: str, store: Path) -> None:
    code, out, err = command("train", "--set", f"data.task={write_task(store)},train.epochs=1,train.batch_size=16")
    assert code == 0, err
    run = mlflow.get_run(made)
    assert made in out
    assert (run.data.tags[names.STAGE], run.info.status) == ("train", "FINISHED")
    assert run.info.run_name.startswith("train · Own")


def test_nobody_takes_it_for_a_result_and_no_other_run_is_touched(made: str) -> None:
    command("show_config")
    with pytest.raises(RunError, match="was not made by tracked_replay"):
        resolve(made, "train", "train_run_id")
    with pytest.raises(RunError):
        EndedRun.open(made)
    assert find_finished("show_config", "") is None
    assert not find_interrupted("show_config", "")
    ended = mlflow.get_run(made).data.tags
    close_unused(made, "another name", "other words", "FAILED")  # it has ended
    assert mlflow.get_run(made).data.tags == ended


def test_a_run_that_is_not_there_changes_no_outcome(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cli.MADE_BY_MLFLOW, "0" * 32)
    with caplog.at_level(logging.WARNING):
        code, out, err = command("show_config")
    assert code == 0
    assert f"the run {'0' * 32} that `mlflow run` made is left without a name: " in err
    assert "Traceback" not in err
    assert "epochs = " in out
    assert command("train", "--set", "train.epoch=1")[0] == 1


def test_other_commands_load_no_mlflow(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = "import sys; from tracked_replay.cli import main; main(['show_config']); print('mlflow' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, env={})
    assert done.stdout.endswith("\nFalse\n")
