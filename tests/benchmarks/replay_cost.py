"""Replay of a step ÷ taking it, for one and for several targets.

    PYTHONPATH=. python tests/benchmarks/replay_cost.py [--width 0.5] [--batch 128] [--targets 1,4,8] [--rounds 9]

A CIFAR-shaped ResNet-9 on random images. Each round takes one training step and pulls cotangents back through it once
for every number of targets, in turn in one process; the medians and their ratios are printed, the ratios also a
target. The process keeps freed memory, as a replay does, which makes the step faster too; its time in a process that
does not is printed first.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

from recording_overhead import RandomImages

from tracked_replay.config import Config
from tracked_replay.replay import StepAdjoint, Target, measurement_cotangent
from tracked_replay.replay.allocation import keep_freed_memory
from tracked_replay.training import set_up, train


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--targets", default="1,4,8", help="numbers of targets, with commas between them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = Config().override(
        {
            "model.width": options.width,
            "train.batch_size": options.batch,
            "train.epochs": 1,
            "train.lr": 1e-3,
            "train.threads": options.threads,
        }
    )
    setup = set_up(config, RandomImages(config))
    *_, record = train(setup, stop=3)
    adjoint = StepAdjoint(setup.step)
    counts = [int(count) for count in options.targets.split(",")]
    single = [
        measurement_cotangent(adjoint, setup.task, setup.data, record.after, Target.single(index))
        for index in range(min(8, max(counts)))
    ]

    def step() -> None:
        setup.take(record.before)

    def pull_back(count: int) -> None:
        batch = setup.batch(record.before.step)
        cotangents = [single[position % len(single)] for position in range(count)]
        rates = record.learning_rates.tolist()
        adjoint.pull_back(record.before, record.after, batch.inputs, batch.labels, rates, cotangents, record.loss)

    works: dict[str, Callable[[], None]] = {"step": step}
    works |= {f"{count} targets": lambda count=count: pull_back(count) for count in counts}
    times: dict[str, list[float]] = {name: [] for name in works}
    step()
    alone = statistics.median(seconds(step) for _ in range(options.rounds))
    print(f"step in a process that trains: median {alone * 1e3:.0f} ms of {options.rounds} rounds")
    keep_freed_memory()
    for work in works.values():
        work()
    for _ in range(options.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"step in a process that replays: median {medians['step'] * 1e3:.0f} ms of {options.rounds} rounds")
    for count in counts:
        ratio = medians[f"{count} targets"] / medians["step"]
        print(f"{count} targets: {ratio:.2f} training steps, {ratio / count:.2f} a target")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
