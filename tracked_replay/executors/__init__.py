"""Executors: map a function over jobs, in this process or in local processes, behind one interface.

An executor knows nothing of training. It is given a *context maker* (a picklable callable that builds what all jobs of
a worker share, once) and a function ``(context, job) -> result``; results come back as they are done.
"""

from tracked_replay.executors._executors import (
    EXECUTORS,
    Done,
    Executor,
    InGroups,
    InProcess,
    LocalProcesses,
    make_executor,
)

__all__ = ["EXECUTORS", "Done", "Executor", "InGroups", "InProcess", "LocalProcesses", "make_executor"]
