"""MLproject and its environment file against the command line and pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tracked_replay.cli import STAGES
from tracked_replay.stages.parameters import fields_of

ROOT = Path(__file__).parents[1]
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))


def test_every_stage_is_an_entry_point() -> None:
    assert set(PROJECT["entry_points"]) == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_an_entry_point_has_the_parameters_of_its_stage_with_their_defaults(stage: str) -> None:
    written = PROJECT["entry_points"][stage]["parameters"]
    fields = fields_of(STAGES[stage][0])
    assert list(written) == list(fields)
    for name, field in fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        assert written[name] == {"type": "string", "default": default}, name


@pytest.mark.parametrize("stage", STAGES)
def test_an_entry_point_hands_every_parameter_to_the_command_of_its_name(stage: str) -> None:
    words = shlex.split(PROJECT["entry_points"][stage]["command"])
    assert words[:4] == ["python", "-m", "tracked_replay", stage]
    handed = dict(zip(words[4::2], words[5::2], strict=True))
    fields = fields_of(STAGES[stage][0])
    assert handed == {f"--{name.replace('_', '-')}": f"{{{name}}}" for name in fields}


def test_nothing_else_is_named_like_the_file_mlproject() -> None:
    # On some file systems MLflow would find a folder of that name first, and on others the two are one.
    assert [path.name for path in ROOT.iterdir() if path.name.lower() == "mlproject"] == ["MLproject"]


def test_the_environment_file_has_the_dependencies_of_pyproject() -> None:
    environment = yaml.safe_load((ROOT / PROJECT["python_env"]).read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert environment["dependencies"] == project["dependencies"]
    assert "python" not in environment  # MLflow then takes the running version and needs no pyenv


@pytest.mark.slow
def test_mlflow_run_takes_over_its_own_run_and_passes_odd_values(store: Path) -> None:
    import mlflow
    from tiny import write_task

    folder = store / "a folder's name"
    folder.mkdir()
    task = write_task(folder, name="my task.py")
    overrides = f"data.task={task},train.epochs=1,train.batch_size=16,train.threads=1"
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "train", "--env-manager", "local"]
    command += ["-P", f"set={overrides}", "-P", "log_level=WARNING"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"training run: (\w+)", done.stdout)
    run = mlflow.get_run(found)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.project.entryPoint"] == "train"  # MLflow made this run, and the stage wrote to it
    assert run.data.params["data.task"] == task
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert [other.info.run_id for other in runs] == [found]
