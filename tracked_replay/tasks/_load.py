"""From ``data.task`` to a task: built-in names, a user's file, a user's module."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError
from tracked_replay.tasks._cifar10 import Cifar10
from tracked_replay.tasks._digits import Digits
from tracked_replay.tasks._task import Task

BUILT_IN_TASKS: dict[str, type[Task]] = {task.name: task for task in (Digits, Cifar10)}
LONGEST_NAME = 200  # MLflow takes 500 for what is made of it
_OWN_FORM = "a task of your own as path/to/file.py:ClassName or module:ClassName"


def load_task(config: Config) -> Task:
    """The task that ``data.task`` names.

    A file is executed once for each content that it has had: an edited file gives a new class. Its folder is not put
    on the import path.

    Raises:
        ConfigError: unknown name, missing file, module or class, a class that is no complete :class:`Task`, or an
            error while the user's file is executed (chained).
    """
    spec = config.data.task
    if spec in BUILT_IN_TASKS:
        return BUILT_IN_TASKS[spec](config)
    # From the right: a path on Windows has a colon of its own.
    place, colon, class_name = spec.rpartition(":")
    if not colon or not place or not class_name.isidentifier():
        close = difflib.get_close_matches(spec, BUILT_IN_TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"data.task: found {spec!r}{hint}; allowed: {', '.join(BUILT_IN_TASKS)}, or {_OWN_FORM}",
        )
    module = _module_of_file(place) if place.endswith(".py") else _module_of_name(place)
    task = _class_in(module, place, class_name)(config)
    if not isinstance(task.name, str) or not 0 < len(task.name) <= LONGEST_NAME:
        raise ConfigError(
            f"data.task: {spec} has the name {task.name!r}; allowed: a text of 1 to {LONGEST_NAME} letters"
        )
    return task


def _class_in(module: ModuleType, place: str, class_name: str) -> type[Task]:
    found: Any = getattr(module, class_name, None)
    defined = [name for name, item in vars(module).items() if _is_task(item) and item is not Task]
    choice = f"allowed: a subclass of tracked_replay.Task; {place} has {', '.join(defined) or 'none'}"
    if found is None:
        raise ConfigError(f"data.task: found no class {class_name!r} in {place}; {choice}")
    if not _is_task(found):
        raise ConfigError(f"data.task: found {class_name!r} in {place}, which is no subclass of Task; {choice}")
    if inspect.isabstract(found):
        methods = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(
            f"data.task: found {class_name!r} in {place} without {methods}; allowed: a class with all of them"
        )
    return found


def _is_task(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Task)


def _module_of_file(place: str) -> ModuleType:
    if "\0" in place:
        raise ConfigError(f"data.task: found {place!r}, which holds a null character; allowed: {_OWN_FORM}")
    path = Path(place).expanduser().resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ConfigError(f"data.task: the file {place!r} {reason}; looked for {path}; allowed: {_OWN_FORM}") from error
    # Named after path and content, and compiled here rather than by an import: Python's bytecode cache goes by time
    # and size, and would run the old code of a file that was edited within the same second.
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"tracked_replay_task_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up while it is being executed
    try:
        # dont_inherit: this module's __future__ imports are not the user's.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    except Exception as error:
        del sys.modules[name]
        raise _failed(place, error) from error
    return module


def _module_of_name(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise ConfigError(
                f"data.task: found no module {place!r} on the import path (missing: {error.name}); allowed: {_OWN_FORM}"
            ) from error
        raise _failed(place, error) from error
    except Exception as error:
        raise _failed(place, error) from error


def _failed(place: str, error: Exception) -> ConfigError:
    return ConfigError(f"data.task: {place} failed when it was imported: {type(error).__name__}: {error}")
