"""Everything that can be wrong with a task, its data and a recording: one sentence, and no run left open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from tiny import own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.errors import (
    ConfigError,
    DataError,
    NumericalError,
    RecordingError,
    ReplayError,
    RunError,
    TaskError,
    TrackedReplayError,
)
from tracked_replay.tracking import names

LABELS = 'label_names = ("a", "b", "c")'
MODEL = "return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))"
NUMBERS = "torch.randn(count, 5, generator=generator) + labels[:, None]"


def stages() -> list[str]:
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return sorted(f"{run.data.tags[names.STAGE]} {run.info.status}" for run in runs)


def refused(error: type[TrackedReplayError], message: str, task: str, runs: list[str], **config: object) -> None:
    with pytest.raises(error) as caught:
        tr.magic(config=own_config(task, **config))
    assert message in str(caught.value)
    assert stages() == runs


def method(name: str, body: str) -> str:
    return f"def {name}: {body}"


BEFORE: list[str] = []  # nothing was started
TRAINING = ["magic FAILED", "train FAILED"]
REPLAYING = ["magic FAILED", "train FINISHED"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((LABELS, "label_names = ("), ConfigError, "failed when it was imported: SyntaxError: '(' was never closed"),
        ((LABELS, "raise KeyError('x')"), ConfigError, "failed when it was imported: KeyError: 'x'"),
        (("class Own(", "class Other("), ConfigError, "found no class 'Own' in "),
        (("def model", "def network"), ConfigError, "without model; allowed: a class with all of them"),
        ((LABELS, LABELS + "; name = 3"), ConfigError, "has the name 3; allowed: a text of 1 to 200 letters"),
        ((LABELS, LABELS + "; name = 'x' * 999"), ConfigError, "allowed: a text of 1 to 200 letters"),
        ((LABELS, "label_names = ('a', 'b')"), DataError, "found training labels from 0 to 2; allowed: 0 to 1"),
        ((LABELS, "label_names = ()"), DataError, "Own.label_names: found (); allowed: a tuple"),
        ((LABELS, "label_names = 3"), DataError, "Own.label_names: found 3; allowed: a tuple"),
        ((LABELS, "label_names = 'abc'"), DataError, "Own.label_names: found 'abc'; allowed: a tuple"),
        (("return Examples(", "return ("), DataError, "Own.train_examples: found tuple; allowed: Examples"),
        ((", labels)", ", labels.int())"), DataError, "and type torch.int32; allowed: shape (N,) and type torch.int64"),
        ((", labels)", ", labels[1:])"), DataError, "for 31 labels; allowed: one input a label"),
        ((", labels)", ", labels - 1)"), DataError, "found training labels from -1 to 1"),
        ((NUMBERS, f"({NUMBERS}) / 0"), DataError, "found NaN or Inf in 32 inputs, the first of them at index 0"),
        ((NUMBERS, "torch.full((count, 5), torch.nan)"), DataError, "found NaN or Inf"),
        (("examples(32, 1)", "examples(0, 1)"), DataError, "examples: found none; allowed: at least 1"),
        (("generator = ", "raise FileNotFoundError('data.csv')\n        generator = "), TaskError, "data.csv"),
        ((MODEL, "raise ValueError('no model')"), TaskError, "line 23: ValueError: no model"),
        ((MODEL, "raise SystemExit(0)"), TaskError, "line 23: SystemExit: 0"),
        ((MODEL, "return None"), ConfigError, "model() must return a torch.nn.Module; found NoneType"),
        ((MODEL, "return lambda x: x"), ConfigError, "model() must return a torch.nn.Module; found function"),
        ((MODEL, "return nn.Flatten()"), ConfigError, "has no parameter that requires a gradient"),
        ((MODEL, "return nn.Linear(5, 3).requires_grad_(False)"), ConfigError, "has no parameter that requires"),
    ],
)
def test_what_is_wrong_with_a_task_before_it_trains(
    change: tuple[str, str], error: type[TrackedReplayError], message: str, store: Path
) -> None:
    refused(error, message, write_task(store, change), BEFORE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (method("__init__(self, config)", "raise RuntimeError('init')"), "line 24: RuntimeError: init"),
        (method("draw(self, x)", "return None"), "Own.draw: found NoneType; allowed: a uint8 array"),
        (method("draw(self, x)", "return x.numpy()"), "Own.draw: found float32 (5,); allowed: a uint8 array"),
        (method("source_files(self)", "from pathlib import Path; return (Path('/no'),)"), "source_files: found '/no'"),
    ],
)
def test_methods_that_are_wrong_before_it_trains(more: str, message: str, store: Path) -> None:
    refused(TaskError, message, write_task(store, more=more), BEFORE)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ([], method("per_example_loss(self, o, y)", "return o.mean()"), "per_example_loss: found shape ()"),
        ([], method("per_example_loss(self, o, y)", "return o[:, :1]"), "per_example_loss: found shape (16, 1)"),
        ([], method("per_example_loss(self, o, y)", "return None"), "failed: AttributeError"),
        ([], method("per_example_loss(self, o, y)", "raise RuntimeError('boo')"), "line 24: RuntimeError: boo"),
        ([], method("per_example_loss(self, o, y)", "return o[:, 0].log() * 0 - torch.inf"), "step 0: the loss is"),
        ([(MODEL, "m = nn.Linear(5, 3); m.more = nn.Parameter(torch.ones(2)); return m")], "", "the parameter 'more'"),
        (
            [(MODEL, "self.n = getattr(self, 'n', 0) + 1; m = nn.Linear(5, 3); m.bias.data += self.n; return m")],
            "",
            "calls gave two models (first",
        ),
        ([(MODEL, "return nn.Linear(6, 3)")], "", "cannot be multiplied (16x5 and 6x3)"),
        ([(MODEL, "return nn.Linear(5, 2)")], "", "index 2 is out of bounds"),
        ([(MODEL, "m = nn.Linear(5, 3); m.bias.data.fill_(torch.nan); return m")], "", "step 0: the loss is nan"),
    ],
)
def test_what_is_wrong_with_a_training(changes: list, more: str, message: str, store: Path) -> None:
    refused(TrackedReplayError, message, write_task(store, *changes, more=more), TRAINING)


@pytest.mark.parametrize("part", ["[:1]", "[1:]"])
def test_a_loss_of_another_length_than_the_batch_is_refused(part: str, store: Path) -> None:
    more = method("per_example_loss(self, o, y)", f"return super().per_example_loss(o, y){part}")
    more += f"\n{method('measurement(self, o, y)', 'return super().per_example_loss(o, y)')}"
    refused(TrackedReplayError, "per_example_loss: found shape", write_task(store, more=more), TRAINING)


@pytest.mark.parametrize(("part", "shape"), [("[:, None]", "(6, 1)"), ("[:1]", "(1,)"), (".mean()", "()")])
def test_a_measurement_of_another_shape_is_refused_when_it_is_first_taken(part: str, shape: str, store: Path) -> None:
    more = method("measurement(self, o, y)", f"return super().measurement(o, y){part}")
    refused(TaskError, f"measurement: found shape {shape}", write_task(store, more=more), TRAINING)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return super().measurement(o, y) + torch.inf", NumericalError, "target 0: its measurement after the last"),
        ("return o.argmax(1)", TaskError, "do not depend on the model"),
        ("return super().measurement(o - o.mean(0), y)", ReplayError, "alone and"),
    ],
)
def test_what_is_wrong_with_a_measurement(body: str, error: type, message: str, store: Path) -> None:
    refused(error, message, write_task(store, more=method("measurement(self, o, y)", body)), REPLAYING)


INSTANCE_NORM = (
    (NUMBERS, "torch.randn(count, 2, 3, 3, generator=generator) + labels[:, None, None, None]"),
    (
        MODEL,
        "return nn.Sequential(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), "
        "nn.Linear(16, 3))",
    ),
)
NO_STATISTICS = (
    INSTANCE_NORM[0],
    (
        MODEL,
        "return nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), "
        "nn.Linear(16, 3))",
    ),
)
COUNTING = """class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(5, 3)
                self.register_buffer("calls", torch.tensor(0.0))
            def forward(self, x):
                if self.training: self.calls += 1
                return self.body(x) * (1 + 0.1 * self.calls)
        return Net()"""
GHOST = """class Net(nn.BatchNorm1d):
            def forward(self, x):
                return super().forward(x) * (2 if self.training else 1)
        return nn.Sequential(Net(5), nn.Linear(5, 3))"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (INSTANCE_NORM, "step 3 changes the buffer '1.running_"),
        ([(MODEL, COUNTING)], "step 3 changes the buffer 'calls', which has no adjoint here"),
        (NO_STATISTICS, "a layer mixes examples in eval mode (BatchNorm without running statistics?)"),
    ],
)
def test_layers_without_an_adjoint(changes: list, message: str, store: Path) -> None:
    task = write_task(store, *changes)
    refused(ReplayError, message, task, REPLAYING, train__epochs=3)


