"""Stage ``compare`` of two ``magic`` runs: verdicts, damage, what is refused, and what is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from stage_runs import command, edit_recording, folder_of, runs_of, statuses
from tiny import own_config, write_task

import tracked_replay as tr
from tracked_replay.errors import RunError
from tracked_replay.recording import file_sha256
from tracked_replay.stages import compare_influence as stage
from tracked_replay.stages.compare import CHECKED
from tracked_replay.tracking import names

INFLUENCE = "scores/influence.parquet"
TARGETS = "0-2;mean:all"


@pytest.fixture(scope="module")
def task(shared_store: Path) -> str:
    return write_task(shared_store)


@pytest.fixture(scope="module")
def training(task: str) -> str:
    return tr.train(own_config(task))


@pytest.fixture(scope="module")
def base(training: str) -> str:
    return tr.magic(training, TARGETS)


@pytest.fixture(scope="module")
def again(base: str, training: str) -> str:
    """The same scores, computed once more."""
    return tr.magic(training, TARGETS, force=True)


@pytest.fixture(scope="module")
def seeded(task: str) -> str:
    """Of another training on the same data."""
    return tr.magic(targets=TARGETS, config=own_config(task, seed=1))


def content_of(run_id: str) -> dict[str, Any]:
    return json.loads((folder_of(run_id) / stage.COMPARISON).read_text(encoding="utf-8"))


def training_of(run_id: str) -> str:
    return str(mlflow.get_run(run_id).data.tags[f"{names.INPUT}train_run_id"])


def compare(a: str, b: str, *options: object) -> tuple[int, str, str]:
    """Exit code, standard output and compare run of a comparison that gives a verdict."""
    code, out, err = command("compare", "--run-a", a, "--run-b", b, *options)
    found = re.findall(r"^compare run: (\w+)$", out, re.MULTILINE)
    assert len(found) == 1, err
    assert mlflow.get_run(found[0]).info.status == "FINISHED"
    assert max(map(len, out.splitlines()[:-3])) <= 100
    return code, out, found[0]


def refused(*arguments: object, failed: bool = False) -> str:
    """The one sentence of a comparison that cannot be made: exit code 2, no run but a FAILED one where one began."""
    before = Counter(statuses())
    code, out, err = command("compare", *arguments, "--log-level", "ERROR")
    assert (code, out) == (2, ""), (code, out, err)
    (sentence,) = [line for line in err.splitlines() if "INFO mlflow." not in line]
    assert Counter(statuses()) - before == Counter(["compare FAILED"] if failed else [])
    return sentence.removeprefix("error: ")


def scores_of(run_id: str) -> np.ndarray:
    """(targets, training examples), read without the package."""
    return pq.read_table(folder_of(run_id) / INFLUENCE)["score"].to_numpy().reshape(4, 32)


def test_the_same_scores_computed_twice_are_identical(base: str, again: str, training: str) -> None:
    assert base != again
    code, out, run_id = compare(base, again)
    assert code == 0
    assert out.startswith("The scores of A and B are identical, bit for bit.\n")
    assert "\nBoth replayed the same training run.\n" in out
    assert f"\nnext:        tracked-replay lds --magic-run-id {base}\n" in out
    found, run, root = content_of(run_id), mlflow.get_run(run_id), folder_of(run_id)
    assert (found["verdict"], found["a"], found["b"], found["examples"]) == ("identical", base, again, 32)
    assert [target["name"] for target in found["targets"]] == ["0", "1", "2", "mean:all"]
    assert (found["training_a"], found["training_b"], found["inputs"]) == (training, training, [])
    tags = run.data.tags
    assert (tags[names.STAGE], tags[names.VERDICT]) == ("compare", "identical")
    assert (tags[f"{names.INPUT}run_a"], tags[f"{names.INPUT}run_b"]) == (base, again)
    assert run.data.metrics["spearman/mean"] == pytest.approx(1)
    assert run.data.metrics["top20_overlap/mean"] == 1
    digests = json.loads((root / "digests.json").read_text())
    assert sorted(digests) == [stage.PAGE, stage.COMPARISON, stage.FIGURE]
    assert tags[names.DIGESTS] == file_sha256(root / "digests.json")
    assert not (root / stage.TABLE).exists()
    for text in ((root / stage.PAGE).read_text(encoding="utf-8"), tags["mlflow.note.content"]):
        assert f"runs/{base}" in text
        assert f"runs/{again}" in text


def test_the_same_run_twice_is_said(base: str) -> None:
    code, out, _ = compare(base, base)
    assert code == 0
    assert "The same run was given twice. Identical bit for bit" in out


def test_it_looks_anew_each_time(base: str, again: str) -> None:
    assert compare(base, again)[2] != compare(base, again)[2]


def test_a_training_repeated_gives_the_same_scores(base: str, task: str) -> None:
    repeated = tr.magic(targets=TARGETS, config=own_config(task), force=True)
    assert training_of(repeated) != training_of(base)
    code, out, _ = compare(base, repeated)
    assert code == 0
    assert "They replayed two training runs that end in the same state, bit for bit." in out


def test_another_seed_gives_other_scores(base: str, seeded: str) -> None:
    code, out, run_id = compare(base, seeded)
    a, b = scores_of(base), scores_of(seeded)
    found, run, root = content_of(run_id), mlflow.get_run(run_id), folder_of(run_id)
    assert (code, found["verdict"]) == (1, "different")
    pearson = [np.corrcoef(one, two)[0, 1] for one, two in zip(a, b, strict=True)]
    spearman = [np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(two)))[0, 1]
                for one, two in zip(a, b, strict=True)]  # fmt: skip
    assert [target["pearson"] for target in found["targets"]] == pytest.approx(pearson)
    assert [target["spearman"] for target in found["targets"]] == pytest.approx(spearman)
    assert run.data.metrics["spearman/mean"] == pytest.approx(np.mean(spearman))
    assert run.data.metrics["top20_overlap/mean"] == pytest.approx(found["top_overlap"])
    assert {row["name"]: (row["a"], row["b"]) for row in found["inputs"]} == {"seed": ("0", "1")}
    assert "They replayed two training runs that end in different states." in out
    assert f"next:        tracked-replay compare --run-a {training_of(base)} --run-b {training_of(seeded)}\n" in out
    first = found["targets"][0]["moved_in_score"][0]
    assert first["train_index"] == np.abs(a[0] - b[0]).argmax()
    table = json.loads((root / stage.TABLE).read_text())
    assert table["columns"] == list(stage.COLUMNS)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["target"] for row in rows} == {"0", "1", "2", "mean:all"}
    row = next(row for row in rows if row["moved_in"] == "score")
    assert row["train_index"] == first["train_index"]
    assert row["score_a"] == pytest.approx(first["score_a"])
    assert row["label_name"] == "abc"[row["label"]]
    page = (root / stage.PAGE).read_text(encoding="utf-8")
    assert f".t{first['train_index']}{{background-image:url(data:image/png;base64," in page
    assert (root / stage.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_common_targets_are_compared(training: str) -> None:
    # Several at once, a target's last digits would depend on how many there are.
    one, other = (
        tr.magic(training, targets, overrides="replay.targets_at_once=1")
        for targets in (TARGETS, "5;2;mean:0,1,2,3,4,5")
    )
    code, out, run_id = compare(one, other)
    found = content_of(run_id)
    assert code == 0
    assert [(target["name"], target["target_b"]) for target in found["targets"]] == [("2", 2), ("mean:all", -1)]
    assert (found["only_a"], found["only_b"]) == (["0", "1"], ["5"])
    assert "Not compared: 0, 1 (only A has them), 5 (only B has it)." in " ".join(out.split())


def test_without_a_common_target_there_is_no_verdict(base: str, training: str) -> None:
    code, out, run_id = compare(base, tr.magic(training, "4-5"))
    assert code == 2
    assert out.startswith("The scores of A and B cannot be compared.\n")
    assert "The runs have no target in common: A has 0, 1, 2, mean:all; B has 4, 5." in out
    assert mlflow.get_run(run_id).data.tags[names.VERDICT] == "incomparable"
    assert "spearman/mean" not in mlflow.get_run(run_id).data.metrics
    assert sorted(json.loads((folder_of(run_id) / "digests.json").read_text())) == [stage.PAGE, stage.COMPARISON]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("examples(32, 1)", "examples(33, 1)"), r"\(32 and 33 training examples\)"),
        (("examples(6, 2)", "examples(6, 3)"), r"\(their fingerprints are [0-9a-f]{16}… and [0-9a-f]{16}…\)"),
        (("manual_seed(seed)", "manual_seed(seed + 9)"), r"\(their fingerprints are "),
    ],
)
def test_other_data_cannot_be_compared(change: tuple[str, str], words: str, base: str, shared_store: Path) -> None:
    other = tr.magic(targets=TARGETS, config=own_config(write_task(shared_store, change, name="other.py")))
    code, out, run_id = compare(base, other)
    assert code == 2
    assert re.search(rf"The runs were trained or evaluated on different data {words}", " ".join(out.split())), out
    assert content_of(run_id)["targets"] == []


def test_damaged_scores_are_named(base: str, again: str) -> None:
    path = folder_of(again) / INFLUENCE
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2]):
        path.write_bytes(damaged)
        for sides in ((base, again), (again, base)):
            sentence = refused("--run-a", sides[0], "--run-b", sides[1], failed=True)
            assert sentence.startswith(f"{again}: {INFLUENCE} is damaged: ")
    path.unlink()
    assert refused("--run-a", base, "--run-b", again, failed=True).startswith(f"{again}: {INFLUENCE} is missing")
    path.write_bytes(content)
    assert compare(base, again)[0] == 0


def test_every_file_is_checked_where_it_is_asked_for(base: str, again: str) -> None:
    path = folder_of(again) / "figures/score-histogram.png"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    assert compare(base, again)[0] == 0
    sentence = refused("--run-a", base, "--run-b", again, "--check-files", failed=True)
    assert sentence.startswith(f"{again}: figures/score-histogram.png is damaged: ")
    path.write_bytes(content)
    code, _, run_id = compare(base, again, "--check-files")
    assert code == 0
    assert content_of(run_id)["summary"].endswith(f". {CHECKED}")


def test_the_files_of_a_run_that_is_given_twice_are_checked_where_asked(base: str) -> None:
    path = folder_of(base) / "figures/score-histogram.png"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    sentence = refused("--run-a", base, "--run-b", base, "--check-files", failed=True)
    assert sentence.startswith(f"{base}: figures/score-histogram.png is damaged: ")
    path.write_bytes(content)
    summary = content_of(compare(base, base, "--check-files")[2])["summary"]
    assert summary.startswith("The same run was given twice. ")
    assert summary.endswith(CHECKED)


def test_a_forged_score_is_found(base: str, training: str) -> None:
    forged = tr.magic(training, TARGETS, force=True)

    def forge(root: Path) -> None:
        table = pq.read_table(root / INFLUENCE)
        scores = table["score"].to_numpy().copy()
        scores[32 + 7] = np.nextafter(scores[32 + 7], np.inf)
        pq.write_table(table.set_column(3, table.schema.field(3), pa.array(scores)), root / INFLUENCE)

    edit_recording(forged, forge)
    code, out, run_id = compare(base, forged)
    assert code == 1
    assert out.startswith("Same ranking; the scores differ only by rounding (largest difference ")
    assert "1 of 128 scores" in out
    tags = mlflow.get_run(run_id).data.tags
    assert tags[names.VERDICT] == content_of(run_id)["verdict"] == "different"
    assert tags["mlflow.note.content"].startswith("**Same ranking; the scores differ only by rounding (")
    target = content_of(run_id)["targets"][1]
    assert (target["differing"], [row["train_index"] for row in target["moved_in_score"]]) == (1, [7])

    def no_number(root: Path) -> None:
        table = pq.read_table(root / INFLUENCE)
        scores = np.full(128, np.nan)
        pq.write_table(table.set_column(3, table.schema.field(3), pa.array(scores)), root / INFLUENCE)

    edit_recording(forged, no_number)
    sentence = refused("--run-a", base, "--run-b", forged, failed=True)
    assert sentence == f"{forged}: the score of training example 0 on target 0 is nan"


def test_what_is_refused(base: str, again: str, training: str) -> None:
    sentence = refused("--run-a", base, "--run-b", training)
    assert sentence == f"run_b: run {training} is of stage 'train'; allowed: a finished run of stage 'magic'"
    sentence = refused("--run-a", training, "--run-b", base)
    assert sentence == f"run_b: run {base} is of stage 'magic'; allowed: a finished run of stage 'train'"
    assert refused("--run-a", base, "--run-b", f"{again},{base}").startswith(
        f"run_b: found '{again},{base}'; allowed: "
    )
    assert refused("--run-a", base, "--run-b", "").startswith("run_b: found ''; allowed: the ID of a run")
    for options, words in (
        (["--max-ulp", 1], "max_ulp: found 1, but"),
        (["--ignore", "lr"], "ignore: found 'lr', but"),
    ):
        assert refused("--run-a", base, "--run-b", again, *options).startswith(words)
    running = MlflowClient().create_run(mlflow.get_run(base).info.experiment_id).info.run_id
    MlflowClient().set_tag(running, names.STAGE, "magic")
    for sides in ((base, running), (running, base)):
        sentence = refused("--run-a", sides[0], "--run-b", sides[1])
        assert f"run {running} is RUNNING; allowed: a FINISHED run of stage 'magic'" in sentence
    MlflowClient().set_terminated(running)


def test_a_run_that_points_to_another_stands_for_it(base: str, again: str) -> None:
    pointing = MlflowClient().create_run(mlflow.get_run(base).info.experiment_id).info.run_id
    MlflowClient().set_tag(pointing, names.STAGE, "magic")
    MlflowClient().set_tag(pointing, names.REUSES, base)
    MlflowClient().set_terminated(pointing)
    code, _, run_id = compare(pointing, again)
    assert (code, content_of(run_id)["a"]) == (0, base)


def test_labels_of_any_kind_and_a_task_that_is_gone(store: Path) -> None:
    hostile = "<script>alert(1)</script>\u202e'\"\n"
    path = write_task(store, ('("a", "b", "c")', repr((hostile, hostile + "2", "c" * 5000))))
    runs = [tr.magic(targets="0", config=own_config(path, seed=seed)) for seed in (0, 1)]
    Path(path.removesuffix(":Own")).unlink()
    code, out, run_id = compare(*runs)
    assert code == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", out)
    page = (folder_of(run_id) / stage.PAGE).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "url(" not in page  # no picture without the task
    rows = json.loads((folder_of(run_id) / stage.TABLE).read_text(encoding="utf-8"))["data"]
    assert hostile in {row[stage.COLUMNS.index("label_name")] for row in rows}


def test_the_output_folder_gets_json_page_and_figure(base: str, seeded: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    _, _, run_id = compare(base, seeded, "--output", folder)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert written == {stage.COMPARISON, stage.PAGE, stage.FIGURE}
    assert json.loads((folder / stage.COMPARISON).read_text()) == content_of(run_id)
    assert "runs/" not in (folder / stage.PAGE).read_text(encoding="utf-8")
    (tmp_path / "taken").touch()
    sentence = refused("--run-a", base, "--run-b", seeded, "--output", tmp_path / "taken")
    assert sentence.startswith(
        f"output: found '{tmp_path / 'taken'}', which cannot be written (File exists); allowed: "
    )


def test_python(base: str, again: str, seeded: str, training: str) -> None:
    before = len(runs_of("compare"))
    found = tr.compare_influence(base, again)
    assert (found.verdict, found.exit_code, found.a, found.b) == ("identical", 0, base, again)
    assert tr.compare_influence(base, seeded, check_files=True).verdict == "different"
    assert len(runs_of("compare")) == before + 2
    with pytest.raises(RunError, match=r"^run_a: run \w+ is of stage 'train'"):
        tr.compare_influence(training, base)
    with pytest.raises(RunError, match=r"^run_a: run \w+ is of stage 'magic'"):
        tr.compare(base, again)
