"""Pictures of examples as the MLflow UI shows them: several as one, and thumbnails in the cells of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tracked_replay import report
from tracked_replay.recording.files import write_bytes
from tracked_replay.stages.problem import Problem

THUMBNAILS = "table_images"
SMALLEST, LARGEST = 96, 128  # pixels of the longer side; the UI does not enlarge small pictures
GAP = 1  # white pixels between two pictures


def tiled(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Several pictures as one, row by row on white.

    Args:
        pictures: at least one; uint8 of shape (H, W) or (H, W, 3), not all of them of one size.

    Returns:
        uint8 of shape (H', W') where all are grey, else (H', W', 3).
    """
    if any(picture.ndim == 3 for picture in pictures):
        pictures = [np.repeat(one[..., None], 3, axis=2) if one.ndim == 2 else one for one in pictures]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = (max(picture.shape[axis] for picture in pictures) + GAP for axis in (0, 1))
    whole = np.full((rows * height - GAP, columns * width - GAP, *pictures[0].shape[2:]), 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * height, place % columns * width
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """A small picture with every pixel as a block, so that it can be seen in the UI."""
    times = math.ceil(SMALLEST / max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def thumbnail(root: Path, problem: Problem, index: int) -> dict[str, str]:
    """Write the picture of a training example under ``root``, once.

    Args:
        root: folder that is logged as the run's artifacts.
        problem: task and data.
        index: the training example.

    Returns:
        The cell of a logged table that shows it, in MLflow's form. ``mlflow.Image`` would write two files for every
        cell, under names that are never the same.
    """
    name = f"{THUMBNAILS}/train-{index}.png"
    path = root / name
    if not path.exists():
        pixels = report.shrunk(problem.task.draw(problem.data.train.inputs[index].cpu()), LARGEST)
        write_bytes(path, report.png_bytes(enlarged(pixels)))
    return {"type": "image", "filepath": name, "compressed_filepath": name}
