"""Stage ``reproduce``, its certificate, and what ``verify`` says of certificates, seeds and the machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from stage_runs import command, edit_recording, folder_of, refusal, runs_of, statuses
from tiny import own_config, write_task

import tracked_replay as tr
from tracked_replay import determinism
from tracked_replay.errors import DataError
from tracked_replay.recording import file_sha256
from tracked_replay.stages.compare import COMPARISON, PAGE
from tracked_replay.stages.reproduce import CERTIFICATE
from tracked_replay.tracking import names
from tracked_replay.training import State, TrainingSetup

TRACE = "trace/part-00000.parquet"
UNKNOWN = "0" * 32
PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def task(shared_store: Path) -> str:
    return write_task(shared_store)


@pytest.fixture(scope="module")
def trained(task: str) -> str:
    return tr.train(own_config(task))


@pytest.fixture(scope="module")
def reproduced(trained: str) -> str:
    return reproduce(trained)[2]


def reproduce(run_id: str, *options: object) -> tuple[int, str, str]:
    """Exit code, standard error and reproduce run of a reproduction that gives a verdict."""
    code, out, err = command("reproduce", "--run-id", run_id, *options)
    assert code in (0, 1), err
    (made,) = re.findall(r"^reproduce run: (\w+)$", out, re.MULTILINE)
    assert f"\nnext:        tracked-replay verify --certificate {made}\n" in out
    assert mlflow.get_run(made).info.status == "FINISHED"
    return code, err, made


def refused(*arguments: object, left: tuple[str, ...] = ()) -> str:
    """The one sentence of a reproduction that comes to no verdict, and the runs that it leaves."""
    before = Counter(statuses())
    code, out, err = command("reproduce", *arguments, "--log-level", "ERROR")
    assert (code, out) == (2, ""), (code, out, err)
    (sentence,) = [line for line in err.splitlines() if "INFO mlflow." not in line]
    assert sentence.startswith("error: ")
    assert Counter(statuses()) - before == Counter(left)
    return sentence.removeprefix("error: ")


def read(run_id: str, name: str = CERTIFICATE) -> dict[str, Any]:
    return json.loads((folder_of(run_id) / name).read_text(encoding="utf-8"))


def forged(made: str, path: Path, **changes: object) -> Path:
    """A run's certificate with other fields and a digest that fits them."""
    content = read(made) | changes
    content.pop("digest")
    text = json.dumps(content, separators=(",", ":"))
    path.write_text(json.dumps(content | {"digest": hashlib.sha256(text.encode()).hexdigest()}), encoding="utf-8")
    return path


def digests(run_id: str) -> list[str]:
    return pq.read_table(folder_of(run_id) / TRACE)["state_digest"].to_pylist()


def holds(*arguments: object) -> str:
    """What ``verify`` prints of a certificate that holds; no run is made."""
    before = statuses()
    code, out, err = command("verify", *arguments)
    assert code == 0, err
    assert statuses() == before
    return out


def test_a_run_is_reproduced_bit_for_bit(trained: str) -> None:
    before = {path: path.read_bytes() for path in sorted(folder_of(trained).rglob("*")) if path.is_file()}
    code, err, run_id = reproduce(trained)
    assert code == 0
    assert err.index("this environment is the recorded one") < err.index("training 4 steps")
    run, root = mlflow.get_run(run_id), folder_of(run_id)
    again = run.data.tags[f"{names.INPUT}reproduced_run_id"]
    assert run.data.tags[f"{names.INPUT}train_run_id"] == trained != again
    assert run.data.tags[names.VERDICT] == "identical"
    child = mlflow.get_run(again)
    assert (child.info.status, child.data.tags[PARENT]) == ("FINISHED", run_id)
    assert digests(trained) == digests(again)
    comparison = read(run_id, COMPARISON)
    assert (comparison["a"], comparison["b"], comparison["verdict"]) == (trained, again, "identical")
    certificate = read(run_id)
    assert (certificate["run_id"], certificate["reproduced_run_id"]) == (trained, again)
    assert (certificate["verdict"], certificate["steps"]) == ("identical", 4)
    assert certificate["merkle_root"] == certificate["reproduced_merkle_root"]
    assert certificate["fingerprint"] == mlflow.get_run(trained).data.tags[names.FINGERPRINT]
    assert certificate["environment"]["torch"] == torch.__version__
    assert sorted(read(run_id, "digests.json")) == sorted([CERTIFICATE, COMPARISON, PAGE])
    assert run.data.tags[names.DIGESTS] == file_sha256(root / "digests.json")
    assert {path: path.read_bytes() for path in sorted(folder_of(trained).rglob("*")) if path.is_file()} == before


