"""How the time of a replay grows: with steps, parameters, examples in the batch and targets.

    PYTHONPATH=. python tests/benchmarks/scaling.py [--steps 10,20,40,80] [--widths 0.25,0.5,1,2] [--rounds 3]

Whole replays of recorded trainings in one process, measurement and reading of states included: a ResNet-9 on random
images of 32×32 pixels. One size is changed at a time, the others stay at the first of their list (steps: the second).
A round replays every size once; the exponent of a round is the slope of a straight line through the logarithms of
sizes and seconds, by least squares. 1: twice the size takes twice as long.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measuring import Row, in_turn, noise_setup, numbers, record_training, replay, run_alone

QUICK = {
    "steps": "10,20",
    "widths": "0.0625,0.125",
    "batches": "4,8",
    "targets": "1,2",
    "rounds": 1,
    "threads": 1,
}


def measure(
    steps: str = "10,20,40,80",
    widths: str = "0.25,0.5,1,2",
    batches: str = "16,32,64,128",
    targets: str = "1,2,4,8,16,32",
    rounds: int = 3,
    threads: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Replay at every size in turn and fit exponents."""
    lists: dict[str, Sequence[float]] = {
        "steps": numbers(steps),
        "parameters": [float(width) for width in widths.split(",")],
        "batch": numbers(batches),
        "targets": numbers(targets),
    }
    first = {name: sizes[0] for name, sizes in lists.items()} | {"steps": lists["steps"][1]}
    return [_row(name, sizes, first, rounds, threads, device) for name, sizes in lists.items()]


def _row(name: str, sizes: Sequence[float], first: dict[str, float], rounds: int, threads: int, device: str) -> Row:
    works, scale = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            at = first | {name: size}
            setup = noise_setup(at["parameters"], int(at["batch"]), int(at["steps"]), threads, device)
            recording = record_training(setup, Path(folder, str(size)))
            count = sum(tensor.numel() for tensor in setup.initial.parameters.values())
            scale.append(count if name == "parameters" else setup.plan.steps if name == "steps" else size)
            works[str(scale[-1])] = lambda setup=setup, recording=recording, targets=int(at["targets"]): replay(
                setup, recording, targets
            )
        for work in works.values():
            work()
        times = in_turn(works, rounds)
    exponents = [float(np.polyfit(np.log(scale), np.log(round_), 1)[0]) for round_ in zip(*times.values(), strict=True)]
    fixed = {key: value for key, value in first.items() if key not in (name, "parameters")}
    fixed |= {} if name == "parameters" else {"width": first["parameters"]}
    words = {
        "steps": "steps T",
        "parameters": "parameters (by width)",
        "batch": "examples in the batch",
        "targets": "targets",
    }[name]
    spread = f"{scale[0]:,g} to {scale[-1]:,g}"
    return Row(
        f"exponent_of_{name}",
        f"exponent of replay time in {words}, {spread}",
        exponents,
        parameters=fixed | {"threads": threads, "device": device, "over": name},
        raw=times,
    )


if __name__ == "__main__":
    run_alone(measure, QUICK)
