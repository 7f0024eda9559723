"""Retrainings an hour: of the `lds` stage against plain training loops, and of workers against threads.

    PYTHONPATH=. python tests/benchmarks/lds_throughput.py [--retrainings 32] [--cores 2] [--rounds 3]

The preset `digits`. In turn: as many plain loops as retrainings (no MLflow, no evaluation), the retrainings as `lds`
does them (evaluated, each recorded as a child run in a SQLite tracking store) in this process with all cores as
threads, and the same by one worker a core with one thread each. The start of the workers is part of their time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlflow
import numpy as np
from measuring import Row, in_turn, quotients, run_alone

from tracked_replay.config import Config
from tracked_replay.executors import InProcess, LocalProcesses
from tracked_replay.lds import MakeSetup, RetrainingJob, draw_subsets, final_state
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.retrainings import retrain_all
from tracked_replay.tracking import names, stage_run

QUICK = {"retrainings": 2, "epochs": 1, "examples": 256, "rounds": 1, "cores": 1}
NOBODY = "0" * 32  # the recorded run that the child runs are of; it is named and not read


def measure(
    retrainings: int = 32, epochs: int = 10, examples: int = 0, cores: int = 2, rounds: int = 3, device: str = "cpu"
) -> list[Row]:
    """Time the three ways in turn."""
    changes = {"train.epochs": epochs, "data.train_examples": examples, "train.device": device}
    config = Config.resolve("digits", overrides=changes | {"train.threads": cores})
    together, apart = Problem.load(config), Problem.load(config.override({"train.threads": 1}))
    drawn = draw_subsets(config.seed, together.data.num_train, [0.01], retrainings)
    jobs = [RetrainingJob(subset.id, subset.removed, np.zeros(len(subset.removed))) for subset in drawn]

    def plain() -> None:
        setup = MakeSetup(config.to_toml())()
        for _ in jobs:
            final_state(setup)

    def stage(problem: Problem, executor: InProcess | LocalProcesses) -> None:
        with stage_run(names.LDS, NOBODY, "benchmark", {}) as run:
            results, errors = retrain_all(problem, NOBODY, jobs, run, executor, force=True)
        if errors or len(results) != len(jobs):
            raise SystemExit(f"lds_throughput: {len(errors)} of {len(jobs)} retrainings failed: {errors}")

    workers = f"{cores} worker{'s' if cores > 1 else ''} of 1 thread"
    ways = {
        "plain loops": plain,
        f"in process, threads: {cores}": lambda: stage(together, InProcess()),
        workers: lambda: stage(apart, LocalProcesses(cores)),
    }
    with tempfile.TemporaryDirectory() as store:
        mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
        mlflow.create_experiment("benchmark", artifact_location=Path(store, "artifacts").as_uri())
        mlflow.set_experiment("benchmark")
        final_state(MakeSetup(config.to_toml())())
        times = in_turn(ways, rounds)
    bare, inside, outside = times.values()
    sizes = {"preset": "digits", "retrainings": retrainings, "epochs": epochs, "cores": cores, "device": device}
    tracked, spread = quotients(bare, inside), quotients(inside, outside)
    rows = [
        Row("tracked", "retrainings an hour in process ÷ plain loops", tracked, parameters=sizes, raw=times),
        Row("workers", f"retrainings an hour, {workers} ÷ in process", spread, parameters=sizes, raw=times),
    ]
    for key, (way, found) in zip(("plain", "in_process", "workers"), times.items(), strict=True):
        rates = [3600 * retrainings / taken for taken in found]
        rows.append(Row(f"an_hour_{key}", f"retrainings, {way}", rates, "an hour", parameters=sizes))
    return rows


if __name__ == "__main__":
    run_alone(measure, QUICK)