def test_results_still_hang_on_the_training_that_was_reproduced(task: str) -> None:
    config = own_config(task, seed=11)
    first = tr.train(config)
    scores = tr.magic(first, "0")
    tr.reproduce(first)
    again = next(run for run in runs_of(names.TRAIN) if run.data.tags.get(names.REPRODUCES) == first)
    assert tr.train(config) == first
    assert tr.magic(config=config, targets="0") == scores
    # Without the first, its reproduction is as good.
    mlflow.delete_run(first)
    assert tr.train(config) == again.info.run_id


def test_it_takes_over_the_run_that_mlflow_run_made(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MlflowClient().create_run(mlflow.get_run(trained).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    code, _, run_id = reproduce(trained)
    assert (code, run_id) == (0, made)
    again = mlflow.get_run(run_id).data.tags[f"{names.INPUT}reproduced_run_id"]
    assert mlflow.get_run(again).data.tags[PARENT] == made


def test_a_certificate_is_checked_by_run_and_by_file(trained: str, reproduced: str, tmp_path: Path) -> None:
    copy = tmp_path / "certificate.json"
    copy.write_bytes((folder_of(reproduced) / CERTIFICATE).read_bytes())
    for arguments in (
        ["--certificate", reproduced],
        ["--certificate", copy],
        ["--certificate", copy, "--train-run-id", trained],
    ):
        out = holds(*arguments)
        assert out.splitlines()[-1] == "the certificate holds; its verdict: identical"
        assert {"holds: merkle_root", "holds: reproduced_merkle_root"} <= set(out.splitlines())


def test_a_certificate_holds_without_the_reproduced_run(trained: str) -> None:
    run_id = reproduce(trained)[2]
    MlflowClient().delete_run(read(run_id)["reproduced_run_id"])
    code, out, err = command("verify", "--certificate", run_id)
    assert code == 0
    assert "the reproduced run is not checked: certificate: its reproduced_run_id: run" in err
    assert "holds: reproduced_merkle_root" in out  # it must be the recorded one's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "the certificate does not hold, steps: found 5, recorded was 4"),
        ({"merkle_root": "a" * 64}, f"does not hold, merkle_root: found '{'a' * 64}', recorded was"),
        ({"reproduced_merkle_root": "a" * 64}, "does not hold, reproduced_merkle_root"),
        ({"verdict": "different", "reproduced_merkle_root": "a" * 64}, "does not hold, reproduced_merkle_root"),
        ({"fingerprint": "a" * 64}, "does not hold, fingerprint"),
        ({"code": "other"}, "does not hold, code"),
        ({"environment": {}}, "does not hold, environment"),
        ({"run_id": UNKNOWN}, f"certificate: its run_id: found '{UNKNOWN}', but "),
        ({"steps": 0}, "the certificate is not valid: steps: found 0"),
        ({"verdict": "perfect"}, "the certificate is not valid: verdict: found 'perfect'"),
        ({"more": 1}, "the certificate is not valid: more: unknown field"),
    ],
)
def test_a_forged_certificate(changes: dict[str, object], message: str, reproduced: str, tmp_path: Path) -> None:
    path = forged(reproduced, tmp_path / "certificate.json")
    assert "the certificate holds" in holds("--certificate", path)  # the forger knows the form
    assert message in refusal("verify", "--certificate", forged(reproduced, path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": {"max_ulp": 3, "ignore": []}}, "the certificate does not hold, tolerance: found max_ulp 3"),
        ({"tolerance": {"max_ulp": 0, "ignore": ["*"]}}, "the certificate does not hold, tolerance: "),
        ({"reproduced_run_id": None}, "the certificate does not hold, reproduced_run_id: it is the reproduced run"),
    ],
)
def test_a_certificate_that_says_nothing(
    changes: dict[str, Any], message: str, trained: str, reproduced: str, tmp_path: Path
) -> None:
    changes = {name: trained if value is None else value for name, value in changes.items()}
    path = forged(reproduced, tmp_path / "certificate.json", **changes)
    assert message in refusal("verify", "--certificate", path)


