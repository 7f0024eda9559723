"""The command line: what a user types, what comes back, and what is left behind."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import write_task

import tracked_replay as tr
from tracked_replay import __version__
from tracked_replay.cli import STAGES, main
from tracked_replay.tracking.runs import TRAINING_VIEW

ROOT = Path(__file__).parents[1]
FEW_STEPS = "train.epochs=2,train.batch_size=16,train.threads=1,train.dtype=float64"
MANY_STEPS = FEW_STEPS.replace("epochs=2", "epochs=200")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def run_id(self) -> str:
        return re.findall(r"run: (\w+)", self.out)[-1]

    @property
    def error(self) -> str:
        """The one line on standard error."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.out == ""
        return self.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator:
    def run(*arguments: object) -> Result:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    logger = logging.getLogger("tracked_replay")
    level, propagate = logger.level, logger.propagate
    yield run
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = propagate


def clean_environment() -> dict[str, str]:
    """Without what MLflow left in this process's environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}


def in_a_process(*arguments: object, **options: object) -> subprocess.Popen:
    env = {"PYTHONPATH": str(ROOT)} | options.pop("env", os.environ)
    command = [sys.executable, "-m", "tracked_replay", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def statuses() -> list[str]:
    import mlflow

    return [run.info.status for run in mlflow.search_runs(search_all_experiments=True, output_format="list")]


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_parameter(stage: str, call) -> None:
    result = call(stage, "--help")
    assert result.code == 0
    for name, field in STAGES[stage][0].model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.out
        assert field.description
        assert field.description.split()[0] in result.out
    assert f"Example: tracked-replay {stage}" in result.out


def test_help_names_every_stage_and_comes_without_arguments_too(call) -> None:
    result = call("--help")
    assert result.code == 0
    assert all(stage in result.out for stage in STAGES)
    assert call().err.strip() == result.out.strip()
    assert call("--version").out.split()[-1] == __version__


@pytest.mark.parametrize("option", ["--data-root", "--data_root"])
def test_dashes_and_underscores_are_the_same(option: str, call) -> None:
    assert 'root = "somewhere"' in call("show_config", option, "somewhere").out


def test_empty_values_mean_not_given(call) -> None:
    empty = [word for name in STAGES["show_config"][0].model_fields for word in (f"--{name}", "")]
    assert call("show_config", *empty).out == call("show_config").out != ""


@pytest.mark.parametrize("force", [["--force"], ["--force", "true"], ["--force", "1"], ["--force", "TRUE"]])
def test_force_is_a_flag_or_takes_a_truth_value(force: list[str], call) -> None:
    from tracked_replay.stages.parameters import TrainParameters, parse

    assert call("show_config", *force).code == 0
    assert parse(TrainParameters, {"force": force[-1] if len(force) > 1 else "true"}).force


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--preset", "nope"], 1, "preset: found 'nope'; allowed: cifar10"),
        (["train", "--set", "train.lr=nan"], 1, "train.lr: found 'nan'; allowed: finite number > 0"),
        (["train", "--set", "train.lr"], 1, "set: found 'train.lr'; allowed: field=value pairs"),
        (["train", "--seed", "abc"], 1, "seed: found 'abc'; allowed: integer >= 0"),
        (["train", "--force", "maybe"], 1, "force: found 'maybe'; allowed: true or false"),
        (["train", "--log-level", "LOUD"], 1, "log_level: found 'LOUD'; allowed: DEBUG, INFO, WARNING, ERROR"),
        (["train", "--log-file", "/proc/none/x.log"], 1, "log_file: found '/proc/none/x.log', which cannot be written"),
        (["train", "--log-file", "/"], 1, "log_file: found '/', which cannot be written (Is a directory)"),
        (["train", "--set", "train.device=cuda:99"], 1, "train.device: found 'cuda:99'"),
        (["train", "--set", "train.batch_size=2000"], 1, "train.batch_size: found 2000, which is more than the 1437"),
        (["train", "--preset", "cifar10"], 1, "cifar10: found an empty data.root"),
        (["train", "--preset", "cifar10", "--data-root", "/nowhere"], 1, "cifar10: no cifar-10-batches-py in /nowhere"),
        (["train", "--set", "data.task=none.py:Own"], 1, "data.task: the file 'none.py' does not exist"),
        (["magic", "--targets", "360"], 1, "targets: found 360; allowed: 0 to 359"),
        (["magic", "--targets", "7-3"], 1, "targets: the range '7-3' runs backwards; allowed: 3-7"),
        (["magic", "--targets", "1,1"], 1, "targets: 1 is given twice in '1,1'"),
        (["magic", "--targets", " "], 1, "targets: nothing was given"),
        (["magic", "--targets", "one"], 1, "targets: found 'one'; allowed: an index (21)"),
        (["magic", "--targets", "-1"], 1, "targets: found '-1'; allowed: an index (21)"),
        (["magic", "--replay-mode", "disk"], 1, "replay_mode: found 'disk'; allowed: auto, memory, stream"),
        (["magic", "--replay-mode", "memory", "--set", "replay.mode=stream"], 1, "but set says replay.mode=stream"),
        (["magic", "--train-run-id", "0" * 32], 1, f"train_run_id: found '{'0' * 32}', but sqlite:///"),
        (["magic", "--train-run-id", "../x"], 1, "train_run_id: found '../x'; allowed: the ID of a run"),
        (["magic", "--train-run-id", "a\nb'\""], 1, r"""train_run_id: found 'a\nb\'"'; allowed: the ID of a run"""),
        (["magic", "--train-run-id", "x" * 9000], 1, "…; allowed: the ID of a run"),
        (["magic", "--train-run-id", "0" * 32, "--seed", "3"], 1, "seed: found '3', but the recorded run"),
        (["train", "--epochs", "3"], 2, "No such option"),
        (["train", "extra"], 2, "unexpected extra argument"),
        (["train", "--seed"], 2, "requires an argument"),
        (["trian"], 2, "No such command 'trian'"),
    ],
)
def test_a_users_error_is_one_line_and_leaves_no_run(
    arguments: list[str], code: int, message: str, store, call
) -> None:
    result = call(*arguments)
    assert message in result.error
    assert len(result.error) < 1500
    assert result.code == code
    assert statuses() == []


def test_a_very_long_error_keeps_what_was_found_and_what_is_allowed(store, call) -> None:
    result = call("show_config", "--set", f"train.schedule={'x' * 9000}")
    assert result.code == 1
    assert result.err.startswith("error: train.schedule: found 'xxx")
    assert "allowed: " in result.err
    assert len(result.err) < 1600


def test_the_traceback_of_an_error_is_there_where_it_is_asked_for(store, call) -> None:
    task = write_task(store, ("return Examples(", "raise KeyError('no\\nsuch'); Examples("))
    quiet = call("train", "--set", f"data.task={task}").error
    assert quiet.startswith(f"data.task: {task} failed in examples, {task.removesuffix(':Own')}, line ")
    assert "KeyError" in quiet
    loud = call("train", "--set", f"data.task={task}", "--log-level", "debug").err
    assert "Traceback" in loud
    assert loud.splitlines()[-1] == f"error: {quiet}"


def test_an_error_of_the_tracking_store_is_one_line(store, call, monkeypatch) -> None:
    import mlflow

    task = write_task(store)
    mlflow.set_tracking_uri("nosuch://user:secret@host")
    result = call("train", "--set", f"data.task={task},{FEW_STEPS}")
    assert result.code == 1
    assert "nosuch" in result.error


def test_an_error_of_the_package_itself_keeps_its_traceback(store, call, monkeypatch) -> None:
    import tracked_replay.stages.train as stage

    monkeypatch.setattr(stage, "log_problem", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train", "--set", "train.epochs=1")
    assert statuses() == ["FAILED"]


def test_train_then_magic_then_both_again(store: Path, call) -> None:
    log = store / "logs here" / "run.log"
    common = ["--set", f"data.task={write_task(store)},{FEW_STEPS}"]
    trained = call("train", *common)
    assert trained.code == 0
    assert f"tracked-replay magic --train-run-id {trained.run_id} --targets 0-7" in trained.out
    again = call("train", *common, "--log-file", log)
    assert again.run_id == trained.run_id
    assert f"reusing training run {trained.run_id}" in again.err
    assert f"reusing training run {trained.run_id}" in log.read_text()

    named = call("magic", "--train-run-id", trained.run_id, "--targets", "0-1")
    found = call("magic", *common, "--targets", "0-1")
    assert found.run_id == named.run_id
    assert "reusing magic run" in found.err
    forced = call("magic", "--train-run-id", trained.run_id, "--targets", "0-1", "--force", "--replay_mode", "stream")
    assert forced.run_id not in (named.run_id, trained.run_id)
    for result in (trained, again, named, found, forced):
        *said, run, link, then = result.out.splitlines()
        assert [run.partition(" run: ")[0], link.split(":")[0], then.split(":")[0]] in (
            ["training", "look at it", "next"],
            ["magic", "look at it", "next"],
        )
        scores = [] if run.startswith("training") else tr.load_scores(result.run_id).to_pylist()
        for target, line in enumerate(said):
            own = sorted((row["score"], row["train_index"]) for row in scores if row["target"] == target)
            (low, helps), (high, harms) = own[0], own[-1]
            assert line == (
                f"target {target}: training example {helps} lowers it most ({low:+.3g}), "
                f"training example {harms} raises it most ({high:+.3g})"
            )
        assert len(said) == len({row["target"] for row in scores})
    assert statuses() == ["FINISHED"] * 3


def test_an_empty_targets_parameter_means_the_default(store: Path, call) -> None:
    import tracked_replay as tr

    result = call("magic", "--set", f"data.task={write_task(store)},{FEW_STEPS}", "--targets", "")
    assert set(tr.load_scores(result.run_id)["target"].to_pylist()) == {0}


def test_a_fresh_process_says_nothing_of_mlflows_own(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's name"
    folder.mkdir()
    process = in_a_process(
        "train",
        "--set",
        f"data.task={write_task(folder)},{FEW_STEPS}",
        "--log-level",
        "warning",
        cwd=folder,
        env=clean_environment(),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    assert (folder / "mlflow.db").is_file()  # MLflow's own default, in the working directory


SLOW_TASK = """
def prepare(self, inputs, dtype):
    import time
    time.sleep(0.2)
    return inputs.to(dtype)
