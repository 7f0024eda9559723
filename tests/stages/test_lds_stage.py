"""Stage ``lds``: what a run holds, that its numbers are those of real trainings, and what is reused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from scipy import stats
from stage_runs import bits, command, edit_recording, folder_of, plain_retraining, refusal, runs_of, statuses, table_of
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ConfigError, DataError, RecordingError, ReplayError, RunError, TaskError
from tracked_replay.lds import RetrainingJob, retrain
from tracked_replay.stages import retrainings
from tracked_replay.tracking import names
from tracked_replay.tracking.runs import TRAINING_VIEW

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(train__epochs=2, lds__drop="0.1,0.25", lds__subsets=4, lds__resamples=100)
LDS = {"lds.drop": "0.1,0.25", "lds.subsets": 4, "lds.resamples": 100}
QUICK = {"lds.drop": "0.1", "lds.subsets": 3, "lds.resamples": 100, "lds.baselines": False}
METHODS = ["magic", "tracin", "last_gradient", "random"]


@pytest.fixture(scope="module")
def validated(shared_store: Path) -> tuple[str, str, str]:
    """A train, a magic and an lds run."""
    train_run = tr.train(CONFIG)
    magic_run = tr.magic(train_run, "3,0;mean:0-4")
    return train_run, magic_run, tr.lds(magic_run, overrides=LDS)


def children_of(run_id: str) -> list[mlflow.entities.Run]:
    return [run for run in runs_of("retraining") if run.data.tags["mlflow.parentRunId"] == run_id]


def outcomes(run_id: str) -> tuple[list, list, np.ndarray, np.ndarray]:
    table = table_of(run_id, "lds/outcomes.parquet")
    assert table.column_names == ["subset", "target", "predicted", "actual"]
    return (table["subset"].to_pylist(), table["target"].to_pylist(), table["predicted"].to_numpy(),
            table["actual"].to_numpy())  # fmt: skip


def assert_same_result(one: str, other: str) -> None:
    for name in ("outcomes", "subsets", "predictions", "validation_losses"):
        assert table_of(one, f"lds/{name}.parquet").equals(table_of(other, f"lds/{name}.parquet")), name
    for column in (2, 3):
        np.testing.assert_array_equal(bits(outcomes(one)[column]), bits(outcomes(other)[column]))
    assert (folder_of(one) / "lds/summary.json").read_bytes() == (folder_of(other) / "lds/summary.json").read_bytes()


def test_subsets_are_those_asked_for(validated: tuple) -> None:
    table = table_of(validated[2], "lds/subsets.parquet").to_pydict()
    assert table["subset"] == list(range(8))
    assert table["drop"] == [0.1] * 4 + [0.25] * 4
    for removed, drop in zip(table["removed"], table["drop"], strict=True):
        assert removed == sorted(set(removed))
        assert len(removed) == {0.1: 5, 0.25: 12}[drop]
        assert 0 <= removed[0] <= removed[-1] < 48
    assert len({tuple(removed) for removed in table["removed"]}) == 8


def test_actual_is_that_of_a_training_written_with_torch_alone(validated: tuple) -> None:
    train_run, _, lds_run = validated
    subsets, targets, _, actual = outcomes(lds_run)
    assert subsets == list(np.repeat(range(8), 3))
    assert targets == [3, 0, -1] * 8
    losses = table_of(lds_run, "lds/validation_losses.parquet").to_pydict()
    assert losses["subset"] == list(np.repeat(range(8), 10))
    assert losses["evaluation_index"] == list(range(10)) * 8
    removed = table_of(lds_run, "lds/subsets.parquet")["removed"].to_pylist()
    for subset, indices in enumerate(removed):
        weights = np.ones(48)
        weights[indices] = 0
        expected = plain_retraining(train_run, weights)
        np.testing.assert_allclose(losses["loss"][10 * subset : 10 * subset + 10], expected, rtol=1e-11)
        wanted = [expected[3], expected[0], expected[:5].mean()]
        np.testing.assert_allclose(actual[3 * subset : 3 * subset + 3], wanted, rtol=1e-11)


def test_predicted_is_the_measurement_less_the_scores_of_what_was_removed(validated: tuple) -> None:
    train_run, magic_run, lds_run = validated
    recorded = plain_retraining(train_run, np.ones(48))
    base = {3: recorded[3], 0: recorded[0], -1: recorded[:5].mean()}
    table = tr.load_scores(magic_run).to_pydict()
    scores = {
        (target, index): score
        for target, index, score in zip(table["target"], table["train_index"], table["score"], strict=True)
    }
    removed = table_of(lds_run, "lds/subsets.parquet")["removed"].to_pylist()
    for subset, target, predicted, _ in zip(*outcomes(lds_run), strict=True):
        expected = base[target] - sum(scores[target, index] for index in removed[subset])
        assert predicted == pytest.approx(expected, rel=1e-11)


def test_correlations_are_scipys_on_the_table(validated: tuple) -> None:
    lds_run = validated[2]
    summary = json.loads((folder_of(lds_run) / "lds/summary.json").read_text())["correlations"]
    assert [(row["drop"], row["method"]) for row in summary] == [
        (drop, method) for drop in (0.1, 0.25) for method in METHODS
    ]
    predictions = table_of(lds_run, "lds/predictions.parquet").to_pandas()
    truth = table_of(lds_run, "lds/outcomes.parquet").to_pandas()
    drops = dict(table_of(lds_run, "lds/subsets.parquet").to_pandas()[["subset", "drop"]].itertuples(index=False))
    for row in summary:
        ranks = []
        for target in row["targets"]:
            chosen = (truth["target"] == target["target"]) & (truth["subset"].map(drops) == row["drop"])
            of_method = predictions[predictions["method"] == row["method"]].merge(
                truth[chosen], on=["subset", "target"]
            )
            assert len(of_method) == 4
            found, actual = of_method["predicted_x"], of_method["actual"]
            assert target["spearman"] == pytest.approx(stats.spearmanr(found, actual).statistic)
            assert target["pearson"] == pytest.approx(stats.pearsonr(found, actual).statistic)
            assert target["slope"] == pytest.approx(stats.linregress(found, actual).slope)
            ranks.append(target["spearman"])
        assert row["lds"] == pytest.approx(np.mean(ranks))
        assert row["low"] <= row["lds"] <= row["high"]
    own = predictions[predictions["method"] == "magic"]["predicted"].to_numpy()
    np.testing.assert_array_equal(bits(own), bits(outcomes(lds_run)[2]))


def test_metrics_figures_tables_and_description_say_the_same(validated: tuple) -> None:
    train_run, magic_run, lds_run = validated
    run, root = mlflow.get_run(lds_run), folder_of(lds_run)
    rows = json.loads((root / "lds/summary.json").read_text())["correlations"]
    for row in rows:
        history = MlflowClient().get_metric_history(lds_run, f"lds_by_basis_points_removed/{row['method']}")
        assert {metric.step: metric.value for metric in history}[round(row["drop"] * 10_000)] == row["lds"]
    assert run.data.metrics["lds"] == rows[0]["lds"]
    assert (run.data.metrics["lds_low"], run.data.metrics["lds_high"]) == (rows[0]["low"], rows[0]["high"])
    assert run.data.metrics["checks/passed"] == len(json.loads((root / "lds/checks.json").read_text())) == 9
    assert {path.name for path in (root / "figures").iterdir()} == {
        "lds-scatter-0.1.png", "lds-scatter-0.25.png", "lds-by-drop.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (root / "figures").iterdir())
    text = run.data.tags["mlflow.note.content"]
    for row in rows:
        assert (
            f"| {row['drop']:g} | {row['method']} | {row['lds']:.3f} | {row['low']:.3f} to {row['high']:.3f} |" in text
        )
    shown = json.loads((root / "tables/lds.json").read_text())
    assert [line[:2] for line in shown["data"]] == [[row["drop"], row["method"]] for row in rows]
    assert "Metasmoothness" not in text
    tags = run.data.tags
    assert (tags["tracked_replay.input.train_run_id"], tags["tracked_replay.input.magic_run_id"]) == (
        train_run,
        magic_run,
    )
    assert "mlflow.parentRunId" not in tags


def test_each_retraining_is_a_finished_child_with_its_losses(validated: tuple) -> None:
    train_run, _, lds_run = validated
    children = children_of(lds_run)
    assert len(children) == 8
    losses = table_of(lds_run, "lds/validation_losses.parquet").to_pandas()
    digests = table_of(lds_run, "lds/subsets.parquet")["final_digest"].to_pylist()
    for child in children:
        number = int(re.fullmatch(r"retraining (\d)", child.info.run_name)[1])
        assert child.info.status == "FINISHED"
        assert child.data.tags["tracked_replay.input.train_run_id"] == train_run
        assert child.info.start_time <= child.info.end_time
        expected = losses[losses["subset"] == number]["loss"].to_numpy()
        found = table_of(child.info.run_id, "lds/measurements.parquet")["measurement"]
        np.testing.assert_array_equal(bits(found), bits(expected))
        assert child.data.metrics["evaluation_measurement"] == pytest.approx(expected.mean())
        assert 0 <= child.data.metrics["evaluation_accuracy"] <= 1
        facts = json.loads((folder_of(child.info.run_id) / "lds/retraining.json").read_text())
        assert facts["final_digest"] == digests[number]
        assert not (folder_of(child.info.run_id) / "checkpoints").exists()


def test_the_scores_run_says_what_its_newest_validation_found(store: Path) -> None:
    magic_run = tr.magic(config=CONFIG, targets="3,0")
    held = f"{names.HELD} not yet."
    before = mlflow.get_run(magic_run).data.tags["mlflow.note.content"]
    assert held in before.splitlines()
    first = tr.lds(magic_run, overrides=QUICK)
    second = tr.lds(magic_run, overrides=QUICK | {"lds.drop": "0.25"})
    run = mlflow.get_run(second)
    metrics, path = run.data.metrics, f"#/experiments/{run.info.experiment_id}/runs/{second}"
    tags = mlflow.get_run(magic_run).data.tags
    line = (
        f"{names.HELD} LDS, 25 % removed: {metrics['lds']:.3f} [{metrics['lds_low']:.3f}, {metrics['lds_high']:.3f}], "
        "from only 3 retrainings: too few to say how well "
        f"([its report]({path}/artifacts/report/index.html{TRAINING_VIEW}), [run {second}]({path}{TRAINING_VIEW}))"
    )
    advice = f"{names.UNTRIED} `tracked-replay lds --magic-run-id {magic_run}`"
    train_run = run.data.tags["tracked_replay.input.train_run_id"]
    now = f"- next, which training examples to doubt: `tracked-replay suspects --train-run-id {train_run}`"
    assert advice in before
    assert tags["mlflow.note.content"] == before.replace(held, line).replace(advice, now)
    assert tags[names.VALIDATED_BY] == second != first
    # What somebody wrote instead stays.
    MlflowClient().set_tag(magic_run, "mlflow.note.content", "my own words")
    third = tr.lds(magic_run, overrides=QUICK | {"lds.drop": "0.3"})
    first_line, *rest = mlflow.get_run(magic_run).data.tags["mlflow.note.content"].splitlines()
    assert third in first_line
    assert rest == ["", "my own words"]
    # What MLflow would cut stays too.
    MlflowClient().set_tag(magic_run, "mlflow.note.content", "w" * 7990)
    fourth = tr.lds(magic_run, overrides=QUICK | {"lds.drop": "0.35"})
    tags = mlflow.get_run(magic_run).data.tags
    assert (tags["mlflow.note.content"], tags[names.VALIDATED_BY]) == ("w" * 7990, fourth)


def test_a_scores_run_that_cannot_be_written_to_costs_no_validation(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    magic_run, original = tr.magic(config=CONFIG, targets="3,0"), MlflowClient.set_tag

    def guarded(client: MlflowClient, run_id: str, *arguments: object) -> None:
        if run_id == magic_run:
            raise MlflowException("not yours")
        original(client, run_id, *arguments)

    monkeypatch.setattr(MlflowClient, "set_tag", guarded)
    lds_run = tr.lds(magic_run, overrides=QUICK)
    assert mlflow.get_run(lds_run).info.status == "FINISHED"
    assert f"run {magic_run} does not say that run {lds_run} validated it: not yours" in caplog.text


def test_the_same_again_is_reused_and_more_subsets_train_only_those(validated: tuple) -> None:
    train_run, magic_run, lds_run = validated
    before = statuses()
    assert tr.lds(magic_run, overrides=LDS) == lds_run
    assert tr.lds(magic_run, overrides=LDS | {"lds.workers": 2}, train_run_id=train_run) == lds_run
    assert tr.lds(train_run_id=train_run, targets="3,0;mean:0-4", overrides=LDS) == lds_run
    assert tr.lds(config=CONFIG, targets="3,0;mean:0-4") == lds_run
    assert statuses() == before
    more = tr.lds(magic_run, overrides=LDS | {"lds.subsets": 5})
    assert len(children_of(more)) == 2
    first = [row for row in table_of(more, "lds/subsets.parquet").to_pylist() if row["subset"] not in (4, 9)]
    known = table_of(lds_run, "lds/subsets.parquet").to_pylist()
    assert [row["removed"] for row in first] == [row["removed"] for row in known]
    assert [row["final_digest"] for row in first] == [row["final_digest"] for row in known]


def test_force_retrains_everything_to_the_same_bits(validated: tuple) -> None:
    _, magic_run, lds_run = validated
    again = tr.lds(magic_run, overrides=LDS, force=True)
    assert again != lds_run
    assert len(children_of(again)) == 8
    assert_same_result(again, lds_run)


def test_two_workers_give_the_bits_of_one(validated: tuple) -> None:
    _, magic_run, lds_run = validated
    again = tr.lds(magic_run, overrides=LDS | {"lds.workers": 2}, force=True)
    assert len(children_of(again)) == 8
    assert_same_result(again, lds_run)


def test_other_options_reuse_the_retrainings(validated: tuple) -> None:
    _, magic_run, lds_run = validated
    other = tr.lds(magic_run, overrides=LDS | {"lds.baselines": False, "lds.metasmoothness": True})
    assert other != lds_run
    assert children_of(other) == []
    assert set(table_of(other, "lds/predictions.parquet")["method"].to_pylist()) == {"magic"}
    run = mlflow.get_run(other)
    value = run.data.metrics["metasmoothness"]
    assert -1 <= value <= 1
    assert json.loads((folder_of(other) / "lds/summary.json").read_text())["metasmoothness"] == value
    assert f"Metasmoothness {value:.2f}: the training" in run.data.tags["mlflow.note.content"]
    single = tr.magic(validated[0], "7")
    assert children_of(tr.lds(single, overrides=LDS)) == []


def test_final_states_are_kept_where_asked(validated: tuple) -> None:
    import safetensors.torch

    from tracked_replay.recording import state_digest
    from tracked_replay.training import State

    lds_run = tr.lds(validated[1], overrides=QUICK | {"lds.keep_states": True})
    digests = table_of(lds_run, "lds/subsets.parquet")["final_digest"].to_pylist()
    children = children_of(lds_run)
    assert len(children) == 3
    found = {
        state_digest(State.from_flat(6, safetensors.torch.load_file(path)))
        for path in (folder_of(child.info.run_id) / "checkpoints/final.safetensors" for child in children)
    }
    assert found == set(digests)


def test_the_order_of_drop_shares_says_which_is_the_runs_number(validated: tuple) -> None:
    lds_run = tr.lds(validated[1], overrides=LDS | {"lds.drop": "0.25,0.1"})
    rows = json.loads((folder_of(lds_run) / "lds/summary.json").read_text())["correlations"]
    assert [row["drop"] for row in rows[::4]] == [0.25, 0.1]
    assert mlflow.get_run(lds_run).data.metrics["lds"] == rows[0]["lds"]


def test_without_a_magic_run_one_is_made_inside(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    made = MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    lds_run = tr.lds(config=CONFIG.override(QUICK), targets="0-1")
    assert lds_run == made  # the run that `mlflow run` made is the one that was asked for
    assert statuses() == ["lds FINISHED", "magic FINISHED"] + ["retraining FINISHED"] * 3 + ["train FINISHED"]
    (magic_run,), (train_run,) = runs_of("magic"), runs_of("train")
    assert magic_run.data.tags["mlflow.parentRunId"] == lds_run
    assert train_run.data.tags["mlflow.parentRunId"] == magic_run.info.run_id
    assert len(children_of(lds_run)) == 3

    again = MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", again)
    assert tr.lds(config=CONFIG.override(QUICK), targets="0-1") == lds_run
    assert mlflow.get_run(again).data.tags[names.REUSES] == lds_run
    assert mlflow.get_run(again).info.status == "FINISHED"


def unlucky(
    monkeypatch: pytest.MonkeyPatch, numbers: set[int], message: str = "no luck", attempts: int = 2
) -> list[int]:
    """Let the retrainings of some numbers fail; returns the list that grows with every attempt."""
    tried: list[int] = []

    def attempt(setup: object, job: RetrainingJob) -> object:
        tried.append(job.id)
        if job.id in numbers and tried.count(job.id) <= attempts:
            raise ValueError(message)
        return retrain(setup, job)  # type: ignore[arg-type]

    monkeypatch.setattr(retrainings, "retrain", attempt)
    return tried


def test_a_retraining_that_fails_once_is_tried_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = unlucky(monkeypatch, {1}, attempts=1)
    lds_run = tr.lds(config=CONFIG.override(QUICK), targets="0")
    assert tried == [0, 1, 2, 1]
    assert {child.info.status for child in children_of(lds_run)} == {"FINISHED"}
    assert names.FAILED not in mlflow.get_run(lds_run).data.tags
    assert tr.lds(config=CONFIG.override(QUICK), targets="0") == lds_run


@pytest.mark.parametrize("message", ["no luck", ""])
def test_a_retraining_that_fails_twice_loses_no_other(
    message: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.override(QUICK | {"lds.subsets": 5})
    tried = unlucky(monkeypatch, {1}, message)
    lds_run = tr.lds(config=config, targets="0-1")
    assert tried == [0, 1, 2, 3, 4, 1]
    run = mlflow.get_run(lds_run)
    assert run.info.status == "FINISHED"
    assert run.data.tags[names.FAILED] == "1"
    assert names.FINGERPRINT not in run.data.tags
    assert table_of(lds_run, "lds/subsets.parquet")["subset"].to_pylist() == [0, 2, 3, 4]
    assert outcomes(lds_run)[0] == [0, 0, 2, 2, 3, 3, 4, 4]
    failed = [child for child in children_of(lds_run) if child.info.status != "FINISHED"]
    assert [(child.info.status, child.info.run_name) for child in failed] == [("FAILED", "retraining 1")]
    assert f"ValueError: {message}".strip() in failed[0].data.tags["error"]

    # The same command does only what is missing.
    tried.clear()
    again = tr.lds(config=config, targets="0-1")
    assert again != lds_run
    assert tried == [1, 1]
    monkeypatch.setattr(retrainings, "retrain", retrain)
    whole = tr.lds(config=config, targets="0-1")
    assert [child.info.run_name for child in children_of(whole)] == ["retraining 1"]
    assert names.FAILED not in mlflow.get_run(whole).data.tags
    assert_same_result(whole, tr.lds(config=config, targets="0-1", force=True))


def test_too_few_retrainings_that_end_stop_the_stage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlucky(monkeypatch, {0, 1, 2})
    with pytest.raises(tr.TrackedReplayError, match=r"0 of 3 retrainings ended.* ValueError: no luck"):
        tr.lds(config=CONFIG.override(QUICK), targets="0")
    assert statuses() == ["lds FAILED", "magic FINISHED"] + ["retraining FAILED"] * 3 + ["train FINISHED"]


def test_too_few_in_every_share_stop_the_stage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlucky(monkeypatch, {0, 4})
    with pytest.raises(tr.TrackedReplayError, match=r"4 of 6 retrainings ended.* \(at least 3 of each"):
        tr.lds(config=CONFIG.override(QUICK | {"lds.drop": "0.1,0.2"}), targets="0")
    assert "lds FAILED" in statuses()


def test_too_few_in_the_first_share_leave_the_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlucky(monkeypatch, {0})
    lds_run = tr.lds(config=CONFIG.override(QUICK | {"lds.drop": "0.1,0.2"}), targets="0")
    summary = json.loads((folder_of(lds_run) / "lds/summary.json").read_text())
    assert [row["drop"] for row in summary["correlations"]] == [0.2]
    assert "lds" not in mlflow.get_run(lds_run).data.metrics  # the number of the first share, which has none
    of_shares = mlflow.get_run(lds_run).data.metrics["lds_by_basis_points_removed/magic"]
    assert of_shares == summary["correlations"][0]["lds"]


FAILS_IN_A_WORKER = """
def per_example_loss(self, o, y):
    import multiprocessing
    if multiprocessing.parent_process() is not None:
        raise RuntimeError("not in a worker")
    return super().per_example_loss(o, y)
