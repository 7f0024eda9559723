import importlib.metadata
import json
import os
import platform
import re
import tomllib
from pathlib import Path

import pytest
import torch

import tracked_replay.determinism._environment as environment
from tracked_replay.determinism import deterministic_flags, environment_record, set_global_deterministic_state


@pytest.fixture(scope="module")
def record() -> dict:
    return environment_record()


def test_json_holds_the_whole_record(record):
    assert json.loads(json.dumps(record)) == record


def test_the_projects_dependencies_are_all_recorded(record):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    names = {re.split(r"[<>=!~ \[;]", entry)[0] for entry in project["project"]["dependencies"]}
    assert set(record["packages"]["project"]) == names
    assert record["packages"]["project"]["torch"] == importlib.metadata.version("torch")


def test_installed_distributions_are_sorted(record):
    names = list(record["packages"]["installed"])
    assert names == sorted(names, key=lambda name: (name.lower(), name))
    for name, version in record["packages"]["installed"].items():
        assert version == importlib.metadata.version(name), name
    assert len(names) > 50


def test_a_packages_name_is_found_however_it_is_written(monkeypatch):
    monkeypatch.setattr(environment, "_DEPENDENCIES", ("Scikit_Learn", "typing.extensions"))
    found = environment_record()["packages"]["project"]
    assert found["Scikit_Learn"] == importlib.metadata.version("scikit-learn")
    assert found["typing.extensions"] == importlib.metadata.version("typing_extensions")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_DEPENDENCIES", ("torch", "no-such-distribution"))
    assert environment_record()["packages"]["project"]["no-such-distribution"] is None


def test_python_and_torch_are_described(record):
    assert record["python"]["version"].startswith(platform.python_version())
    assert record["torch"]["version"] == torch.__version__
    assert record["torch"]["build"] == torch.__config__.show()
    assert record["blas"]["numpy"]["name"]


def test_flags_and_threads_are_those_in_force():
    set_global_deterministic_state(0, threads=1)
    record = environment_record()
    assert record["determinism"] == deterministic_flags()
    assert record["threads"]["intra_op"] == 1


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux tells the processor's flags in /proc/cpuinfo")
def test_the_processors_flags_are_recorded(record):
    assert isinstance(record["cpu"]["flags"], list)
    assert record["cpu"]["flags"]
    assert record["cpu"]["logical_cores"] >= 1


def test_a_platform_that_does_not_tell_its_flags_is_recorded_as_such(monkeypatch):
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(environment.Path, "read_text", missing)
    assert environment._cpu()["flags"] == "unknown on this platform"
    assert environment._nvidia_driver() in (None, "unknown on this platform")


def test_the_drivers_version_is_read(monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: gcc 13\n"
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    monkeypatch.setattr(environment.Path, "read_text", lambda *_, **__: text)
    assert environment._nvidia_driver() == "580.95.05"


def test_only_variables_that_change_results_are_recorded(monkeypatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    kept = {"OMP_NUM_THREADS": "2", "MKL_CBWR": "AVX2", "KMP_AFFINITY": "none", "TORCH_LOGS": "x", "PYTORCH_NO": "1"}
    dropped = {"AWS_SECRET_ACCESS_KEY": "x", "MLFLOW_TRACKING_PASSWORD": "x", "HOME": "/x", "PYTORCH_HUB_TOKEN": "x"}
    for name, value in {**kept, **dropped}.items():
        monkeypatch.setenv(name, value)
    assert environment._variables() == kept