"""


def started(store: Path, stage: str) -> subprocess.Popen:
    """A stage whose run is open and takes steps."""
    import mlflow

    task = write_task(store, more=SLOW_TASK, name=f"{stage}.py")
    process = in_a_process(stage, "--set", f"data.task={task},{MANY_STEPS}")
    expected = {"train": ["train"], "magic": ["magic", "train"]}[stage]
    for _ in range(600):
        runs = mlflow.search_runs(output_format="list")
        if sorted(run.data.tags.get("tracked_replay.stage", "") for run in runs) == expected and any(
            "epoch/train_loss" in run.data.metrics for run in runs
        ):
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the stage did not start")


@pytest.mark.parametrize(("stage", "number"), [("train", signal.SIGTERM), ("magic", signal.SIGINT)])
def test_an_interrupted_stage_closes_its_runs_as_killed(stage: str, number: int, store: Path) -> None:
    process = started(store, stage)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        err.splitlines()[-1]
        == "interrupted; a run that was open is KILLED; train, magic and lds go on where they were when given again"
    )
    assert "Traceback" not in err
    assert set(statuses()) == {"KILLED"}


def test_further_signals_do_not_break_off_the_closing_of_the_runs(store: Path) -> None:
    process = started(store, "magic")
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # `mlflow run` answers Ctrl-C with a SIGTERM of its own
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    process.communicate(timeout=60)
    assert statuses() == ["KILLED", "KILLED"]


def test_a_killed_process_leaves_a_run_that_is_never_reused(store: Path, call) -> None:
    process = started(store, "train")
    process.kill()
    process.communicate(timeout=60)
    assert statuses() == ["RUNNING"]
    import mlflow

    (left,) = mlflow.search_runs(output_format="list")
    task = f"{store / 'train.py'}:Own"
    result = call("magic", "--train-run-id", left.info.run_id)
    assert result.error == (
        f"train_run_id: run {left.info.run_id} is RUNNING; allowed: a FINISHED run of stage 'train'"
    )
    (store / "train.py").write_text((store / "train.py").read_text().replace("time.sleep(0.2)", "pass"))
    done = call("train", "--set", f"data.task={task},{FEW_STEPS}")
    assert done.run_id != left.info.run_id


@pytest.mark.slow
def test_the_printed_command_serves_the_run_in_a_folder_with_odd_letters(tmp_path: Path) -> None:
    import json
    import socket
    import urllib.request

    folder = tmp_path / "it's 100% a folder"
    folder.mkdir()
    set_ = f"data.task={write_task(folder)},{FEW_STEPS}"
    env = clean_environment()
    command = [sys.executable, "-m", "tracked_replay", "train", "--set", set_]
    out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
    (shown,) = re.findall(r"look at it: +(.*)  then  http://127.0.0.1:5000/(#.*)", out)
    words = shlex.split(shown[0])
    assert words[:3] == ["mlflow", "ui", "--backend-store-uri"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port), "--workers", "1"],
            cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        run_id = shown[1].rsplit("/", 1)[1].removesuffix(TRAINING_VIEW)
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}"
        for attempt in range(120):
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    run = json.load(answer)["run"]
                break
            except OSError:
                assert attempt < 119, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert run["info"]["status"] == "FINISHED"
    assert f"#/experiments/{run['info']['experiment_id']}/runs/{run_id}{TRAINING_VIEW}" == shown[1]
