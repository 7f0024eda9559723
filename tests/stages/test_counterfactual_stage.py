"""Stage ``counterfactual``: predicted beside actual, the ways to name examples, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from stage_runs import bits, command, folder_of, plain_retraining, refusal, runs_of, statuses, table_of
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ConfigError, RecordingError, ReplayError, RetrainingError, RunError
from tracked_replay.stages import retrainings
from tracked_replay.stages.counterfactual import conclusion, read_counterfactual, run_counterfactual
from tracked_replay.tracking import names

CONFIG = tiny_config(train__epochs=2)
TARGETS = "3,0;mean:0-4"


@pytest.fixture(scope="module")
def recorded(shared_store: Path) -> tuple[str, str]:
    """A train run and a magic run on it."""
    train_run = tr.train(CONFIG)
    return train_run, tr.magic(train_run, TARGETS)


def base_of(magic_run: str) -> np.ndarray:
    rows = json.loads((folder_of(magic_run) / "scores/targets.json").read_text())
    return np.array([row["measurement"] for row in rows])


def scores_of(magic_run: str) -> np.ndarray:
    return tr.load_scores(magic_run)["score"].to_numpy().reshape(3, -1)


def test_predicted_and_actual_are_those_of_scores_and_a_training_with_torch_alone(recorded: tuple) -> None:
    train_run, magic_run = recorded
    changed = {3: 0.0, 17: 2.5, 40: -0.5}
    result = tr.counterfactual(train_run, changed, TARGETS)
    weights = np.ones(48)
    weights[list(changed)] = list(changed.values())
    measured = plain_retraining(train_run, weights)
    assert isinstance(result, tuple)
    assert result._fields == ("predicted", "actual")
    for values in result:
        assert values.dtype == np.float64
        assert values.shape == (3,)
    np.testing.assert_allclose(result.actual, [measured[3], measured[0], measured[:5].mean()], rtol=1e-11)
    change = sum((weight - 1) * scores_of(magic_run)[:, index] for index, weight in changed.items())
    np.testing.assert_allclose(result.predicted, base_of(magic_run) + change, rtol=1e-11)


def test_the_central_difference_is_the_score(recorded: tuple) -> None:
    train_run, magic_run = recorded
    scores = scores_of(magic_run)
    for index in np.argsort(-np.abs(scores).min(axis=0))[:2].tolist():
        up, down = (tr.counterfactual(train_run, {index: 1 + step}, TARGETS) for step in (1e-4, -1e-4))
        np.testing.assert_allclose((up.actual - down.actual) / 2e-4, scores[:, index], rtol=1e-6)
        np.testing.assert_allclose((up.predicted - down.predicted) / 2e-4, scores[:, index], rtol=1e-6)


def test_weight_1_changes_no_bit(recorded: tuple) -> None:
    train_run, magic_run = recorded
    for weights in ({5: 1.0}, dict.fromkeys(range(48), 1)):
        result = tr.counterfactual(train_run, weights, TARGETS)
        for values in result:
            np.testing.assert_array_equal(bits(values), bits(base_of(magic_run)))


def test_command_line_and_python_agree_and_share_the_run(recorded: tuple, tmp_path: Path) -> None:
    train_run, magic_run = recorded
    expected = tr.counterfactual(train_run, {1: 0, 4: 0, 5: 0, 6: 0}, TARGETS)
    before = statuses()
    listed = tmp_path / "some examples"
    listed.write_text("1\n4-5\r\n\n  6\n")
    as_json = tmp_path / "weights.json"
    as_json.write_text('{"1": 0, "4": 0.0, "5": -0.0, " 6": "0"}'.replace('" 6": "0"', '"6": 0'))
    ways = [("--remove", "1,4-6"), ("--remove", " 6 ,1, 4 - 5 ".replace(" - ", "-")), ("--remove", listed)]
    ways += [("--weights", "1=0,4=0,5=0.0, 6 = 0"), ("--weights", as_json)]
    for way in ways:
        code, out, err = command("counterfactual", "--magic-run-id", magic_run, *way)
        assert code == 0, err
        found = read_counterfactual(re.findall(r"counterfactual run: (\w+)", out)[0])
        np.testing.assert_array_equal(bits(found.actual), bits(expected.actual))
        for place in range(3):
            said = f"predicted {found.predicted[place]:.6g}, actual {found.actual[place]:.6g}"
            assert re.search(rf"target \S.*: recorded [\d.]+, {re.escape(said)}\n", out)
    code, out, err = command("counterfactual", "--train-run-id", train_run, "--remove", "1,4-6", "--targets", TARGETS)
    assert "reusing counterfactual run" in err
    # −0.0 is another weight than 0.0 for the fingerprint; everything else was there already.
    assert len(statuses()) - len(before) <= 2


def test_a_run_holds_weights_outcomes_figure_and_description(recorded: tuple) -> None:
    train_run, magic_run = recorded
    run_id = run_counterfactual(train_run, weights="3=0,1=0.5", magic_run_id=magic_run)
    result, run, root = read_counterfactual(run_id), mlflow.get_run(run_id), folder_of(run_id)
    assert table_of(run_id, "counterfactual/weights.parquet").to_pydict() == {"train_index": [1, 3], "weight": [0.5, 0]}
    table = table_of(run_id, "counterfactual/outcomes.parquet").to_pydict()
    assert table["target"] == [3, 0, -1]
    assert table["recorded"] == base_of(magic_run).tolist()
    assert (table["predicted"], table["actual"]) == (result.predicted.tolist(), result.actual.tolist())
    assert (root / "figures/counterfactual.png").read_bytes().startswith(b"\x89PNG")
    assert [row["name"] for row in json.loads((root / "counterfactual/targets.json").read_text())] == [
        "3", "0", "mean:0-4",
    ]  # fmt: skip
    assert (root / "config/config.toml").is_file()
    text = run.data.tags["mlflow.note.content"]
    for name, old, one, other in zip(
        ["3", "0", "mean:0-4"], table["recorded"], result.predicted, result.actual, strict=True
    ):
        assert f"| {name} | {old:.6g} | {one:.6g} | {other:.6g} |" in text
    history = MlflowClient().get_metric_history(run_id, "change_by_target/actual")
    np.testing.assert_allclose(
        [metric.value for metric in sorted(history, key=lambda metric: metric.step)], result.actual - table["recorded"]
    )
    assert run.data.tags["tracked_replay.input.train_run_id"] == train_run
    assert run.data.tags["tracked_replay.input.magic_run_id"] == magic_run
    (child,) = [one for one in runs_of("retraining") if one.data.tags["mlflow.parentRunId"] == run_id]
    assert child.info.status == "FINISHED"


def test_the_conclusion_is_the_first_line_of_the_description_and_the_last_before_the_run(recorded: tuple) -> None:
    _, magic_run = recorded
    code, out, err = command("counterfactual", "--magic-run-id", magic_run, "--remove", "8,22,23")
    assert code == 0, err
    run_id = re.findall(r"counterfactual run: (\w+)", out)[0]
    result = read_counterfactual(run_id)
    happened, expected = result.actual - base_of(magic_run), result.predicted - base_of(magic_run)
    right = sum(one * other > 0 for one, other in zip(happened, expected, strict=True))
    worst = max(range(3), key=lambda place: abs(result.actual[place] - result.predicted[place]))
    moves = [
        f"a {'rise' if change > 0 else 'fall'} of {abs(change):.3g}" for change in (happened[worst], expected[worst])
    ]
    sentence = (
        f"Removing these 3 examples moved the measurement of {right} of 3 targets the way that the scores predicted; "
        f"they are furthest off at target {TARGETS.replace(';', ',').split(',')[worst]}, by "
        f"{abs(happened[worst] - expected[worst]):.3g}: {moves[0]}, predicted {moves[1]}."
    )
    assert f"\n{sentence}\ncounterfactual run: " in out
    assert mlflow.get_run(run_id).data.tags["mlflow.note.content"].startswith(f"{sentence} ")


@pytest.mark.parametrize(
    ("happened", "expected", "sentence"),
    [
        (
            -0.125,
            -0.12,
            "lowered the measurement of target 3 by 0.125; the scores predicted 0.12 (96% of what happened)",
        ),
        (0.25, 0.5, "raised the measurement of target 3 by 0.25; the scores predicted 0.5 (200% of what happened)"),
        (0.01, 0.5, "raised the measurement of target 3 by 0.01; the scores predicted 0.5 (50 times what happened)"),
        (
            -0.125,
            0.5,
            "lowered the measurement of target 3 by 0.125; the scores predicted the opposite, a rise of 0.5",
        ),
        (0.125, -0.5, "raised the measurement of target 3 by 0.125; the scores predicted the opposite, a fall of 0.5"),
        (0.125, 0, "raised the measurement of target 3 by 0.125; the scores predicted no change"),
        (0, 0.5, "did not change the measurement of target 3; the scores predicted a rise of 0.5"),
        (0, 0, "did not change the measurement of target 3, as the scores predicted"),
    ],
)
def test_the_conclusion_on_one_target_has_signs_and_share(happened: float, expected: float, sentence: str) -> None:
    base = np.array([2.0])
    for weights, done in (
        ([0.0], "Removing this example"),
        ([0.0, 0.0], "Removing these 2 examples"),
        ([2.5], "Reweighting this example"),
        ([0.0, 0.5], "Reweighting these 2 examples"),
    ):
        found = conclusion(np.array(weights), ["3"], base, base + expected, base + happened)
        assert found == f"{done} {sentence}."


def test_the_conclusion_on_several_targets_counts_directions_and_names_the_worst() -> None:
    base, removed = np.zeros(4), np.zeros(2)
    names_of = ["0", "1", "2", "mean:all"]
    found = conclusion(removed, names_of, base, np.array([0.5, -0.5, 0, 0.25]), np.array([0.75, 0.125, 0, 0]))
    assert found == (
        "Removing these 2 examples moved the measurement of 2 of 4 targets the way that the scores predicted; they are "
        "furthest off at target 1, by 0.625: a rise of 0.125, predicted a fall of 0.5."
    )
    found = conclusion(removed, names_of, base, np.array([0.5, -0.5, 0, 0.25]), np.array([0.5, -0.5, 0, 0]))
    assert found.endswith("furthest off at target mean:all, by 0.25: no change, predicted a rise of 0.25.")
    assert conclusion(np.ones(1), names_of, base, base, base) == (
        "Reweighting this example changed the measurement of none of the 4 targets, as the scores predicted."
    )


def test_the_name_of_a_target_cannot_end_a_row(recorded: tuple) -> None:
    run_id = run_counterfactual(recorded[0], remove="5", targets="mean:0,\n1")
    text = mlflow.get_run(run_id).data.tags["mlflow.note.content"]
    assert text.startswith("Removing this example ")
    assert " target mean:0, 1 by " in text.splitlines()[0]
    assert re.search(r"^\| mean:0, 1 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE)


def test_what_follows_a_hash_in_a_file_of_examples_is_no_index(recorded: tuple, tmp_path: Path) -> None:
    path = tmp_path / "top.txt"
    path.write_text("# the 2 most suspicious of 48\n7  # labelled 3, the model says 8 (97%)\n\n2# 5\n")
    run_id = run_counterfactual("", remove=str(path), magic_run_id=recorded[1])
    assert table_of(run_id, "counterfactual/weights.parquet")["train_index"].to_pylist() == [2, 7]


@pytest.mark.parametrize("side", ["harmful", "helpful"])
@pytest.mark.parametrize(("target", "row"), [("3", 0), ("0", 1), ("mean:0-4", 2)])
def test_the_most_harmful_are_those_with_the_largest_scores(side: str, target: str, row: int, recorded: tuple) -> None:
    _, magic_run = recorded
    run_id = run_counterfactual("", remove=f"{side}:4@{target}", magic_run_id=magic_run)
    chosen = table_of(run_id, "counterfactual/weights.parquet").to_pydict()
    scores = scores_of(magic_run)[row] * (1 if side == "harmful" else -1)
    assert chosen["train_index"] == sorted(np.argsort(-scores)[:4].tolist())
    assert chosen["weight"] == [0.0] * 4
    assert scores[chosen["train_index"]].min() > 0
    result = read_counterfactual(run_id)
    lower = result.predicted[row] < base_of(magic_run)[row]
    assert lower == (side == "harmful")


def test_all_harmful_examples_are_as_many_as_have_a_positive_score(recorded: tuple) -> None:
    _, magic_run = recorded
    positive = int((scores_of(magic_run)[0] > 0).sum())
    message = refusal("counterfactual", "--magic-run-id", magic_run, "--remove", f"harmful:{positive + 1}@3")
    assert f"remove: found {positive + 1} harmful examples asked for; allowed: 1 to {positive}" in message


def test_the_same_again_is_reused_and_force_gives_the_same_bits(recorded: tuple) -> None:
    train_run, magic_run = recorded
    first = run_counterfactual(train_run, remove="30,2", magic_run_id=magic_run)
    before = statuses()
    assert run_counterfactual(train_run, remove="2,30", magic_run_id=magic_run) == first
    assert run_counterfactual("", weights="2=0,30=0.0", magic_run_id=magic_run, targets=TARGETS) == first
    assert run_counterfactual(train_run, remove="2,30", targets=TARGETS) == first
    assert statuses() == before
    again = run_counterfactual("", remove="30,2", magic_run_id=magic_run, force=True)
    assert again != first
    for one, other in zip(read_counterfactual(first), read_counterfactual(again), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))
    assert len(statuses()) == len(before) + 2


def test_other_targets_reuse_the_retraining(recorded: tuple) -> None:
    train_run, _ = recorded
    tr.counterfactual(train_run, {33: 0.0}, TARGETS)
    before = len(runs_of("retraining"))
    tr.counterfactual(train_run, {33: 0.0}, [7, 8])
    assert len(runs_of("retraining")) == before


def test_hundreds_of_named_examples_are_no_path(recorded: tuple) -> None:
    _, magic_run = recorded
    weights = ",".join(f"{index}=0.{index:020}" for index in range(48))
    assert len(weights) > 1000
    read_counterfactual(run_counterfactual("", weights=weights, magic_run_id=magic_run))
    spaced = (" " * 30).join(f"{index}," for index in range(6)) + "6"
    assert len(spaced) > 160
    read_counterfactual(run_counterfactual("", remove=spaced, magic_run_id=magic_run))
    message = refusal("counterfactual", "--magic-run-id", magic_run, "--remove", "x" * 5000)
    assert message.startswith(f"remove: found '{'x' * 80}'…; allowed: indices")


def test_a_file_named_like_an_index_is_no_file_of_indices(recorded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("7").write_text("8")
    _, magic_run = recorded
    run_id = run_counterfactual("", remove="7", magic_run_id=magic_run)
    assert table_of(run_id, "counterfactual/weights.parquet")["train_index"].to_pylist() == [7]


def test_under_mlflow_run_the_run_that_was_made_is_the_one_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run = tr.train(CONFIG)
    experiment = mlflow.get_run(train_run).info.experiment_id
    made = MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    assert run_counterfactual(train_run, remove="1") == made
    (magic_run,) = runs_of("magic")
    assert magic_run.data.tags["mlflow.parentRunId"] == made
    assert mlflow.get_run(made).data.tags[names.STAGE] == "counterfactual"

    # A run that only points to a result is as good as the result.
    for stage, call in (
        ("train", lambda: tr.train(CONFIG)),
        ("counterfactual", lambda: run_counterfactual(train_run, remove="1")),
    ):
        pointing = MlflowClient().create_run(experiment).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", pointing)
        call()
        assert mlflow.get_run(pointing).data.tags[names.REUSES], stage
        if stage == "train":
            assert run_counterfactual(pointing, remove="1") == made
            assert run_counterfactual(pointing, remove="1", magic_run_id=magic_run.info.run_id) == made
            np.testing.assert_array_equal(*(tr.counterfactual(run, {1: 0}).actual for run in (pointing, train_run)))


def test_a_retraining_that_fails_says_why_and_leaves_a_failed_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = tr.train(CONFIG)

    def fail(setup: object, job: object) -> None:
        raise ValueError("no luck")

    monkeypatch.setattr(retrainings, "retrain", fail)
    with pytest.raises(RetrainingError, match=r"^the retraining failed twice: ValueError: no luck$"):
        tr.counterfactual(train_run, {1: 0.0})
    assert statuses() == ["counterfactual FAILED", "magic FINISHED", "retraining FAILED", "train FINISHED"]


def test_weights_that_make_the_training_diverge_say_so(store: Path) -> None:
    train_run = tr.train(CONFIG)
    with pytest.raises(RetrainingError, match=r"NumericalError: step \d: the"):
        tr.counterfactual(train_run, {1: 1e308})
    assert "counterfactual FAILED" in statuses()


def test_a_task_edited_since_is_refused(store: Path) -> None:
    train_run = tr.train(own_config(write_task(store)))
    write_task(store, ("nn.Tanh()", "nn.ReLU()"))
    with pytest.raises(ReplayError, match="step 0: "):
        tr.counterfactual(train_run, {1: 0.0})
    assert statuses() == ["train FINISHED"]


def test_a_model_that_begins_elsewhere_than_the_recorded_one_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = "import os\n        torch.rand(int(os.environ.get('DRAWS', 0)))\n        return nn.Sequential("
    train_run = tr.train(own_config(write_task(store, ("return nn.Sequential(", draws))))
    tr.counterfactual(train_run, {1: 0.0}, targets="0")
    monkeypatch.setenv("DRAWS", "1")
    with pytest.raises(ReplayError, match=r"^step 0: initial model 1 has the digest .*, recorded was"):
        tr.counterfactual(train_run, {2: 0.0}, targets="0")
    assert "RUNNING" not in " ".join(statuses())


def test_a_damaged_result_is_never_given_out(recorded: tuple) -> None:
    train_run, magic_run = recorded
    run_id = run_counterfactual(train_run, remove="11", magic_run_id=magic_run)
    path = folder_of(run_id) / "counterfactual/outcomes.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "actual", [[1.0, 2.0, 3.0]]), path)
    with pytest.raises(RecordingError, match=r"outcomes\.parquet is damaged"):
        read_counterfactual(run_id)
    with pytest.raises(RunError, match="is of stage 'magic'"):
        read_counterfactual(magic_run)


# Bad input: one sentence, exit code 1, no run.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "remove, weights: found '' and ''; allowed: exactly one of them"),
        (["--remove", " ", "--weights", "\t"], "allowed: exactly one of them"),
        (["--remove", "1", "--weights", "1=0"], "remove, weights: found '1' and '1=0'; allowed: exactly one"),
        (["--remove", "48"], "remove: found 48; allowed: 0 to 47, the training examples"),
        (["--remove", "40-48"], "remove: found 48; allowed: 0 to 47"),
        (["--remove", "0-99999999999"], "remove: found 99999999999; allowed: 0 to 47"),
        (["--remove", "9" * 5000], "allowed: indices (3,17,40-49)"),
        (["--remove", "-1"], "remove: found '-1'; allowed: indices"),
        (["--remove", "1,1"], "remove: 1 is given twice"),
        (["--remove", "1-3,2"], "remove: 2 is given twice"),
        (["--remove", "1,5-3"], "remove: the range '5-3' runs backwards; allowed: 3-5"),
        (["--remove", "1,"], "remove: found ''; allowed: indices"),
        (["--remove", ","], "remove: found ''; allowed: indices"),
        (["--remove", "1.5"], "remove: found '1.5'; allowed: indices"),
        (["--remove", "1 2"], "remove: found '1 2'; allowed: indices"),
        (["--remove", "١"], "remove: found '١'; allowed: indices"),
        (["--remove", "nothing.txt"], "remove: found 'nothing.txt'; allowed: indices"),
        (["--remove", "."], "remove: found '.'; allowed: indices"),
        (["--remove", "a\0b"], r"remove: found 'a\x00b'; allowed: indices"),
        (["--remove", "harmful:0@3"], "remove: found 0 harmful examples asked for; allowed: 1 to "),
        (["--remove", "harmful:99999@3"], "remove: found 99999 harmful examples asked for; allowed: 1 to "),
        (["--remove", "helpful:99999@3"], "remove: found 99999 helpful examples asked for; allowed: 1 to "),
        (["--remove", f"harmful:{'9' * 5000}@3"], "allowed: indices"),
        (["--remove", "harmful:2@4"], "remove: found target '4'; allowed: 3, 0, mean:0-4, the run's targets"),
        (["--remove", "harmful:2@"], "remove: found 'harmful:2@'; allowed: indices"),
        (["--remove", "harmful:-2@3"], "remove: found 'harmful:-2@3'; allowed: indices"),
        (["--remove", "worst:2@3"], "remove: found 'worst:2@3'; allowed: indices"),
        (["--weights", "1"], "weights: found '1='; allowed: index=weight pairs"),
        (["--weights", "=1"], "weights: found '=1'; allowed: index=weight pairs"),
        (["--weights", "1=x"], "weights: found '1=x'; allowed: index=weight pairs"),
        (["--weights", "x=1"], "weights: found 'x=1'; allowed: index=weight pairs"),
        (["--weights", "1=0,"], "weights: found '='; allowed: index=weight pairs"),
        (["--weights", "1=2=3"], "weights: found '1=2=3'; allowed: index=weight pairs"),
        (["--weights", "1.0=0"], "weights: found '1.0=0'; allowed: index=weight pairs"),
        (["--weights", "1_0=0"], "weights: found '1_0=0'; allowed: index=weight pairs"),
        (["--weights", "1=nan"], "weights: found nan for example 1; allowed: finite numbers"),
        (["--weights", "1=-inf"], "weights: found -inf for example 1; allowed: finite numbers"),
        (["--weights", "1=1e999"], "weights: found inf for example 1; allowed: finite numbers"),
        (["--weights", "48=0"], "weights: found 48; allowed: 0 to 47"),
        (["--weights", "-1=0"], "weights: found -1; allowed: 0 to 47"),
        (["--weights", "1=0,01=0"], "weights: 1 is given twice"),
        (["--weights", "1=0,1=0"], "weights: 1 is given twice"),
        (["--remove", "1", "--targets", "3"], "targets: found '3', but the magic run"),
        (["--remove", "1", "--targets", "10"], "targets: found 10; allowed: 0 to 9"),
        (["--remove", "1", "--set", "train.lr=1"], "set: found 'train.lr=1'; allowed: empty"),
        (["--remove", "1", "--seed", "1"], "seed: found '1', but the recorded run"),
        (["--remove", "1", "--train-run-id", "0" * 32], "has no such run"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(arguments: list[str], message: str, recorded: tuple) -> None:
    assert message in refusal("counterfactual", "--magic-run-id", recorded[1], *arguments)


@pytest.mark.parametrize(
    ("parameter", "content", "message"),
    [
        ("remove", b"\xff\xfe\x00", "cannot be read: it is not UTF-8 text"),
        ("remove", b"", "names no example; allowed: one index a line"),
        ("remove", b" \n\n", "names no example; allowed: one index a line"),
        ("remove", b"# 3\n", "names no example; allowed: one index a line"),
        ("remove", b"index\n3\n", "remove: found 'index'; allowed: indices"),
        ("remove", b"3\n3\n", "remove: 3 is given twice"),
        ("remove", b"3\n48\n", "remove: found 48; allowed: 0 to 47"),
        ("remove", b"3\n" + b"z" * 9000, f"remove: found '{'z' * 80}'…; allowed: indices"),
        ("weights", b"\xff\xfe\x00", "cannot be read: it is not UTF-8 text"),
        ("weights", b"", "is not JSON: "),
        ("weights", b"{", "is not JSON: "),
        ("weights", b"[" * 100_000, "is not JSON: "),
        ("weights", b"{}", "weights: nothing was given; allowed: index=weight pairs"),
        ("weights", b"3", "holds no JSON object; allowed"),
        ("weights", b"null", "holds no JSON object; allowed"),
        ("weights", b'"3=1"', "holds no JSON object; allowed"),
        ("weights", b"[[3, 0.5]]", "holds no JSON object; allowed"),
        ("weights", b'{"3": {"4": 0}}', "weights: found \"3=(('4', 0),)\"; allowed"),
        ("weights", b'{"3": [0]}', "weights: found '3=[0]'; allowed"),
        ("weights", b'{"3": null}', "weights: found '3=None'; allowed"),
        ("weights", b'{"3": true}', "weights: found '3=True'; allowed"),
        ("weights", b'{"3": NaN}', "weights: found nan for example 3; allowed: finite numbers"),
        ("weights", b'{"3": 1e999}', "weights: found inf for example 3; allowed: finite numbers"),
        ("weights", b'{"3": 1' + b"0" * 400 + b"}", "weights: found '3=1000"),
        ("weights", b'{"3": 0, "3": 1}', "weights: 3 is given twice"),
        ("weights", b'{"3": 0, "03": 1}', "weights: 3 is given twice"),
        ("weights", b'{"48": 0}', "weights: found 48; allowed: 0 to 47"),
        ("weights", b'{"a": 0}', "weights: found 'a=0'; allowed"),
    ],
)
def test_a_file_with_junk(parameter: str, content: bytes, message: str, recorded: tuple, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(content)
    assert message in refusal("counterfactual", "--magic-run-id", recorded[1], f"--{parameter}", path)


def test_runs_that_do_not_fit(recorded: tuple) -> None:
    train_run, magic_run = recorded
    assert "needs the scores of a run; allowed: with magic_run_id" in refusal(
        "counterfactual", "--train-run-id", train_run, "--remove", "harmful:2@3", "--targets", "3"
    )
    assert "train_run_id: nothing was given" in refusal("counterfactual", "--remove", "1")
    other = tr.train(CONFIG.override({"seed": 1}))
    assert f"magic_run_id: run {magic_run} is of training run {train_run}, but train_run_id is {other}" in refusal(
        "counterfactual", "--train-run-id", other, "--magic-run-id", magic_run, "--remove", "1"
    )
    assert "targets: found 'x'" in refusal(
        "counterfactual", "--train-run-id", train_run, "--remove", "1", "--targets", "x"
    )
    assert f"magic_run_id: run {train_run} is of stage 'train'" in refusal(
        "counterfactual", "--magic-run-id", train_run, "--remove", "1"
    )


def test_removal_of_a_whole_batch_is_refused_before_anything_is_computed(store: Path) -> None:
    train_run = tr.train(CONFIG)
    batch = pq.read_table(folder_of(train_run) / "trace/part-00000.parquet")["indices"].to_pylist()[4]
    message = refusal("counterfactual", "--train-run-id", train_run, "--remove", ",".join(map(str, batch)))
    assert "step 4: all 16 examples of its batch would be removed; allowed: removals that leave" in message
    with pytest.raises(ConfigError, match="step 4: all 16 examples of its batch would be removed"):
        tr.counterfactual(train_run, dict.fromkeys(batch, 0.0))
    assert statuses() == ["train FINISHED"]
    tr.counterfactual(train_run, dict.fromkeys(batch[1:], 0.0))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "nothing was given"),
        ({48: 0.0}, "found 48; allowed: 0 to 47"),
        ({-1: 0.0}, "found -1; allowed: 0 to 47"),
        ({1.5: 0.0}, "found 1.5: 0.0; allowed: a whole number and a number"),
        ({"1": 0.0}, "found '1': 0.0; allowed: a whole number and a number"),
        ({None: 0.0}, "found None: 0.0; allowed: a whole number and a number"),
        ({1: None}, "found 1: None; allowed: a whole number and a number"),
        ({1: "x"}, "found 1: 'x'; allowed: a whole number and a number"),
        ({1: 10**400}, "allowed: a whole number and a number"),
        ({1: float("nan")}, "found nan for example 1; allowed: finite numbers"),
        ({1: np.inf}, "found inf for example 1; allowed: finite numbers"),
    ],
)
def test_weights_in_python_that_cannot_be_meant(weights: dict, message: str, recorded: tuple) -> None:
    before = statuses()
    with pytest.raises(ConfigError, match=f"^weights: {re.escape(message)}" if message[0] != "a" else message):
        tr.counterfactual(recorded[0], weights, TARGETS)
    assert statuses() == before


def test_numpy_indices_and_weights_are_numbers(recorded: tuple) -> None:
    one = tr.counterfactual(recorded[0], {np.int64(9): np.float32(0.5)}, TARGETS)
    other = tr.counterfactual(recorded[0], {9: 0.5}, TARGETS)
    np.testing.assert_array_equal(bits(one.actual), bits(other.actual))
