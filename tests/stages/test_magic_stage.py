"""Stage ``magic`` under MLflow: reuse, lineage, and exact scores for models of many kinds."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from tiny import own_config, slope, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.config import Config
from tracked_replay.errors import ConfigError, DataError, ReplayError, RunError, TaskError
from tracked_replay.tasks import load_task
from tracked_replay.tracking import artifacts_of, names
from tracked_replay.training import set_up

CONFIG = tiny_config(train__epochs=2)


def stages() -> list[str]:
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return sorted(f"{run.data.tags[names.STAGE]} {run.info.status}" for run in runs)


def scores_of(run_id: str) -> np.ndarray:
    return tr.load_scores(run_id)["score"].to_numpy()


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.int64)


def test_magic_trains_where_nothing_matches_and_reuses_from_then_on(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "tracked_replay"):
        magic_run = tr.magic(config=CONFIG, targets="0-1")
        train_run = mlflow.get_run(magic_run).data.tags["tracked_replay.input.train_run_id"]
        assert mlflow.get_run(train_run).data.tags["mlflow.parentRunId"] == magic_run
        assert "reusing" not in caplog.text

        assert tr.magic(config=CONFIG, targets="0-1") == magic_run
        assert f"reusing training run {train_run}" in caplog.text
        assert f"reusing magic run {magic_run}" in caplog.text
    assert tr.magic(train_run, [0, 1]) == magic_run
    assert tr.magic(train_run, "0-1", overrides="replay.mode=stream", data_root="elsewhere") == magic_run
    assert tr.train(CONFIG) == train_run
    assert stages() == ["magic FINISHED", "train FINISHED"]

    other = tr.magic(config=CONFIG, targets="1")
    assert other != magic_run
    assert mlflow.get_run(other).data.tags["tracked_replay.input.train_run_id"] == train_run
    np.testing.assert_allclose(scores_of(other), scores_of(magic_run)[48:], rtol=1e-10)  # another number at once


def test_force_computes_the_same_bits_again(store: Path) -> None:
    first = tr.magic(config=CONFIG, targets="0;mean:all")
    replayed = tr.magic(mlflow.get_run(first).data.tags["tracked_replay.input.train_run_id"], "0;mean:all", force=True)
    both = tr.magic(config=CONFIG, targets="0;mean:all", force=True)
    assert stages() == ["magic FINISHED"] * 3 + ["train FINISHED"] * 2
    for again in (replayed, both):
        np.testing.assert_array_equal(bits(scores_of(again)), bits(scores_of(first)))
    for name in ("scores/influence.parquet", "scores/targets.json", "config/config.toml"):
        with artifacts_of(first)(name) as one, artifacts_of(both)(name) as other:
            assert one.read_bytes() == other.read_bytes()


def test_a_run_holds_scores_targets_labels_and_their_lineage(store: Path) -> None:
    train_run = tr.train(CONFIG)
    magic_run = tr.magic(train_run, "3,1;mean:0-4", overrides={"replay.per_step": True})
    run = mlflow.get_run(magic_run)
    assert run.data.tags["tracked_replay.input.train_run_id"] == train_run
    assert run.data.tags["tracked_replay.exact"] == "true"
    assert "mlflow.parentRunId" not in run.data.tags
    table = tr.load_scores(magic_run)
    assert table["target"].to_pylist() == [3] * 48 + [1] * 48 + [-1] * 48
    assert table["train_index"].to_pylist() == list(range(48)) * 3
    labels = load_task(CONFIG).train_examples().labels.tolist()
    assert table["label"].to_pylist() == labels * 3
    source = artifacts_of(magic_run)
    with source("scores/targets.json") as path:
        targets = json.loads(path.read_text())
    assert [target["name"] for target in targets] == ["3", "1", "mean:0-4"]
    assert targets[2]["indices"] == [0, 1, 2, 3, 4]
    with source("scores/per_step/part-00000.parquet") as path:
        steps = pq.read_table(path)
    total = np.zeros((3, 48))
    for target, indices, values in zip(
        *(steps[name].to_pylist() for name in ("target", "indices", "scores")), strict=True
    ):
        np.add.at(total[[3, 1, -1].index(target)], indices, values)
    np.testing.assert_allclose(total.reshape(-1), table["score"].to_numpy(), rtol=1e-12, atol=1e-15)


def test_targets_whose_names_begin_alike_get_figures_of_their_own(store: Path) -> None:
    long = "mean:" + ",".join(map(str, range(10)))
    run_id = tr.magic(config=CONFIG, targets=f"{long};mean:0,1,2,3,4,5,6,7,9,8")
    names_of = [item.path for item in MlflowClient().list_artifacts(run_id, "figures")]
    assert {"figures/target-combination-1-over-training.png", "figures/target-combination-2-over-training.png"} <= set(
        names_of
    )


def test_clipping_is_tagged_as_inexact_and_is_another_run(store: Path) -> None:
    exact = tr.magic(config=CONFIG)
    clipped = tr.magic(config=CONFIG.override({"replay.clip_gradient": True, "replay.clip_gradient_norm": 1e-3}))
    assert mlflow.get_run(clipped).data.tags["tracked_replay.exact"] == "false"
    assert mlflow.get_run(clipped).data.metrics["clip/steps_gradient_clipped"] == 6
    assert stages() == ["magic FINISHED", "magic FINISHED", "train FINISHED"]
    assert not np.array_equal(scores_of(exact), scores_of(clipped))


def test_a_recorded_run_keeps_its_config(store: Path) -> None:
    train_run = tr.train(CONFIG)
    for pairs in ({"train.lr": 0.1}, {"seed": 1}, {"data.train_examples": 3}, {"data.task": "digits"}):
        (name,) = pairs
        with pytest.raises(ConfigError, match=rf"^{name}: cannot be changed for the recorded run {train_run}"):
            tr.magic(train_run, "0", overrides=pairs)
    with pytest.raises(ConfigError, match="were both given"):
        tr.magic(train_run, "0", config=CONFIG)
    with pytest.raises(RunError, match="is of stage 'train'"):
        tr.load_scores(train_run)
    assert stages() == ["train FINISHED"]


def test_a_task_that_now_takes_other_steps_is_refused(store: Path) -> None:
    train_run = tr.train(own_config(write_task(store)))
    write_task(store, ("nn.Tanh()", "nn.ReLU()"))
    with pytest.raises(ReplayError, match="step 0: taken again from its checkpoint it leads to another state"):
        tr.magic(train_run, "0")
    write_task(store, more="def per_example_loss(self, o, y): return 1.1 * super().per_example_loss(o, y)")
    with pytest.raises(ReplayError, match="step 0: taken again"):
        tr.magic(train_run, "0")
    assert stages() == ["train FINISHED"]


@pytest.mark.parametrize(
    "change",
    [
        ("manual_seed(seed)", "manual_seed(seed + 1)"),
        ("+ labels[:, None]", "+ labels[:, None] * 1.0000001"),
        ("examples(32, 1)", "examples(33, 1)"),
        ("examples(6, 2)", "examples(5, 2)"),
        ('"c")', '"d")'),
    ],
)
def test_data_that_changed_since_are_refused(change: tuple[str, str], store: Path) -> None:
    train_run = tr.train(own_config(write_task(store)))
    write_task(store, change)
    with pytest.raises(DataError, match="the data differ from those of the training run"):
        tr.magic(train_run, "0")
    assert stages() == ["train FINISHED"]


def test_another_measurement_of_the_same_training_is_allowed_and_another_run(store: Path) -> None:
    train_run = tr.train(own_config(write_task(store)))
    loss = tr.magic(train_run, "0")
    write_task(store, more="def measurement(self, o, y): return -2 * self.per_example_loss(o, y)")
    other = tr.magic(train_run, "0")
    assert other != loss
    np.testing.assert_allclose(scores_of(other), -2 * scores_of(loss), rtol=1e-12)


IMAGES = ("torch.randn(count, 5, generator=generator) + labels[:, None]",
          "torch.randn(count, 2, 3, 3, generator=generator) + labels[:, None, None, None]")  # fmt: skip
MODEL = "return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))"


def model(text: str) -> tuple[str, str]:
    return (MODEL, text.replace("\n", "\n        "))


KINDS = {
    "dropout": [model("return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))")],
    "batch norm, plain average": [
        model("return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 3))")
    ],
    "batch norm without affine": [
        model("return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3))")
    ],
    "batch norm called twice": [
        model(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.a, self.n, self.b = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)\n"
            "        self.c = nn.Linear(4, 3)\n"
            "    def forward(self, x):\n"
            "        return self.c(torch.tanh(self.n(self.b(torch.tanh(self.n(self.a(x)))))))\n"
            "return Net()"
        )
    ],
    "batch norm, plain average, called twice": [
        model(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.a, self.n, self.b = nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4)\n"
            "        self.c = nn.Linear(4, 3)\n"
            "    def forward(self, x):\n"
            "        return self.c(torch.tanh(self.n(self.b(torch.tanh(self.n(self.a(x)))))))\n"
            "return Net()"
        )
    ],
    "attention": [
        model(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.into, self.out = nn.Linear(1, 4), nn.Linear(4, 3)\n"
            "        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)\n"
            "    def forward(self, x):\n"
            "        x = self.into(x[..., None])\n"
            "        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))\n"
            "return Net()"
        )
    ],
    "weight norm": [
        model(
            "from torch.nn.utils.parametrizations import weight_norm\n"
            "return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 3), dim=None))"
        )
    ],
    "group norm": [
        IMAGES,
        model(
            "return nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))"
        ),
    ],
    "feature maps that are viewed": [
        IMAGES,
        model(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.a, self.n, self.b = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Linear(16, 3)\n"
            "        self.g = nn.GELU('tanh')\n"
            "    def forward(self, x):\n"
            "        return self.b(self.g(self.n(self.a(x))).view(len(x), -1))\n"
            "return Net()"
        ),
    ],
    "dropout of feature maps": [
        IMAGES,
        model(
            "return nn.Sequential(nn.Conv2d(2, 4, 2), nn.Dropout(0.4), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), "
            "nn.Linear(16, 3))"
        ),
    ],
    "grouped and strided convolutions": [
        IMAGES,
        model(
            "return nn.Sequential(nn.Conv2d(2, 4, 2, stride=(2, 1), padding=1, groups=2), nn.GELU(), "
            "nn.Conv2d(4, 3, 2, dilation=(1, 2), bias=False), nn.BatchNorm2d(3), nn.AvgPool2d((1, 2)), nn.Flatten())"
        ),
    ],
    "frozen parameters": [
        model(
            "net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))\n"
            "net[0].weight.requires_grad_(False)\n"
            "net[1].weight.requires_grad_(False)\n"
            "return net"
        )
    ],
    "a scalar parameter": [
        model(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.body, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(0.7))\n"
            "    def forward(self, x):\n"
            "        return self.body(x) * self.scale\n"
            "return Net()"
        )
    ],
    "tied weights": [
        model(
            "net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))\n"
            "net[2].weight = net[0].weight\n"
            "return net"
        )
    ],
    "one layer under two names": [
        model("layer = nn.Linear(5, 5)\nreturn nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))")
    ],
    "a single tensor": [model("return nn.Linear(5, 3, bias=False)")],
    "a bare batch norm": [model("return nn.BatchNorm1d(5)"), ('("a", "b", "c")', '("a", "b", "c", "d", "e")')],
}


UNDER_TWO_NAMES = [
    model(
        "norm = nn.BatchNorm1d(4)\n"
        "return nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 3))"
    )
]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_slopes_of_real_trainings(kind: str, store: Path) -> None:
    assert_scores_are_slopes(store, KINDS[kind])


def test_scores_of_a_batch_norm_under_two_names_are_slopes(store: Path) -> None:
    assert_scores_are_slopes(store, UNDER_TWO_NAMES)


def test_a_long_label_leaves_the_description_its_links(store: Path) -> None:
    task = write_task(store, ('label_names = ("a", "b", "c")', 'label_names = ("a" * 10_000, "b\\nb" * 5_000, "c")'))
    description = mlflow.get_run(tr.magic(config=own_config(task), targets="0-3")).data.tags["mlflow.note.content"]
    assert len(description) < 8000
    assert "tracked-replay lds --magic-run-id" in description


CHECKPOINTED = model(
    "from torch.utils.checkpoint import checkpoint\n"
    "class Net(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.a, self.b = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)\n"
    "    def forward(self, x):\n"
    "        return self.b(checkpoint(self.a, x, use_reentrant=False))\n"
    "return Net()"
)


def test_activation_checkpointing_is_refused_before_it_trains_something_else(store: Path) -> None:
    # The forward pass that is repeated in the backward pass would see the initial parameters.
    with pytest.raises(TaskError, match=r"reads its own tensors in a step, .*torch\.utils\.checkpoint"):
        tr.magic(config=own_config(write_task(store, CHECKPOINTED)), targets="2")
    assert stages() == ["magic FAILED", "train FAILED"]


DETACHED = model(
    "class Net(nn.Linear):\n"
    "    def forward(self, x):\n"
    "        found = super().forward(x)\n"
    "        return found * found.detach().sigmoid()\n"
    "return Net(5, 3)"
)


def test_derivatives_are_held_against_finite_differences_before_a_replay(store: Path) -> None:
    run = mlflow.get_run(tr.magic(config=own_config(write_task(store)), targets="2"))
    assert 0 < run.data.metrics["checks/derivative_deviation"] < 1e-5
    assert "derivatives held against finite differences (" in run.data.tags["mlflow.note.content"]
    with pytest.raises(ReplayError, match=r"^step 2: its derivative and a finite difference"):
        tr.magic(config=own_config(write_task(store, DETACHED, name="detached.py")), targets="2")
    assert stages() == ["magic FAILED", "magic FINISHED", "train FINISHED", "train FINISHED"]


def test_what_cannot_be_held_against_them_is_said(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = write_task(store, model("return nn.Sequential(Float32(), nn.Linear(5, 3))"), name="float32.py")
    path = Path(task.removesuffix(":Own"))
    layer = "class Float32(nn.Module):\n    def forward(self, x):\n        return x @ torch.eye(5)\n\n\nclass Own("
    path.write_text(path.read_text().replace("class Own(", layer))
    run = mlflow.get_run(tr.magic(config=own_config(task, train__dtype="float32"), targets="2"))
    assert "checks/derivative_deviation" not in run.data.metrics
    assert (
        "derivatives not held against finite differences: the model does not run in"
        in (run.data.tags["mlflow.note.content"])
    )
    assert "derivatives could not be held against finite differences: the model does not run in float64" in caplog.text


def assert_scores_are_slopes(store: Path, changes: list[tuple[str, str]]) -> None:
    config = own_config(write_task(store, *changes), replay__mode="stream", record__every=3)
    run_id = tr.magic(config=config, targets="2,5")
    assert mlflow.get_run(run_id).data.params["replay_targets_at_once_used"] == "8"
    setup = set_up(config, load_task(config))
    found = scores_of(run_id)[: setup.data.num_train]
    examples = np.argsort(-np.abs(found))[:3]
    expected = np.array([slope(setup, int(example), 2) for example in examples])
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(found[examples], expected, rtol=1e-6)


def test_dropout_masks_differ_from_step_to_step_and_with_the_seed(store: Path) -> None:
    task = write_task(store, *KINDS["dropout"])
    runs = {
        seed: mlflow.get_run(tr.train(own_config(task, seed=seed))).data.metrics["epoch/train_loss"] for seed in (0, 1)
    }
    assert runs[0] != runs[1]
    setup = set_up(own_config(task), load_task(own_config(task)))
    first, batch = setup.take(setup.initial)
    again = setup.step(setup.initial, batch.inputs, batch.labels, [0.05, 0.05])
    assert torch.equal(first.loss, again.loss)


def test_config_of_a_magic_run_is_complete(store: Path) -> None:
    run_id = tr.magic(config=CONFIG, overrides="report.examples=3")
    with artifacts_of(run_id)("config/config.toml") as path:
        assert Config.from_toml(path.read_text()) == CONFIG.override({"report.examples": 3})
