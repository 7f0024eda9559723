"""The documentation says what the code does: names, paths, links and examples."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.cli import STAGES
from tracked_replay.config import field_names, preset_names
from tracked_replay.tracking import names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FORBIDDEN = ("robust", "production-ready", "enhanced", "state-of-the-art", "seamless")
MADE_BY_MLFLOW = "images/"
# A part of an artifact's path that differs between runs, and how docs/formats.md writes it.
VARYING = (
    (r"step-\d{6}\.", "step-NNNNNN."),
    (r"part-\d{5}\.", "part-NNNNN."),
    (r"^figures/target-.+-(extremes|over-training)\.png$", r"figures/target-NAME-\1.png"),
    (r"^table_images/train-\d+\.", "table_images/train-N."),
    (r"^config/task/.+", "config/task/"),
    (r"^figures/lds-scatter-[\d.]+\.png$", "figures/lds-scatter-SHARE.png"),
    (r"^(compare|figures)/\d+-\d+\.", r"\1/M-N."),
    (rf"^{MADE_BY_MLFLOW}.+", MADE_BY_MLFLOW),
)


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def block(page: str, marker: str) -> str:
    """The fenced block after an HTML comment."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", text(page), re.DOTALL)
    assert found, f"docs/{page} has no block marked {marker!r}"
    return found[1]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script prints when it is run in this process, where the tracking store is set."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def test_the_reference_is_what_its_script_makes() -> None:
    assert text("reference.md") == generator().reference(), "run: python docs/make_reference.py"


def test_every_entry_point_parameter_field_and_tag_is_in_the_reference() -> None:
    reference = text("reference.md")
    tags = {value for key, value in vars(names).items() if key.isupper() and str(value).startswith(names.PREFIX)}
    parameters = {field for model, _ in STAGES.values() for field in model.model_fields}
    for name in (*STAGES, *parameters, *field_names(), *(tags - {names.PREFIX})):
        assert f"`{name}`" in reference, name
    for preset in preset_names():
        assert f" {preset} " in reference


def test_every_public_name_is_documented() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in tr.__all__:
        if name != "__version__":
            assert name in everything, name


def test_every_dependency_has_a_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    page = text("decisions/0001-dependencies.md")
    for requirement in (*project["dependencies"], *extras):
        name = re.split(r"[<>=!~ \[]", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", page), name


def test_every_artifact_of_a_run_is_in_the_formats(store: Path) -> None:
    config = tiny_config(train__epochs=1, record__pixels=True, replay__per_step=True)
    train_run = tr.train(config)
    magic_run = tr.magic(train_run, "0;mean:all", overrides="replay.per_step=true")
    for run_id in (train_run, magic_run):
        assert "digests.json" in all_files(run_id)
        require_documented(run_id)


def test_every_artifact_and_column_of_a_validation_is_in_the_formats(store: Path) -> None:
    from tracked_replay.stages.counterfactual import run_counterfactual
    from tracked_replay.stages.main import run_main
    from tracked_replay.stages.verify import run_verify

    changes = {"lds__subsets": 3, "lds__drop": "0.1,0.2", "lds__metasmoothness": True, "lds__keep_states": True}
    main_run = run_main(tiny_config(train__epochs=2, **changes), "0;mean:all")
    inputs = tags_of(main_run)
    train_run, magic_run, lds_run = (inputs[f"{names.INPUT}{name}_run_id"] for name in ("train", "magic", "lds"))
    counterfactual_run = run_counterfactual("", remove="harmful:2@mean:all", magic_run_id=magic_run)
    retrainings = children(lds_run, names.RETRAINING)
    assert len(retrainings) == 6
    assert len(children(counterfactual_run, names.RETRAINING)) == 1
    columns = {
        lds_run: [f"lds/{name}.parquet" for name in ("subsets", "outcomes", "predictions", "validation_losses")],
        retrainings[0]: ["lds/measurements.parquet"],
        counterfactual_run: ["counterfactual/weights.parquet", "counterfactual/outcomes.parquet"],
    }
    for run_id in (*columns, run_verify(train_run), main_run):
        require_documented(run_id)
        tables = [path for path in all_files(run_id) if path.endswith(".parquet")]
        assert sorted(tables) == sorted(columns.get(run_id, []))
        for path in tables:
            assert documented_columns(f"`{path}`") == columns_of(run_id, path), path


def test_every_artifact_and_key_of_a_comparison_is_in_the_formats(store: Path) -> None:
    from tracked_replay.stages.compare import COMPARISON, run_compare
    from tracked_replay.stages.reproduce import CERTIFICATE, run_reproduce

    one, two, three = (tr.train(tiny_config(train__epochs=1, seed=seed)) for seed in range(3))
    pair, several = run_compare(one, two).run_id, run_compare(one, f"{two},{three}").run_id
    reproduced = run_reproduce(one).run_id
    for run_id in (pair, several, reproduced):
        assert run_id is not None
        require_documented(run_id)
    for run_id, name in ((pair, COMPARISON), (reproduced, CERTIFICATE)):
        section = text("formats.md").split(f"### `{name}`\n")[1].split("\n#")[0]
        for key in keys_of(json.loads(artifact(run_id, name).read_text(encoding="utf-8"))):
            assert f"`{key}`" in section, (name, key)


def keys_of(content: object) -> set[str]:
    """Names in a JSON file, those inside lists too."""
    if isinstance(content, list):
        return set().union(*map(keys_of, content))
    return set(content).union(*map(keys_of, content.values())) if isinstance(content, dict) else set()


def artifact(run_id: str | None, name: str) -> Path:
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def require_documented(run_id: str) -> None:
    """Check that a run's artifact paths, metrics and tags stand in the documentation."""
    from mlflow.tracking import MlflowClient

    formats = text("formats.md")
    for path in all_files(run_id):
        documented = path
        for pattern, written in VARYING:
            documented = re.sub(pattern, written, documented)
        assert f"`{documented}`" in formats, path
    for metric in MlflowClient().get_run(run_id).data.metrics:
        # MLflow's own are only there where a run takes long enough.
        assert metric.startswith("system/") or f"`{metric}`" in formats, metric
    for tag in tags_of(run_id):
        if tag.startswith(names.PREFIX):
            written = re.sub(r"(?<=\.run_)[c-t]$", "b", tag)  # of a comparison of many runs
            assert f"`{written}`" in text("reference.md"), tag


def tags_of(run_id: str) -> dict[str, str]:
    from mlflow.tracking import MlflowClient

    return dict(MlflowClient().get_run(run_id).data.tags)


def children(run_id: str, stage: str) -> list[str]:
    """Run IDs of a run's children of a stage."""
    from mlflow.tracking import MlflowClient

    experiment = MlflowClient().get_run(run_id).info.experiment_id
    wanted = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`{names.STAGE}` = '{stage}'"
    return [str(run.info.run_id) for run in MlflowClient().search_runs([experiment], wanted)]


def columns_of(run_id: str, path: str) -> list[str]:
    """Columns of a Parquet file among a run's artifacts."""
    import mlflow
    import pyarrow.parquet as pq

    return list(pq.read_schema(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path)).names)


