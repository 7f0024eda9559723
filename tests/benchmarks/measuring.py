"""What the benchmarks share: rows, timing in turn, options on the command line, a training on noise and its replay."""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracked_replay.config import Config
from tracked_replay.recording import Recorder, Recording, folder_source, write_json
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target
from tracked_replay.tasks import Examples, ResNet9, Task
from tracked_replay.training import TrainingSetup, set_up, train

STEPS_AN_EPOCH = 10


@dataclass(frozen=True)
class Row:
    """A number that was measured.

    Attributes:
        key: name of its metric inside the benchmark.
        what: the number in words.
        values: it in each round.
        unit: of it; empty for a ratio.
        at_most: what it should not exceed; None where nothing is promised.
        parameters: the sizes it was measured at.
        raw: the single measurements of every round that it was made of, by what was measured.
    """

    key: str
    what: str
    values: Sequence[float]
    unit: str = ""
    at_most: float | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    raw: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def missed(self) -> bool:
        """Whether it is more than it should be."""
        return self.at_most is not None and self.value > self.at_most

    def cells(self) -> tuple[str, str, str, str]:
        """What, value, smallest and largest round, and what it should be at most, as people read them."""
        spread = f"{shown(min(self.values))} to {shown(max(self.values))} in {len(self.values)}"
        return (
            self.what,
            f"{shown(self.value)} {self.unit}".strip(),
            spread if len(self.values) > 1 else "",
            "" if self.at_most is None else f"≤ {self.at_most:g}{' (missed)' if self.missed else ''}",
        )


def shown(value: float) -> str:
    """Three digits that count, or a whole number."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(6, max(0, digits))}f}".replace("-", "−")


def run_alone(measure: Callable[..., list[Row]], quick: Mapping[str, object]) -> None:
    """Measure with the options of the command line, one for each parameter of ``measure``, and print the rows.

    Args:
        measure: the benchmark; its parameters all have defaults, which are its full size.
        quick: parameters of ``--quick``.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(inspect.getmodule(measure)), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(measure).parameters.items():
        kind, default = type(parameter.default), parameter.default
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"default: {default}")
    parser.add_argument("--quick", action="store_true", help="at toy size: shows that it runs, measures nothing")
    parser.add_argument("--rows", type=Path, help="JSON file that all rounds are written to")
    options = vars(parser.parse_args())
    is_quick, path = options.pop("quick"), options.pop("rows")
    rows = measure(**(dict(quick) if is_quick else {}) | options)
    rows = [replace(row, at_most=None) for row in rows] if is_quick else rows  # nothing is promised at toy size
    for row in rows:
        what, value, spread, limit = row.cells()
        print(f"{what}: {value}{f' ({spread} rounds)' if spread else ''}{f', goal {limit}' if limit else ''}")
    if path:
        write_json(path, [asdict(row) for row in rows])


def numbers(text: str) -> list[int]:
    """``"1,4,8"`` as whole numbers."""
    return [int(part) for part in text.split(",")]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, until the device is done."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every work in each round.

    Every other round goes through the works backwards, so that a drift of the machine's speed cancels.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds):
        for name in list(works) if round_ % 2 == 0 else reversed(list(works)):
            times[name].append(seconds(works[name]))
    return times


def quotients(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> list[float]:
    """Round by round ``factor · above ÷ below``."""
    return [factor * one / other for one, other in zip(above, below, strict=True)]


class RandomImages(Task):
    """CIFAR-shaped noise; only its cost matters."""

    label_names = tuple("0123456789")
    side = 32

    def train_examples(self) -> Examples:
        """As many as one epoch takes."""
        generator = torch.Generator().manual_seed(0)
        count = self.config.train.batch_size * STEPS_AN_EPOCH
        images = torch.randint(256, (count, 3, self.side, self.side), dtype=torch.uint8, generator=generator)
        return Examples(images, torch.randint(10, (count,), generator=generator))

    def evaluation_examples(self) -> Examples:
        """A few."""
        return self.train_examples().subset(10, field="")

    def prepare(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pixels to −1 … 1."""
        return inputs.to(dtype) / 127.5 - 1

    def model(self) -> ResNet9:
        """The published variant at the config's width."""
        return ResNet9(3, 10, width=self.config.model.width, final_scale=0.3)


class SmallImages(RandomImages):
    """Noise of 8×8 pixels: a step is cheap and its state as large as ever."""

    side = 8


def noise_setup(
    width: float,
    batch: int,
    steps: int,
    threads: int,
    device: str = "cpu",
    task: type[RandomImages] = RandomImages,
    **changes: Any,
) -> TrainingSetup:
    """A training on noise; ``record__every=5`` sets ``record.every``. ``steps`` is rounded up to whole epochs."""
    config = Config().override(
        {
            "model.width": width,
            "train.batch_size": batch,
            "train.epochs": -(-steps // STEPS_AN_EPOCH),
            "train.lr": 1e-3,
            "train.threads": threads,
            "train.device": device,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return set_up(config, task(config))


def record_training(setup: TrainingSetup, root: Path) -> Recording:
    """Train and record under a folder, without MLflow."""
    state = setup.initial
    with Recorder(root, setup) as recorder:
        for record in train(setup):
            recorder.add(record)
            state = record.after
        recorder.finish(state)
    return Recording(folder_source(root))


def replay(setup: TrainingSetup, recording: Recording, targets: int, mode: str = "memory") -> np.ndarray:
    """Scores of the first evaluation examples as targets (over again from the tenth on), (targets, examples)."""
    chosen = [Target.single(place % setup.data.num_evaluation) for place in range(targets)]
    total = ScoreSum(chosen, setup.data.num_train, recording.trace.steps)
    for step in Replay(setup, recording, chosen, StepAdjoint(setup.step), mode):
        total.add(step)
    return total.scores


def bytes_under(*folders: Path) -> int:
    """Bytes of all files in some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
