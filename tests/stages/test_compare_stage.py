"""Stage ``compare``: where two recorded runs part and why, what is damaged, and what a command line gives back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file
from stage_runs import command, folder_of, runs_of, statuses
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import ConfigError, RecordingError, RunError
from tracked_replay.recording import file_sha256
from tracked_replay.stages import compare as stage
from tracked_replay.tracking import names

ROOT = Path(__file__).parents[2]
TRACE = "trace/part-00000.parquet"


@pytest.fixture(scope="module")
def task(shared_store: Path) -> str:
    return write_task(shared_store)


@pytest.fixture(scope="module")
def base(task: str) -> str:
    """Four steps, two an epoch, every state kept."""
    return tr.train(own_config(task))


@pytest.fixture(scope="module")
def again(base: str, task: str) -> str:
    """The same training, computed once more."""
    return tr.train(own_config(task), force=True)


@pytest.fixture(scope="module")
def seeded(task: str) -> str:
    return tr.train(own_config(task, seed=1))


def content_of(run_id: str, name: str = stage.COMPARISON) -> dict[str, Any]:
    return json.loads((folder_of(run_id) / name).read_text(encoding="utf-8"))


def compare(a: object, b: object, *options: object) -> tuple[int, str, str]:
    """Exit code, standard output and compare run of a comparison that gives a verdict."""
    code, out, err = command("compare", "--run-a", a, "--run-b", b, *options)
    assert code in (0, 1), err
    (run_id,) = re.findall(r"^compare run: (\w+)$", out, re.MULTILINE)
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    return code, out, run_id


def refused(*arguments: object, failed: bool = False) -> str:
    """The one sentence of a comparison that cannot be made: exit code 2, no run but a FAILED one where one began."""
    before = Counter(statuses())
    code, out, err = command("compare", *arguments, "--log-level", "ERROR")
    assert (code, out) == (2, ""), (code, out, err)
    (sentence,) = [line for line in err.splitlines() if "INFO mlflow." not in line]
    assert sentence.startswith("error: ")
    assert len(sentence) < 700
    assert Counter(statuses()) - before == Counter(["compare FAILED"] if failed else [])
    return sentence.removeprefix("error: ")


def column(run_id: str, name: str) -> list[Any]:
    return pq.read_table(folder_of(run_id) / TRACE)[name].to_pylist()


@contextmanager
def flipped(path: Path, place: int = -1) -> Iterator[None]:
    """One bit of a file changed."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    try:
        yield
    finally:
        content[place] ^= 1
        path.write_bytes(content)


@contextmanager
def moved_away(*paths: Path) -> Iterator[None]:
    for path in paths:
        path.rename(path.with_name(f"{path.name}.away"))
    try:
        yield
    finally:
        for path in paths:
            path.with_name(f"{path.name}.away").rename(path)


def test_the_same_config_twice_is_identical(base: str, again: str) -> None:
    code, out, run_id = compare(base, again)
    assert code == 0
    assert out.startswith("A and B are identical, bit for bit.\n")
    assert f"\nnext:        tracked-replay reproduce --run-id {base}\n" in out
    found, run, root = content_of(run_id), mlflow.get_run(run_id), folder_of(run_id)
    assert (found["verdict"], found["first_divergent_step"], found["causes"]) == ("identical", None, [])
    assert (found["a"], found["b"], found["steps_a"], found["steps_b"]) == (base, again, 4, 4)
    assert found["summary"] == f"Identical bit for bit: 4 steps. {stage.UNREAD}"
    assert column(base, "state_digest") == column(again, "state_digest")  # it is true
    tags = run.data.tags
    assert (tags[names.STAGE], tags[names.VERDICT]) == ("compare", "identical")
    assert (tags[f"{names.INPUT}run_a"], tags[f"{names.INPUT}run_b"]) == (base, again)
    assert "first_divergent_step" not in run.data.metrics
    assert sorted(json.loads((root / "digests.json").read_text())) == [stage.PAGE, stage.COMPARISON]
    assert tags[names.DIGESTS] == file_sha256(root / "digests.json")
    page = (root / stage.PAGE).read_text(encoding="utf-8")
    assert f"runs/{base}" in page
    assert f"runs/{base}" in tags["mlflow.note.content"]