def test_a_certificate_among_the_artifacts_is_held_against_its_digest(trained: str) -> None:
    _, _, run_id = reproduce(trained)
    path = folder_of(run_id) / CERTIFICATE
    forged(run_id, path, verdict="different")
    assert "is damaged: its SHA-256 is" in refusal("verify", "--certificate", run_id)


def test_a_certificate_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    assert "the certificate is not valid" in refusal("verify", "--certificate", path)


def test_what_a_certificate_is_not_checked_for_is_refused(reproduced: str) -> None:
    sentence = refusal("verify", "--certificate", reproduced, "--seed", "77")
    assert sentence.startswith("seed: found '77', which a check of certificate does not look at")


def test_a_damaged_recording_is_not_trained_again(task: str, store: Path) -> None:
    trained = tr.train(own_config(write_task(store)))
    path = folder_of(trained) / "rng/part-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, _, err = command("reproduce", "--run-id", trained)
    assert code == 2
    assert "rng/part-00000.safetensors is damaged" in err
    assert statuses() == ["train FINISHED"]


def test_a_certificate_changed_by_hand(reproduced: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    text = (folder_of(reproduced) / CERTIFICATE).read_text(encoding="utf-8")
    path.write_text(text.replace('"identical"', '"different"'), encoding="utf-8")
    assert "the certificate is damaged: its content has the digest" in refusal("verify", "--certificate", path)
    path.write_text(text[:-30], encoding="utf-8")
    assert "the certificate is not valid JSON" in refusal("verify", "--certificate", path)
    path.write_bytes(b"\xff\x00")
    assert "the certificate is not valid JSON" in refusal("verify", "--certificate", path)


def test_a_certificate_of_another_run(trained: str, reproduced: str, task: str) -> None:
    other = tr.train(own_config(task, seed=1))
    sentence = refusal("verify", "--certificate", reproduced, "--train-run-id", other)
    assert sentence == f"certificate: it is about run {trained}, train_run_id is {other}"


def test_a_certificate_that_is_none(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, message in (
        ("none.json", "certificate: the file 'none.json' does not exist"),
        ("a/b", "certificate: the file 'a/b' does not exist"),
        (trained, f"certificate: run {trained} is of stage 'train'; allowed: a finished run of stage 'reproduce'"),
        (UNKNOWN, f"certificate: found '{UNKNOWN}', but "),
    ):
        assert message in refusal("verify", "--certificate", given)


def test_a_recording_changed_since_does_not_match_its_certificate(task: str) -> None:
    run_id = tr.train(own_config(task, seed=2))
    made = reproduce(run_id)[2]
    assert "holds" in holds("--certificate", made)

    def edit(root: Path) -> None:
        table = pq.read_table(root / TRACE)
        place = table.schema.get_field_index("loss")
        losses = table["loss"].to_pylist()
        losses[2] += 1e-9
        pq.write_table(table.set_column(place, table.schema.field("loss"), pa.array(losses)), root / TRACE)

    edit_recording(run_id, edit)
    assert "the certificate does not hold, merkle_root" in refusal("verify", "--certificate", made)
    (folder_of(run_id) / TRACE).unlink()
    assert f"{TRACE} is missing" in refusal("verify", "--certificate", made)


def test_another_environment_is_shown_before_the_training(task: str) -> None:
    run_id = tr.train(own_config(task, seed=3))

    def edit(root: Path) -> None:
        path = root / "environment/environment.json"
        content = json.loads(path.read_text())
        content["python"]["version"] = "2.7.18"
        content["packages"]["installed"]["gone"] = "1.0"
        path.write_text(json.dumps(content))

    edit_recording(run_id, edit)
    code, err, made = reproduce(run_id)
    assert code == 0
    lines = [line for line in err.splitlines() if "INFO mlflow." not in line]
    shown = [line.split(" INFO ")[1] for line in lines if " INFO " in line]
    start = shown.index("this environment differs from the recorded one in 2 values:")
    assert re.fullmatch(r"  packages\.installed\.gone: recorded 1\.0, here not there", shown[start + 1])
    assert re.fullmatch(r"  python\.version: recorded 2\.7\.18, here 3\.\d+\..+", shown[start + 2])
    assert shown[start + 3].startswith("training 4 steps")
    rows = {row["name"]: row["a"] for row in read(made, COMPARISON)["environment"]}
    assert rows == {"python.version": "2.7.18", "packages.installed.gone": "1.0"}
    assert read(made)["environment"]["python"] == "2.7.18" != read(made)["reproduced_environment"]["python"]


def test_changed_data_are_refused_before_a_run_starts(store: Path) -> None:
    run_id = tr.train(own_config(write_task(store)))
    write_task(store, ("manual_seed(seed)", "manual_seed(seed + 1)"))
    sentence = refused("--run-id", run_id)
    assert sentence.startswith("the data differ from those of the training run: their fingerprint is ")
    with pytest.raises(DataError):
        tr.reproduce(run_id)
    Path(store / "own.py").unlink()
    assert "own.py' does not exist" in refused("--run-id", run_id)


def test_changed_code_is_named(store: Path) -> None:
    run_id = tr.train(own_config(write_task(store)))
    write_task(store, ("nn.Tanh()", "nn.ReLU()"))
    code, _, made = reproduce(run_id)
    comparison = read(made, COMPARISON)
    assert (code, comparison["first_divergent_step"], comparison["causes"][0]["name"]) == (1, 0, "code")
    assert holds("--certificate", made).splitlines()[-1] == "the certificate holds; its verdict: different"


Change = Callable[[State], State]


@contextmanager
def step_changed(number: int, change: Change) -> Iterator[None]:
    """Something that happens after one step of every training."""
    take = TrainingSetup.take

    def changed(self: TrainingSetup, state: State, weights: torch.Tensor | None = None) -> Any:
        result, batch = take(self, state, weights)
        return (result._replace(state=change(result.state)) if state.step == number else result), batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSetup, "take", changed)
        yield


def nudged(state: State) -> State:
    """The state with one number of one tensor the next larger one."""
    flat = state.flat()
    tensor = flat["parameters/2.bias"].clone()
    tensor[1] = torch.nextafter(tensor[1], tensor.new_tensor(torch.inf))
    return State.from_flat(state.step, flat | {"parameters/2.bias": tensor})


def test_a_reproduction_that_differs_in_one_bit(trained: str) -> None:
    with step_changed(2, nudged):
        code, _, run_id = reproduce(trained)
    assert code == 1
    comparison, certificate = read(run_id, COMPARISON), read(run_id)
    assert (comparison["first_divergent_step"], comparison["first_difference"]) == (2, "state")
    assert [row["name"] for row in comparison["first_tensors"]] == ["parameters/2.bias"]
    assert comparison["first_tensors"][0]["largest_ulp"] == 1
    assert [cause["name"] for cause in comparison["causes"]] == ["unknown"]
    assert certificate["verdict"] == mlflow.get_run(run_id).data.tags[names.VERDICT] == "different"
    assert certificate["merkle_root"] != certificate["reproduced_merkle_root"]
    assert (folder_of(run_id) / "figures/comparison.png").is_file()
    assert holds("--certificate", run_id).splitlines()[-1] == "the certificate holds; its verdict: different"


def test_a_reproduction_that_is_interrupted_or_fails(trained: str) -> None:
    def interrupt(state: State) -> State:
        raise KeyboardInterrupt

    def break_down(state: State) -> State:
        raise ZeroDivisionError("a kernel")

    before = Counter(statuses())
    with step_changed(2, interrupt):
        code, out, err = command("reproduce", "--run-id", trained)
    assert (code, out) == (130, "")
    assert (
        err.splitlines()[-1]
        == "interrupted; a run that was open is KILLED; train, magic and lds go on where they were when given again"
    )
    assert Counter(statuses()) - before == Counter(["reproduce KILLED", "train KILLED"])
    with step_changed(2, break_down):
        left = ("reproduce FAILED", "train FAILED")
        assert "ZeroDivisionError: a kernel" in refused("--run-id", trained, left=left)
    assert reproduce(trained)[0] == 0


def test_a_run_recorded_with_other_settings_is_reproduced_with_them(task: str) -> None:
    run_id = tr.train(own_config(task, seed=4, train__threads=2, record__every=3))
    torch.set_num_threads(1)
    code, _, made = reproduce(run_id)
    assert code == 0
    again = read(made)["reproduced_run_id"]
    assert mlflow.get_run(again).data.params["train.threads"] == "2"
    assert mlflow.get_run(again).data.params["record.every"] == "3"


def test_a_damaged_recording_is_refused(task: str) -> None:
    run_id = tr.train(own_config(task, seed=5))
    path = folder_of(run_id) / "config/config.toml"
    path.write_text(path.read_text() + "\n")
    assert refused("--run-id", run_id).startswith("config/config.toml is damaged: its SHA-256 is ")
    (folder_of(run_id) / "digests.json").unlink()
    assert refused("--run-id", run_id) == f"digests.json is missing from the artifacts of run {run_id}"
    MlflowClient().delete_tag(run_id, names.DIGESTS)
    assert f"run {run_id} has no tag tracked_replay.digests" in refused("--run-id", run_id)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "run_id: found ''; allowed: the ID of a run"),
        ("a b", "run_id: found 'a b'; allowed: the ID of a run"),
        (UNKNOWN, f"run_id: found '{UNKNOWN}', but "),
        ("REPRODUCED", "is of stage 'reproduce'; allowed: a finished run of stage 'train'"),
        ("RUNNING", "is RUNNING; allowed: a FINISHED run of stage 'train'"),
        ("DELETED", "is deleted; `mlflow runs restore"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(given: str, message: str, trained: str, reproduced: str) -> None:
    client, experiment = MlflowClient(), mlflow.get_run(trained).info.experiment_id
    made = {name: client.create_run(experiment).info.run_id for name in ("RUNNING", "DELETED")}
    for run_id in made.values():
        client.set_tag(run_id, names.STAGE, "train")
    client.delete_run(made["DELETED"])
    sentence = refused("--run-id", (made | {"REPRODUCED": reproduced}).get(given, given))
    assert message in sentence
    assert sentence.startswith("run_id: ")
    client.set_terminated(made["RUNNING"])


def test_python(trained: str) -> None:
    found = tr.reproduce(trained)
    assert (found.verdict, found.exit_code, found.a) == ("identical", 0, trained)
    newest = runs_of("reproduce")[-1]
    assert newest.data.tags[f"{names.INPUT}reproduced_run_id"] == found.b


def test_verify_asks_for_the_seed_of_a_run(trained: str) -> None:
    code, out, err = command("verify", "--train-run-id", trained, "--seed", 0)
    assert code == 0, err
    assert "all checks passed" in out
    sentence = refusal("verify", "--train-run-id", trained, "--seed", 7)
    assert sentence == "seed: found 0 in config/config.toml; expected: 7"
    for seed in ("-1", "x", "0.5"):
        assert f"seed: found '{seed}'; allowed: integer >= 0" in refusal(
            "verify", "--train-run-id", trained, "--seed", seed
        )


def test_verify_repeats_a_training_here(store: Path) -> None:
    code, out, err = command("verify", "--iterations", 2)
    assert code == 0, err
    assert out.startswith("2 iterations and a fresh process agree bit for bit (cpu")
    assert statuses() == []


def test_verify_says_where_this_machine_differs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = determinism.SelfTest(
        False, 3, ("a", "a", "b"), "a", 2, "iteration 2: cpu, step 0: gradient of 0.weight", ("cpu",), 1, 0.1
    )
    monkeypatch.setattr(determinism, "verify_reproducibility", lambda iterations: found)
    sentence = refusal("verify", "--iterations", 3)
    assert sentence.endswith("does not repeat a training bit for bit: iteration 2: cpu, step 0: gradient of 0.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "1"], "iterations: found '1'; allowed: integer >= 2"),
        (["--iterations", "many"], "iterations: found 'many'; allowed: integer >= 2"),
        (["--iterations", "2", "--train-run-id", UNKNOWN], "allowed: without train_run_id and certificate"),
        (["--iterations", "2", "--certificate", UNKNOWN], "allowed: without train_run_id and certificate"),
    ],
)
def test_iterations_that_cannot_be_meant(arguments: list[str], message: str, store: Path) -> None:
    assert message in refusal("verify", *arguments)
