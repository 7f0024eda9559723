import sys
import textwrap
import traceback
from pathlib import Path

import pytest
import torch

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError
from tracked_replay.tasks import Cifar10, Digits, TaskData, load_task

OWN_TASK = '''
"""Which half of the line is larger."""
import torch
from torch import nn

from tracked_replay.tasks import Examples, Task


class Halves(Task):
    label_names = ("left", "right")

    def train_examples(self):
        return self.examples(64, seed=1)

    def evaluation_examples(self):
        return self.examples(16, seed=2)

    def examples(self, count, seed):
        inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        return Examples(inputs, (inputs[:, 3:].sum(1) > inputs[:, :3].sum(1)).long())

    def model(self):
        return nn.Linear(6, 2)
'''


def load(spec: str):
    return load_task(Config().override({"data.task": spec}))


def write(path: Path, source: str = OWN_TASK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_built_in_names():
    assert type(load("digits")) is Digits
    assert type(load("cifar10")) is Cifar10


@pytest.mark.parametrize("folder", ["plain", "with a space", "ünï:colon"])
def test_a_file_of_forty_lines_is_enough(tmp_path, folder):
    path = write(tmp_path / folder / "my task.py")
    task = load(f"{path}:Halves")
    data = TaskData(task, task.config)
    batch = data.batch(torch.arange(8), 0)
    assert task.per_example_loss(task.model()(batch.inputs), batch.labels).shape == (8,)
    assert task.name == "Halves"
    assert task.source_files() == (path.resolve(),)
    assert not list(path.parent.glob("__pycache__"))


def test_relative_paths_count_from_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "tasks" / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert load("tasks/mine.py:Halves").name == "Halves"


def test_an_edited_file_is_executed_again_and_an_unchanged_one_is_not(tmp_path):
    path = write(tmp_path / "mine.py")
    first = load(f"{path}:Halves")
    assert type(load(f"{path}:Halves")) is type(first)
    write(path, OWN_TASK.replace('"left"', '"LEFT"'))  # the same size, in the same second
    assert load(f"{path}:Halves").label_names == ("LEFT", "right")


def test_a_module_on_the_import_path(tmp_path, monkeypatch):
    path = write(tmp_path / "own_package_for_test" / "halves.py")
    write(tmp_path / "own_package_for_test" / "__init__.py", "")
    monkeypatch.syspath_prepend(tmp_path)
    task = load("own_package_for_test.halves:Halves")
    assert task.source_files() == (path.resolve(),)
    with pytest.raises(ConfigError, match=r"no class 'Other' .* own_package_for_test\.halves has Halves"):
        load("own_package_for_test.halves:Other")


@pytest.mark.parametrize("spec", ["digit", "path/to/file.py", ":Class", "file.py:", "file.py:not a name"])
def test_an_unknown_name_lists_what_there_is(spec):
    with pytest.raises(ConfigError) as caught:
        load(spec)
    sentence = str(caught.value)
    assert f"data.task: found {spec!r}" in sentence
    assert (
        "allowed: digits, cifar10, or a task of your own as path/to/file.py:ClassName or module:ClassName" in sentence
    )
    assert ("did you mean digits?" in sentence) == (spec == "digit")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py' does not exist; looked for /"):
        load(f"{tmp_path}/nowhere.py:Halves")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.py' cannot be read"):
        load(f"{tmp_path}/folder.py:Halves")


def test_a_missing_class_lists_the_tasks_of_the_file(tmp_path):
    path = write(tmp_path / "mine.py", OWN_TASK + "\nclass Other(Halves):\n    pass\n")
    with pytest.raises(ConfigError, match=r"found no class 'Halfs' in .*; allowed: .* has Halves, Other$"):
        load(f"{path}:Halfs")
    with pytest.raises(ConfigError, match=r"has none$"):
        load(f"{write(tmp_path / 'empty.py', '')}:Halves")


@pytest.mark.parametrize("name", ["Examples", "nn"])
def test_a_class_that_is_no_task_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"found '{name}' in .*, which is no subclass of Task; .* has Halves"):
        load(f"{write(tmp_path / 'mine.py')}:{name}")


def test_an_incomplete_task_names_what_is_missing(tmp_path):
    path = write(tmp_path / "mine.py", OWN_TASK.replace("def model", "def network"))
    with pytest.raises(ConfigError, match=r"found 'Halves' in .* without model"):
        load(f"{path}:Halves")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_an_error_inside_the_users_file_is_reported_and_chained(tmp_path, source, message):
    path = write(tmp_path / "broken.py", source)
    modules = set(sys.modules)
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{path}:Halves")
    assert caught.value.__cause__ is not None
    assert str(path) in "".join(traceback.format_exception(caught.value.__cause__))
    assert not {name for name in set(sys.modules) - modules if name.startswith("tracked_replay_task_")}


def test_an_error_inside_the_users_module_is_told_from_a_missing_module(tmp_path, monkeypatch):
    write(tmp_path / "broken_module_for_test.py", "import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="broken_module_for_test failed when it was imported: ModuleNotFoundError"):
        load("broken_module_for_test:Halves")
    with pytest.raises(ConfigError, match=r"found no module 'no_such\.module' on the import path \(missing: no_such\)"):
        load("no_such.module:Halves")
    with pytest.raises(ConfigError, match="failed when it was imported"):
        load(".relative:Halves")


def test_the_users_file_does_not_inherit_future_imports(tmp_path):
    source = OWN_TASK + "\ndef typed(x: int): ...\nassert typed.__annotations__ == {'x': int}\n"
    assert load(f"{write(tmp_path / 'mine.py', source)}:Halves")
