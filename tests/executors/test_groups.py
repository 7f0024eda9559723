"""Jobs in groups: the results of single jobs in their order, and an error that stays with its group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, write_task

from tracked_replay.executors import InGroups, InProcess, LocalProcesses
from tracked_replay.lds import MakeSetup, RetrainingJob, retrain_together


def doubled(context: list[Sequence[int]], jobs: Sequence[int]) -> list[int]:
    context.append(jobs)
    if 13 in jobs:
        raise ValueError("13 is in it")
    return [2 * job for job in jobs]


@pytest.mark.parametrize(
    ("size", "groups"),
    [(1, [[5], [1], [4], [2], [3]]), (2, [[5, 1], [4, 2], [3]]), (5, [[5, 1, 4, 2, 3]]), (9, [[5, 1, 4, 2, 3]])],
)
def test_groups_are_taken_in_order_and_each_job_gets_its_result(size: int, groups: list[list[int]]) -> None:
    seen: list[Sequence[int]] = []
    done = list(InGroups(InProcess(), size).run(lambda: seen, doubled, [5, 1, 4, 2, 3]))
    assert seen == groups
    assert [(item.job, item.result, item.error) for item in done] == [(n, 2 * n, None) for n in (5, 1, 4, 2, 3)]


def test_an_error_is_that_of_every_job_of_its_group() -> None:
    done = list(InGroups(InProcess(), 2).run(list, doubled, [1, 2, 13, 3, 4]))
    assert [(item.job, item.result) for item in done] == [(1, 2), (2, 4), (13, None), (3, None), (4, 8)]
    assert [str(item.error) for item in done if item.error] == ["13 is in it"] * 2


def test_a_result_that_is_missing_is_noticed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(InGroups(InProcess(), 3).run(list, lambda _, jobs: [0] * (len(jobs) - 1), [1, 2, 3]))


def test_batched_retrainings_in_processes_are_bit_for_bit_those_in_this_one(tmp_path: Path) -> None:
    config = tiny_config(data__task=write_task(tmp_path), train__epochs=2)
    jobs = [RetrainingJob(number, np.array([number, number + 5]), np.zeros(2), keep_state=True) for number in range(5)]
    results = []
    for executor in (InProcess(), LocalProcesses(2)):
        done = InGroups(executor, 2).run(MakeSetup(config.to_toml()), partial(retrain_together, models=2), jobs)
        results.append({item.job.id: item.result for item in done})
    for number in range(5):
        assert results[0][number].state == results[1][number].state
        assert results[0][number].measurements.tobytes() == results[1][number].measurements.tobytes()
    assert len({result.final_digest for result in results[0].values()}) == 5
