"""Stage ``clean``: what each kind removes, what it refuses, and that a run that lost files is never reused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import FileInfo
from mlflow.tracking import MlflowClient
from stage_runs import folder_of, runs_of, statuses
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.errors import ConfigError, RecordingError, RunError, TrackedReplayError
from tracked_replay.stages.clean import Cleaned, describe, parse_what, run_clean
from tracked_replay.stages.verify import run_verify
from tracked_replay.tracking import cleaning, find_finished, find_interrupted, names, point_to, stage_run
from tracked_replay.tracking.process import this_process

CONFIG = tiny_config(train__epochs=2, lds__drop="0.1", lds__subsets=3, lds__resamples=100, lds__baselines=False)
LDS = {"lds.drop": "0.1", "lds.subsets": 3, "lds.resamples": 100, "lds.baselines": False}
TRAIN_FILES = {
    "checkpoints/manifest.parquet": 10,
    "checkpoints/step-000000.safetensors": 4000,
    "checkpoints/step-000002.safetensors": 4000,
    "rng/part-00000.safetensors": 700,
    "trace/part-00000.parquet": 300,
    "config/config.toml": 20,
    "figures/training.png": 50,
    "digests.json": 5,
}
KINDS = "checkpoints, trace, scores, figures, lds, all"


def fake(
    stage: str, inputs: Mapping[str, str] | None = None, files: Mapping[str, int] | None = None, identity: str = "ab"
) -> str:
    """A FINISHED run of a stage with files of some sizes, made without its work."""
    with stage_run(stage, identity, stage, inputs or {}) as run:
        for name, size in (files or {}).items():
            add_file(run.run_id, name, size)
        return run.run_id


def add_file(run_id: str, name: str, size: int = 1) -> Path:
    path = folder_of(run_id) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def on_disk(run_id: str) -> dict[str, int]:
    """Every file under a run's artifact folder with its size."""
    root = folder_of(run_id)
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def without(files: Mapping[str, int], *removed: str) -> dict[str, int]:
    return {name: size for name, size in files.items() if not name.startswith(removed)}


def tags(run_id: str) -> dict[str, str]:
    return dict(mlflow.get_run(run_id).data.tags)


def test_each_kind_takes_its_files_and_no_other(store: Path) -> None:
    train_run = tr.train(CONFIG)
    magic_run = tr.magic(train_run, "0", overrides="replay.per_step=true")
    expected = {run_id: on_disk(run_id) for run_id in (train_run, magic_run)}
    for run_id, kind, folders in (
        (train_run, "figures", ["figures/"]),
        (train_run, "trace", ["trace/"]),
        (train_run, "checkpoints", ["checkpoints/step-", "rng/"]),
        (magic_run, "figures", ["figures/", "images/", "report/", "table_images/"]),
        (magic_run, "scores", ["scores/"]),
    ):
        left = without(expected[run_id], *folders)
        removed = expected[run_id].keys() - left.keys()
        assert removed, kind
        found = run_clean(run_id, kind, force=True)
        assert on_disk(run_id) == left, kind
        assert {name: size for name, size in found.files} == {name: expected[run_id][name] for name in removed}
        assert found.removed
        assert found.run_id == run_id
        expected[run_id] = left
    assert "checkpoints/manifest.parquet" in on_disk(train_run)
    assert not (folder_of(train_run) / "rng").exists()  # no empty folder stays
    run_clean(train_run, "all", force=True)
    run_clean(magic_run, "all")
    assert list(folder_of(train_run).iterdir()) == list(folder_of(magic_run).iterdir()) == []
    for run_id in (train_run, magic_run):
        run = mlflow.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params
        assert run.data.metrics
        assert run.data.tags["mlflow.note.content" if run_id == magic_run else names.TASK]


