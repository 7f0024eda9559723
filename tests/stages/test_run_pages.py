"""What the MLflow UI shows of runs: descriptions that begin with the result, metrics to sort by, pictures in tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.image
import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from stage_runs import folder_of
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.cli import STAGES
from tracked_replay.stages.compare import run_compare
from tracked_replay.stages.compare_influence import run_compare_influence
from tracked_replay.stages.counterfactual import run_counterfactual
from tracked_replay.stages.main import run_main
from tracked_replay.stages.pictures import tiled
from tracked_replay.stages.reproduce import run_reproduce
from tracked_replay.stages.suspects_result import read_suspects
from tracked_replay.stages.verify import run_verify
from tracked_replay.tasks import load_task
from tracked_replay.tracking import names
from tracked_replay.tracking.runs import TRAINING_VIEW

CONFIG = tiny_config(train__epochs=2, lds__drop="0.1,0.25", lds__subsets=4, lds__resamples=100, lds__baselines=False)
TARGETS = "0;mean:0-4"
FOLDED = 300  # characters of a description that the UI shows before "Show more", or fewer


@pytest.fixture(scope="module")
def runs(shared_store: Path) -> dict[str, mlflow.entities.Run]:
    """One run of each stage by its name."""
    main_run = run_main(CONFIG, TARGETS)
    tags = mlflow.get_run(main_run).data.tags
    ids = {stage: tags[f"{names.INPUT}{stage}_run_id"] for stage in ("train", "magic", "lds")} | {"main": main_run}
    ids["counterfactual"] = run_counterfactual("", remove="harmful:2@0", magic_run_id=ids["magic"])
    ids["suspects"] = tr.suspects(ids["train"])
    ids["verify"] = run_verify(ids["train"])
    ids["reproduce"] = run_reproduce(ids["train"]).run_id
    seeded = tr.train(CONFIG.override({"seed": 1}))
    ids["compare"] = str(run_compare(ids["train"], seeded).run_id)
    ids["compare several"] = str(run_compare(ids["train"], f"{seeded},{ids['train']}").run_id)
    ids["compare influence"] = run_compare_influence(ids["magic"], tr.magic(seeded, TARGETS)).run_id
    ids["retraining"] = retrainings_of(ids["counterfactual"])[0].info.run_id
    return {stage: mlflow.get_run(run_id) for stage, run_id in ids.items()}


def description(run: mlflow.entities.Run) -> str:
    return str(run.data.tags["mlflow.note.content"])


def table(run: mlflow.entities.Run, name: str) -> list[dict]:
    shown = json.loads((folder_of(run.info.run_id) / f"tables/{name}.json").read_text(encoding="utf-8"))
    return [dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]]


def retrainings_of(run_id: str) -> list[mlflow.entities.Run]:
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == run_id]


STAGES_WITH_A_PAGE = ("train", "magic", "lds", "main", "counterfactual", "suspects", "verify", "reproduce", "compare")
COMPARISONS = ("compare several", "compare influence")


@pytest.mark.parametrize("stage", [*STAGES_WITH_A_PAGE, *COMPARISONS])
def test_a_description_links_its_inputs_and_ends_with_a_command_that_there_is(stage: str, runs: dict) -> None:
    text = description(runs[stage])
    for key, run_id in runs[stage].data.tags.items():
        if key.startswith(names.INPUT):
            path = f"#/experiments/{runs[stage].info.experiment_id}/runs/{run_id}{TRAINING_VIEW}"
            assert f"[{run_id}]({path})" in text, key
    last = text.strip().splitlines()[-1]
    command = re.search(r"- next.*`tracked-replay (\w+) [^`]+`$", last)
    assert command is not None, last
    assert command[1] in STAGES
    for path in re.findall(r"`((?:figures|report|compare)/[^`]+)`", text) if stage != "main" else ():
        assert (folder_of(runs[stage].info.run_id) / path).is_file(), path


def test_the_first_lines_hold_the_number_that_one_looks_for(runs: dict) -> None:
    lds = runs["lds"].data.metrics["lds"]
    accuracy = runs["train"].data.metrics["epoch/evaluation_accuracy"]
    assert f"**LDS {lds:.3f}**" in description(runs["lds"])[:FOLDED]
    assert f"**LDS {lds:.3f}**" in description(runs["main"])[:FOLDED]
    assert f"{accuracy:.1%}" in description(runs["main"])[:FOLDED]
    assert f"**accuracy {accuracy:.1%}**" in description(runs["train"])[:FOLDED]
    change = runs["counterfactual"].data.metrics["mean_absolute/actual_change"]
    assert f"changes by {change:.3g}" in description(runs["counterfactual"])[:FOLDED]


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        ("compare", "**A and B are different, first at step 0.**"),
        ("reproduce", "**A and B are identical, bit for bit.**"),
        ("compare several", "**1 of 3 pairs of runs are identical.**"),
        ("compare influence", "**The scores of A and B are different.**"),
    ],
)
def test_a_comparison_begins_with_its_verdict_and_says_which_run_is_which(stage: str, verdict: str, runs: dict) -> None:
    text, tags = description(runs[stage]), runs[stage].data.tags
    assert text.startswith(verdict)
    second = "reproduced_run_id" if stage == "reproduce" else "run_b"
    first = "train_run_id" if stage == "reproduce" else "run_a"
    for side, name in (("A", first), ("B", second)):
        assert re.search(rf"^- {side}: \[{tags[names.INPUT + name]}\]\(#/", text, re.MULTILINE), side
    if stage == "compare":
        assert "Likely cause: " in text


def test_a_verification_begins_with_how_many_checks_passed(runs: dict) -> None:
    passed = int(runs["verify"].data.metrics["checks/passed"])
    assert description(runs["verify"]).startswith(f"**All {passed} checks passed**")


def test_suspects_are_named_in_the_first_lines(runs: dict) -> None:
    order = read_suspects(runs["suspects"].info.run_id).table["train_index"].to_pylist()
    found = re.findall(r"#(\d+) \(labelled \w, the model says \w\)", description(runs["suspects"]).split("\n")[0])
    assert [int(index) for index in found] == order[:3]


def test_a_validation_does_not_lead_to_a_far_larger_job(runs: dict) -> None:
    for stage in ("lds", "main"):
        train_run = runs[stage].data.tags[f"{names.INPUT}train_run_id"]
        assert f"`tracked-replay suspects --train-run-id {train_run}`" in description(runs[stage])


def test_a_retraining_says_what_was_left_out_and_of_which_run(runs: dict) -> None:
    retraining, parent = runs["retraining"], runs["counterfactual"]
    text, root = description(retraining), folder_of(parent.info.run_id)
    removed = pq.read_table(root / "counterfactual/weights.parquet")["train_index"].to_pylist()
    assert f"retrained without 2 examples ({', '.join(map(str, removed))})" in text
    for run_id in (parent.info.run_id, runs["train"].info.run_id):
        assert f"[{run_id}](#/experiments/{parent.info.experiment_id}/runs/{run_id}{TRAINING_VIEW})" in text
    measured = retraining.data.metrics["evaluation_measurement"]
    assert f"evaluation measurement {measured:.4g}**" in text
    assert retraining.data.tags[names.TASK] == parent.data.tags[names.TASK] == "TinyTask"
    for run in retrainings_of(runs["lds"].info.run_id):
        subset = json.loads((folder_of(run.info.run_id) / "lds/retraining.json").read_text())["id"]
        table = pq.read_table(folder_of(runs["lds"].info.run_id) / "lds/subsets.parquet").to_pylist()
        assert f"({', '.join(map(str, table[subset]['removed'][:12]))}" in description(run)


def test_a_main_run_can_be_sorted_by_what_its_stages_found(runs: dict) -> None:
    shown = {name: value for name, value in runs["main"].data.metrics.items() if not name.startswith("system/")}
    assert shown == {name: runs["lds"].data.metrics[name] for name in ("lds", "lds_low", "lds_high")} | {
        "evaluation_accuracy": runs["train"].data.metrics["epoch/evaluation_accuracy"]
    }


def test_a_series_whose_axis_is_not_the_step_says_so_in_its_name(runs: dict) -> None:
    client = MlflowClient()
    for run in runs.values():
        for name in run.data.metrics:
            steps = {metric.step for metric in client.get_metric_history(run.info.run_id, name)}
            if steps != {0} and not name.startswith("system/"):
                assert name.startswith(("train/", "lr/", "epoch/")) or "_by_" in name.split("/")[0], name


def test_the_description_names_the_strongest_example_of_every_target(runs: dict) -> None:
    scores = tr.load_scores(runs["magic"].info.run_id)["score"].to_numpy().reshape(2, -1)
    for name, values in zip(("0", "mean:0-4"), scores, strict=True):
        (row,) = [line for line in description(runs["magic"]).splitlines() if line.startswith(f"| {name} |")]
        helps, harms = re.findall(r"#(\d+)", row)
        assert (int(helps), int(harms)) == (values.argmin(), values.argmax())


@pytest.mark.parametrize(("stage", "name"), [("magic", "top_examples"), ("suspects", "suspects")])
def test_a_table_shows_the_picture_of_each_training_example(stage: str, name: str, runs: dict) -> None:
    task, root = load_task(CONFIG), folder_of(runs[stage].info.run_id)
    inputs = task.train_examples().inputs
    rows = table(runs[stage], name)
    assert rows
    for row in rows:
        assert row["picture"]["type"] == "image"
        found = matplotlib.image.imread(root / row["picture"]["filepath"])[..., :3]
        drawn = task.draw(inputs[row["train_index"]])
        drawn = np.repeat(drawn[..., None], 3, axis=2) if drawn.ndim == 2 else drawn
        times = found.shape[0] // drawn.shape[0]
        np.testing.assert_array_equal(np.round(255 * found[::times, ::times]).astype(np.uint8), drawn)
    assert {path.name for path in (root / "table_images").iterdir()} == {
        f"train-{row['train_index']}.png" for row in rows
    }


def test_a_mean_has_pictures_too(runs: dict) -> None:
    root = folder_of(runs["magic"].info.run_id)
    assert (root / "figures/target-combination-1-extremes.png").is_file()
    steps = {re.findall(r"targets\Wstep\W(\d+)", path.name)[0] for path in (root / "images").glob("targets*")}
    assert steps == {"0", "1"}


def test_tiled_pictures_are_whole_and_apart() -> None:
    grey = [np.full((2, 3), shade, dtype=np.uint8) for shade in (10, 20, 30)]
    whole = tiled(grey)
    assert whole.shape == (5, 7)
    for shade, (top, left) in zip((10, 20, 30), ((0, 0), (0, 4), (3, 0)), strict=True):
        assert (whole[top : top + 2, left : left + 3] == shade).all()
    assert (whole == 255).sum() == 5 * 7 - 3 * 6
    mixed = tiled([grey[0], np.zeros((2, 3, 3), dtype=np.uint8)])
    assert mixed.shape == (2, 7, 3)
    assert tiled(grey[:1]).shape == (2, 3)