def test_it_looks_anew_each_time(base: str, again: str) -> None:
    assert compare(base, again)[2] != compare(base, again)[2]


def test_another_seed_parts_them_at_step_0(base: str, seeded: str) -> None:
    code, out, run_id = compare(base, seeded)
    found, run = content_of(run_id), mlflow.get_run(run_id)
    assert code == 1
    assert (found["verdict"], found["first_divergent_step"]) == ("different", 0)
    assert [cause["name"] for cause in found["causes"]] == ["seed"]
    assert "likely cause: seed: the seeds differ: seed is 0 in A and 1 in B" in out
    assert run.data.tags[names.VERDICT] == "different"
    assert run.data.metrics["first_divergent_step"] == 0
    assert run.data.metrics["tensors/differing"] == len(found["tensors"]) == 8
    assert (folder_of(run_id) / "figures/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (folder_of(run_id) / stage.PAGE).read_text(encoding="utf-8")


def test_another_learning_rate_parts_them_where_it_begins(base: str, task: str) -> None:
    changed = tr.train(own_config(task, train__schedule="step", train__lr_step_epochs=1, train__lr_gamma=0.5))
    rates = [column(run_id, "lr") for run_id in (base, changed)]
    assert [one == other for one, other in zip(*rates, strict=True)] == [True, True, False, False]
    code, _, run_id = compare(base, changed)
    found = content_of(run_id)
    assert code == 1
    assert (found["first_divergent_step"], found["first_difference"]) == (2, "lr")
    assert found["causes"][0]["name"] == "lr"
    assert found["first_tensor"] == "parameters/0.weight"
    assert {row["name"]: (row["a"], row["b"]) for row in found["config"]} == {
        "train.schedule": ("constant", "step"),
        "train.lr_step_epochs": ("10", "1"),
        "train.lr_gamma": ("0.1", "0.5"),
    }


def test_two_swapped_labels_part_them_where_they_first_occur(store: Path) -> None:
    task = write_task(store)
    config = own_config(task, train__epochs=1)
    first = tr.train(config)
    indices, labels = column(first, "indices")[1], column(first, "labels")[1]
    one = indices[0]
    other = next(index for index, label in zip(indices, labels, strict=True) if label != labels[0])
    old = "return Examples(torch.randn(count, 5, generator=generator) + labels[:, None], labels)"
    swap = f"if count == 32: labels[[{one}, {other}]] = labels[[{other}, {one}]]"
    lines = (
        old.replace("return Examples(", "inputs = ").removesuffix(", labels)"),
        swap,
        "return Examples(inputs, labels)",
    )
    write_task(store, (old, "\n        ".join(lines)))
    code, out, run_id = compare(first, tr.train(config))
    found = content_of(run_id)
    assert code == 1
    assert (found["first_divergent_step"], found["first_difference"]) == (1, "data")
    assert found["causes"][0]["name"] == "data"
    assert "the labels of the batch differ" in out
    assert {row["column"] for row in found["trace"]} == {"labels", "loss", "state_digest"}


@pytest.mark.parametrize(
    ("field", "values"),
    [("train.batch_size", ("16", "8")), ("data.flip_labels", ("0.0", "0.2")), ("train.epochs", ("2", "3"))],
)
def test_the_field_that_explains_other_batches_is_named_first(
    base: str, task: str, field: str, values: tuple[str, str]
) -> None:
    other = tr.train(own_config(task, **{field.replace(".", "__"): json.loads(values[1])}))
    code, out, run_id = compare(base, other)
    assert code == 1
    assert content_of(run_id)["first_difference"] == "data"
    cause = f"config: {field} is {values[0]} in A and {values[1]} in B"
    assert f"\nlikely cause: {cause}\n" in out
    assert f"\nLikely cause: {cause}\n" in mlflow.get_run(run_id).data.tags["mlflow.note.content"].replace("\\", "")


LARGE_SUM = """class Net(nn.Linear):
            def __init__(self):
                super().__init__(5, 3)
                self.many = nn.Parameter(torch.randn(200000))
            def forward(self, x):
                return super().forward(x) * (1 + self.many.sum() / 1000)
        return Net()"""


def test_another_number_of_threads_is_named_as_the_cause(store: Path) -> None:
    """A sum over 200,000 numbers: with two threads each adds up a half."""
    task = write_task(store, ("return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))", LARGE_SUM))
    config = {"train__dtype": "float32", "train__epochs": 1}
    one, two = (tr.train(own_config(task, train__threads=threads, **config)) for threads in (1, 2))
    digests = [column(run_id, "state_digest") for run_id in (one, two)]
    losses = [column(run_id, "loss") for run_id in (one, two)]
    if digests[0] == digests[1]:
        pytest.skip("this machine adds up alike with one thread and two")
    assert digests[0][0] == digests[1][0]
    code, out, run_id = compare(one, two)
    found = content_of(run_id)
    assert code == 1
    differs = [a != b or c != d for a, b, c, d in zip(*losses, digests[0][1:], digests[1][1:], strict=False)]
    assert found["first_divergent_step"] == differs.index(True) == 0
    assert found["first_difference"] in ("loss", "state")
    assert found["causes"][0]["name"] == "threads"
    assert "likely cause: threads: the number of CPU threads differs: train.threads is 1 in A and 2 in B" in out


def test_a_damaged_checkpoint_is_named_and_no_difference(base: str, again: str, seeded: str) -> None:
    for run_id, other, options in ((again, base, ["--check-files"]), (seeded, base, [])):
        for name in ("checkpoints/step-000001.safetensors", "checkpoints/step-000004.safetensors"):
            with flipped(folder_of(run_id) / name):
                sentence = refused("--run-a", other, "--run-b", run_id, *options, failed=True)
                assert sentence.startswith(f"{run_id}: {name} is damaged: ")
                sentence = refused("--run-a", run_id, "--run-b", other, *options, failed=True)
                assert sentence.startswith(f"{run_id}: {name} is damaged: ")


def test_what_was_read_is_said(base: str, again: str, seeded: str) -> None:
    with flipped(folder_of(again) / "checkpoints/step-000001.safetensors"):
        code, _, run_id = compare(base, again)
    assert code == 0
    assert content_of(run_id)["summary"].endswith(stage.UNREAD)
    code, _, run_id = compare(base, again, "--check-files", "true")
    assert code == 0
    assert content_of(run_id)["summary"] == f"Identical bit for bit: 4 steps. {stage.CHECKED}"
    assert compare(base, seeded, "--check-files")[0] == 1


@pytest.mark.parametrize("name", ["digests.json", TRACE, "checkpoints/manifest.parquet", "config/config.toml"])
def test_damage_in_what_is_always_read_is_named(name: str, base: str, again: str) -> None:
    path = folder_of(again) / name
    with flipped(path, len(path.read_bytes()) // 2):
        assert refused("--run-a", base, "--run-b", again, failed=True).startswith(f"{again}: {name} is damaged: ")
    with moved_away(path):
        assert refused("--run-a", base, "--run-b", again, failed=True).startswith(f"{again}: {name} is missing from")


def test_damage_in_a_matrix_is_named_too(base: str, again: str, seeded: str) -> None:
    with flipped(folder_of(again) / "rng/part-00000.safetensors"):
        sentence = refused("--run-a", base, "--run-b", f"{seeded},{again}", "--check-files", failed=True)
    assert sentence.startswith(f"{again}: rng/part-00000.safetensors is damaged: ")
    code, _, run_id = compare(base, f"{again},{seeded}", "--check-files")
    assert code == 1
    assert content_of(run_id, "compare/1-2.json")["summary"].endswith(stage.CHECKED)


def test_states_that_were_not_kept_are_computed_again(store: Path) -> None:
    task = write_task(store)
    sparse = {"record__every": 100}
    one = tr.train(own_config(task, **sparse))
    other = tr.train(own_config(task, train__schedule="step", train__lr_step_epochs=1, **sparse))
    assert content_of(compare(one, other)[2])["first_tensor"] == "parameters/0.weight"
    write_task(store, ("nn.Tanh()", "nn.ReLU()"))
    code, _, run_id = compare(one, other)
    found = content_of(run_id)
    assert (code, found["first_divergent_step"], found["first_tensor"]) == (1, 2, None)
    assert "state 1 has the digest" in found["summary"]
    Path(task.removesuffix(":Own")).unlink()
    assert "cannot be retrained here" in content_of(compare(one, other)[2])["summary"]


def test_500_steps_take_seconds_and_no_checkpoint(store: Path) -> None:
    config = own_config(write_task(store), train__epochs=250, record__evaluate_every=0)
    runs = [tr.train(config, force=True) for _ in range(2)]
    assert len(column(runs[0], "step")) == 500
    opened: list[str] = []
    listening = True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(note)
    start = time.process_time()
    code, _, _ = compare(*runs)
    seconds = time.process_time() - start
    listening = False
    assert code == 0
    assert seconds < 20
    read = [name for name in opened if name.endswith(".safetensors")]
    assert read == []
    assert any(name.endswith("digests.json") for name in opened)  # the count counts
    states = [path for run_id in runs for path in folder_of(run_id).rglob("*.safetensors")]
    assert len(states) == 2 * (501 + 1)  # with a file of generators' states
    for path in states:  # what is not there cannot be read, by whatever means
        path.unlink()
    assert compare(*runs)[0] == 0


def test_runs_of_other_length_and_of_another_task(base: str, task: str) -> None:
    longer = tr.train(own_config(task, train__epochs=3))
    code, _, run_id = compare(base, longer)
    found = content_of(run_id)
    assert code == 1
    assert (found["first_divergent_step"], found["first_difference"]) == (4, "data")
    assert f"{base} ends there and {longer} goes on to step 6" in found["summary"]
    assert (found["steps_a"], found["steps_b"]) == (4, 6)
    other = tr.train(tiny_config(train__epochs=1, train__batch_size=24))
    code, _, run_id = compare(base, other)
    found = content_of(run_id)
    assert (code, found["first_divergent_step"]) == (1, 0)
    assert {row["difference"] for row in found["first_tensors"]} <= {"shape", "missing in a", "missing in b"}


def test_the_same_run_twice_is_said(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own_config(task, seed=6)
    run_id = tr.train(config)
    pointing = MlflowClient().create_run(mlflow.get_run(run_id).info.experiment_id).info.run_id
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_RUN_ID", pointing)
        assert tr.train(config) == run_id
    for other in (run_id, pointing):
        code, out, made = compare(run_id, other)
        assert (code, content_of(made)["b"]) == (0, run_id)
        assert "The same run was given twice; it is identical to itself, and nothing was compared." in out


def test_the_files_of_a_run_that_is_given_twice_are_checked_where_asked(base: str, again: str) -> None:
    code, _, run_id = compare(base, base, "--check-files")
    assert code == 0
    assert content_of(run_id)["summary"] == f"{stage.SAME_RUN}. {stage.CHECKED}"
    with flipped(folder_of(again) / "rng/part-00000.safetensors"):
        assert compare(again, again)[0] == 0
        for others in (again, f"{again},{again}"):
            sentence = refused("--run-a", again, "--run-b", others, "--check-files", failed=True)
            assert sentence.startswith(f"{again}: rng/part-00000.safetensors is damaged: ")
    _, _, run_id = compare(base, f"{again},{again}", "--check-files")
    assert content_of(run_id, "compare/2-3.json")["summary"] == f"{stage.SAME_RUN}. {stage.CHECKED}"


def test_several_runs_make_a_matrix(base: str, again: str, seeded: str) -> None:
    code, out, run_id = compare(base, f"{again}, {seeded}")
    assert code == 1
    matrix, root, tags = content_of(run_id, stage.MATRIX), folder_of(run_id), mlflow.get_run(run_id).data.tags
    assert matrix["runs"] == [base, again, seeded]
    same, other = "identical", "different"
    assert matrix["verdicts"] == [[same, same, other], [same, same, other], [other, other, same]]
    assert matrix["first_divergent_steps"] == [[None, None, 0], [None, None, 0], [0, 0, None]]
    assert "Runs 1 and 2 are equal." in out
    assert "Run 3 equals no other run." in out
    for name in (stage.MATRIX_PAGE, "compare/1-2.json", "compare/2-3.html", "figures/1-3.png"):
        assert (root / name).is_file(), name
    assert seeded in (root / stage.MATRIX_PAGE).read_text(encoding="utf-8")
    assert [tags[f"{names.INPUT}run_{letter}"] for letter in "abc"] == [base, again, seeded]
    assert tags[names.VERDICT] == "different, identical"


def test_at_most_20_runs(base: str, again: str) -> None:
    code, _, run_id = compare(base, ",".join([again, *[base] * 18]))
    assert code == 0
    assert len(content_of(run_id, stage.MATRIX)["runs"]) == 20
    assert refused("--run-a", base, "--run-b", ",".join([again] * 20)) == "run_b: found 20 runs; allowed: at most 19"


def write_files(folder: Path) -> tuple[Path, Path]:
    """Two checkpoint files whose tensor ``w`` is one representable number apart in one of four elements."""
    for name, value in (("a", 1.0), ("b", float(np.nextafter(np.float32(1), np.float32(2))))):
        save_file({"w": torch.tensor([0.0, value, 3.0, -0.0]), "v": torch.arange(3)}, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def test_two_files_give_a_table_and_an_exit_code(store: Path) -> None:
    a, b = write_files(store)
    code, out, err = command("compare", "--run-a", a, "--run-b", b)
    assert (code, err) == (1, "")
    assert re.search(r"^  w +1 of 4 +1 +1\.19\S*$", out, re.MULTILINE), out
    assert "compare run" not in out
    assert statuses() == []  # files make no run
    assert command("compare", "--run-a", a, "--run-b", b, "--max-ulp", 1)[0] == 0
    assert command("compare", "--run-a", a, "--run-b", b, "--ignore", "w")[0] == 0
    assert command("compare", "--run-a", a, "--run-b", b, "--ignore", "v")[0] == 1
    code, out, _ = command("compare", "--run-a", a, "--run-b", a)
    assert (code, out.splitlines()[0]) == (0, "A and B are identical, bit for bit.")
    save_file({"other": torch.ones(2)}, store / "c.safetensors")
    code, out, _ = command("compare", "--run-a", a, "--run-b", store / "c.safetensors")
    assert (code, out.splitlines()[0]) == (2, "A and B cannot be compared.")


def test_folders_of_files_and_names_with_commas(base: str, again: str, seeded: str, tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    a, b = write_files(folder)
    assert command("compare", "--run-a", b, "--run-b", a)[0] == 1
    root = folder_of(base)
    assert command("compare", "--run-a", root / "checkpoints", "--run-b", folder_of(again) / "checkpoints")[0] == 0
    assert command("compare", "--run-a", root, "--run-b", folder_of(seeded))[0] == 1
    with flipped(root / "checkpoints/step-000002.safetensors"):
        assert "step-000002.safetensors is damaged" in refused("--run-a", root, "--run-b", folder_of(again))


def test_the_output_folder_gets_table_page_and_figure(base: str, seeded: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    _, _, run_id = compare(base, seeded, "--output", folder)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert written == {stage.COMPARISON, stage.PAGE, "figures/comparison.png"}
    assert json.loads((folder / stage.COMPARISON).read_text()) == content_of(run_id)
    a, b = write_files(tmp_path)
    command("compare", "--run-a", a, "--run-b", b, "--output", tmp_path / "files")
    found = json.loads((tmp_path / "files" / stage.COMPARISON).read_text())
    assert (found["a"], found["verdict"]) == (str(a), "different")
    assert str(b) in (tmp_path / "files" / stage.PAGE).read_text(encoding="utf-8")


def test_an_output_folder_that_cannot_be_made(
    base: str, seeded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, sides = tmp_path / "taken", ("--run-a", base, "--run-b", seeded)
    taken.touch()
    allowed = "; allowed: a folder that can be made and written to"
    for path, reason in ((taken, "File exists"), (taken / "below", "Not a directory")):
        sentence = refused(*sides, "--output", path)
        assert sentence == f"output: found '{path}', which cannot be written ({reason}){allowed}"
    (tmp_path / "half").mkdir()
    (tmp_path / "half/compare").touch()
    code, _, err = command("compare", *sides, "--output", tmp_path / "half", "--log-level", "ERROR")
    assert code == 2
    assert f"error: output: found '{tmp_path / 'half'}', which cannot be written (" in err
    monkeypatch.setattr(os, "access", lambda *_: False)
    sentence = refused(*sides, "--output", tmp_path / "half")
    assert sentence == f"output: found '{tmp_path / 'half'}', which cannot be written (Permission denied){allowed}"


UNKNOWN = "0" * 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_a, run_b: two sides are needed; allowed: run IDs, or paths"),
        (["--run-a", "BASE"], "run_a, run_b: two sides are needed"),
        (["--run-b", "BASE"], "run_a, run_b: two sides are needed"),
        (["--run-a", "BASE", "--run-b", " , "], "run_a, run_b: two sides are needed"),
        (["--run-a", "BASE", "--run-b", UNKNOWN], f"run_b: found '{UNKNOWN}', but "),
        (["--run-a", UNKNOWN, "--run-b", "BASE"], f"run_a: found '{UNKNOWN}', but "),
        (["--run-a", "BASE", "--run-b", f"BASE,{UNKNOWN}"], f"run_b: found '{UNKNOWN}', but "),
        (["--run-a", "BASE", "--run-b", "no run"], "run_b: found 'no run'; allowed: the ID of a run"),
        (["--run-a", "BASE", "--run-b", "x" * 9000], "…; allowed: the ID of a run"),
        (["--run-a", "BASE", "--run-b", "MAGIC"], "is of stage 'magic'; allowed: a finished run of stage 'train'"),
        (["--run-a", "BASE", "--run-b", "DELETED"], "is deleted; `mlflow runs restore"),
        (["--run-a", "RUNNING", "--run-b", "BASE"], "is RUNNING; allowed: a FINISHED run of stage 'train'"),
        (["--run-a", "BASE", "--run-b", "FOREIGN"], "was not made by tracked_replay"),
        (["--run-a", "BASE", "--run-b", "a/b.safetensors"], "allowed: run IDs only, or two paths"),
        (["--run-a", "pyproject.toml", "--run-b", "BASE"], "allowed: run IDs only, or two paths"),
        (["--run-a", "a.safetensors", "--run-b", "b.safetensors,c.safetensors"], "allowed: run IDs only, or two paths"),
        (["--run-a", "a.safetensors", "--run-b", "b.safetensors"], "a.safetensors: no such file or folder"),
        (["--run-a", "pyproject.toml", "--run-b", "pyproject.toml"], "pickles are not read"),
        (["--run-a", "BASE", "--run-b", "AGAIN", "--max-ulp", "-1"], "max_ulp: found '-1'; allowed: integer >= 0"),
        (["--run-a", "BASE", "--run-b", "AGAIN", "--max-ulp", "two"], "max_ulp: found 'two'; allowed: integer >= 0"),
        (["--run-a", "BASE", "--run-b", "AGAIN", "--max-ulp", "1.5"], "max_ulp: found '1.5'; allowed: integer >= 0"),
        (
            ["--run-a", "BASE", "--run-b", "AGAIN", "--check-files", "maybe"],
            "check_files: found 'maybe'; allowed: true",
        ),
        (["--run-a", "BASE", "--run-b", "AGAIN", "--log-file", "/"], "log_file: found '/', which cannot be written"),
    ],
)
def test_what_is_refused_before_a_run_starts(
    arguments: list[str], message: str, base: str, again: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, experiment = MlflowClient(), mlflow.get_run(base).info.experiment_id
    made = {name: client.create_run(experiment).info.run_id for name in ("RUNNING", "DELETED", "MAGIC", "FOREIGN")}
    for name, run_id in made.items():
        if name != "FOREIGN":
            client.set_tag(run_id, names.STAGE, "magic" if name == "MAGIC" else "train")
        if name != "RUNNING":
            client.set_terminated(run_id)
    client.delete_run(made["DELETED"])
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").touch()
    given = {"BASE": base, "AGAIN": again} | made
    written = [re.sub("|".join(given), lambda found: given[found[0]], argument) for argument in arguments]
    assert message in refused(*written)
    client.set_terminated(made["RUNNING"])


def test_an_entry_of_ignore_that_is_nothing(base: str, again: str) -> None:
    sentence = refused("--run-a", base, "--run-b", again, "--ignore", "loss, momentun/*", failed=True)
    assert sentence.startswith("ignore: found 'momentun/*'; allowed: data, lr, loss, generators, or a pattern of")


def test_a_tolerance_beyond_all_numbers(base: str, seeded: str) -> None:
    assert compare(base, seeded, "--max-ulp", "9" * 30, "--ignore", "data")[0] in (0, 1)


def test_a_run_whose_files_are_gone(base: str, task: str) -> None:
    gone = tr.train(own_config(task, seed=5))
    folder = folder_of(gone)
    with moved_away(folder):
        sentence = refused("--run-a", base, "--run-b", gone, failed=True)
    assert sentence == f"{gone}: digests.json is missing from the artifacts of run {gone}"
    MlflowClient().delete_tag(gone, names.DIGESTS)
    assert f"run {gone} has no tag tracked_replay.digests" in refused("--run-a", base, "--run-b", gone)


def test_a_run_without_its_checkpoints_can_still_be_compared(task: str, base: str) -> None:
    cleaned = tr.train(own_config(task), force=True)
    code, _, err = command("clean", "--run-id", cleaned, "--what", "checkpoints")
    assert code == 0, err
    assert compare(base, cleaned)[0] == 0
    sentence = refused("--run-a", base, "--run-b", cleaned, "--check-files", failed=True)
    assert re.search(rf"^{cleaned}: (rng/part-00000|checkpoints/step-000000)\.safetensors is missing from", sentence)
    longer = tr.train(own_config(task, train__epochs=3))
    code, out, _ = compare(longer, cleaned)
    assert (code, "is missing" in out) == (1, False)


def test_an_interrupt_and_an_error_of_the_package(base: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, expected, status in ((KeyboardInterrupt(), 130, "KILLED"), (ZeroDivisionError("x"), 2, "FAILED")):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        before = Counter(statuses())
        with monkeypatch.context() as patch:
            patch.setattr(stage, "compare_recordings", fail)
            code, out, err = command("compare", "--run-a", base, "--run-b", again)
        assert (code, out) == (expected, "")  # 1 would say that they differ
        assert ("Traceback" in err) == (expected == 2)
        assert Counter(statuses()) - before == Counter([f"compare {status}"])


def test_python(base: str, again: str, seeded: str, tmp_path: Path) -> None:
    before = len(runs_of("compare"))
    found = tr.compare(base, again)
    assert (found.verdict, found.exit_code, found.a, found.b) == ("identical", 0, base, again)
    assert tr.compare(base, again, check_files=True).summary.endswith(stage.CHECKED)
    found = tr.compare(base, seeded, max_ulp=1, ignore=["momentum/*", "loss"])
    assert (found.verdict, found.tolerance.ignore) == ("different", ("momentum/*", "loss"))
    assert not any(row.name.startswith("momentum/") for row in found.tensors)
    assert len(runs_of("compare")) == before + 3
    a, b = write_files(tmp_path)
    assert tr.compare(str(a), str(b)).verdict == "different"
    assert tr.compare(str(a), str(b), max_ulp=1).verdict == "identical"
    for error, arguments in (
        (RunError, (base, f"{again},{seeded}")),
        (RunError, (base, UNKNOWN)),
        (ConfigError, (base, "")),
    ):
        with pytest.raises(error):
            tr.compare(*arguments)
    with pytest.raises(ConfigError, match=r"^max_ulp: found -1; allowed: integer >= 0"):
        tr.compare(base, again, max_ulp=-1)
    with (
        flipped(folder_of(again) / "checkpoints/step-000000.safetensors"),
        pytest.raises(RecordingError, match=r"step-000000\.safetensors is damaged"),
    ):
        tr.compare(base, again, check_files=True)


@pytest.mark.slow
def test_mlflow_run_fails_where_they_differ_and_keeps_the_comparison(base: str, again: str, seeded: str) -> None:
    mlflow_run = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "compare", "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    for other, status, verdict in ((again, "FINISHED", "identical"), (seeded, "FAILED", "different")):
        arguments = ["-P", f"run_a={base}", "-P", f"run_b={other}", "-P", "log_level=WARNING"]
        done = subprocess.run([*mlflow_run, *arguments], env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == (status == "FINISHED"), done.stderr
        (run_id,) = re.findall(r"compare run: (\w+)", done.stdout)
        run = mlflow.get_run(run_id)
        assert run.data.tags[names.VERDICT] == verdict
        assert run.data.tags["mlflow.project.entryPoint"] == "compare"
        assert content_of(run_id)["verdict"] == verdict
        assert run.info.status == status  # set by MLflow, by the exit code