def all_files(run_id: str, folder: str | None = None) -> list[str]:
    from mlflow.tracking import MlflowClient

    found: list[str] = []
    for item in MlflowClient().list_artifacts(run_id, folder):
        found += all_files(run_id, item.path) if item.is_dir else [item.path]
    return found


def test_the_columns_of_every_table_are_in_the_formats() -> None:
    from tracked_replay.recording.checkpoints import MANIFEST_SCHEMA
    from tracked_replay.recording.trace import SCHEMA
    from tracked_replay.replay.scores import INFLUENCE_SCHEMA, PER_STEP_SCHEMA

    for heading, schema in (
        ("`trace/part-NNNNN.parquet`", SCHEMA),
        ("`checkpoints/manifest.parquet`", MANIFEST_SCHEMA),
        ("`scores/influence.parquet`", INFLUENCE_SCHEMA),
        ("`scores/per_step/part-NNNNN.parquet`", PER_STEP_SCHEMA),
    ):
        assert documented_columns(heading)[: len(schema)] == schema.names, heading


def documented_columns(heading: str) -> list[str]:
    """Names in the first column of the table under a heading of docs/formats.md."""
    section = text("formats.md").split(f"### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that headings get: lower case, no punctuation, dashes for spaces."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    headings = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_relative_link_is_dead(page: Path) -> None:
    content = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", content):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_word_that_says_nothing(page: Path) -> None:
    content = page.read_text(encoding="utf-8").lower()
    assert [word for word in FORBIDDEN if word in content] == []


def test_every_decision_is_listed_and_says_context_choice_and_cost() -> None:
    pages = sorted((DOCS / "decisions").glob("0*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert f"({page.name})" in text("decisions/README.md")
        for part in ("**Context.**", "**Choice.**", "**Cost.**"):
            assert part in content, (page.name, part)


def test_the_readme_marks_the_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert '<!-- test command -->\n```bash\npip install ".[test]" && python -m pytest -n 2\n```\n' in readme


def test_the_example_of_buffers_prints_what_the_page_says(tmp_path: Path) -> None:
    script = tmp_path / "buffers.py"
    script.write_text(block("how-it-works.md", "run: buffers"), encoding="utf-8")
    # A process of its own, because it changes torch's default type.
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout == block("how-it-works.md", "output: buffers")


def test_the_task_of_the_how_to_trains_and_replays(store: Path) -> None:
    path = store / "wine.py"
    path.write_text(block("how-to/own-data.md", "file: wine.py"), encoding="utf-8")
    changes = {"data.task": "wine.py:Wine", "train.batch_size": 35, "train.epochs": 2, "train.threads": 1}
    train_run = tr.train(tr.Config.resolve(overrides=changes))
    scores = tr.load_scores(tr.magic(train_run, targets="0-1;mean:all"))
    assert scores.num_rows == 3 * 140
    assert scores.column_names == ["target", "train_index", "label", "score"]
    assert any(scores["score"].to_pylist())


def test_the_loop_of_the_how_to_ends_at_the_recorded_bits(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = tr.train(tr.Config.resolve(overrides="train.epochs=2"))
    script = store / "check.py"
    script.write_text(block("how-to/check-it-yourself.md", "file: check.py"), encoding="utf-8")
    said = printed(script, run_id, monkeypatch=monkeypatch)
    assert said.strip().endswith("equal bit for bit")
    assert said in text("how-to/check-it-yourself.md")