def test_a_batch_norm_with_a_forward_pass_of_its_own_is_refused(store: Path) -> None:
    refused(ReplayError, "", write_task(store, (MODEL, GHOST)), REPLAYING)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"train__batch_size": 33}, ConfigError, "train.batch_size: found 33, which is more than the 32 training"),
        ({"data__train_examples": 33}, ConfigError, "data.train_examples: found 33; allowed: 0 (all) to 32"),
        ({"data__evaluation_examples": 7}, ConfigError, "data.evaluation_examples: found 7; allowed: 0 (all) to 6"),
        ({"data__train_examples": 15}, ConfigError, "found 16, which is more than the 15 training examples"),
        ({"train__device": "cuda:77"}, ConfigError, "train.device: found 'cuda:77', but torch "),
    ],
)
def test_a_config_that_does_not_fit_task_or_machine(config: dict, error: type, message: str, store: Path) -> None:
    refused(error, message, write_task(store), BEFORE, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train__lr": 1e30, "train__epochs": 30}, "the parameter '0.weight' holds NaN or Inf; lower train.lr"),
        ({"train__lr": 1e300}, "step 1: the parameter '0.weight' holds NaN or Inf"),
        ({"train__weight_decay": 1e300}, "step 1: the parameter '0.weight' holds NaN or Inf"),
        ({"train__lr": 1e30, "train__dtype": "float32"}, "the parameter '0.weight' holds NaN or Inf"),
    ],
)
def test_a_training_that_diverges_names_step_and_tensor(config: dict, message: str, store: Path) -> None:
    refused(NumericalError, message, write_task(store), TRAINING, **config)


