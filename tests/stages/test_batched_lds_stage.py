"""Stage ``lds`` with several retrainings in one batched step: the same result to rounding, which each run checks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlflow
import numpy as np
import pytest
from stage_runs import folder_of, refusal, runs_of, statuses, table_of
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ReplayError, RetrainingError
from tracked_replay.lds import Retrained, RetrainingJob, retrain_together
from tracked_replay.stages import retrainings
from tracked_replay.tracking import names

CONFIG = tiny_config(train__epochs=2, lds__drop="0.1,0.25", lds__subsets=5, lds__resamples=100, lds__baselines=False)
BATCHED = CONFIG.override({"lds.models_at_once": 4})
ONE_SHARE = BATCHED.override({"lds.drop": "0.1"})

Together = Callable[..., list[Retrained]]


def children_of(run_id: str) -> list[str]:
    return [run.info.run_name for run in runs_of("retraining") if run.data.tags["mlflow.parentRunId"] == run_id]


def instead(monkeypatch: pytest.MonkeyPatch, together: Together) -> None:
    monkeypatch.setattr(retrainings, "retrain_together", together)


def test_the_result_is_that_of_retrainings_done_alone_and_neither_reuses_the_other(store: Path) -> None:
    alone = tr.lds(config=CONFIG, targets="0-3")
    together = tr.lds(config=BATCHED, targets="0-3")
    assert together != alone
    assert children_of(alone) == [f"retraining {number}" for number in range(10)]
    assert children_of(together) == [f"retraining {number}, 4 at once" for number in range(10)]
    one, other = (table_of(run, "lds/outcomes.parquet") for run in (alone, together))
    assert one["subset"].equals(other["subset"])
    np.testing.assert_allclose(one["actual"].to_numpy(), other["actual"].to_numpy(), rtol=1e-10)
    for number, run in enumerate(runs_of("retraining")):
        facts = json.loads((folder_of(run.info.run_id) / "lds/retraining.json").read_text())
        assert (facts["id"], facts["models_at_once"]) == (number % 10, 1 if number < 10 else 4)
    assert mlflow.get_run(alone).data.tags[names.EQUALITY] == "bitwise"
    said = mlflow.get_run(together).data.tags[names.EQUALITY]
    assert said.startswith("bound 0.01 of the spread between retrainings; found ")
    assert float(said.split("found ")[1].split(",")[0]) < 1e-9
    assert said.endswith(", 4 at once")

    # What is there is used, by the same way of doing it only; of another one nothing is.
    before = len(runs_of("retraining"))
    assert tr.lds(config=BATCHED, targets="0-3") == together
    more = tr.lds(config=BATCHED.override({"lds.subsets": 6}), targets="0-3")
    assert children_of(more) == ["retraining 5, 4 at once", "retraining 11, 4 at once"]
    assert mlflow.get_run(more).data.tags[names.EQUALITY].startswith("bound 0.01 of ")
    assert len(runs_of("retraining")) == before + 2
    other_size = tr.lds(config=BATCHED.override({"lds.models_at_once": 3}), targets="0-3")
    assert len(children_of(other_size)) == 10


def test_one_of_them_is_done_alone_and_recorded(store: Path) -> None:
    run = tr.lds(config=ONE_SHARE, targets="0")
    assert children_of(run) == [*(f"retraining {number}, 4 at once" for number in range(5)), "retraining 3"]
    assert statuses() == ["lds FINISHED", "magic FINISHED"] + ["retraining FINISHED"] * 6 + ["train FINISHED"]
    alone = tr.lds(config=ONE_SHARE.override({"lds.models_at_once": 1}), targets="0")
    assert children_of(alone) == [f"retraining {number}" for number in (0, 1, 2, 4)]


@pytest.mark.parametrize(("error", "passes"), [(0.001, True), (0.05, False)])
def test_a_result_beyond_the_bound_fails_the_run(
    error: float, passes: bool, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(setup: object, jobs: Sequence[RetrainingJob], *, models: int) -> list[Retrained]:
        found = retrain_together(setup, jobs, models=models)  # type: ignore[arg-type]
        spread = np.stack([result.measurements for result in found]).std(0)
        return [dataclasses.replace(result, measurements=result.measurements + error * spread) for result in found]

    instead(monkeypatch, off)
    if passes:
        assert "found 0.00" in mlflow.get_run(tr.lds(config=ONE_SHARE, targets="0")).data.tags[names.EQUALITY]
        return
    with pytest.raises(
        ReplayError, match=r"^lds\.models_at_once: found 4, but retraining 3 done alone .*; allowed: 1, or"
    ):
        tr.lds(config=ONE_SHARE, targets="0")
    assert "lds FAILED" in statuses()
    assert names.EQUALITY not in runs_of("lds")[0].data.tags


def test_results_in_a_wrong_order_fail_the_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(setup: object, jobs: Sequence[RetrainingJob], *, models: int) -> list[Retrained]:
        found = retrain_together(setup, jobs, models=models)  # type: ignore[arg-type]
        return [dataclasses.replace(found[-1 - place], id=job.id) for place, job in enumerate(jobs)]

    instead(monkeypatch, swapped)
    with pytest.raises(ReplayError, match=r"retraining 3 done alone has other measurements, by [0-9.]+ of the spread"):
        tr.lds(config=ONE_SHARE, targets="0")


def test_one_that_fails_loses_no_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def unlucky(setup: object, jobs: Sequence[RetrainingJob], *, models: int) -> list[Retrained]:
        tried.append([job.id for job in jobs])
        if any(job.id == 1 for job in jobs):
            raise ValueError("no luck")
        return retrain_together(setup, jobs, models=models)  # type: ignore[arg-type]

    instead(monkeypatch, unlucky)
    run = tr.lds(config=ONE_SHARE, targets="0")
    assert tried == [[0, 1, 2, 3], [4], [0], [1], [2], [3]]
    assert mlflow.get_run(run).data.tags[names.FAILED] == "1"
    assert table_of(run, "lds/subsets.parquet")["subset"].to_pylist() == [0, 2, 3, 4]
    assert "retraining FAILED" in statuses()

    # The same command does only what is missing.
    instead(monkeypatch, retrain_together)
    whole = tr.lds(config=ONE_SHARE, targets="0")
    assert children_of(whole) == ["retraining 1, 4 at once"]
    assert names.FAILED not in mlflow.get_run(whole).data.tags


def test_an_interruption_loses_only_the_group_it_fell_into(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def interrupted(setup: object, jobs: Sequence[RetrainingJob], *, models: int) -> list[Retrained]:
        tried.append([job.id for job in jobs])
        if len(tried) == 2:
            raise KeyboardInterrupt
        return retrain_together(setup, jobs, models=models)  # type: ignore[arg-type]

    instead(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        tr.lds(config=BATCHED, targets="0")
    assert statuses().count("retraining FINISHED") == 4
    again = tr.lds(config=BATCHED, targets="0")
    assert tried == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]
    assert len(children_of(again)) == 7  # six, and the one done alone
    uninterrupted = tr.lds(config=BATCHED, targets="0", force=True)
    one, other = (table_of(run, "lds/outcomes.parquet")["actual"].to_numpy() for run in (again, uninterrupted))
    np.testing.assert_allclose(one, other, rtol=1e-10)


def test_the_one_done_alone_must_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: object, job: RetrainingJob) -> object:
        raise ValueError("no luck")

    monkeypatch.setattr(retrainings, "retrain", fail)
    with pytest.raises(
        RetrainingError, match=r"^retraining 3 failed twice when it was done alone: ValueError: no luck$"
    ):
        tr.lds(config=ONE_SHARE, targets="0")


def test_a_model_that_cannot_be_batched_leaves_no_run_behind(store: Path) -> None:
    task = write_task(store, ("nn.Tanh()", "nn.RReLU()"))
    config = own_config(task).override({"lds.models_at_once": 4, "lds.drop": "0.1", "lds.subsets": 3})
    Path("own.toml").write_text(config.to_toml())
    said = refusal("lds", "--preset", "own.toml", "--targets", "0")
    assert said.startswith(
        "lds.models_at_once: found 4, but torch.vmap cannot take the model or the loss of the task Own"
    )
    assert statuses() == []
