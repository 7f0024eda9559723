"""Stage ``verify``: what it passes, and that the first check that fails is named with step and value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from mlflow.tracking import MlflowClient
from stage_runs import command, edit_recording, folder_of, refusal, statuses
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import DataError, RecordingError, ReplayError, TaskError
from tracked_replay.recording import state_digest
from tracked_replay.stages.verify import run_verify
from tracked_replay.training import State

CHECKS = [
    "recorded files against their digests",
    "the same order in two loaders",
    "the order across epochs",
    "the whole sequence against the recorded trace",
    "subset weights hit exactly the named examples",
    "identical initial models",
    "identical config where it is shared",
    "recorded states against their digests",
    "a retraining with all weights 1 is the recorded run",
]
CONFIG = tiny_config(train__epochs=2)
TRACE = "trace/part-00000.parquet"
MANIFEST = "checkpoints/manifest.parquet"


@pytest.fixture(scope="module")
def trained(shared_store: Path) -> str:
    return tr.train(CONFIG)


def edit_column(name: str, edit: Callable[[list], None], file: str = TRACE) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        table = pq.read_table(root / file)
        values = table[name].to_pylist()
        edit(values)
        place = table.schema.get_field_index(name)
        column = pa.array(values, table.schema.field(name).type)
        pq.write_table(table.set_column(place, table.schema.field(name), column), root / file)

    return change


def failing(
    edit: Callable[[Path], None], check: int, message: str, error: type = ReplayError, **config: object
) -> None:
    """Forge a recording; the check must fail with the message, after those before it have passed."""
    train_run = tr.train(CONFIG.override({name.replace("__", "."): value for name, value in config.items()}))
    edit_recording(train_run, edit)
    expected = f"^the check '{re.escape(CHECKS[check])}' failed: {message}" if error is ReplayError else message
    with pytest.raises(error, match=expected):
        run_verify(train_run)
    assert statuses() == ["train FINISHED", "verify FAILED"]
    (run,) = [run for run in mlflow.search_runs(output_format="list") if run.info.run_id != train_run]
    assert run.data.metrics["checks/passed"] == check
    text = run.data.tags["mlflow.note.content"]
    assert re.findall(r"^- (.*): passed", text, re.MULTILINE) == CHECKS[:check]
    assert "**failed**" in text


def test_a_recorded_run_passes_all_checks(trained: str) -> None:
    code, out, err = command("verify", "--train-run-id", trained)
    assert code == 0, err
    assert "all checks passed" in out
    (run_id,) = re.findall(r"verify run: (\w+)", out)
    run, root = mlflow.get_run(run_id), folder_of(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["checks/passed"] == 9
    assert [check["name"] for check in json.loads((root / "lds/checks.json").read_text())] == CHECKS
    for name in CHECKS:
        assert f"- {name}: passed (" in run.data.tags["mlflow.note.content"]
        assert f"check passed: {name}" in err
    assert run.data.tags["tracked_replay.input.train_run_id"] == trained
    assert run_verify(trained) != run_id  # it looks anew each time


def test_subsets_are_checked_where_they_are_asked_for(trained: str) -> None:
    run_id = run_verify(trained, overrides={"lds.drop": "0.1,0.2", "lds.subsets": 5})
    text = mlflow.get_run(run_id).data.tags["mlflow.note.content"]
    assert "subset weights hit exactly the named examples: passed (10 subsets)" in text


def test_a_changed_order_is_named_with_its_step_and_value(store: Path) -> None:
    recorded: list[list[int]] = []

    def swap(rows: list[list[int]]) -> None:
        recorded.append(list(rows[4]))
        rows[4][2], rows[4][3] = rows[4][3], rows[4][2]

    def edit(root: Path) -> None:
        edit_column("indices", swap)(root)

    failing(edit, 3, r"step 4: ")
    with pytest.raises(ReplayError) as caught:
        run_verify(
            mlflow.search_runs(filter_string="tags.`tracked_replay.stage`='train'", output_format="list")[0].info.run_id
        )
    # Both values are in the sentence.
    first, second = recorded[0][2], recorded[0][3]
    assert {str(first), str(second)} <= set(re.findall(r"\d+", str(caught.value)))


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("indices", lambda rows: rows.__setitem__(0, rows[0][::-1]), "step 0: "),
        ("indices", lambda rows: rows.__setitem__(slice(0, 2), [rows[1], rows[0]]), "step 0: "),
        ("labels", lambda rows: rows[5].__setitem__(0, (rows[5][0] + 1) % 3), "step 5: "),
        ("lr", lambda rows: rows[3].__setitem__(0, rows[3][0] * (1 + 1e-15)), "step 3: "),
        ("epoch", lambda rows: rows.__setitem__(1, 1), "step 1: "),
    ],
)
def test_a_trace_that_differs_is_named_with_its_step(
    column: str, edit: Callable[[list], None], message: str, store: Path
) -> None:
    failing(edit_column(column, edit), 3, message)


def test_another_initial_model_is_named(store: Path) -> None:
    def edit(root: Path) -> None:
        path = root / "checkpoints/step-000000.safetensors"
        tensors = safetensors.torch.load_file(path)
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name] + 1
        content = safetensors.torch.save(tensors, metadata={"step": "0"})
        path.write_bytes(content)
        digest = state_digest(State.from_flat(0, tensors))
        edit_column("state_digest", lambda rows: rows.__setitem__(0, digest))(root)
        manifest = "checkpoints/manifest.parquet"
        edit_column("digest", lambda rows: rows.__setitem__(0, digest), manifest)(root)
        edit_column("bytes", lambda rows: rows.__setitem__(0, len(content)), manifest)(root)

    failing(edit, 5, r"step 0: initial model 1 has the digest [0-9a-f]{32}, recorded was [0-9a-f]{32}$")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_state_that_is_not_reproduced_is_named(step: int, store: Path) -> None:
    def edit(root: Path) -> None:
        edit_column("state_digest", lambda rows: rows.__setitem__(step, "0" * 32))(root)

    failing(edit, 7, rf"step {step}: .*recorded was {'0' * 32}", record__every=6)


def test_a_loss_that_is_not_reproduced_is_named(store: Path) -> None:
    failing(
        edit_column("loss", lambda rows: rows.__setitem__(2, float("nan"))), 8, r"step 2: a retraining has the loss"
    )


@pytest.mark.parametrize("name", ["rng/part-00000.safetensors", "environment/environment.json"])
def test_a_file_that_no_check_needs_is_held_against_its_digest(name: str, store: Path) -> None:
    train_run = tr.train(CONFIG)
    path = folder_of(train_run) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=rf"{re.escape(name)} is damaged"):
        run_verify(train_run)


NO_JSON = "[" * 100_000
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (
        lambda root: reseal_checkpoint(root, b"not a checkpoint"),
        "checkpoints/step-000000.safetensors is damaged: it is no checkpoint (",
    ),
    "a name outside": (
        lambda root: reseal_checkpoint(root, safetensors.torch.save({"evil/../../x": torch.ones(1)})),
        "checkpoints/step-000000.safetensors is damaged: it is no checkpoint ('evil/../../x' is not a state's tensor",
    ),
    "no rows": (
        lambda root: pq.write_table(pq.read_table(root / MANIFEST)[:0], root / MANIFEST),
        "checkpoints/manifest.parquet lists no checkpoint",
    ),
    "other columns": (
        lambda root: pq.write_table(pa.table({"x": [1]}), root / MANIFEST),
        "checkpoints/manifest.parquet cannot be read: ",
    ),
    "a short batch": (
        edit_column("labels", lambda rows: rows[0].append(rows[1].pop())),
        "the trace must hold equally many labels for each step",
    ),
    "no text": (
        lambda root: (root / "config/config.toml").write_bytes(b"\xff"),
        "config/config.toml cannot be read: ",
    ),
    "deep": (
        lambda root: (root / "environment/environment.json").write_text(NO_JSON),
        "environment/environment.json cannot be read as JSON: ",
    ),
}


def reseal_checkpoint(root: Path, content: bytes) -> None:
    """Other content for the first checkpoint, and a manifest that fits it."""
    (root / "checkpoints/step-000000.safetensors").write_bytes(content)
    edit_column("bytes", lambda rows: rows.__setitem__(0, len(content)), MANIFEST)(root)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_recording_of_another_form_is_one_sentence(kind: str, store: Path) -> None:
    edit, message = DAMAGE[kind]
    one, other = tr.train(CONFIG), tr.train(CONFIG, force=True)
    edit_recording(other, edit)
    code, _, err = command("compare", "--run-a", one, "--run-b", other, "--check-files", "true")
    assert code == 2
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in sentence
    assert "Traceback" not in err
    assert "RUNNING" not in str(statuses())


def test_a_changed_checkpoint_is_named(store: Path) -> None:
    train_run = tr.train(CONFIG)
    path = folder_of(train_run) / "checkpoints/step-000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"step-000003\.safetensors is damaged"):
        run_verify(train_run)
    assert statuses() == ["train FINISHED", "verify FAILED"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("nn.Tanh()", "nn.ReLU()"), ReplayError, "the check 'recorded states against their digests' failed: step 1: "),
        (
            ("nn.Linear(4, 3)", "nn.Linear(4, 3, bias=False)"),
            ReplayError,
            "the check 'identical initial models' failed",
        ),
        (("manual_seed(seed)", "manual_seed(seed + 1)"), DataError, "the data differ from those of the training run"),
        (("return nn.Seq", "raise KeyError('x')\n        return nn.Seq"), TaskError, "KeyError: 'x'"),
    ],
)
def test_a_task_edited_since_is_named(change: tuple[str, str], error: type, message: str, store: Path) -> None:
    train_run = tr.train(own_config(write_task(store), record__every=100))
    write_task(store, change)
    with pytest.raises(error, match=re.escape(message)):
        run_verify(train_run)
    assert "RUNNING" not in str(statuses())
    assert "verify FINISHED" not in statuses()


def test_other_threads_than_recorded_are_pinned_again(trained: str) -> None:
    torch.set_num_threads(2)
    run_verify(trained)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-run-id", ""], "train_run_id: nothing was given; allowed: a finished run of stage 'train'"),
        (["--train-run-id", "0" * 32], "has no such run"),
        (["--train-run-id", "a b"], "train_run_id: found 'a b'; allowed: the ID of a run"),
        (["--set", "train.lr=0.1"], "train.lr: cannot be changed for the recorded run"),
        (["--set", "seed=0"], "seed: cannot be changed for the recorded run"),
        (["--set", "lds.drop=0.001"], "drop: found 0.001, which removes 0 of 48"),
        (["--set", "lds.drop=2"], "drop: found '2'; allowed: shares above 0 and below 1"),
        (["--set", "lds.nothing=2"], "lds.nothing: unknown config field"),
        (["--preset", "cifar10"], "preset: found 'cifar10', which a check of train_run_id does not look at"),
        (["--seed", "3"], "seed: found 0 in config/config.toml; expected: 3"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(arguments: list[str], message: str, trained: str) -> None:
    given = [] if "--train-run-id" in arguments else ["--train-run-id", trained]
    assert message in refusal("verify", *given, *arguments)


def test_a_run_that_is_no_training_and_one_that_points(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    magic_run = tr.magic(trained, "0")
    assert f"run {magic_run} is of stage 'magic'" in refusal("verify", "--train-run-id", magic_run)
    pointing = MlflowClient().create_run(mlflow.get_run(trained).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", pointing)
    assert tr.train(CONFIG) == trained
    run_id = run_verify(pointing)
    assert mlflow.get_run(run_id).data.tags["tracked_replay.input.train_run_id"] == trained


def test_the_recording_is_left_as_it_was(trained: str) -> None:
    def digests() -> dict[str, bytes]:
        root = folder_of(trained)
        return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    before = digests()
    run_verify(trained)
    assert digests() == before
