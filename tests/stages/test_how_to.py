"""The how-tos: every command has the options it is written with, and the marked ones are run as they stand."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from stage_runs import command, runs_of
from test_docs import DOCS, PAGES, ROOT, block, text
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.cli import STAGES
from tracked_replay.stages.parameters import fields_of
from tracked_replay.tasks import TaskData, load_task

ONE_THREAD = "train.threads=1"  # two are slow where the tests share the cores
PLACEHOLDERS = ("train", "magic", "reproduce")  # TRAIN_RUN_ID is the ID of the newest run of stage train


def written_commands(content: str) -> list[str]:
    """Commands of this package in a page's code, each on one line."""
    code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", content, re.DOTALL)
    lines = [line for pair in code for line in "".join(pair).replace("\\\n", " ").splitlines()]
    return [match[0] for line in lines for match in re.finditer(r"(tracked-replay|mlflow run \. -e) [^|&;#]*", line)]


def run_marked(page: str, marker: str, changes: str = "") -> str:
    """Run the commands of a marked block, the trainings among them with changes to the config; what they print."""
    said = ""
    for line in block(page, f"run: {marker}").splitlines():
        for stage in PLACEHOLDERS:
            written = f"\\b{stage.upper()}_RUN_ID\\b"
            if re.search(written, line):
                line = re.sub(written, runs_of(stage)[-1].info.run_id, line)
        program, *arguments = shlex.split(line)
        assert program == "tracked-replay"
        if changes and arguments[0] == "train":
            given = [arguments.pop() for _ in arguments[1:]][:1]  # the value of --set, the only option there
            arguments += ["--set", ",".join([*given, changes])]
        code, out, err = command(*arguments)
        assert code == 0, (line, err)
        said += out + err
    return said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_written_command_has_a_stage_and_options_that_there_are(page: Path) -> None:
    for written in written_commands(page.read_text(encoding="utf-8")):
        words = re.sub(r"[…$()\"']", " ", written).split()
        projects = words[0] == "mlflow"
        stage = words[4 if projects else 1]
        if re.fullmatch(r"NAME|-.*", stage):
            continue
        assert stage in STAGES, written
        if projects:
            given = {after.partition("=")[0] for word, after in pairwise(words) if word == "-P"} - {"parameter"}
        else:
            given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        assert given <= {*fields_of(STAGES[stage][0]), "help"}, written


@pytest.mark.parametrize("page", ["remote-server.md", "find-bad-labels.md"])
def test_a_command_that_needs_the_clone_says_so(page: str) -> None:
    content = text(f"how-to/{page}")
    places = [found.start() for found in re.finditer(r"^mlflow run \. ", content, re.MULTILINE)]
    assert places
    for place in places:
        before, line = content[:place].rpartition("```bash\n")[0], content[place:].split("\n")[0]
        paragraph = before.rstrip().rpartition("\n\n")[2]
        assert "in a clone of this repository" in paragraph + line, line


def test_from_a_clone_to_a_picture(store: Path) -> None:
    run_marked("how-to/start-here.md", "start here 1", ONE_THREAD)
    run_marked("how-to/start-here.md", "start here 2")
    (magic_run,) = runs_of("magic")
    assert magic_run.data.tags["mlflow.runName"] == "magic · digits · 3 targets"
    assert "magic · digits · 3 targets" in text("how-to/start-here.md")
    root = Path(magic_run.info.artifact_uri.removeprefix("file://"))
    for name in ("report/index.html", "figures/target-0-extremes.png", "tables/top_examples.json"):
        assert (root / name).is_file()
        assert f"`{name}`" in text("how-to/start-here.md")
    said = run_marked("how-to/start-here.md", "start here 3")
    assert len(re.findall(r"predicted [\d.]+, actual [\d.]+", said)) == 3
    run_marked("how-to/start-here.md", "start here 4")
    assert len(runs_of("retraining")) == 9
    assert runs_of("lds")[-1].data.metrics["lds"] > 0


def test_budgets_say_what_they_keep(store: Path) -> None:
    page = text("how-to/big-runs.md")
    kept = re.findall(r"keeping .*", run_marked("how-to/big-runs.md", "big runs 1", ONE_THREAD))
    assert kept, "no plan was printed"
    assert kept[0] in page
    plan = re.findall(r"replaying .*", run_marked("how-to/big-runs.md", "big runs 2"))
    assert re.sub(r", in about .*", "", plan[0]) in page
    root = Path(runs_of("train")[0].info.artifact_uri.removeprefix("file://"))
    assert sum(path.stat().st_size for part in ("checkpoints", "rng") for path in (root / part).iterdir()) <= 8_000_000


def test_the_gate_passes_on_a_training_that_repeats(store: Path) -> None:
    assert "identical" in run_marked("how-to/ci-gate.md", "gate 1")
    assert "the certificate holds" in run_marked("how-to/ci-gate.md", "gate 2")
    run_id = runs_of("train")[0].info.run_id
    code = block("how-to/ci-gate.md", "run: expected")
    exec(code, {"RUN_ID": run_id})  # noqa: S102
    with pytest.raises(tr.TrackedReplayError, match="seed"):
        exec(code.replace("seed=0", "seed=1"), {"RUN_ID": run_id})  # noqa: S102


def test_the_workflow_is_yaml_whose_steps_are_the_commands_of_the_page() -> None:
    workflow = yaml.safe_load(block("how-to/ci-gate.md", "workflow"))
    (job,) = workflow["jobs"].values()
    script = "\n".join(step.get("run", "") for step in job["steps"])
    for line in block("how-to/ci-gate.md", "run: gate 1").splitlines():
        assert line.replace("TRAIN_RUN_ID", '"$RUN"') in script
    pattern = re.search(r"s/\^(.*?): //p", script)
    assert pattern is not None
    assert f'_closing("{pattern[1]}"' in (ROOT / "tracked_replay/cli.py").read_text(encoding="utf-8")


def test_the_final_model_is_loaded_and_a_version_leads_to_its_run(store: Path) -> None:
    run_id = tr.train(tiny_config(train__epochs=2))
    space: dict = {"RUN_ID": run_id}
    page = "decisions/0023-no-registered-model.md"
    exec(block(page, "run: final model"), space)  # noqa: S102
    config = space["recording"].config
    data = TaskData(load_task(config), config)
    batch = data.evaluation_batch(torch.arange(data.num_evaluation))
    model = space["model"].to(batch.inputs.dtype).eval()
    right = (model(batch.inputs).argmax(1) == batch.labels).double().mean().item()
    assert right == pytest.approx(mlflow.get_run(run_id).data.metrics["epoch/evaluation_accuracy"])
    exec(block(page, "run: version"), space)  # noqa: S102
    assert MlflowClient().get_model_version("digits", "1").run_id == run_id


def test_the_index_names_every_how_to() -> None:
    for page in (DOCS / "how-to").glob("*.md"):
        assert f"(how-to/{page.name})" in text("index.md"), page.name
