"""A replayed step, compiled and not, ÷ training step: what `replay.compile` brings, and after how many calls.

    PYTHONPATH=. python tests/benchmarks/compiled.py [--cases 0.125x8x1,0.5x128x8] [--rounds 9] [--device cuda]

A case is the width of the network, the batch and the number of targets. Both ways are timed in turn in one process,
after the compiled one was held against the other. Compilation is timed with an empty cache, and once more with what the
first has left there. On the CPU it needs a C++ compiler.
"""

from __future__ import annotations

import os
import statistics
import tempfile

import torch
from measuring import Row, in_turn, noise_setup, quotients, run_alone

from tracked_replay.config import ReplayConfig
from tracked_replay.replay import CompilingAdjoint, StepAdjoint, Target, measurement_cotangent
from tracked_replay.replay.allocation import keep_freed_memory
from tracked_replay.training import train

QUICK = {"cases": "0.125x8x1", "rounds": 2}
CASES = "0.125x8x1,0.125x8x8,0.5x8x1,0.25x128x1,0.5x128x1,0.5x128x8"


def measure(cases: str = CASES, rounds: int = 9, threads: int = 2, device: str = "cpu") -> list[Row]:
    """Compile and time every case."""
    rows = []
    for case in cases.split(","):
        width, batch, targets = (float(part) for part in case.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            rows += _measured(case, width, int(batch), int(targets), rounds, threads, device)
    return rows


def _measured(case: str, width: float, batch: int, targets: int, rounds: int, threads: int, device: str) -> list[Row]:
    setup = noise_setup(width, batch, 3, threads, device)
    *_, record = train(setup, stop=3)
    plain = StepAdjoint(setup.step)
    chosen = [Target.single(place % setup.data.num_evaluation) for place in range(targets)]
    cotangents = [measurement_cotangent(plain, setup.task, setup.data, record.after, target) for target in chosen]
    seen = setup.batch(record.before.step)
    given = (record.before, record.after, seen.inputs, seen.labels, record.learning_rates.tolist(), cotangents)
    keep_freed_memory()
    plain.pull_back(*given)
    adjoints = []
    for _ in ("an empty cache", "a filled one"):
        torch.compiler.reset()
        adjoints.append(CompilingAdjoint(setup.step, ReplayConfig(compile="on"), steps=setup.plan.steps))
        adjoints[-1].pull_back(*given)
    cold, warm = (adjoint.seconds for adjoint in adjoints)
    times = in_turn(
        {
            "step": lambda: setup.take(record.before),
            "plain": lambda: plain.pull_back(*given),
            "compiled": lambda: adjoints[-1].pull_back(*given),
        },
        rounds,
    )
    saved = statistics.median(one - other for one, other in zip(times["plain"], times["compiled"], strict=True))
    what = f"width {width:g}, batch {batch}, {targets} target{'s' * (targets > 1)}"
    sizes = {"threads": threads, "device": device}

    def row(key: str, words: str, values: list[float], unit: str = "") -> Row:
        return Row(f"{case}_{key}", f"{what}: {words}", values, unit, parameters=sizes, raw=times)

    rows = [
        row("plain", "not compiled ÷ training step", quotients(times["plain"], times["step"])),
        row("compiled", "compiled ÷ training step", quotients(times["compiled"], times["step"])),
        row("cold", "compilation", [cold], "s"),
        row("warm", "compilation, from torch's cache", [warm], "s"),
    ]
    # Each call of the compiled function pulls as many targets back as go together.
    calls = -(-targets // (plain.together or 1))
    return [*rows, row("pays", "calls after which it has paid", [calls * cold / saved])] if saved > 0 else rows


if __name__ == "__main__":
    run_alone(measure, QUICK)
