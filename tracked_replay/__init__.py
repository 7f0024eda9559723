"""Train a model under MLflow once, then ask exact questions about its training data by run ID.

>>> import tracked_replay as tr
>>> train_run = tr.train(tr.Config.resolve("digits"))          # doctest: +SKIP
>>> magic_run = tr.magic(train_run_id=train_run, targets="0-3")  # doctest: +SKIP
>>> scores = tr.load_scores(magic_run)                          # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracked_replay.config import Config
    from tracked_replay.determinism import verify_reproducibility
    from tracked_replay.errors import TrackedReplayError
    from tracked_replay.stages.compare import compare
    from tracked_replay.stages.compare_influence import compare_influence
    from tracked_replay.stages.counterfactual import counterfactual
    from tracked_replay.stages.expectations import require_expected, restore_generators
    from tracked_replay.stages.influence import load_scores
    from tracked_replay.stages.lds import run_lds as lds
    from tracked_replay.stages.magic import run_magic as magic
    from tracked_replay.stages.reproduce import reproduce
    from tracked_replay.stages.suspects import run_suspects as suspects
    from tracked_replay.stages.train import run_train as train
    from tracked_replay.tasks import Examples, Task

__version__ = "0.1.0"

# Imported when first asked for, so that `tracked-replay --help` does not wait for torch and MLflow.
_PUBLIC = {
    "Config": ("tracked_replay.config", "Config"),
    "Examples": ("tracked_replay.tasks", "Examples"),
    "Task": ("tracked_replay.tasks", "Task"),
    "TrackedReplayError": ("tracked_replay.errors", "TrackedReplayError"),
    "compare": ("tracked_replay.stages.compare", "compare"),
    "compare_influence": ("tracked_replay.stages.compare_influence", "compare_influence"),
    "counterfactual": ("tracked_replay.stages.counterfactual", "counterfactual"),
    "lds": ("tracked_replay.stages.lds", "run_lds"),
    "load_scores": ("tracked_replay.stages.influence", "load_scores"),
    "magic": ("tracked_replay.stages.magic", "run_magic"),
    "reproduce": ("tracked_replay.stages.reproduce", "reproduce"),
    "require_expected": ("tracked_replay.stages.expectations", "require_expected"),
    "restore_generators": ("tracked_replay.stages.expectations", "restore_generators"),
    "suspects": ("tracked_replay.stages.suspects", "run_suspects"),
    "train": ("tracked_replay.stages.train", "run_train"),
    "verify_reproducibility": ("tracked_replay.determinism", "verify_reproducibility"),
}

__all__ = [
    "Config",
    "Examples",
    "Task",
    "TrackedReplayError",
    "__version__",
    "compare",
    "compare_influence",
    "counterfactual",
    "lds",
    "load_scores",
    "magic",
    "reproduce",
    "require_expected",
    "restore_generators",
    "suspects",
    "train",
    "verify_reproducibility",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps a subpackage from taking the place of the function of the same name (`lds`) once it is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
