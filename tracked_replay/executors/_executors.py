from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tracked_replay.errors import ConfigError

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done(Generic[Job, Result]):
    """A job that ended: with a result, or with the error that stopped it."""

    job: Job
    result: Result | None
    error: BaseException | None


class Executor(Protocol):
    """Runs jobs; how many at once, and where, is its own affair. Results do not depend on it."""

    def run(
        self, make_context: Callable[[], Any], function: Callable[[Any, Any], Any], jobs: Sequence[Any]
    ) -> Iterator[Done[Any, Any]]:
        """Run all jobs.

        Args:
            make_context: picklable; called once in each worker.
            function: picklable; called as ``function(context, job)``.
            jobs: picklable.

        Yields:
            One :class:`Done` a job, in the order in which they end. A job's error does not stop the others.
        """
        ...


class InProcess:
    """One job after the other, here."""

    def run(
        self, make_context: Callable[[], Any], function: Callable[[Any, Any], Any], jobs: Sequence[Any]
    ) -> Iterator[Done[Any, Any]]:
        """See :class:`Executor`."""
        made: list[Any] = []
        for job in jobs:
            try:
                if not made:
                    made.append(make_context())
                done: Done[Any, Any] = Done(job, function(made[0], job), None)
            except Exception as error:
                done = Done(job, None, error)
            yield done


class LocalProcesses:
    """Several jobs at once, each in a process of its own on this machine.

    Processes are spawned, not forked: a fork of a process that has used OpenMP threads can hang. Each worker is a pool
    of one process that is given one job at a time: the death of a process (out of memory, killed) breaks its whole
    pool, so it costs the job that ran there and no other.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(
        self, make_context: Callable[[], Any], function: Callable[[Any, Any], Any], jobs: Sequence[Any]
    ) -> Iterator[Done[Any, Any]]:
        """See :class:`Executor`."""
        waiting = iter(jobs)
        pools: list[ProcessPoolExecutor] = []
        busy: dict[Future[Any], tuple[Any, int]] = {}

        def start_next(worker: int) -> None:
            for job in waiting:
                try:
                    future = pools[worker].submit(_run_job, job)
                except BrokenProcessPool:
                    pools[worker].shutdown()
                    pools[worker] = _worker_pool(make_context, function)
                    future = pools[worker].submit(_run_job, job)
                busy[future] = job, worker
                return

        try:
            for worker in range(min(self.workers, len(jobs))):
                pools.append(_worker_pool(make_context, function))
                start_next(worker)
            while busy:
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    job, worker = busy.pop(future)
                    error = future.exception()
                    start_next(worker)
                    yield Done(job, future.result() if error is None else None, error)
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


class InGroups:
    """Several jobs in one call of the function, which takes a list of jobs and gives their results in its order.

    Args:
        executor: runs the groups.
        size: jobs in a group; the last one may have fewer.
    """

    def __init__(self, executor: Executor, size: int) -> None:
        self.executor = executor
        self.size = size

    def run(
        self, make_context: Callable[[], Any], function: Callable[[Any, Any], Any], jobs: Sequence[Any]
    ) -> Iterator[Done[Any, Any]]:
        """See :class:`Executor`. An error is that of every job of its group."""
        groups = [jobs[first : first + self.size] for first in range(0, len(jobs), self.size)]
        for group in self.executor.run(make_context, function, groups):
            results = [None] * len(group.job) if group.result is None else group.result
            for job, result in zip(group.job, results, strict=True):
                yield Done(job, result, group.error)


def _worker_pool(make_context: Callable[[], Any], function: Callable[[Any, Any], Any]) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(make_context, function),
    )


_worker: dict[str, Any] = {}


def _start_worker(make_context: Callable[[], Any], function: Callable[[Any, Any], Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["make_context"], _worker["function"] = make_context, function


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next job for ever: it holds both ends of the job queue.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(job: Any) -> Any:
    # The context is made with the first job and not in the initialiser, whose error would break the whole pool
    # without saying why.
    if "context" not in _worker:
        _worker["context"] = _worker["make_context"]()
    return _worker["function"](_worker["context"], job)


EXECUTORS = ("local", "ray")


def make_executor(name: str, workers: int) -> Executor:
    """The executor of a name.

    Args:
        name: ``local``.
        workers: jobs at once; 1 runs them in this process.

    Raises:
        ConfigError: no such executor here.
    """
    if name == "local":
        return InProcess() if workers == 1 else LocalProcesses(workers)
    raise ConfigError(f"executor: found {name!r}, which is not available here; allowed: local")