"""


@pytest.mark.slow
def test_workers_that_all_fail_say_why(store: Path) -> None:
    config = own_config(write_task(store, more=FAILS_IN_A_WORKER)).override(QUICK | {"lds.workers": 2})
    with pytest.raises(tr.TrackedReplayError, match=r"0 of 3 retrainings ended.* RuntimeError: not in a worker"):
        tr.lds(config=config, targets="0")
    assert statuses() == ["lds FAILED", "magic FINISHED"] + ["retraining FAILED"] * 3 + ["train FINISHED"]


@pytest.mark.parametrize("how", ["changed", "deleted", "emptied"])
@pytest.mark.parametrize("name", ["lds/measurements.parquet", "lds/retraining.json"])
def test_a_damaged_child_is_trained_again(name: str, how: str, store: Path) -> None:
    config = CONFIG.override(QUICK)
    lds_run = tr.lds(config=config, targets="0")
    path = folder_of(children_of(lds_run)[1].info.run_id) / name
    content = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(b"" if how == "emptied" else content[:60] + bytes([content[60] ^ 1]) + content[61:])
    MlflowClient().delete_run(lds_run)  # its own result would be reused
    again = tr.lds(config=config, targets="0")
    assert len(children_of(again)) == 1
    assert table_of(again, "lds/outcomes.parquet").equals(table_of(lds_run, "lds/outcomes.parquet"))


# What follows must stop before the first retraining.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("nn.Tanh()", "nn.ReLU()"), ReplayError, "step 0: "),
        (("manual_seed(seed)", "manual_seed(seed + 1)"), DataError, "the data differ from those of the training run"),
        (("nn.Linear(4, 3)", "nn.Linear(4, 3, bias=False)"), ReplayError, "step 0: "),
        (("return nn.Seq", "raise KeyError('x')\n        return nn.Seq"), TaskError, "KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("name_it", [True, False])
def test_a_task_edited_since_the_training_is_refused(
    change: tuple[str, str], error: type, message: str, name_it: bool, store: Path
) -> None:
    train_run = tr.train(own_config(write_task(store)))
    magic_run = tr.magic(train_run, "0")
    write_task(store, change)
    with pytest.raises(error, match=re.escape(message)):
        tr.lds(magic_run if name_it else None, train_run_id=train_run, targets="0", overrides=QUICK)
    assert statuses() == ["magic FINISHED", "train FINISHED"]


def test_another_measurement_than_that_of_the_scores_is_refused(store: Path) -> None:
    magic_run = tr.magic(config=own_config(write_task(store)), targets="0-1")
    write_task(store, more="def measurement(self, o, y): return 2 * self.per_example_loss(o, y)")
    with pytest.raises(ReplayError, match=r"target 0: .*measurement"):
        tr.lds(magic_run, overrides=QUICK)
    with pytest.raises(ReplayError, match=r"target 0: .*measurement"):
        run_counterfactual_of(magic_run)
    assert runs_of("retraining") == []


def run_counterfactual_of(magic_run: str) -> str:
    from tracked_replay.stages.counterfactual import run_counterfactual

    return run_counterfactual("", remove="1", magic_run_id=magic_run)


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_a_changed_checkpoint_is_refused(step: int, store: Path) -> None:
    magic_run = tr.magic(config=tiny_config(train__epochs=2), targets="0")
    train_run = mlflow.get_run(magic_run).data.tags["tracked_replay.input.train_run_id"]
    path = folder_of(train_run) / f"checkpoints/step-{step:06d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=f"step-{step:06d}"):
        tr.lds(magic_run, overrides=QUICK)
    assert runs_of("retraining") == []
    assert not [status for status in statuses() if "RUNNING" in status or status == "lds FINISHED"]


def test_digests_that_cannot_be_reproduced_are_refused(store: Path) -> None:
    import pyarrow.parquet as pq

    magic_run = tr.magic(config=tiny_config(train__epochs=2, record__every=6), targets="0")
    train_run = mlflow.get_run(magic_run).data.tags["tracked_replay.input.train_run_id"]

    def change(root: Path) -> None:
        path = root / "trace/part-00000.parquet"
        table = pq.read_table(path)
        digests = table["state_digest"].to_pylist()
        digests[3] = "0" * 32
        column = table.schema.get_field_index("state_digest")
        pq.write_table(table.set_column(column, table.schema.field(column), [digests]), path)

    edit_recording(train_run, change)
    with pytest.raises(ReplayError, match=f"step 3: .* recorded was {'0' * 32}"):
        tr.lds(magic_run, overrides=QUICK)
    assert runs_of("retraining") == []
    assert statuses() == ["lds FAILED", "magic FINISHED", "train FINISHED"]


# Bad input: one sentence, exit code 1, no run.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "0"], "drop: found '0'; allowed: shares above 0 and below 1"),
        (["--drop", "1"], "drop: found '1'; allowed: shares"),
        (["--drop", "1.5"], "drop: found '1.5'; allowed: shares"),
        (["--drop", "-0.1"], "drop: found '-0.1'; allowed: shares"),
        (["--drop", "abc"], "drop: found 'abc'; allowed: shares"),
        (["--drop", "nan"], "drop: found 'nan'; allowed: shares"),
        (["--drop", ","], "drop: found ''; allowed: shares"),
        (["--drop", " "], "drop: found ''; allowed: shares"),
        (["--drop", "0.1,"], "drop: found ''; allowed: shares"),
        (["--drop", "0.1;0.2"], "drop: found '0.1;0.2'; allowed: shares"),
        (["--drop", "0.1,0.10"], "drop: 0.1 is given twice"),
        (["--drop", "0.1,0.10000001"], "drop: 0.1 is given twice"),
        (["--drop", "0.01"], "drop: found 0.01, which removes 0 of 48 training examples; allowed: 0.02"),
        (["--drop", "0.999"], "drop: found 0.999, which removes 48 of 48 training examples"),
        (["--drop", "0.95"], "examples of its batch would be removed"),
        (["--drop", "0.1", "--set", "lds.drop=0.2"], "drop: found '0.1', but set says lds.drop=0.2"),
        (["--subsets", "2"], "lds.subsets: found '2'; allowed: integer >= 3"),
        (["--subsets", "0"], "lds.subsets: found '0'; allowed: integer >= 3"),
        (["--subsets", "-1"], "lds.subsets: found '-1'; allowed: integer >= 3"),
        (["--subsets", "abc"], "lds.subsets: found 'abc'; allowed: integer >= 3"),
        (["--subsets", "3.5"], "lds.subsets: found '3.5'; allowed: integer >= 3"),
        (["--workers", "0"], "lds.workers: found '0'; allowed: integer >= 1"),
        (["--workers", "two"], "lds.workers: found 'two'; allowed: integer >= 1"),
        (["--executor", "ray"], "lds.executor: found 'ray'; allowed: "),
        (["--executor", "dask"], "lds.executor: found 'dask'; allowed: "),
        (["--set", "lds.confidence=1"], "lds.confidence: found '1'; allowed"),
        (["--set", "train.lr=0.1"], "train.lr: cannot be changed for the recorded run"),
        (["--set", "seed=3"], "seed: cannot be changed for the recorded run"),
        (["--set", "replay.clip_gradient=true"], "replay.clip_gradient: cannot be changed"),
        (["--replay-mode", "stream"], "replay.mode: cannot be changed"),
        (["--seed", "3"], "seed: found '3', but the recorded run"),
        (["--targets", "0"], "targets: found '0', but the magic run"),
        (["--targets", "0-3"], "targets: found '0-3', but the magic run"),
        (["--targets", "11"], "targets: found 11; allowed: 0 to 9"),
        (["--targets", "x"], "targets: found 'x'; allowed: an index"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(arguments: list[str], message: str, validated: tuple) -> None:
    magic_run = validated[1]
    given = arguments if "--drop" in arguments or "lds.drop" in str(arguments) else ["--drop", "0.1", *arguments]
    assert message in refusal("lds", "--magic-run-id", magic_run, *given)


def test_run_ids_that_do_not_belong_together(validated: tuple) -> None:
    train_run, magic_run, lds_run = validated
    assert f"magic_run_id: run {train_run} is of stage 'train'" in refusal("lds", "--magic-run-id", train_run)
    assert f"magic_run_id: run {lds_run} is of stage 'lds'" in refusal("lds", "--magic-run-id", lds_run)
    assert "has no such run" in refusal("lds", "--magic-run-id", "0" * 32)
    assert "allowed: the ID of a run" in refusal("lds", "--magic-run-id", "../x")
    other = tr.train(CONFIG.override({"seed": 1}))
    message = refusal("lds", "--magic-run-id", magic_run, "--train-run-id", other)
    assert (
        f"magic_run_id: run {magic_run} replayed the training run {train_run}, but train_run_id is {other}" in message
    )
    child = children_of(lds_run)[0].info.run_id
    with pytest.raises(RunError, match="is of stage 'retraining'"):
        tr.lds(child)


def test_targets_beside_a_magic_run(validated: tuple) -> None:
    _, magic_run, lds_run = validated
    before = statuses()
    for same in ("", "3,0;mean:0-4", "mean:0-4;0;3"):
        assert_same_result(tr.lds(magic_run, targets=same, overrides=LDS), lds_run)
    assert statuses() == before
    with pytest.raises(ConfigError, match=r"^targets: found '0-7', but the magic run"):
        tr.lds(magic_run, targets="0-7", overrides=LDS)
    with pytest.raises(ConfigError, match=r"^targets: found '3', but the magic run .* has the targets 3, 0, mean:0-4"):
        tr.lds(magic_run, targets="3", overrides=LDS)
    with pytest.raises(ConfigError, match=r"^targets: found \[3, 1\], but the magic run"):
        tr.lds(magic_run, targets=[3, 1], overrides=LDS)


def test_a_config_beside_a_run(validated: tuple) -> None:
    train_run, magic_run, _ = validated
    for given in ({"magic_run_id": magic_run}, {"train_run_id": train_run}):
        with pytest.raises(ConfigError, match=r"^config: "):
            tr.lds(config=CONFIG, **given)


def test_the_command_line_gives_the_run_and_says_what_it_found(validated: tuple) -> None:
    _, magic_run, lds_run = validated
    options = ["--drop", "0.1,0.25", "--subsets", "4", "--set", "lds.resamples=100", "--targets", ""]
    code, out, err = command("lds", "--magic-run-id", magic_run, *options)
    assert code == 0, err
    (found,) = re.findall(r"LDS run: (\w+)", out)
    assert f"reusing LDS run {found}" in err
    assert_same_result(found, lds_run)


# A process that is killed in the middle.

SLOW_WHERE_ASKED = """
def prepare(self, inputs, dtype):
    import os
    import time
    time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
    return inputs.to(dtype)