def test_retrainings_lose_all_with_lds_and_their_states_with_checkpoints(store: Path) -> None:
    magic_run = tr.magic(tr.train(CONFIG), "0")
    lds_run = tr.lds(magic_run, overrides=LDS | {"lds.keep_states": True})
    children = [run.info.run_id for run in runs_of("retraining")]
    own = on_disk(lds_run)
    states = run_clean(lds_run, "checkpoints")
    assert (states.files, states.count, states.removed) == ((), 3, True)
    state = ["checkpoints/final.safetensors"]
    assert {child.run_id: [path for path, _ in child.files] for child in states.retrainings} == {
        child: state for child in children
    }
    assert on_disk(lds_run) == own
    # The runs promise states that are not there any more.
    assert all(names.FINGERPRINT not in tags(run_id) for run_id in (lds_run, *children))
    assert {tags(run_id)[names.CLEANED] for run_id in (lds_run, *children)} == {"checkpoints"}
    rest = {child: on_disk(child) for child in children}
    assert all(set(files) == {"digests.json", "lds/measurements.parquet", "lds/retraining.json"}
               for files in rest.values())  # fmt: skip

    found = run_clean(lds_run, "lds")
    assert all(on_disk(child) == {} for child in children)
    assert on_disk(lds_run) == without(own, "lds/")
    assert {child.run_id: dict(child.files) for child in found.retrainings} == rest
    lost = sum(size for name, size in own.items() if name.startswith("lds/"))
    assert found.bytes == lost + sum(sum(files.values()) for files in rest.values())
    assert tags(lds_run)[names.CLEANED] == "checkpoints,lds"
    assert {tags(child)[names.CLEANED] for child in children} == {"checkpoints,all"}


def test_a_run_that_lost_what_a_stage_reads_is_computed_again(store: Path) -> None:
    train_run = tr.train(CONFIG)
    magic_run = tr.magic(train_run, "0")
    lds_run = tr.lds(magic_run, overrides=LDS)
    for run_id in (train_run, magic_run, lds_run):
        run_clean(run_id, "figures")
        assert tags(run_id)[names.CLEANED] == "figures"
    assert tr.train(CONFIG) == train_run
    assert tr.magic(train_run, "0") == magic_run
    assert tr.lds(magic_run, overrides=LDS) == lds_run
    assert len(runs_of("retraining")) == 3

    before = on_disk(lds_run) | {"lds/subsets.parquet": 0}
    run_clean(lds_run, "lds")
    again = tr.lds(magic_run, overrides=LDS)
    assert again != lds_run
    assert len(runs_of("retraining")) == 6  # those of the first run are gone with it
    assert on_disk(again).keys() >= before.keys()
    run_clean(again, "lds")
    run_clean(magic_run, "scores")
    assert tags(magic_run)[names.CLEANED] == "scores,figures"
    assert tr.magic(train_run, "0") != magic_run
    computed = tags(train_run)[names.FINGERPRINT]
    run_clean(train_run, "trace", force=True)
    assert tags(train_run)[names.PENDING] == computed  # what it computed is known still
    assert tr.train(CONFIG) != train_run


