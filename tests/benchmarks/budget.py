"""Disk that a recording's states take ÷ `record.budget`: planned for the preset `cifar10`, and written by a short run.

    PYTHONPATH=. python tests/benchmarks/budget.py [--budgets 250,500,1000,5000] [--steps 40] [--budget 400]

The plan: how many states of the preset's network (10.3 million parameters) are kept of its 2000 steps under a budget in
MB. Nothing is trained for it; the number is multiplied by the size of the files that the short run wrote. The short run
trains the same network on two 8×8 images a step under a budget, and the bytes are those of its files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measuring import Row, SmallImages, bytes_under, noise_setup, numbers, record_training, run_alone

from tracked_replay.config import Config
from tracked_replay.recording.checkpoints import FOLDER as CHECKPOINTS
from tracked_replay.recording.generators import FOLDER as GENERATORS
from tracked_replay.recording.recorder import checkpoint_distance, checkpoint_steps
from tracked_replay.tasks import Examples, TaskData
from tracked_replay.training import set_up

QUICK = {"budgets": "20", "steps": 10, "budget": 12, "width": 0.5, "threads": 1}
MEGABYTE = 1e6


class OnlyCounted(SmallImages):
    """As many training examples as CIFAR-10 has, for the number of steps; nobody looks at them."""

    def train_examples(self) -> Examples:
        """50,000 pixels."""
        return Examples(torch.zeros(50_000, 3, 1, 1, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.int64))


def measure(
    budgets: str = "250,500,1000,5000",
    steps: int = 40,
    budget: int = 400,
    width: float = 2.5,
    threads: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Train under a budget and count bytes, then plan."""
    setup = noise_setup(width, 2, steps, threads, device, SmallImages, record__budget=f"{budget}MB")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kept = len(record_training(setup, root).checkpoints)
        written = bytes_under(root / CHECKPOINTS, root / GENERATORS)
        each = max(path.stat().st_size for path in (root / CHECKPOINTS).iterdir())
        each += bytes_under(root / GENERATORS) // kept
    size = {"width": width, "threads": threads, "device": device}
    said = f"{steps} steps, {kept} states of {each / MEGABYTE:.0f} MB kept"
    rows = [_row(f"short_run_{budget}MB", f"bytes written ÷ budget of {budget} MB: {said}", written, budget, size)]
    preset = Config.resolve("cifar10").override(
        {"model.width": width, "train.device": device, "train.threads": threads, "record.every": 1}
        | {"data.train_examples": 0, "data.evaluation_examples": 0}
    )
    data = TaskData(OnlyCounted(preset), preset)
    for megabytes in numbers(budgets):
        config = preset.override({"record.budget": f"{megabytes}MB"})
        setup = set_up(config, OnlyCounted(config), data)
        planned, distance = len(checkpoint_steps(setup)), checkpoint_distance(setup)
        said = f"T = {setup.plan.steps}, {planned} states kept, one every {distance} steps"
        words = f"planned bytes ÷ budget of {megabytes:,} MB: {said}"
        rows.append(_row(f"plan_{megabytes}MB", words, planned * each, megabytes, size))
    return rows


def _row(key: str, what: str, found: int, megabytes: int, size: dict[str, object]) -> Row:
    return Row(key, what, [found / (megabytes * MEGABYTE)], at_most=1, parameters=size, raw={"bytes": [found]})


if __name__ == "__main__":
    run_alone(measure, QUICK)