@pytest.mark.parametrize("task", ["digits", "own"])
def test_a_batch_of_which_batch_norm_sees_one_value_is_refused(task: str, store: Path) -> None:
    norm = (MODEL, "return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))")
    config = {"train__batch_size": 1, "data__train_examples": 5, "data__evaluation_examples": 4}
    name = task if task == "digits" else write_task(store, norm)
    refused(
        ConfigError,
        "train.batch_size: found 1, of which a BatchNorm of the model gets a single",
        name,
        TRAINING,
        **config,
    )


def test_an_augmentation_that_the_data_do_not_take(store: Path) -> None:
    refused(ConfigError, "data.augmentation: found 'flip'", write_task(store), TRAINING, data__augmentation="flip")


def test_data_of_odd_types_are_fine(store: Path) -> None:
    for place, numbers in enumerate((f"({NUMBERS}).bfloat16()", f"({NUMBERS}) > 0", f"({NUMBERS}).requires_grad_()")):
        tr.magic(config=own_config(write_task(store, (NUMBERS, numbers), name=f"own{place}.py")))
    assert stages() == ["magic FINISHED"] * 3 + ["train FINISHED"] * 3


# What follows shares one recording: each test puts back what it damages.
RECORDED = tiny_config(train__epochs=2, record__every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    from stores import tracking_store

    folder = tmp_path_factory.mktemp("store")
    with tracking_store(folder, empty_database):
        yield tr.train(RECORDED)


@contextmanager
def changed(path: Path, how: str) -> Iterator[None]:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "made longer":
        path.write_bytes(content + b"\n")
    elif how == "made a folder":
        path.unlink()
        path.mkdir()
    else:
        place = {"first byte": 0, "middle byte": len(content) // 2, "last byte": len(content) - 1}[how]
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    yield
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)


HOW = ["first byte", "middle byte", "last byte", "truncated", "emptied", "made longer", "deleted", "made a folder"]


def artifacts(run_id: str) -> Path:
    return Path(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name",
    [
        "digests.json",
        "config/config.toml",
        "config/data.json",
        "trace/part-00000.parquet",
        "checkpoints/manifest.parquet",
        "checkpoints/step-000000.safetensors",
        "checkpoints/step-000002.safetensors",
        "checkpoints/step-000006.safetensors",
    ],
)
@pytest.mark.parametrize("mode", ["memory"])
def test_a_damaged_recording_is_refused_and_the_file_named(name: str, how: str, mode: str, trained: str) -> None:
    before = stages()
    with changed(artifacts(trained) / name, how), pytest.raises(RecordingError) as caught:
        tr.magic(trained, "0", overrides={"replay.mode": mode}, force=True)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300
    left = stages()
    assert not [stage for stage in left if stage.endswith("RUNNING")]
    assert left.count("magic FINISHED") == before.count("magic FINISHED")
    assert left.count("train FINISHED") == 1


def test_a_checkpoint_that_no_check_takes_up_is_found_by_the_replay(trained: str) -> None:
    path = artifacts(trained) / "checkpoints/step-000004.safetensors"
    for mode in ("stream", "memory"):
        before = stages().count("magic FAILED")
        with changed(path, "middle byte"), pytest.raises(RecordingError, match=r"step-000004\.safetensors is damaged"):
            tr.magic(trained, "0", overrides={"replay.mode": mode}, force=True)
        assert stages().count("magic FAILED") <= before + 1
    assert not [stage for stage in stages() if stage.endswith("RUNNING")]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["scores/influence.parquet", "digests.json"])
