"""Stage ``compare`` of two ``magic`` runs: are their influence scores the same, and where do they differ most."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tracked_replay import report
from tracked_replay.compare import Difference
from tracked_replay.compare.facts import differences, flatten
from tracked_replay.compare.influence import InfluenceComparison, InfluenceTable, MovedExample
from tracked_replay.compare.influence import compare_influence as compare_tables
from tracked_replay.compare.pair import naming
from tracked_replay.errors import TrackedReplayError
from tracked_replay.recording import Recording, write_json, write_text
from tracked_replay.recording.files import write_bytes
from tracked_replay.stages.compare import CHECKED, make_output, output_errors
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.train import DATA, open_recording
from tracked_replay.tracking import StageRun, code_digest, fingerprint, names, stage_run, ui_path

logger = logging.getLogger(__name__)

COMPARISON = "compare/influence.json"
PAGE = "compare/influence.html"
FIGURE = "figures/influence-scatter.png"
TABLE = "tables/influence_moved.json"
COLUMNS = ("target", "moved_in", "train_index", "label", "label_name", "score_a", "score_b", "rank_a", "rank_b")
PICTURED_TARGETS = report.INFLUENCE_COMPARISON_TARGETS


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two runs.

    Attributes:
        influence: its scores.
        training: the recorded training that it replayed.
    """

    influence: Influence
    training: Recording

    @classmethod
    def open(cls, run_id: str, parameter: str) -> _Side:
        influence = Influence.open(run_id, parameter)
        return cls(influence, open_recording(influence.train_run_id))

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the training recorded about its data."""
        with naming(self.influence.train_run_id), self.training.open(DATA) as path:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found

    @cached_property
    def table(self) -> InfluenceTable:
        """Its scores. Raises RecordingError, NumericalError."""
        influence = self.influence
        with naming(influence.run_id):
            labels = influence.table["label"].to_numpy()[: influence.scores.shape[1]]
            return InfluenceTable(
                influence.run_id, self.data["fingerprint"], influence.targets, influence.scores, labels
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its scores, and how they were computed, by name."""
        with naming(self.influence.run_id):
            config = self.influence.config.flat()
        return config | {"code of the training": self.data["code"], "exact": self.influence.exact}

    def check_files(self) -> None:
        """Read every recorded file. Raises RecordingError."""
        recording = self.influence.recording
        with naming(self.influence.run_id):
            for name in recording.digests:
                with recording.open(name):
                    pass


