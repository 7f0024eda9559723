"""Recorded training ÷ the same loop without recording, and the time of 1000 seed derivations.

    PYTHONPATH=. python tests/benchmarks/recording_overhead.py [--width 0.5] [--batch 128] [--steps 40] [--rounds 5]

Both loops take the same steps of a CIFAR-shaped ResNet-9 on random images in one process, in turn; the ratio of each
round and their median are printed. The recorded loop writes everything a `train` run writes: a checkpoint and
generator states each step, the trace, the metrics of each step into a SQLite tracking store, manifest and digests,
and logs all of it as artifacts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlflow
import torch

from tracked_replay.config import Config
from tracked_replay.determinism import derive_component_seed
from tracked_replay.recording import Recorder
from tracked_replay.tasks import Examples, ResNet9, Task
from tracked_replay.tracking import StageRun, Workspace
from tracked_replay.training import TrainingSetup, set_up, train


class RandomImages(Task):
    """CIFAR-shaped noise; only its cost matters."""

    label_names = tuple("0123456789")

    def train_examples(self) -> Examples:
        """As many as one epoch of the benchmark takes."""
        generator = torch.Generator().manual_seed(0)
        count = self.config.train.batch_size * 10
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
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


def bare(setup: TrainingSetup, stop: int) -> float:
    """Seconds of the loop without recording."""
    started = time.perf_counter()
    for _ in train(setup, stop=stop):
        pass
    return time.perf_counter() - started


def recorded(setup: TrainingSetup, stop: int) -> float:
    """Seconds of the loop that records and logs everything."""
    started = time.perf_counter()
    with mlflow.start_run() as active:
        run = StageRun(active.info.run_id)
        workspace = Workspace.of(run.run_id)
        with workspace.opened() as root, Recorder(root, setup) as recorder:
            for record in train(setup, stop=stop):
                recorder.add(record)
                run.metric("train/loss", record.loss, record.before.step)
                run.metric("lr/weights", record.learning_rates[0], record.before.step)
            run.flush()
            recorder.finish(record.after)
        workspace.publish()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = Config().override(
        {
            "model.width": options.width,
            "train.batch_size": options.batch,
            "train.epochs": -(-options.steps // 10),
            "train.lr": 1e-3,
            "train.threads": options.threads,
        }
    )
    setup = set_up(config, RandomImages(config))
    seeds = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        for instance in range(1000):
            derive_component_seed(42, "model", instance)
        seeds.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as store:
        mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
        mlflow.create_experiment("benchmark", artifact_location=Path(store, "artifacts").as_uri())
        mlflow.set_experiment("benchmark")
        bare(setup, 5)
        recorded(setup, 5)
        ratios = []
        for round_ in range(options.rounds):
            # In turn, and the order swapped every round, so that a drift of the machine's speed cancels.
            pair = (bare, recorded) if round_ % 2 == 0 else (recorded, bare)
            seconds = {measure: measure(setup, options.steps) for measure in pair}
            ratios.append(seconds[recorded] / seconds[bare])
            bare_s, recorded_s = seconds[bare], seconds[recorded]
            print(f"round {round_}: bare {bare_s:.2f} s, recorded {recorded_s:.2f} s, ratio {ratios[-1]:.3f}")
    megabytes = setup.initial.nbytes / 1e6
    print(f"state: {megabytes:.2f} MB without momentum; {options.steps} steps of batch {options.batch}")
    print(f"recorded / bare: median {statistics.median(ratios):.3f} of {options.rounds} rounds")
    print(f"1000 seed derivations: median {statistics.median(seeds) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