def test_damaged_scores_are_never_given_out(name: str, how: str, trained: str) -> None:
    magic_run = tr.magic(trained, "0")
    with changed(artifacts(magic_run) / name, how), pytest.raises(RecordingError, match=name):
        tr.load_scores(magic_run)
    assert tr.load_scores(magic_run).num_rows == 48


def test_a_changed_digest_tag_is_noticed(trained: str) -> None:
    client = MlflowClient()
    recorded = mlflow.get_run(trained).data.tags[names.DIGESTS]
    client.set_tag(trained, names.DIGESTS, "0" * 64)
    with pytest.raises(RecordingError, match=r"digests\.json is damaged"):
        tr.magic(trained, "0", force=True)
    client.delete_tag(trained, names.DIGESTS)
    with pytest.raises(RecordingError, match=r"has no tag tracked_replay\.digests"):
        tr.magic(trained, "0", force=True)
    client.set_tag(trained, names.DIGESTS, recorded)


@pytest.mark.parametrize(
    "targets", ["", " ", "10", "0-10", "3-1", "1,1", "0;0", "x", "-1", "1.5", "0-", "mean:", "0;;1"]
)
def test_targets_that_cannot_be_meant(targets: str, trained: str) -> None:
    before = stages()
    with pytest.raises(ConfigError, match=r"^targets: "):
        tr.magic(trained, targets)
    assert stages() == before


@pytest.mark.parametrize("targets", [1.5, None, ["a"], [[1]], [1.5], "9" * 5000])
def test_targets_of_another_type(targets: object, trained: str) -> None:
    with pytest.raises(ConfigError, match=r"^targets: "):
        tr.magic(trained, targets)  # type: ignore[arg-type]


def test_a_run_that_is_no_training(trained: str) -> None:
    magic_run = tr.magic(trained, "0")
    with pytest.raises(
        RunError, match=f"run {magic_run} is of stage 'magic'; allowed: a finished run of stage 'train'"
    ):
        tr.magic(magic_run, "0")