class ComparedInfluence(NamedTuple):
    """What a comparison of two ``magic`` runs gives.

    Attributes:
        run_id: the ``compare`` run.
        comparison: what it found.
        label_names: a name a label.
    """

    run_id: str
    comparison: InfluenceComparison
    label_names: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 identical, 1 different, 2 incomparable."""
        return self.comparison.exit_code

    @property
    def text(self) -> str:
        """A short table for the terminal."""
        return report.influence_comparison_text(self.comparison, self.label_names)

    @property
    def next_command(self) -> str:
        """What to look at next: where the trainings part, if there are two."""
        found = self.comparison
        if found.training_a != found.training_b:
            return f"tracked-replay compare --run-a {found.training_a} --run-b {found.training_b}"
        return f"tracked-replay lds --magic-run-id {found.a}"


def run_compare_influence(
    run_a: str,
    run_b: str,
    *,
    check_files: bool = False,
    data_root: str | None = None,
    output: str | None = None,
) -> ComparedInfluence:
    """Compare the scores of two finished ``magic`` runs.

    Always computed anew, never reused: its purpose is to look now.

    Args:
        run_a: a run ID.
        run_b: likewise.
        check_files: whether every recorded file of both runs is read and checked first, not only those that are
            compared.
        data_root: where the data are now, for pictures of the examples that moved.
        output: folder that gets page, table and figure too.

    Raises:
        TrackedReplayError: one clear sentence about why they cannot be compared.
    """
    if output:
        make_output(output)
    sides = (_Side.open(run_a.strip(), "run_a"), _Side.open(run_b.strip(), "run_b"))
    runs = [side.influence.run_id for side in sides]
    inputs = dict(zip(("run_a", "run_b"), runs, strict=True))
    identity = fingerprint(names.COMPARE, {}, "", code_digest(), inputs)
    title = f"compare · influence · {runs[0][:8]} · {runs[1][:8]}"
    with (
        stage_run(names.COMPARE, identity, title, inputs) as run,
        tempfile.TemporaryDirectory(prefix="tracked-replay-compare-") as folder,
    ):
        for side in sides if check_files else ():
            side.check_files()
        comparison = _compare(*sides)
        if check_files:
            comparison = replace(comparison, summary=f"{comparison.summary} {CHECKED}")
        compared = ComparedInfluence(run.run_id, comparison, tuple(sides[0].data["label_names"]))
        figure = _figure(sides, comparison)
        pictures = _pictures(sides[0], comparison, data_root)
        links = {run_id: ui_path(run_id) for run_id in (*runs, comparison.training_a, comparison.training_b)}
        _write(Path(folder), compared, figure, pictures, links)
        _log(run, compared, links)
        publish(run, Path(folder))
    if output:
        with output_errors(output):
            _write(Path(output), compared, figure, pictures, {})
    return compared


def _compare(a: _Side, b: _Side) -> InfluenceComparison:
    found = compare_tables(a.table, b.table)
    if a.influence.run_id == b.influence.run_id:
        found = replace(found, summary=f"The same run was given twice. {found.summary}")
    return replace(
        found,
        training_a=a.influence.train_run_id,
        training_b=b.influence.train_run_id,
        training=_training(a, b),
        inputs=_inputs(a, b),
    )


def _training(a: _Side, b: _Side) -> str:
    """Whether what was replayed was the same."""
    if a.influence.train_run_id == b.influence.train_run_id:
        return "Both replayed the same training run."
    digests = []
    for side in (a, b):
        with naming(side.influence.train_run_id):
            digests.append(side.training.final.digest)
    if digests[0] == digests[1]:
        return "They replayed two training runs that end in the same state, bit for bit."
    return "They replayed two training runs that end in different states."


def _inputs(a: _Side, b: _Side) -> tuple[Difference, ...]:
    return differences(flatten(a.facts), flatten(b.facts))


def _shown(comparison: InfluenceComparison) -> list[MovedExample]:
    """Examples that the page shows."""
    differing = [target for target in comparison.targets if target.differing][:PICTURED_TARGETS]
    return [example for target in differing for example in (*target.moved_in_rank, *target.moved_in_score)]


def _pictures(side: _Side, comparison: InfluenceComparison, data_root: str | None) -> dict[int, np.ndarray]:
    """Pictures of the moved examples by training index; none where data or task are not here or not the recorded."""
    indices = sorted({example.train_index for example in _shown(comparison)})
    if not indices:
        return {}
    try:
        config = side.influence.config.override({"data.root": data_root} if data_root else {})
        problem = Problem.load(config)
        if problem.data_fingerprint != side.data["fingerprint"]:
            logger.info("no pictures of the examples: the data are not those of the training run")
            return {}
        with task_errors(config):
            return {index: problem.task.draw(problem.data.train.inputs[index].cpu()) for index in indices}
    except (TrackedReplayError, OSError) as error:
        logger.info("no pictures of the examples: %s", error)
        return {}


def _figure(sides: tuple[_Side, _Side], comparison: InfluenceComparison) -> bytes | None:
    """The scatter as PNG; nothing without a common target."""
    if not comparison.targets:
        return None
    a = _common(sides[0], [target.target_a for target in comparison.targets])
    b = _common(sides[1], [target.target_b for target in comparison.targets])
    return report.figure_png_bytes(report.influence_scatter_figure(comparison, a, b))


def _write(
    root: Path,
    compared: ComparedInfluence,
    figure: bytes | None,
    pictures: dict[int, np.ndarray],
    links: dict[str, str],
) -> None:
    """Write JSON, page and figure under a folder."""
    comparison = compared.comparison
    write_json(root / COMPARISON, comparison.to_json_dict())
    if figure is not None:
        write_bytes(root / FIGURE, figure)
    page = report.influence_comparison_html(comparison, figure, compared.label_names, pictures, links)
    write_text(root / PAGE, page)


def _common(side: _Side, ids: Sequence[int]) -> np.ndarray:
    """(targets, training examples) scores on the targets with some IDs."""
    places = {target.id: place for place, target in enumerate(side.table.targets)}
    return side.table.scores[[places[number] for number in ids]]


def _log(run: StageRun, compared: ComparedInfluence, links: dict[str, str]) -> None:
    comparison = compared.comparison
    run.tag({names.VERDICT: comparison.verdict})
    for name, value in (("spearman/mean", comparison.spearman), ("top20_overlap/mean", comparison.top_overlap)):
        if value is not None:
            run.metric(name, value)
    rows = _moved_rows(compared)
    if rows["target"]:
        run.table(rows, TABLE)
    run.describe(_description(compared, links, run.link(PAGE)))


def _description(compared: ComparedInfluence, links: Mapping[str, str], look: str) -> str:
    found = compared.comparison
    sides = [("A", found.a, found.training_a), ("B", found.b, found.training_b)]
    lines = [
        f"- {side}: [{name}]({links[name]}), of the training run [{training}]({links[training]})"
        for side, name, training in sides
    ]
    lines += [f"- to look at: {look} among the artifacts", f"- next: `{compared.next_command}`"]
    # The first lines are what MLflow shows before "Show more".
    head = f"**{report.influence_comparison_headline(found)}** {report.markdown_text(found.summary)}"
    return "\n\n".join([head, report.markdown_text(found.training), "\n".join(lines)]) + "\n"


def _moved_rows(compared: ComparedInfluence) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for target in compared.comparison.targets:
        for kind, examples in (("rank", target.moved_in_rank), ("score", target.moved_in_score)):
            for example in examples:
                label_name = compared.label_names[example.label]
                row = (target.name, kind, example.train_index, example.label, label_name, *example[2:])
                for column, value in zip(rows.values(), row, strict=True):
                    column.append(value)
    return rows


def compare_influence(
    run_a: str, run_b: str, *, check_files: bool = False, data_root: str | None = None
) -> InfluenceComparison:
    """Compare the influence scores of two finished ``magic`` runs on the targets that both have.

    Args:
        run_a: a run ID.
        run_b: likewise.
        check_files: whether every recorded file of both runs is read and checked first.
        data_root: where the data are now, for pictures of the examples that moved.

    Returns:
        The comparison; the MLflow run that holds it is logged. Its verdict is ``incomparable`` where the runs are of
        different data or have no target in common.

    Raises:
        TrackedReplayError: one clear sentence about why a run cannot be read.
    """
    return run_compare_influence(run_a, run_b, check_files=check_files, data_root=data_root).comparison
