"""Executors: the same results everywhere, errors that stay with their job, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_jobs import Count, Unlucky, add_pid, die_on_three, sleepy, strange
from tiny import tiny_config, write_task

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError
from tracked_replay.executors import Done, Executor, InProcess, LocalProcesses, make_executor
from tracked_replay.lds import MakeSetup, Retrained, RetrainingJob, retrain

EXECUTORS = (InProcess(), LocalProcesses(2))
ENDS = 20.0  # seconds that a process has to end in


def by_job(executor: Executor, make_context: Callable[[], Any], function: Any, jobs: Sequence[Any]) -> dict[Any, Done]:
    done = list(executor.run(make_context, function, jobs))
    assert len(done) == len(jobs)
    return {item.job: item for item in done}


def children() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or before it was read
        return True


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
def test_results_do_not_depend_on_order_and_an_error_stays_with_its_job(executor: Executor, tmp_path: Path) -> None:
    jobs = [5, -1, 3, 4, -2, 1, 2]
    forwards = by_job(executor, Count(tmp_path), add_pid, jobs)
    backwards = by_job(executor, Count(tmp_path), add_pid, jobs[::-1])
    for done in (forwards, backwards):
        for job in jobs:
            if job < 0:
                assert done[job].result is None
                assert isinstance(done[job].error, ValueError)
                assert str(done[job].error) == f"job {job} is negative"
            else:
                assert done[job].error is None
                assert done[job].result[0] == 10 * job


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
def test_the_context_is_made_once_in_each_worker(executor: Executor, tmp_path: Path) -> None:
    done = by_job(executor, Count(tmp_path), add_pid, range(6))
    contexts = {item.result[1:] for item in done.values()}
    workers = {pid for pid, _ in contexts}
    assert len(contexts) == len(workers) == len(list(tmp_path.iterdir()))
    assert len(workers) <= (1 if isinstance(executor, InProcess) else 2)
    assert (os.getpid() in workers) == isinstance(executor, InProcess)


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
def test_a_context_that_cannot_be_made_is_the_error_of_each_job(executor: Executor) -> None:
    done = by_job(executor, Unlucky(), add_pid, [1, 2, 3])
    assert [str(item.error) for item in done.values()] == ["no data here"] * 3


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
def test_without_jobs_nothing_is_made(executor: Executor) -> None:
    before = children()
    assert list(executor.run(Unlucky(), add_pid, [])) == []
    assert children() == before


@pytest.mark.timeout(60)
def test_a_killed_worker_is_the_error_of_its_job_alone() -> None:
    before = children()
    done = by_job(LocalProcesses(2), dict, die_on_three, range(8))
    assert done[3].result is None
    assert "terminated abruptly" in str(done[3].error)
    assert [item.result for job, item in sorted(done.items()) if job != 3] == [0, 1, 2, 4, 5, 6, 7]
    assert children() == before


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_between_two_jobs_is_replaced() -> None:
    with closing(LocalProcesses(1).run(dict, sleepy, [0.0, 0.0, 0.0])) as run:
        first = next(run).result
        os.kill(first, signal.SIGKILL)
        while not ended(first):
            time.sleep(0.01)
        # The second job may have been with the killed worker; the third never was.
        last = list(run)[-1]
    assert last.error is None
    assert last.result != first


@pytest.mark.timeout(60)
def test_an_error_that_cannot_be_sent_back_is_still_an_error_of_its_job() -> None:
    done = by_job(LocalProcesses(2), dict, strange, range(4))
    assert done[1].error is not None
    assert [done[job].result for job in (0, 2, 3)] == [0, 2, 3]


@pytest.mark.timeout(60)
def test_no_process_stays_behind_when_the_consumer_stops_early() -> None:
    before = children()
    run = LocalProcesses(2).run(dict, sleepy, [0.1] * 50)
    started = time.monotonic()

    def consume() -> None:
        for _ in run:
            raise RuntimeError("the consumer failed")

    with pytest.raises(RuntimeError, match="the consumer failed"):
        consume()
    run.close()  # type: ignore[attr-defined]
    assert children() == before
    assert time.monotonic() - started < 50 * 0.1 / 2 + ENDS


ORPHANS = """
import sys
sys.path[:0] = {path!r}
if __name__ == "__main__":
    from small_jobs import sleepy
    from tracked_replay.executors import LocalProcesses
    for item in LocalProcesses(2).run(dict, sleepy, [0.2] * 1000):
        print(item.result, flush=True)
"""


@pytest.mark.timeout(90)
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(ORPHANS.format(path=[str(Path(__file__).parent), *sys.path]))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stdout is not None
        workers = {int(driver.stdout.readline()) for _ in range(4)}
        driver.kill()
    limit = time.monotonic() + ENDS
    while time.monotonic() < limit and not all(map(ended, workers)):
        time.sleep(0.05)
    left = [pid for pid in workers if not ended(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_retrainings_in_processes_are_bit_for_bit_those_in_this_one(tmp_path: Path) -> None:
    config: Config = tiny_config(data__task=write_task(tmp_path), train__epochs=2)
    jobs = [
        RetrainingJob(number, np.array([number, number + 5]), np.array([0.0, 0.5]), keep_state=True)
        for number in range(3)
    ]
    results: list[dict[int, Retrained]] = []
    for executor in (InProcess(), LocalProcesses(2)):
        done = list(executor.run(MakeSetup(config.to_toml()), retrain, jobs))
        assert [item.error for item in done] == [None] * 3
        results.append({item.result.id: item.result for item in done if item.result is not None})
    for number in range(3):
        here, there = results[0][number], results[1][number]
        np.testing.assert_array_equal(here.measurements.view(np.int64), there.measurements.view(np.int64))
        assert here.state == there.state
        assert (here.final_digest, here.accuracy) == (there.final_digest, there.accuracy)
    assert len({result.final_digest for result in results[0].values()}) == 3


def test_an_executor_is_chosen_by_name_and_workers() -> None:
    assert isinstance(make_executor("local", 1), InProcess)
    several = make_executor("local", 3)
    assert isinstance(several, LocalProcesses)
    assert several.workers == 3
    with pytest.raises(ConfigError, match=r"executor: found 'slurm'.*allowed: local"):
        make_executor("slurm", 2)
