"""Replay of a step ÷ taking it, for one and for several targets.

    PYTHONPATH=. python tests/benchmarks/replay_cost.py [--width 0.5] [--batch 128] [--targets 1,4,8,32] [--rounds 9]

A CIFAR-shaped ResNet-9 on random images. Each round takes one training step and pulls cotangents back through it once
for every number of targets, in turn in one process; the ratios are given, and the ratios a target. The process keeps
freed memory, as a replay does, which makes the step faster too; its time in a process that does not is given as well.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial

from measuring import Row, in_turn, noise_setup, numbers, quotients, run_alone, seconds

from tracked_replay.replay import StepAdjoint, Target, measurement_cotangent
from tracked_replay.replay.allocation import keep_freed_memory
from tracked_replay.training import train

QUICK = {"width": 0.125, "batch": 8, "targets": "1,4", "rounds": 2, "threads": 1}
GOALS = {1: 2.5, 8: 1.9}  # training steps a target, by number of targets


def measure(
    width: float = 0.5,
    batch: int = 128,
    targets: str = "1,4,8,32",
    rounds: int = 9,
    threads: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Time steps and their adjoints in turn."""
    setup = noise_setup(width, batch, 3, threads, device)
    *_, record = train(setup, stop=3)
    adjoint = StepAdjoint(setup.step)
    counts = numbers(targets)
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
    works |= {f"{count} targets": partial(pull_back, count) for count in counts}
    step()
    alone = [seconds(step) for _ in range(rounds)]
    keep_freed_memory()
    for work in works.values():
        work()
    times = in_turn(works, rounds)
    sizes = {"width": width, "batch": batch, "threads": threads, "device": device}
    rows = []
    for count in counts:
        name = f"{count} targets"
        raw = {"step": times["step"], name: times[name]}
        all_of_them, each = (quotients(times[name], times["step"], 1 / divisor) for divisor in (1, count))
        goal = GOALS.get(count)
        words = f"replay of {count} target{'s' if count > 1 else ''} ÷ training step"
        if count > 1:
            rows.append(Row(f"{count}_targets", words, all_of_them, parameters=sizes | {"targets": count}, raw=raw))
            words += ", a target"
        rows.append(
            Row(f"{count}_targets_each", words, each, at_most=goal, parameters=sizes | {"targets": count}, raw=raw)
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return [
        *rows,
        Row("step", "training step in this process", [1e3 * t for t in times["step"]], "ms", parameters=sizes),
        Row(
            "step_alone",
            "training step in a process that trains only",
            [1e3 * t for t in alone],
            "ms",
            parameters=sizes,
        ),
        Row("peak", "peak memory of the process", [peak], "MB", parameters=sizes),
    ]


if __name__ == "__main__":
    run_alone(measure, QUICK)