def test_an_interrupted_run_that_lost_files_is_not_gone_on_with(store: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage_run("train", "ab", "interrupted", {}) as run:
        raise KeyboardInterrupt
    for name in TRAIN_FILES:
        add_file(run.run_id, name)
    assert run_clean(run.run_id, "figures").removed
    assert find_interrupted("train", "ab") == [run.run_id]
    assert run_clean(run.run_id, "checkpoints").removed
    assert find_interrupted("train", "ab") == []


@pytest.mark.parametrize("kind", ["checkpoints", "trace", "all"])
def test_reading_what_was_removed_is_one_sentence(kind: str, store: Path) -> None:
    train_run = tr.train(CONFIG)
    run_clean(train_run, kind)
    with pytest.raises(RecordingError, match=rf"is missing from the artifacts of run {train_run}"):
        tr.magic(train_run, "0")
    assert statuses() == ["train FINISHED"]


def test_a_dry_run_says_all_and_changes_nothing(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    magic_run = fake("magic", {"train_run_id": train_run})
    before = tags(train_run)
    found = run_clean(train_run, "checkpoints,trace", dry_run=True)
    assert sorted(found.files) == sorted(
        (name, size) for name, size in TRAIN_FILES.items()
        if name.startswith(("checkpoints/step", "rng/", "trace/"))
    )  # fmt: skip
    assert (found.removed, found.bytes, found.count) == (False, 9000, 4)
    assert [(reader.stage, reader.run_id) for reader in found.downstream] == [("magic", magic_run)]
    assert on_disk(train_run) == TRAIN_FILES
    assert tags(train_run) == before
    assert describe(found).splitlines() == [
        f"would be removed from run {train_run}:",
        "  checkpoints/      2 files  8.00kB",
        "  rng/              1 file     700B",
        "  trace/            1 file     300B",
        "  total             4 files  9.00kB",
        f"is needed by magic run {magic_run}",
        f"would be refused: what: found checkpoints,trace, needed by magic run {magic_run}; "
        "allowed: clean those first, or force",
    ]


def test_a_dry_run_says_what_the_removal_would_be_refused_with(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    assert run_clean(train_run, "trace", dry_run=True).refused == ""
    with stage_run("verify", "ab", "running", {"train_run_id": train_run}):
        for _ in range(6):
            fake("magic", {"train_run_id": train_run})
        for what in ("trace", "checkpoints,figures", "all"):
            found = run_clean(train_run, what, dry_run=True)
            with pytest.raises(RunError) as error:
                run_clean(train_run, what)
            assert found.refused == str(error.value)
            assert describe(found).endswith(f"\nwould be refused: {error.value}\n")
        for allowed in (
            run_clean(train_run, "figures", dry_run=True),
            run_clean(train_run, "scores", dry_run=True),
            run_clean(train_run, "all", dry_run=True, force=True),
        ):
            assert allowed.refused == ""
            assert "refused" not in describe(allowed)
    running = running_run("train", gone=False)
    for dry_run in (True, False):
        with pytest.raises(RunError, match=rf"^run_id: run {running} is RUNNING; allowed: a run that has ended$"):
            run_clean(running, "all", dry_run=dry_run)


def test_what_is_not_there_is_no_error(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    fake("magic", {"train_run_id": train_run})
    before = tags(train_run)
    empty = Cleaned(train_run, (), removed=False)
    assert run_clean(train_run, "scores,lds") == empty
    assert describe(empty) == f"run {train_run} has nothing of that kind; nothing to remove\n"
    assert tags(train_run) == before
    assert run_clean(train_run, "checkpoints,scores", force=True).removed
    assert tags(train_run)[names.CLEANED] == "checkpoints"  # there were no scores
    assert run_clean(train_run, "checkpoints") == empty  # and nobody is asked who needs what is gone
    assert run_clean(fake("lds"), "all").count == 0


def test_what_others_need_is_refused_and_names_them(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    mlflow.set_experiment("another")
    magic_run = fake("magic", {"train_run_id": train_run}, {"scores/influence.parquet": 9})
    mlflow.set_experiment("tests")
    lds_run = fake("lds", {"train_run_id": train_run, "magic_run_id": magic_run}, {"lds/summary.json": 9})
    fake("main", {"train_run_id": train_run, "magic_run_id": magic_run, "lds_run_id": lds_run})
    for kind in ("checkpoints", "trace", "figures,trace", "all"):
        with pytest.raises(RunError) as error:
            run_clean(train_run, kind)
        assert str(error.value).startswith(f"what: found {kind.removeprefix('figures,')}, needed by ")
        assert f"magic run {magic_run}" in str(error.value)
        assert f"lds run {lds_run}" in str(error.value)
        assert "main" not in str(error.value)
        assert str(error.value).endswith("; allowed: clean those first, or force")
    with pytest.raises(RunError, match=rf"^what: found scores, needed by lds run {lds_run};"):
        run_clean(magic_run, "scores")
    with pytest.raises(RunError, match=r"^what: found lds, needed by main run \w+;"):
        run_clean(lds_run, "lds")
    assert on_disk(train_run) == TRAIN_FILES
    assert {run_id: tags(run_id)[names.FINGERPRINT] for run_id in (train_run, magic_run, lds_run)}
    assert run_clean(train_run, "figures").removed

    assert run_clean(lds_run, "lds", force=True).downstream[0].stage == "main"
    assert run_clean(magic_run, "scores").removed  # what needed it lost its own result
    assert run_clean(train_run, "all").removed


def test_many_runs_that_need_it_are_counted(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    for _ in range(7):
        fake("magic", {"train_run_id": train_run})
    with pytest.raises(RunError, match=r"(magic run \w{32}, ){4}magic run \w{32} and 2 more; allowed"):
        run_clean(train_run, "trace")


def test_a_run_that_has_all_it_needs_does_not_stop_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    inputs = {"train_run_id": train_run}
    fake("verify", inputs)
    fake("retraining", inputs)
    fake("magic", {"train_run_id": "0" * 32})
    with pytest.raises(ConfigError), stage_run("magic", "ab", "failed", inputs):
        raise ConfigError("x")
    MlflowClient().delete_run(fake("magic", inputs))
    # A run that points to an earlier result reads nothing.
    earlier = fake("magic")
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", MlflowClient().create_run(experiment).info.run_id)
    assert point_to("magic", earlier, "pointing", inputs)
    found = run_clean(train_run, "all")
    assert found.removed
    assert found.downstream == ()


def test_a_run_that_reads_it_now_stops_it_whatever_its_stage(store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    for stage, parameter in (("verify", "train_run_id"), ("compare", "run_b")):
        with (
            stage_run(stage, "ab", "running", {parameter: train_run}) as run,
            pytest.raises(RunError, match=rf"needed by {stage} run {run.run_id} \(RUNNING\)"),
        ):
            run_clean(train_run, "trace")
    abandoned = running_run("verify", {"train_run_id": train_run}, gone=True)
    assert run_clean(train_run, "trace").removed
    assert mlflow.get_run(abandoned).info.status == "KILLED"


def running_run(stage: str, inputs: Mapping[str, str] | None = None, *, gone: bool) -> str:
    """A RUNNING run of this process, or of one of this machine that has ended."""
    owner = this_process()
    if gone:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        host, _, created = owner.rsplit(" ", 2)
        owner = f"{host} {ended.pid} {created}"
    made = {names.STAGE: stage, names.PROCESS: owner, names.FINGERPRINT: "ab"}
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    inputs = {f"{names.INPUT}{name}": value for name, value in (inputs or {}).items()}
    return str(MlflowClient().create_run(experiment, tags=made | inputs).info.run_id)


def test_only_a_run_that_has_ended_is_cleaned(store: Path) -> None:
    for status in ("FAILED", "KILLED", "FINISHED"):
        run_id = running_run("train", gone=False)
        add_file(run_id, "trace/part-00000.parquet")
        with pytest.raises(RunError, match=rf"^run_id: run {run_id} is RUNNING; allowed: a run that has ended$"):
            run_clean(run_id, "all", force=True)
        assert on_disk(run_id)
        MlflowClient().set_terminated(run_id, status)
        assert run_clean(run_id, "trace").removed
        assert on_disk(run_id) == {}
        assert mlflow.get_run(run_id).info.status == status
    abandoned = running_run("train", gone=True)
    add_file(abandoned, "trace/part-00000.parquet")
    assert run_clean(abandoned, "trace").removed
    assert mlflow.get_run(abandoned).info.status == "KILLED"


def test_the_run_that_mlflow_run_made_is_left_as_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    made = str(MlflowClient().create_run(experiment).info.run_id)
    before = mlflow.get_run(made).to_dictionary()
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    assert run_clean(train_run, "all").removed
    assert mlflow.get_run(made).to_dictionary() == before
    assert statuses() == ["None RUNNING", "train FINISHED"]
    assert mlflow.active_run() is None


def test_a_run_that_points_to_another_is_followed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", MlflowClient().create_run(experiment).info.run_id)
    pointing = point_to("train", train_run, "train", {})
    assert pointing is not None
    found = run_clean(pointing, "trace")
    assert (found.run_id, found.removed) == (train_run, True)
    assert on_disk(train_run) == without(TRAIN_FILES, "trace/")
    assert names.CLEANED not in tags(pointing)
    MlflowClient().set_tag(train_run, names.REUSES, pointing)
    with pytest.raises(RunError, match="points on to another run"):
        run_clean(pointing, "all")


def test_an_interruption_leaves_no_run_that_looks_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    magic_run = tr.magic(tr.train(CONFIG), "0")
    lds_run = tr.lds(magic_run, overrides=LDS)
    unlink = Path.unlink

    def interrupt(path: Path, missing_ok: bool = False) -> None:
        if list(folder_of(lds_run).rglob("*.json")):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    before = on_disk(lds_run)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_clean(lds_run, "all")
    assert on_disk(lds_run) == before
    runs = [lds_run, *(run.info.run_id for run in runs_of("retraining"))]
    assert all(names.FINGERPRINT not in tags(run_id) for run_id in runs)
    assert {tags(run_id)[names.CLEANED] for run_id in runs} == {"all"}
    assert run_clean(lds_run, "all").count == len(before) + 9
    assert all(on_disk(run_id) == {} for run_id in runs)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_run_whose_folder_is_a_link_is_left_alone(depth: int, store: Path) -> None:
    train_run = fake("train", files=TRAIN_FILES)
    folder = [folder_of(train_run), folder_of(train_run).parent][depth]
    outside = store / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(RecordingError, match=rf"^run {train_run}: its folder .* is a link"):
            run_clean(train_run, "all", dry_run=dry_run)
    assert sorted(outside.rglob("*")) == before


def test_links_are_never_followed(store: Path) -> None:
    outside = store / "outside"
    outside.mkdir()
    kept = outside / "step-000000.safetensors"
    kept.write_bytes(b"not the run's")
    for place, target in (
        ("trace", outside),
        ("trace/part", kept),
        ("config/part", outside),
        ("trace/no", store / "no"),
    ):
        train_run = fake("train", files=without(TRAIN_FILES, "trace/"))
        link = folder_of(train_run) / place
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
        for dry_run in (True, False):
            with pytest.raises(RecordingError, match=rf"^run {train_run}: {place} is a link"):
                run_clean(train_run, "all", dry_run=dry_run)
        assert kept.read_bytes() == b"not the run's"
        assert link.is_symlink()
        assert names.FINGERPRINT in tags(train_run)
        assert names.CLEANED not in tags(train_run)
        link.unlink()
        assert run_clean(train_run, "all").removed
    # The folder of the store itself may be reached through one.
    train_run = fake("train", files=TRAIN_FILES)
    experiment = folder_of(train_run).parents[1]
    os.rename(experiment, store / "moved")
    experiment.symlink_to(store / "moved")
    assert run_clean(train_run, "trace").removed
    assert not (store / "moved" / train_run / "artifacts/trace").exists()


def test_names_with_signs_of_urls_are_names(store: Path) -> None:
    odd = {"figures/a%20b.png": 1, "figures/%2e%2e/x": 1, "figures/c?d#e.png": 1, "images/ü +.png": 1}
    kept = {"a b.png": 1, "x": 1, "tables/a b.png": 1, "figures.txt": 1}
    train_run = fake("train", files=odd | kept)
    assert dict(run_clean(train_run, "figures").files) == odd
    assert on_disk(train_run) == kept


class Listing:
    """An artifact repository that lists what it was told to."""

    def __init__(self, *items: FileInfo) -> None:
        self.items = items
        self.deleted: list[str] = []

    def list_artifacts(self, folder: str | None = None) -> list[FileInfo]:
        return [
            item for item in self.items if item.path not in self.deleted and (folder is None) == ("/" not in item.path)
        ]

    def delete_artifacts(self, path: str | None = None) -> None:
        assert path is not None
        self.deleted.append(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../other/x", "is not a path inside a run's artifacts"),
        ("trace/../../x", "is not a path inside a run's artifacts"),
        ("/etc/hostname", "is not a path inside a run's artifacts"),
        ("", "is not a path inside a run's artifacts"),
        ("trace\\..\\x", "is not a path inside a run's artifacts"),
        ("scores/x", "the store lists 'scores/x' among the files of trace"),
        ("trace/a?b", "cannot be removed through MLflow"),
        ("trace/%2e%2e", "cannot be removed through MLflow"),
    ],
)
def test_a_store_cannot_lead_outside_of_the_run(
    path: str, message: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run = fake("train")
    items = [FileInfo("trace", True, None), FileInfo("trace/kept", False, 1), FileInfo(path, False, 1)]
    listing = Listing(*items)
    monkeypatch.setattr(cleaning, "is_local_uri", lambda uri: False)
    monkeypatch.setattr(cleaning, "get_artifact_repository", lambda uri: listing)
    monkeypatch.setattr("tracked_replay.stages.clean.KINDS", {"trace": ("trace/a*", "trace/%*")})
    with pytest.raises(RecordingError, match=message):
        run_clean(train_run, "trace")
    assert listing.deleted == []
    assert names.FINGERPRINT in tags(train_run)


def test_a_store_that_does_not_remove_is_found_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = fake("train")
    listing = Listing(FileInfo("digests.json", False, 1))
    monkeypatch.setattr(cleaning, "is_local_uri", lambda uri: False)
    monkeypatch.setattr(cleaning, "get_artifact_repository", lambda uri: listing)
    monkeypatch.setattr(listing, "delete_artifacts", lambda path: None)
    with pytest.raises(RecordingError, match=r"^digests\.json cannot be removed .*: the store still lists it$"):
        run_clean(train_run, "all")


def test_a_file_that_the_system_keeps_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = fake("train", files=TRAIN_FILES)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    message = rf"^checkpoints/manifest\.parquet cannot be removed from the artifacts of run {train_run}: .*denied"
    with pytest.raises(RecordingError, match=message):
        run_clean(train_run, "all")


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("", "''"),
        (" ", "''"),
        ("checkpoints,", "''"),
        ("checkpoint", "'checkpoint'"),
        ("checkpoints;trace", "'checkpoints;trace'"),
        ("ALL", "'ALL'"),
        ("trace,../trace", "'../trace'"),
        ("*", "'*'"),
        ("z" * 9000, f"'{'z' * 80}'…"),
    ],
)
def test_an_unknown_kind_is_one_sentence(what: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_clean("0" * 32, what)
    assert str(error.value) == f"what: found {found}; allowed: {KINDS}, or several joined by commas"


def test_kinds_are_taken_in_any_order_and_twice() -> None:
    assert parse_what(" trace , checkpoints,trace") == ("checkpoints", "trace")


def test_a_run_that_cannot_be_meant_is_one_sentence(store: Path) -> None:
    deleted, foreign = fake("train", files=TRAIN_FILES), None
    MlflowClient().delete_run(deleted)
    with mlflow.start_run() as run:
        foreign = run.info.run_id
    add_file(foreign, "trace/part")
    for run_id, message in (
        ("", "run_id: found ''; allowed: the ID of a run"),
        ("../x", "run_id: found '../x'; allowed: the ID of a run"),
        ("0" * 32, "has no such run"),
        (deleted, f"run_id: run {deleted} is deleted; `mlflow gc --tracking-uri URI` removes"),
        (foreign, f"run_id: run {foreign} was not made by tracked_replay"),
    ):
        with pytest.raises(RunError) as error:
            run_clean(run_id, "all", force=True)
        assert message in str(error.value)
        assert isinstance(error.value, TrackedReplayError)
    assert on_disk(foreign) == {"trace/part": 1}
    assert on_disk(deleted) == TRAIN_FILES


@pytest.fixture
def server(store: Path) -> Iterator[Path]:
    """A real tracking server that serves artifacts; the folder where it keeps them."""
    folder = store / "server side"
    folder.mkdir()
    os.replace(store / "mlflow.db", folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--serve-artifacts"]
    command += ["--artifacts-destination", str(folder / "files")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (store / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=env | {"MLFLOW_DISABLE_TELEMETRY": "true"}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            for attempt in range(240):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (store / "server.log").read_text()
                assert attempt < 239, (store / "server.log").read_text()
                time.sleep(0.25)
            mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
            mlflow.set_experiment("over http")
            yield folder / "files"
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


@pytest.mark.slow
def test_a_run_on_a_server_loses_the_same(server: Path) -> None:
    train_run = tr.train(CONFIG)
    magic_run = tr.magic(train_run, "0")
    lds_run = tr.lds(magic_run, overrides=LDS)
    assert mlflow.get_run(train_run).info.artifact_uri.startswith("mlflow-artifacts:")

    def kept(run_id: str) -> dict[str, int]:
        (root,) = server.rglob(f"{run_id}/artifacts")
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}

    runs = [train_run, magic_run, lds_run, *(run.info.run_id for run in runs_of("retraining"))]
    expected = {run_id: kept(run_id) for run_id in runs}
    with pytest.raises(RunError, match=f"magic run {magic_run}"):
        run_clean(train_run, "checkpoints")
    assert {run_id: kept(run_id) for run_id in runs} == expected
    for run_id, what, folders in (
        (lds_run, "lds", ["lds/"]),
        (magic_run, "scores,figures", ["scores/", "figures/", "images/", "report/", "table_images/"]),
        (train_run, "checkpoints", ["checkpoints/step-", "rng/"]),
    ):
        left = without(expected[run_id], *folders)
        found = run_clean(run_id, what)
        assert kept(run_id) == left, what
        assert dict(found.files) == {name: size for name, size in expected[run_id].items() if name not in left}
        assert run_clean(run_id, what) == Cleaned(run_id, (), removed=False)
    assert all(kept(run_id) == {} for run_id in runs[3:])
    assert run_clean(train_run, "all").removed
    assert kept(train_run) == {}
    assert all(names.FINGERPRINT not in tags(run_id) for run_id in runs)


def test_a_finished_verification_is_not_in_the_way(store: Path) -> None:
    train_run = tr.train(CONFIG)
    verify_run = run_verify(train_run)
    assert run_clean(train_run, "checkpoints").removed
    assert find_finished(names.TRAIN, tags(train_run).get(names.FINGERPRINT, "none")) is None
    assert on_disk(verify_run)
