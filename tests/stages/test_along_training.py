"""Influence along training as a series of pictures: which examples at which step, and what MLflow is given."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import matplotlib.image
import mlflow
import numpy as np
import pytest
from stage_runs import folder_of
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.replay import PerStepWriter, Target, scores
from tracked_replay.replay.traversal import StepScores
from tracked_replay.report import Picture
from tracked_replay.stages import along_training
from tracked_replay.stages.along_training import FRAMES, SERIES, frame_steps, frames
from tracked_replay.stages.problem import Problem

STEPS, EXAMPLES = 11, 9
TARGETS = [Target.single(4), Target.mean([1, 2], "mean:1-2")]


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """(targets, steps, examples) scores of each step, which lie in several files under ``tmp_path``."""
    monkeypatch.setattr(scores, "STEPS_PER_FILE", 4)
    random = np.random.default_rng(3)
    found = np.zeros((2, STEPS, EXAMPLES))
    writer = PerStepWriter(tmp_path, TARGETS)
    for step in reversed(range(STEPS)):
        indices = random.integers(0, EXAMPLES, 5)  # an example may stand in a batch twice
        values = random.normal(size=(2, 5))
        for place, index in enumerate(indices):
            found[:, step, index] += values[:, place]
        writer.add(StepScores(step, indices, values))
    writer.flush()
    assert len(list((tmp_path / "scores/per_step").iterdir())) == 3
    return found


@pytest.mark.parametrize("steps", [[0, 3, 4, 10], list(range(STEPS)), [7]])
def test_a_frame_holds_the_strongest_of_all_steps_up_to_it(steps: list[int], added: np.ndarray, tmp_path: Path) -> None:
    found = frames(tmp_path, [-1, 4], steps, EXAMPLES, count=3)
    for target, rows in zip((4, -1), added, strict=True):
        assert [frame.step for frame in found[target]] == steps
        for frame in found[target]:
            total = rows[: frame.step + 1].sum(axis=0)
            order = sorted(range(EXAMPLES), key=lambda index, total=total: total[index])
            assert frame.helpful == [index for index in order if total[index] < 0][:3]
            assert frame.harmful == [index for index in order[::-1] if total[index] > 0][:3]
            assert sorted(frame.scores) == sorted({*frame.helpful, *frame.harmful})
            np.testing.assert_allclose(list(frame.scores.values()), total[list(frame.scores)], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, FRAMES, FRAMES + 1, 50, 10_000])
def test_steps_are_spread_from_the_first_to_the_last(steps: int) -> None:
    found = frame_steps(steps)
    assert (found[0], found[-1]) == (0, steps - 1)
    assert len(found) == min(steps, FRAMES)
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def series_of(run_id: str) -> dict[str, list[int]]:
    """Steps of each key of the image grid."""
    found: dict[str, list[int]] = {}
    for path in sorted((folder_of(run_id) / "images").glob("*.png")):
        match = re.fullmatch(r"(.+)[+%]step[+%](\d+)[+%]timestamp.+", path.name)
        assert match is not None, path.name
        found.setdefault(match[1], []).append(int(match[2]))
    return {key: sorted(steps) for key, steps in found.items()}


def test_a_run_shows_a_series_for_each_of_the_first_targets(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along_training, "SERIES", 3)
    train_run = tr.train(tiny_config(train__epochs=4))
    run_id = tr.magic(train_run, "3;mean:0-4;mean:7,8,9;1")
    steps = frame_steps(12)
    expected = {f"target-{name}-along-training": steps for name in ("3", "combination-1", "combination-2")}
    assert series_of(run_id) == expected | {"targets": [0, 1, 2, 3]}
    assert mlflow.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    assert "a slider over the training's steps" in mlflow.get_run(run_id).data.tags["mlflow.note.content"]
    sizes = Counter(
        matplotlib.image.imread(path).shape[:2] for path in (folder_of(run_id) / "images").glob("*along*.png")
    )
    assert len(sizes) == 1  # a slider over pictures of one size


def test_the_last_frame_is_of_the_scores_of_the_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(along_training, "frames", lambda *args: seen.append(frames(*args)) or seen[-1])
    run_id = tr.magic(config=tiny_config(train__epochs=2), targets="5")
    table = tr.load_scores(run_id)
    values = table["score"].to_numpy()
    last = seen[0][5][-1]
    order = np.argsort(values)
    assert last.helpful == order[: len(last.helpful)].tolist()
    assert last.harmful == order[::-1][: len(last.harmful)].tolist()
    np.testing.assert_allclose([last.scores[index] for index in last.helpful], values[last.helpful], rtol=1e-12)


def test_a_target_without_influence_gets_no_series(tmp_path: Path) -> None:
    class Refusing:
        def image(self, *_: object, **__: object) -> None:
            raise AssertionError

    writer = PerStepWriter(tmp_path, TARGETS[:1])
    writer.add(StepScores(0, np.arange(3), np.zeros((1, 3))))
    writer.flush()
    problem = Problem.load(tiny_config())
    picture = Picture(np.zeros((2, 2), dtype=np.uint8), "a", 4)
    along_training.log_along_training(Refusing(), tmp_path, problem, {TARGETS[0]: picture}, 1)  # type: ignore[arg-type]


def test_there_are_not_too_many_pictures() -> None:
    assert SERIES * FRAMES <= 120
