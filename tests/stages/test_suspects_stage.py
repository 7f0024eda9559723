"""Stage ``suspects``: its files against the recording and trainings with torch alone, reuse, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import stage_runs
import torch
from sklearn.metrics import roc_auc_score
from stage_runs import command, folder_of, plain_retraining, refusal, runs_of, statuses, table_of
from test_docs import documented_columns, require_documented
from tiny import TinyTask, own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay import report
from tracked_replay.debugging import QUESTIONS
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.report import Suspect
from tracked_replay.stages.suspects import run_suspects
from tracked_replay.stages.suspects_result import Suspects, describe, read_suspects
from tracked_replay.stages.verify import run_verify
from tracked_replay.tasks import Examples

CONFIG = tiny_config(data__flip_labels=0.125, seed=3)
SHARE = 0.125
TOP = 6


@pytest.fixture(scope="module")
def found(shared_store: Path) -> tuple[str, str]:
    """A train run with flipped labels, and a suspects run on it."""
    train_run = tr.train(CONFIG)
    return train_run, run_suspects(train_run, share=SHARE)


def flipped_of(train_run: str) -> dict[str, list[int]]:
    return table_of(train_run, "config/flipped_labels.parquet").to_pydict()


def summary_of(run_id: str) -> dict:
    return json.loads((folder_of(run_id) / "suspects/summary.json").read_text())


def children_of(run_id: str) -> list[mlflow.entities.Run]:
    return [run for run in runs_of("retraining") if run.data.tags["mlflow.parentRunId"] == run_id]


def test_the_training_records_what_was_flipped(found: tuple) -> None:
    train_run, _ = found
    flipped = flipped_of(train_run)
    true_labels = TinyTask(CONFIG).train_examples().labels
    assert len(flipped["train_index"]) == 6
    assert flipped["true_label"] == true_labels[flipped["train_index"]].tolist()
    assert all(label != true for label, true in zip(flipped["label"], flipped["true_label"], strict=True))
    wrong = true_labels.clone()
    wrong[flipped["train_index"]] = torch.tensor(flipped["label"])
    for row in pq.read_table(folder_of(train_run) / "trace/part-00000.parquet").to_pylist():
        assert row["labels"] == wrong[row["indices"]].tolist()


def test_a_training_without_flips_says_nothing_of_them(shared_store: Path) -> None:
    train_run = tr.train(tiny_config(train__epochs=1))
    assert not (folder_of(train_run) / "config/flipped_labels.parquet").exists()


def test_the_checks_of_a_recording_hold_with_flipped_labels(found: tuple) -> None:
    assert mlflow.get_run(run_verify(found[0])).info.status == "FINISHED"


def test_every_example_is_in_the_table_in_the_order_of_the_first_ranking(found: tuple) -> None:
    train_run, run_id = found
    table = table_of(run_id, "suspects/suspects.parquet")
    assert table.column_names == ["rank", "train_index", "label", "predicted_label", "probability", *QUESTIONS]
    assert sorted(table["train_index"].to_pylist()) == list(range(48))
    assert table["rank"].to_pylist() == list(range(1, 49))
    assert (np.diff(table["margin"].to_numpy()) <= 0).all()
    labels = TinyTask(CONFIG).train_examples().labels
    flipped = flipped_of(train_run)
    labels[flipped["train_index"]] = torch.tensor(flipped["label"])
    assert table["label"].to_pylist() == labels[table["train_index"].to_pylist()].tolist()
    tensors = safetensors.torch.load_file(folder_of(train_run) / "checkpoints/step-000009.safetensors")
    model = TinyTask(CONFIG).model().double().eval()
    model.load_state_dict(
        {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if "momentum/" not in name}
    )
    with torch.no_grad():
        outputs = model(TinyTask(CONFIG).train_examples().inputs.double())[table["train_index"].to_pylist()]
    assert table["predicted_label"].to_pylist() == outputs.argmax(1).tolist()
    np.testing.assert_allclose(table["probability"].to_numpy(), outputs.softmax(1).max(1).values.numpy(), rtol=1e-10)
    own = torch.nn.functional.cross_entropy(outputs, torch.tensor(table["label"].to_pylist()), reduction="none")
    np.testing.assert_allclose(table["training_loss"].to_numpy(), own.numpy(), rtol=1e-10)


def test_harm_is_the_exact_influence_on_the_mean_evaluation_loss(found: tuple) -> None:
    train_run, run_id = found
    magic_run = mlflow.get_run(run_id).data.tags["tracked_replay.input.magic_run_id"]
    before = statuses()
    assert tr.magic(train_run, "mean:all") == magic_run
    assert statuses() == before
    scores = tr.load_scores(magic_run)["score"].to_numpy()
    table = table_of(run_id, "suspects/suspects.parquet")
    assert (table["harm"].to_numpy() == scores[table["train_index"].to_numpy()]).all()


def test_metrics_and_summary_are_what_the_table_gives(found: tuple) -> None:
    train_run, run_id = found
    flipped = flipped_of(train_run)["train_index"]
    table = table_of(run_id, "suspects/suspects.parquet").to_pandas()
    truth = table["train_index"].isin(flipped).to_numpy()
    metrics, summary = mlflow.get_run(run_id).data.metrics, summary_of(run_id)
    assert (summary["top"], summary["flipped"]) == (TOP, 6)
    assert [row["name"] for row in summary["rankings"]] == list(QUESTIONS)
    for row in summary["rankings"]:
        values = table[row["name"]].to_numpy()
        by_index = table.sort_values([row["name"], "train_index"], ascending=[False, True])
        hits = by_index["train_index"][:TOP].isin(flipped).sum()
        assert row["question"] == QUESTIONS[row["name"]]
        assert metrics[f"auc/{row['name']}"] == row["auc"]
        expected = {"auc": roc_auc_score(truth, values), "precision": hits / TOP, "recall": hits / 6}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-12)


def test_the_retrainings_leave_out_exactly_what_they_say(found: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run, run_id = found
    flipped = flipped_of(train_run)

    class Flipped(TinyTask):
        def train_examples(self) -> Examples:
            examples = super().train_examples()
            examples.labels[flipped["train_index"]] = torch.tensor(flipped["label"])
            return examples

    monkeypatch.setattr(stage_runs, "TinyTask", Flipped)
    table = table_of(run_id, "suspects/suspects.parquet")
    removed: dict[str, list[int]] = {"nothing": []}
    for row in table_of(run_id, "suspects/removed.parquet").to_pylist():
        removed.setdefault(row["removal"], []).append(row["train_index"])
    assert removed["suspects"] == sorted(table["train_index"].to_pylist()[:TOP])
    assert removed["flipped"] == flipped["train_index"]
    assert len(removed["random"]) == len(set(removed["random"])) == TOP
    rows = {row["removal"]: row for row in summary_of(run_id)["removals"]}
    assert list(rows) == ["nothing", "suspects", "random", "flipped"]
    metrics = mlflow.get_run(run_id).data.metrics
    for name, row in rows.items():
        weights = np.ones(48)
        weights[removed[name]] = 0
        measurements = plain_retraining(train_run, weights)
        assert row["evaluation_measurement"] == pytest.approx(measurements.mean(), rel=1e-10), name
        assert metrics[f"evaluation_measurement/removed_{name}"] == row["evaluation_measurement"]
        assert metrics[f"evaluation_accuracy/removed_{name}"] == row["evaluation_accuracy"]
        assert row["removed"] == len(removed[name])
        assert row["flipped"] == len(set(removed[name]) & set(flipped["train_index"]))
    assert len(children_of(run_id)) == 3


def test_the_run_shows_table_figure_questions_and_a_list_to_remove(found: tuple) -> None:
    train_run, run_id = found
    root, tags = folder_of(run_id), mlflow.get_run(run_id).data.tags
    assert (root / "figures/suspects.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads((root / "tables/suspects.json").read_text())
    rows = [dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]]
    order = table_of(run_id, "suspects/suspects.parquet")["train_index"].to_pylist()
    assert [row["train_index"] for row in rows[:32]] == order[:32]
    assert [row["ranking"] for row in rows] == [name for name in QUESTIONS for _ in range(32)]
    assert all(row["question"] == QUESTIONS[row["ranking"]] for row in rows)
    text = tags["mlflow.note.content"]
    for name, question in QUESTIONS.items():
        assert f"| {name} | {question} |" in text
    assert tags["tracked_replay.input.train_run_id"] == train_run
    top = root / "suspects/top.txt"
    assert np.loadtxt(top, dtype=int, comments="#").tolist() == order[:TOP]
    code, out, err = command("counterfactual", "--train-run-id", train_run, "--targets", "mean:all", "--remove", top)
    assert code == 0, err
    actual = float(re.findall(r"actual ([\d.]+)", out)[0])
    assert actual == pytest.approx(summary_of(run_id)["removals"][1]["evaluation_measurement"], rel=1e-5)


def test_every_artifact_column_and_metric_is_in_the_formats(found: tuple) -> None:
    for run_id, tables in zip(
        found, (["config/flipped_labels"], ["suspects/suspects", "suspects/removed"]), strict=True
    ):
        require_documented(run_id)
        for name in tables:
            columns = table_of(run_id, f"{name}.parquet").column_names
            assert documented_columns(f"`{name}.parquet`") == columns


def test_command_line_and_python_share_the_run(found: tuple) -> None:
    train_run, run_id = found
    before = statuses()
    code, out, err = command("suspects", "--train-run-id", train_run, "--share", SHARE)
    assert code == 0, err
    assert f"suspects run: {run_id}" in out
    assert "reusing suspects run" in err
    assert describe(read_suspects(run_id)) in out
    rows = table_of(run_id, "suspects/suspects.parquet").to_pylist()
    for row in rows[:10]:
        assert f"{row['rank']:4d}. training example {row['train_index']}: {in_words(row)}\n" in out
    assert statuses() == before
    command_after = re.findall(r"^next: +(.*)$", out, re.MULTILINE)[0]
    assert command_after.endswith(f" --remove {','.join(str(row['train_index']) for row in rows[:10])}")
    assert mlflow.get_run(run_id).data.tags["mlflow.note.content"].endswith(f"- next: `{command_after}`\n")


def in_words(row: dict) -> str:
    """What a row of the table says of its example."""
    names = TinyTask.label_names
    agrees = row["predicted_label"] == row["label"]
    says = "the model agrees" if agrees else f"the model says {names[row['predicted_label']]}"
    return f"labelled {names[row['label']]}, {says} ({row['probability']:.0%})"


def test_what_the_model_agrees_with_comes_last_and_is_marked(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Suspect] = []
    draw = report.suspects_figure
    monkeypatch.setattr(
        report, "suspects_figure", lambda suspects, *rest: drawn.extend(suspects) or draw(suspects, *rest)
    )
    run_id = run_suspects(config=tiny_config(train__epochs=2), checkpoints=1, share=0.8)
    rows = table_of(run_id, "suspects/suspects.parquet").to_pylist()
    agrees = [row["predicted_label"] == row["label"] for row in rows]
    assert agrees == sorted(agrees)
    disagreeing, top = agrees.count(False), rows[:38]
    assert 0 < disagreeing < 38
    heading, *lines = (folder_of(run_id) / "suspects/top.txt").read_text().splitlines()
    assert heading == (
        f"# the 38 most suspicious of 48 training examples by margin; the model says another class than the label of "
        f"{disagreeing}, and agrees with {38 - disagreeing}"
    )
    assert lines == [f"{row['train_index']}  # {in_words(row)}" for row in top]
    assert f"the model says another class than the label of {disagreeing} of all 48 examples" in describe(
        read_suspects(run_id)
    )
    assert [suspect.says for suspect in drawn] == [
        f"→ {'agrees' if agreed else TinyTask.label_names[row['predicted_label']]} {row['probability']:.0%}"
        for agreed, row in zip(agrees[:32], rows, strict=False)
    ]
    assert [suspect.differs for suspect in drawn] == [not agreed for agreed in agrees[:32]]
    text = mlflow.get_run(run_id).data.tags["mlflow.note.content"]
    assert f"the model agrees with the label of {38 - disagreeing} of these" in text
    shown = json.loads((folder_of(run_id) / "tables/suspects.json").read_text())
    for values in shown["data"]:
        row = dict(zip(shown["columns"], values, strict=True))
        assert row["model_agrees"] is (row["model_says"] == row["label"])


def test_a_list_where_the_model_agrees_says_so() -> None:
    columns = {"rank": [1, 2], "train_index": [7, 5], "label": [0, 1], "predicted_label": [1, 1]}
    summary = {"label_names": ["a", "b"], "rankings": [{"name": "margin", "question": "?"}]}
    assert describe(Suspects(pa.table(columns | {"probability": [0.9, 0.51]}), summary)).splitlines() == [
        "most suspicious by margin: ?",
        "the model says another class than the label of 1 of all 2 examples",
        "   1. training example 7: labelled a, the model says b (90%)",
        "   2. training example 5: labelled b, the model agrees (51%)",
    ]


def test_a_label_cannot_end_a_line(store: Path) -> None:
    labels = ('label_names = ("a", "b", "c")', r'label_names = ("a\n\n| x", "b\r\u2028*x*", "c" * 99)')
    run_id = run_suspects(config=own_config(write_task(store, labels)), share=0.5)
    lines = (folder_of(run_id) / "suspects/top.txt").read_text().splitlines()
    rows = table_of(run_id, "suspects/suspects.parquet").to_pylist()
    names = ["a | x", "b *x*", "c" * 59 + "…"]
    assert [line.split(", ")[0] for line in lines[1:]] == [
        f"{row['train_index']}  # labelled {names[row['label']]}" for row in rows[:16]
    ]
    assert len(describe(read_suspects(run_id)).splitlines()) == 12
    written = [r"a \| x", r"b \*x\*", names[2]]
    first = mlflow.get_run(run_id).data.tags["mlflow.note.content"].splitlines()[0]
    assert re.findall(r"#(\d+) \(labelled ([^,]*), the model", first) == [
        (str(row["train_index"]), written[row["label"]]) for row in rows[:3]
    ]


def test_without_flips_nothing_is_retrained_and_nothing_is_claimed(store: Path) -> None:
    run_id = run_suspects(config=tiny_config(train__epochs=2), checkpoints=1)
    assert statuses() == ["magic FINISHED", "suspects FINISHED", "train FINISHED"]
    root = folder_of(run_id)
    assert not (root / "suspects/removed.parquet").exists()
    summary = summary_of(run_id)
    assert (summary["flipped"], summary["removals"]) == (0, [])
    assert all(set(row) == {"name", "question"} for row in summary["rankings"])
    assert not [name for name in mlflow.get_run(run_id).data.metrics if "/" in name and not name.startswith("system/")]
    assert "AUC" not in describe(read_suspects(run_id))
    before = statuses()
    assert run_suspects(config=tiny_config(train__epochs=2), checkpoints=1) == run_id
    assert statuses() == before
    for changed in ({"checkpoints": 2}, {"checkpoints": 1, "share": 0.2}):
        assert run_suspects(config=tiny_config(train__epochs=2), **changed) != run_id
    assert statuses().count("magic FINISHED") == 1
    (root / "suspects/summary.json").write_text("{}")
    with pytest.raises(RecordingError, match=r"suspects/summary.json is damaged"):
        read_suspects(run_id)


def test_a_task_without_classes_is_ranked_by_its_losses(store: Path) -> None:
    changes = (("nn.Linear(4, 3)", "nn.Linear(4, 1)"),)
    loss = """
        def per_example_loss(self, outputs, labels):
            return (outputs.squeeze(1) - labels).square()
    """
    config = own_config(write_task(store, *changes, more=loss), data__flip_labels=0.1)
    run_id = run_suspects(config=config)
    table = table_of(run_id, "suspects/suspects.parquet")
    assert table["predicted_label"].null_count == table["probability"].null_count == 32
    assert [name for name in QUESTIONS if name not in table.column_names] == ["margin", "margin_area"]
    assert (np.diff(table["training_loss"].to_numpy()) <= 0).all()
    removals = summary_of(run_id)["removals"]
    assert [row["evaluation_accuracy"] for row in removals] == [None] * 4
    assert "the model" not in describe(read_suspects(run_id))
    lines = (folder_of(run_id) / "suspects/top.txt").read_text().splitlines()
    assert lines[0] == "# the 2 most suspicious of 32 training examples by training_loss"
    assert [re.sub(r"labelled [abc]$", "", line) for line in lines[1:]] == [
        f"{index}  # " for index in table["train_index"].to_pylist()[:2]
    ]


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "0.001", "some"])
def test_a_share_that_is_no_top_is_refused(share: str, found: tuple) -> None:
    message = refusal("suspects", "--train-run-id", found[0], "--share", share)
    assert message.startswith(f"share: found {share if share != 'some' else repr(share)}")


def test_what_cannot_be_asked_is_refused(found: tuple, shared_store: Path) -> None:
    train_run, run_id = found
    refused = {
        "checkpoints: found '0'; allowed: integer >= 1": ("--train-run-id", train_run, "--checkpoints", "0"),
        "seed: found '7', but the recorded run": ("--train-run-id", train_run, "--seed", "7"),
        "train.lr: cannot be changed for the recorded run": ("--train-run-id", train_run, "--set", "train.lr=1"),
        "train_run_id: run": ("--train-run-id", run_id),
        "data.flip_labels: found '1'": ("--set", "data.flip_labels=1"),
        "data.flip_labels: found 0.001, which flips none of 48 labels": (
            "--set",
            "data.task=tiny:TinyTask,train.batch_size=16,data.flip_labels=0.001",
        ),
    }
    for beginning, arguments in refused.items():
        assert refusal("suspects", *arguments).startswith(beginning)
    with pytest.raises(ConfigError, match="a config and train_run_id were both given"):
        run_suspects(train_run, config=CONFIG)
    with pytest.raises(ConfigError, match="checkpoints: found 0; allowed: integer >= 1"):
        run_suspects(train_run, checkpoints=0)
