"""Retrainings an hour: of the `lds` stage against plain training loops, of workers against threads, and of several
models in one batched step (`lds.models_at_once`) against one after the other.

    PYTHONPATH=. python tests/benchmarks/lds_throughput.py [--retrainings 32] [--cores 2] [--rounds 3] [--models 2,4,8]

On a GPU, with the preset's small network and with one of the published width (this has not been run on one yet):

    PYTHONPATH=. python tests/benchmarks/lds_throughput.py --device cuda --models 2,4,8,16,32
    PYTHONPATH=. python tests/benchmarks/lds_throughput.py --device cuda --models 2,4,8,16,32 --width 2.5

The preset `digits`. In turn: as many plain loops as retrainings (no MLflow, no evaluation), the retrainings as `lds`
does them (evaluated, each recorded as a child run in a SQLite tracking store) in this process with all cores as
threads, the same by one worker a core with one thread each, and the same in this process with several models in a
step. The start of the workers is part of their time; the one retraining that `lds` does alone to check a batched step
is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
from measuring import Row, in_turn, numbers, quotients, run_alone

from tracked_replay.config import Config
from tracked_replay.executors import InProcess, LocalProcesses
from tracked_replay.lds import MakeSetup, RetrainingJob, draw_subsets, final_state
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.retrainings import retrain_all
from tracked_replay.tracking import names, stage_run

QUICK = {"retrainings": 2, "epochs": 1, "examples": 256, "rounds": 1, "cores": 1, "models": "2"}
NOTHING = "0" * 32  # fingerprint of the runs


def measure(
    retrainings: int = 32,
    epochs: int = 10,
    examples: int = 0,
    cores: int = 2,
    rounds: int = 3,
    models: str = "2,4,8",
    width: float = 0.25,
    device: str = "cpu",
) -> list[Row]:
    """Time the ways in turn."""
    changes = {"train.epochs": epochs, "data.train_examples": examples, "model.width": width, "train.device": device}
    config = Config.resolve("digits", overrides=changes | {"train.threads": cores})
    together, apart = Problem.load(config), Problem.load(config.override({"train.threads": 1}))
    drawn = draw_subsets(config.seed, together.data.num_train, [0.01], retrainings)
    jobs = [RetrainingJob(subset.id, subset.removed, np.zeros(len(subset.removed))) for subset in drawn]
    found: dict[int, np.ndarray] = {}

    def plain() -> None:
        setup = MakeSetup(config.to_toml())()
        for _ in jobs:
            final_state(setup)

    def stage(problem: Problem, executor: InProcess | LocalProcesses, models_at_once: int = 1) -> None:
        with stage_run(names.LDS, NOTHING, "benchmark", {}) as run:
            # The run stands for the recorded one, too: that is named in child runs, and nothing of it is read.
            results, errors = retrain_all(
                problem, run.run_id, jobs, run, executor, force=True, models_at_once=models_at_once
            )
        if errors or len(results) != len(jobs):
            raise SystemExit(f"lds_throughput: {len(errors)} of {len(jobs)} retrainings failed: {errors}")
        if problem is together:
            found[models_at_once] = np.stack([results[job.id].measurements for job in jobs])

    workers = f"{cores} worker{'s' if cores > 1 else ''} of 1 thread"
    ways: dict[str, Callable[[], object]] = {
        "plain loops": plain,
        f"in process, threads: {cores}": partial(stage, together, InProcess()),
        workers: partial(stage, apart, LocalProcesses(cores)),
    }
    sizes = numbers(models)
    ways |= {f"{size} at once": partial(stage, together, InProcess(), size) for size in sizes}
    with tempfile.TemporaryDirectory() as store:
        mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
        mlflow.create_experiment("benchmark", artifact_location=Path(store, "artifacts").as_uri())
        mlflow.set_experiment("benchmark")
        final_state(MakeSetup(config.to_toml())())
        times = in_turn(ways, rounds)
    bare, inside, outside, *batched = times.values()
    parameters = {
        "preset": "digits",
        "retrainings": retrainings,
        "epochs": epochs,
        "width": width,
        "cores": cores,
        "device": device,
    }
    tracked, spread = quotients(bare, inside), quotients(inside, outside)
    rows = [
        Row("tracked", "retrainings an hour in process ÷ plain loops", tracked, parameters=parameters, raw=times),
        Row("workers", f"retrainings an hour, {workers} ÷ in process", spread, parameters=parameters, raw=times),
    ]
    for size, taken in zip(sizes, batched, strict=True):
        what = f"retrainings an hour, {size} at once ÷ one by one"
        rows.append(Row(f"at_once_{size}", what, quotients(inside, taken), parameters=parameters, raw=times))
    for size in sizes:
        largest = float(np.max(np.abs(found[size] - found[1]) / np.abs(found[1])))
        what = f"largest relative difference of a measurement, {size} at once from one by one"
        rows.append(Row(f"difference_{size}", what, [1e6 * largest], "millionths", parameters=parameters))
    keys = ("plain", "in_process", "workers", *(f"at_once_{size}" for size in sizes))
    for key, (way, taken) in zip(keys, times.items(), strict=True):
        rates = [3600 * retrainings / seconds for seconds in taken]
        rows.append(Row(f"an_hour_{key}", f"retrainings, {way}", rates, "an hour", parameters=parameters))
    return rows


if __name__ == "__main__":
    run_alone(measure, QUICK)
