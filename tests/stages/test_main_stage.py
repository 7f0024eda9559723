"""Stage ``main``: train, magic and lds under one parent run, from one command."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from stage_runs import command, refusal, runs_of, statuses
from tiny import tiny_config, write_task

import tracked_replay as tr
from tracked_replay.stages.main import run_main
from tracked_replay.tracking import names

QUICK = "train.epochs=1,train.batch_size=16,train.threads=1,lds.resamples=100,lds.baselines=false"
CONFIG = tiny_config(
    train__epochs=1, lds__drop="0.1", lds__subsets=3, lds__resamples=100, lds__baselines=False, record__every=2
)
STAGES = ["lds", "magic", "train"]


def children_of(run_id: str) -> list[mlflow.entities.Run]:
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == run_id]


def test_one_parent_with_three_children_and_all_three_reused(store: Path) -> None:
    parent = run_main(CONFIG, "0-1")
    by_stage = {run.data.tags[names.STAGE]: run for run in children_of(parent)}
    assert sorted(by_stage) == STAGES
    assert {run.info.status for run in by_stage.values()} == {"FINISHED"}
    tags = mlflow.get_run(parent).data.tags
    assert tags[names.STAGE] == "main"
    for stage, run in by_stage.items():
        assert tags[f"tracked_replay.input.{stage}_run_id"] == run.info.run_id
        assert run.info.run_id in tags["mlflow.note.content"]
    assert len(children_of(by_stage["lds"].info.run_id)) == 3
    assert by_stage["lds"].data.tags["tracked_replay.input.magic_run_id"] == by_stage["magic"].info.run_id
    assert by_stage["magic"].data.tags["tracked_replay.input.train_run_id"] == by_stage["train"].info.run_id

    again = run_main(CONFIG, "0-1")
    assert again != parent
    assert children_of(again) == []
    other = mlflow.get_run(again).data.tags
    assert {key: value for key, value in other.items() if key.startswith(names.INPUT)} == {
        key: value for key, value in tags.items() if key.startswith(names.INPUT)
    }
    # What main made is found by the single stages, too.
    assert tr.train(CONFIG) == by_stage["train"].info.run_id
    assert tr.magic(config=CONFIG, targets="0-1") == by_stage["magic"].info.run_id
    assert tr.lds(config=CONFIG, targets="0-1") == by_stage["lds"].info.run_id

    more = run_main(CONFIG.override({"lds.subsets": 4}), "0-1")
    assert [run.data.tags[names.STAGE] for run in children_of(more)] == ["lds"]
    forced = run_main(CONFIG, "0-1", force=True)
    assert sorted(run.data.tags[names.STAGE] for run in children_of(forced)) == STAGES


def test_the_command_under_mlflow_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    options = ["--set", f"data.task={write_task(store)},{QUICK}", "--drop", "0.1", "--subsets", "3", "--targets", "0-1"]
    options += ["--workers", "1", "--executor", "local", "--replay-mode", "stream", "--seed", "4"]
    made = []
    for _ in range(2):
        made.append(MlflowClient().create_run(experiment).info.run_id)
        monkeypatch.setenv("MLFLOW_RUN_ID", made[-1])
        code, out, err = command("main", *options)
        assert code == 0, err
        assert re.findall(r"main run: (\w+)", out) == [made[-1]]
        (line,) = re.findall(r"LDS, 10 % removed: .*", out)
        (shown,) = re.findall(r"removed: (-?\d\.\d{3}) \[", line)
        assert shown == f"{runs_of('lds')[0].data.metrics['lds']:.3f}"
    assert sorted(run.data.tags[names.STAGE] for run in children_of(made[0])) == STAGES
    assert children_of(made[1]) == []
    for stage in STAGES:
        assert f"reusing {dict(lds='LDS', magic='magic', train='training')[stage]} run" in err
    (train_run,) = runs_of("train")
    assert train_run.data.params["master_seed"] == "4"


def test_a_stage_that_fails_fails_the_parent(store: Path) -> None:
    config = CONFIG.override({"train.lr": 1e300})
    with pytest.raises(tr.TrackedReplayError, match="step 1: the loss is nan"):
        run_main(config, "0")
    assert statuses() == ["main FAILED", "train FAILED"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "0"], "drop: found '0'; allowed: shares above 0 and below 1"),
        (["--drop", "0.001"], "drop: found 0.001, which removes 0 of 32"),
        (["--drop", "0.95"], "examples of its batch would be removed"),
        (["--drop", "0.1,0.1"], "drop: 0.1 is given twice"),
        (["--set", "replay.budget=1"], "replay.budget: found 1 bytes; allowed: 0, or at least"),
        (["--subsets", "2"], "lds.subsets: found '2'; allowed: integer >= 3"),
        (["--executor", "ray"], "lds.executor: found 'ray'"),
        (["--workers", "0"], "lds.workers: found '0'"),
        (["--targets", "6"], "targets: found 6; allowed: 0 to 5"),
        (["--train-run-id", "0" * 32], "train_run_id: found '0000"),
        (["--magic-run-id", "0" * 32], "magic_run_id: found '0000"),
        (["--set", "train.nothing=1"], "train.nothing: unknown config field"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_trained(arguments: list[str], message: str, store: Path) -> None:
    task = write_task(store)
    given = ["--set", f"data.task={task},{QUICK}"] if "--set" not in arguments else []
    drop = ["--drop", "0.1"] if "--drop" not in arguments else []
    targets = ["--targets", "0"] if "--targets" not in arguments else []
    assert message in refusal("main", *given, *drop, *targets, *arguments)