"""
RESUMED = QUICK | {"lds.subsets": 6, "train.epochs": 2}


def start(config: str, seconds: float = 0.06, *options: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "SECONDS_A_BATCH": str(seconds)}
    arguments = ["--preset", config, "--targets", "0-1", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "tracked_replay", "lds", *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_retrainings(process: subprocess.Popen, count: int) -> None:
    for _ in range(600):
        if sum(run.info.status == "FINISHED" for run in runs_of("retraining")) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the retrainings did not start")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_process_goes_on_where_it_stopped(
    workers: str, store: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(store, more=SLOW_WHERE_ASKED)
    config = own_config(task).override(RESUMED)
    Path("preset.toml").write_text(config.to_toml())
    tr.magic(config=config, targets="0-1")
    process = start("preset.toml", 0.15, "--workers", workers)
    wait_for_retrainings(process, 2)
    # The run of a process that lives is left alone by other stages.
    (killed,) = runs_of("lds")
    tr.train(config.override({"seed": 1}))
    assert process.poll() is None
    assert mlflow.get_run(killed.info.run_id).info.status == "RUNNING"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    at_hand = [run.info for run in runs_of("retraining")]
    before = {info.run_id: info for info in at_hand if info.status == "FINISHED"}
    assert 2 <= len(before) < 6, "the process was too fast to be killed in the middle"
    half = [info for info in at_hand if info.status == "RUNNING"]  # one that was just being recorded
    assert len(half) <= 1
    assert len(half) + len(before) == len(at_hand)
    assert mlflow.get_run(killed.info.run_id).info.status == "RUNNING"

    out, err = start("preset.toml", 0, "--workers", workers).communicate(timeout=300)
    assert f"{len(before)} of 6 retrainings are finished already" in err
    assert f"run {killed.info.run_id} was left RUNNING by a process that is gone; it is closed as KILLED" in err
    assert mlflow.get_run(killed.info.run_id).info.status == "KILLED"
    (resumed,) = re.findall(r"LDS run: (\w+)", out)
    after = {run.info.run_id: run for run in runs_of("retraining")}
    assert len(after) == 6 + len(half)
    for run_id, info in before.items():
        assert (after[run_id].info.start_time, after[run_id].info.end_time) == (info.start_time, info.end_time)
        assert after[run_id].data.tags["mlflow.parentRunId"] == killed.info.run_id
    assert len(children_of(resumed)) == 6 - len(before)
    assert not [status for status in statuses() if status.endswith("RUNNING")]

    other = store / "other"
    other.mkdir()
    shutil.copyfile(empty_database, other / "mlflow.db")
    monkeypatch.chdir(other)
    kept = folder_of(resumed)
    mlflow.set_tracking_uri(f"sqlite:///{other}/mlflow.db")
    mlflow.set_experiment("tests")
    whole = tr.lds(config=config, targets="0-1")
    assert len(children_of(whole)) == 6
    for name in ("outcomes", "subsets", "predictions", "validation_losses"):
        file = f"lds/{name}.parquet"
        assert (folder_of(whole) / file).read_bytes() == (kept / file).read_bytes(), name
    assert (folder_of(whole) / "lds/summary.json").read_bytes() == (kept / "lds/summary.json").read_bytes()


def test_a_child_that_was_recorded_by_half_is_trained_again(store: Path) -> None:
    config = CONFIG.override(QUICK)
    lds_run = tr.lds(config=config, targets="0")
    client, (first, second, _) = MlflowClient(), children_of(lds_run)
    client.delete_tag(first.info.run_id, names.FINGERPRINT)  # killed before the fingerprint was set
    client.update_run(second.info.run_id, status="RUNNING")  # killed before it was closed
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    host, _, created = second.data.tags[names.PROCESS].rsplit(" ", 2)
    gone.wait()
    client.set_tag(second.info.run_id, names.PROCESS, f"{host} {gone.pid} {created}")
    client.delete_run(lds_run)
    again = tr.lds(config=config, targets="0")
    assert mlflow.get_run(second.info.run_id).info.status == "KILLED"
    assert {child.info.run_name for child in children_of(again)} == {first.info.run_name, second.info.run_name}
    assert table_of(again, "lds/outcomes.parquet").equals(table_of(lds_run, "lds/outcomes.parquet"))


@pytest.mark.parametrize("state", ["gone", "zombie", "another process", "another machine", "untagged", "alive"])
def test_only_a_run_whose_process_is_gone_is_closed(state: str, store: Path) -> None:
    from tracked_replay.tracking.process import this_process

    host, _, created = this_process().rsplit(" ", 2)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = f"{host} {child.pid} {psutil.Process(child.pid).create_time():.2f}"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has waited for it
    if state == "gone":
        child.wait()
    tag = {
        "another process": f"{host} {os.getpid()} {float(created) - 100:.2f}",  # the number was given out again
        "another machine": f"not-{host} {child.pid} 1.00",
        "alive": this_process(),
    }.get(state, owner)
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    tags = {names.STAGE: "lds"} | ({} if state == "untagged" else {names.PROCESS: tag})
    run_id = MlflowClient().create_run(experiment, tags=tags).info.run_id
    tr.train(CONFIG)
    child.wait()
    closed = state in ("gone", "zombie", "another process")
    assert mlflow.get_run(run_id).info.status == ("KILLED" if closed else "RUNNING")
