"""The page of influence scores as an artifact: what it says is what the run's other files say."""

from __future__ import annotations

import base64
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import mlflow
import numpy as np
import pytest
import safetensors.torch
import torch
from stage_runs import folder_of, table_of
from tiny import TinyTask, own_config, tiny_config, write_task

import tracked_replay as tr
from tracked_replay.recording.files import file_sha256
from tracked_replay.replay import PerStepWriter, Target, curves
from tracked_replay.replay.traversal import StepScores
from tracked_replay.stages import influence_report
from tracked_replay.tasks import load_task

CONFIG = tiny_config(train__epochs=2)
PAGE = "report/index.html"


class Shown(NamedTuple):
    """A training example on the page."""

    index: int
    score: float
    words: str
    steps: str


class Page(HTMLParser):
    """What a page says, target by target."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self.source = (folder_of(run_id) / PAGE).read_text(encoding="utf-8")
        self.examples: dict[str, list[Shown]] = {}
        sections = re.findall(r'<section class="target" id="target-([^"]+)"(.*?)</section>', self.source, re.S)
        self.about = {key: plain(f"<{content}") for key, content in sections}
        self._target, self._words, self._data = "", "", False
        self.feed(self.source)
        self.words = plain(self.source.split("</style>")[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "section":
            self._target = given["id"].removeprefix("target-") if given.get("class") == "target" else ""
        if given.get("role") == "img":
            self._words = given.get("aria-label", "")
        if tag == "data":
            shown = Shown(int(given["data-index"]), float(given["value"]), self._words, "")
            self.examples.setdefault(self._target, []).append(shown)

    def handle_data(self, data: str) -> None:
        if self._target and re.fullmatch(r"steps [\d,]+ to [\d,]+", data):
            examples = self.examples[self._target]
            examples[-1] = examples[-1]._replace(steps=data)

    def pixels(self, name: str) -> np.ndarray:
        """A picture of the page, (H, W, 3)."""
        (data,) = re.findall(rf"^\.{name}\{{background-image:url\(data:image/png;base64,([^)]*)\)", self.source, re.M)
        return np.round(255 * matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")[:, :, :3])


def plain(html: str) -> str:
    """The words of a piece of a page."""
    inline = re.sub(r"</?(strong|bdi)>", "", html)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", inline)).split())


def test_the_page_of_a_run_shows_the_strongest_of_its_scores(store: Path) -> None:
    run_id = tr.magic(config=CONFIG, targets="0,3;mean:0-7", overrides={"replay.per_step": True, "report.examples": 5})
    page = Page(run_id)
    table = table_of(run_id, "scores/influence.parquet").to_pandas()
    steps = table_of(run_id, "scores/per_step/part-00000.parquet").to_pandas().set_index("target")
    assert list(page.examples) == ["0", "3", "combination-1"]
    for key, target in (("0", 0), ("3", 3), ("combination-1", -1)):
        scores = table[table["target"] == target].set_index("train_index")["score"].sort_values()
        helps, harms = scores[scores < 0][:5], scores[scores > 0][::-1][:5]
        shown = page.examples[key]
        assert [(one.index, one.score) for one in shown] == [*helps.items(), *harms.items()]
        labels = table[table["target"] == target].set_index("train_index")["label"]
        for place, one in enumerate(shown):
            assert one.words.startswith(f"training example {one.index}, label {'abc'[labels[one.index]]}, score ")
            assert one.words.endswith(": helps" if place < len(helps) else ": harms")
            held = [row.step for row in steps.loc[target].itertuples() if one.index in row.indices]
            assert one.steps == f"steps {min(held)} to {max(held)}"
    assert "Mean over 8 evaluation examples: mean:0-7" in page.about["combination-1"]
    assert "and 2 more" in page.about["combination-1"]


def test_the_page_says_what_the_trained_model_says(store: Path) -> None:
    run_id = tr.magic(config=CONFIG, targets="all")
    page, root = Page(run_id), folder_of(run_id)
    train_run = mlflow.get_run(run_id).data.tags["tracked_replay.input.train_run_id"]
    tensors = safetensors.torch.load_file(folder_of(train_run) / "checkpoints/step-000006.safetensors")
    model = TinyTask.__new__(TinyTask).model().double().eval()
    model.load_state_dict({name.split("/", 1)[1]: value for name, value in tensors.items() if "momentum" not in name})
    examples = TinyTask.__new__(TinyTask).evaluation_examples()
    with torch.no_grad():
        probabilities = model(examples.inputs.double()).softmax(1)
    measurements = {row["target"]: row["measurement"] for row in json.loads((root / "scores/targets.json").read_text())}
    for index, label in enumerate(examples.labels.tolist()):
        said = int(probabilities[index].argmax())
        percent = f"{100 * probabilities[index, said]:.1f} %"
        about = page.about[str(index)]
        verdict = "right" if said == label else "wrong"
        assert f"The model says {'abc'[said]} (probability {percent}), and is {verdict}." in about
        assert f"Its loss is {measurements[index]:#.3g}." in about
    share = 100 * float((probabilities.argmax(1) == examples.labels).double().mean())
    assert f"is right on {share:.3g} % of the evaluation examples" in page.words


def test_the_pictures_on_the_page_are_those_of_the_task(store: Path) -> None:
    page = Page(tr.magic(config=CONFIG, targets="3"))
    task = load_task(CONFIG)
    example = page.examples["3"][0].index
    for name, inputs in (
        (f"t{example}", task.train_examples().inputs[example]),
        ("e3", task.evaluation_examples().inputs[3]),
    ):
        np.testing.assert_array_equal(page.pixels(name)[:, :, 0], task.draw(inputs))


def test_the_page_has_its_digest_lineage_seed_and_the_command_that_validates(store: Path) -> None:
    run_id = tr.magic(config=CONFIG)
    page, root = Page(run_id), folder_of(run_id)
    assert json.loads((root / "digests.json").read_text())[PAGE] == file_sha256(root / PAGE)
    train_run = mlflow.get_run(run_id).data.tags["tracked_replay.input.train_run_id"]
    for said in (
        run_id,
        train_run,
        "Master seed 0",
        "6 steps, 2 epochs, batches of 16, sgd, float64",
        torch.__version__,
    ):
        assert said in page.words, said
    assert "Not validated when this was written. A validation" in page.words
    assert f"tracked-replay lds --magic-run-id {run_id}" in page.words
    assert "Exact" in page.words
    assert 'href="http' not in page.source
    assert str(store) not in page.source


def test_a_page_of_clipped_scores_does_not_call_them_exact(store: Path) -> None:
    clipped = CONFIG.override({"replay.clip_gradient": True, "replay.clip_gradient_norm": 1e-3})
    words = Page(tr.magic(config=clipped)).words
    assert "Not exact" in words
    assert "false (clipping was on)" in words


def test_only_the_first_of_many_targets_are_shown(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_report, "SHOWN_TARGETS", 2)
    page = Page(tr.magic(config=CONFIG, targets="4,2,7"))
    assert list(page.examples) == ["4", "2"]
    assert "The first 2 of 3 targets; the scores of all are in scores/influence.parquet." in page.words


def test_the_page_of_a_validation_says_what_its_summary_says(store: Path) -> None:
    magic_run = tr.magic(config=CONFIG, targets="0;mean:all")
    changes = {"lds.subsets": 4, "lds.drop": "0.1,0.2", "lds.metasmoothness": True}
    run_id = tr.lds(magic_run, overrides=changes)
    page = Page(run_id)
    summary = json.loads((folder_of(run_id) / "lds/summary.json").read_text())
    first = next(row for row in summary["correlations"] if row["method"] == "magic")
    assert first["drop"] == 0.1
    assert (
        "Retraining without a random 10 % of the examples 4 times, the scores ranked the outcomes with correlation "
        f"{said(first['lds'])} ({said(first['low'])} to {said(first['high'])}, 95 % interval)."
    ) in page.words
    for row, share in zip(summary["correlations"], ("10 %",) * 4 + ("20 %",) * 4, strict=True):
        assert f"{share} {said(row['lds'])} {said(row['low'])} to {said(row['high'])} 4" in page.words
    assert f"Metasmoothness {summary['metasmoothness']:.2f}" in page.words
    assert "Not validated" not in page.words
    assert "Validation run " + run_id in page.words
    assert magic_run in page.words
    magic_page = Page(magic_run)
    for key, one in zip(("0", "combination-1"), first["targets"], strict=True):
        assert f"Rank correlation {said(one['spearman'])}." in page.about[key]
        assert [e[:3] for e in page.examples[key]] == [e[:3] for e in magic_page.examples[key]]
    assert page.source.count("<circle") == 2 * 4


def said(value: float) -> str:
    """A correlation as the package writes it everywhere."""
    text = f"{abs(value):.3f}" if abs(value) >= 0.99 else f"{abs(value):.2f}"
    return f"−{text}" if value < 0 and float(text) else text


def test_a_task_without_images_and_with_a_measurement_of_its_own_gets_a_page(store: Path) -> None:
    task = write_task(
        store,
        ('label_names = ("a", "b", "c")', 'label_names = ("<script>alert(1)</script>", "b" * 10_000, "\\u202ec")'),
        more="""
            def measurement(self, outputs, labels):
                return outputs[:, 0]
        """,
    )
    page = Page(tr.magic(config=own_config(task), targets="0-2"))
    assert list(page.examples) == ["0", "1", "2"]
    assert page.pixels("e0").shape == (32, 16, 3)
    assert page.source.count("<script>") == 1
    assert "\u202e" not in page.source
    assert "b" * 400 not in page.source
    assert "(10,000 characters in all)" in page.words
    assert "These raise it most" in page.words
    assert "Its measurement is" in page.words


def test_outputs_that_are_not_one_a_class_make_no_prediction(store: Path) -> None:
    task = write_task(
        store,
        ("nn.Linear(4, 3))", "nn.Linear(4, 5))"),
    )
    words = Page(tr.magic(config=own_config(task), targets="0-1")).words
    assert "The model says" not in words
    assert "Its loss is" in words


@pytest.mark.parametrize(
    ("hint", "url"),
    [
        ("http://host:5000/#/experiments/1/runs/x", "http://host:5000/#/experiments/1/runs/x"),
        ("https://someone:***@host/#/experiments/1/runs/x", "https://host/#/experiments/1/runs/x"),
        ("mlflow ui --backend-store-uri sqlite:///mlflow.db  then  http://127.0.0.1:5000/#/x", None),
    ],
)
def test_links_lead_to_a_server_without_its_password(hint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_report, "ui_hint", lambda run_id: hint)
    assert influence_report._url("x") == url


def test_courses_of_several_targets_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    targets = [Target.single(4), Target.mean([0, 1], "mean:0-1"), Target.single(7)]
    writer = PerStepWriter(tmp_path, targets)
    for step in reversed(range(250)):
        writer.add(StepScores(step, rng.integers(0, 12, 6), rng.normal(size=(3, 6))))
    writer.flush()
    examples = {4: np.array([3, 11, 0]), -1: np.array([5]), 8: np.array([1])}
    found = influence_report.courses(tmp_path, examples, 250)
    for target in targets[:2]:
        expected = curves(tmp_path, target, examples[target.id].tolist(), 250)
        np.testing.assert_allclose(found[target.id], expected, rtol=1e-12, atol=1e-15)
        assert np.ptp(expected) > 1
    assert not found[8].any()
