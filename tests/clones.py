"""A copy of what `mlflow run` needs of this project."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_project(folder: Path) -> Path:
    """Copy the project's own files, no tests and no documentation, to a folder that is not there yet; the folder."""
    folder.mkdir(parents=True)
    for name in ("MLproject", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("tracked_replay", "mlproject.d"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
