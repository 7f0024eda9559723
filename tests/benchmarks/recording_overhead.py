"""Recorded training ÷ the same loop without recording, and the time of 1000 seed derivations.

    PYTHONPATH=. python tests/benchmarks/recording_overhead.py [--width 0.5] [--batch 128] [--steps 200] [--rounds 9]

Both loops take the same steps of a CIFAR-shaped ResNet-9 on random images in one process, 25 steps of one and then
25 of the other, because the speed of a machine drifts by more within a minute than recording costs. The recorded
loop writes everything a `train` run writes: a checkpoint and generator states each step, the trace, the metrics of
each step into a SQLite tracking store, manifest and digests, and logs all of it as artifacts. Its time is that of all
of this from the start of the run to its end, and of waiting after every 25 steps until they are on disk, so that
none of it is done in the other loop's time. (A training waits at its end only, some 2 ms for the last step.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from measuring import RandomImages, Row, noise_setup, quotients, run_alone, seconds

from tracked_replay.determinism import derive_component_seed
from tracked_replay.recording import Recorder
from tracked_replay.tracking import StageRun, Workspace
from tracked_replay.training import TrainingSetup, train

__all__ = ["RandomImages"]

BLOCK = 25  # steps
QUICK = {"width": 0.125, "batch": 8, "steps": 4, "rounds": 2, "threads": 1}


def bare(setup: TrainingSetup, stop: int) -> Iterator[None]:
    """The loop without recording; gives way after every block of steps."""
    for record in train(setup, stop=stop):
        if record.after.step % BLOCK == 0:
            yield


def recorded(setup: TrainingSetup, stop: int) -> Iterator[None]:
    """The loop that records and logs everything."""
    with mlflow.start_run() as active:
        run = StageRun(active.info.run_id)
        workspace = Workspace.of(run.run_id)
        with workspace.opened() as root, Recorder(root, setup) as recorder:
            for record in train(setup, stop=stop):
                recorder.add(record)
                run.metric("train/loss", record.loss, record.before.step)
                run.metric("lr/weights", record.learning_rates[0], record.before.step)
                if record.after.step % BLOCK == 0:
                    recorder.wait()
                    yield
            run.flush()
            recorder.finish(record.after)
        workspace.publish()


def side_by_side(setup: TrainingSetup, stop: int, first: int) -> dict[str, float]:
    """Seconds of both loops, taken in turn; ``first`` begins the turns."""
    loops = [("bare", bare(setup, stop)), ("recorded", recorded(setup, stop))]
    taken = dict.fromkeys(("bare", "recorded"), 0.0)
    for turn in range(-(-stop // BLOCK) + 1):  # the last one comes to the end of both
        for name, loop in loops if (turn + first) % 2 == 0 else reversed(loops):
            taken[name] += seconds(lambda loop=loop: next(loop, None))
    return taken


def derive_seeds() -> None:
    """A thousand of them."""
    for instance in range(1000):
        derive_component_seed(42, "model", instance)


def measure(
    width: float = 0.5, batch: int = 128, steps: int = 200, rounds: int = 9, threads: int = 2, device: str = "cpu"
) -> list[Row]:
    """Time both loops in turn."""
    setup = noise_setup(width, batch, steps, threads, device)
    seeds = [seconds(derive_seeds) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as store:
        mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
        mlflow.create_experiment("benchmark", artifact_location=Path(store, "artifacts").as_uri())
        mlflow.set_experiment("benchmark")
        side_by_side(setup, min(BLOCK, steps), 0)
        taken = [side_by_side(setup, steps, round_) for round_ in range(rounds)]
    times = {name: [one[name] for one in taken] for name in ("bare", "recorded")}
    sizes = {"width": width, "batch": batch, "steps": steps, "threads": threads, "device": device}
    sizes |= {"parameters": sum(tensor.numel() for tensor in setup.initial.parameters.values())}
    ratios = quotients(times["recorded"], times["bare"])
    return [
        Row("recording", "recorded training ÷ the bare loop", ratios, at_most=1.02, parameters=sizes, raw=times),
        Row("seeds", "1000 seed derivations", [1e3 * taken for taken in seeds], "ms", at_most=10),
    ]


if __name__ == "__main__":
    run_alone(measure, QUICK)
