"""Influence along training as a series of pictures for a target, which the MLflow UI shows with a slider over steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracked_replay import report
from tracked_replay.replay import Target
from tracked_replay.replay.scores import PER_STEP
from tracked_replay.stages.influence_report import extremes, key_of, measures_loss, training_picture
from tracked_replay.stages.problem import Problem
from tracked_replay.tracking import StageRun

FRAMES = 8  # of a target
SERIES = 12  # targets that get one: a picture takes MLflow some 10 ms, and a tracking server three requests


class Frame(NamedTuple):
    """The strongest examples of a target up to a step.

    Attributes:
        step: the last step that counts.
        helpful: training indices, strongest first.
        harmful: likewise.
        scores: (training examples,) of those, by index, summed over the steps up to and including ``step``.
    """

    step: int
    helpful: Sequence[int]
    harmful: Sequence[int]
    scores: Mapping[int, float]


def log_along_training(
    run: StageRun, per_step_root: Path, problem: Problem, targets: Mapping[Target, report.Picture], num_steps: int
) -> None:
    """Log a series of pictures for each of the first :data:`SERIES` targets, at most :data:`FRAMES` of each.

    Args:
        run: gets the images ``target-NAME-along-training``.
        per_step_root: folder that holds ``scores/per_step``.
        problem: task and data.
        targets: with their pictures.
        num_steps: steps of the training.
    """
    chosen = dict(list(targets.items())[:SERIES])
    series = frames(per_step_root, [target.id for target in chosen], frame_steps(num_steps), problem.data.num_train)
    for target, picture in chosen.items():
        largest = max((abs(score) for frame in series[target.id] for score in frame.scores.values()), default=0.0)
        for frame in series[target.id] if largest else ():
            helpful, harmful = (
                [training_picture(problem, index, frame.scores[index]) for index in side]
                for side in (frame.helpful, frame.harmful)
            )
            pixels = report.training_frame(
                picture,
                helpful,
                harmful,
                step=frame.step,
                last_step=num_steps - 1,
                largest=largest,
                is_loss=measures_loss(problem.task),
            )
            # By ID: what a combination is called may hold what MLflow takes in no key.
            run.image(pixels, key=f"target-{key_of(target)}-along-training", step=frame.step)


def frame_steps(num_steps: int) -> list[int]:
    """At most :data:`FRAMES` steps, evenly spread, the first and the last of the training among them."""
    return sorted({int(step) for step in np.linspace(0, num_steps - 1, FRAMES).round()})


def frames(
    root: Path, targets: Sequence[int], steps: Sequence[int], num_train: int, count: int = report.FRAME_EXAMPLES
) -> dict[int, list[Frame]]:
    """The strongest examples of some targets after some steps, in one pass over the files.

    Args:
        root: folder that holds ``scores/per_step``.
        targets: IDs.
        steps: rising.
        num_train: training examples.
        count: how many of each side.

    Returns:
        A frame a step, by target ID.
    """
    found: dict[int, list[Frame]] = {target: [] for target in targets}
    for step, sums in _sums(root, targets, steps, num_train):
        for target, scores in sums.items():
            helpful, harmful = (side.tolist() for side in extremes(scores, count))
            shown = {index: float(scores[index]) for index in (*helpful, *harmful)}
            found[target].append(Frame(step, helpful, harmful, shown))
    return found


def _sums(
    root: Path, targets: Collection[int], steps: Sequence[int], num_train: int
) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """For each of the steps the scores (training examples,) summed up to it by target: always the same arrays."""
    sums = {target: np.zeros(num_train) for target in targets}
    waiting = list(steps)
    for path in sorted((root / PER_STEP).glob("part-*.parquet"), reverse=True):  # written from the last step on
        table = pq.read_table(path, filters=pc.field("target").isin(list(targets))).combine_chunks()
        lists = table["indices"].chunk(0)
        starts, held = lists.offsets.to_numpy(), lists.values.to_numpy()
        scores = table["scores"].chunk(0).values.to_numpy()
        ids, at = table["target"].to_numpy(), table["step"].to_numpy()
        for row in np.argsort(at, kind="stable"):
            while waiting and waiting[0] < at[row]:
                yield waiting.pop(0), sums
            part = slice(starts[row], starts[row + 1])
            np.add.at(sums[int(ids[row])], held[part], scores[part])
    for step in waiting:
        yield step, sums
