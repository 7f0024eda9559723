"""Stage ``compare``: are recorded runs, or checkpoint files, the same, and where do they first part."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from tracked_replay import report
from tracked_replay.compare import (
    Comparison,
    StateSource,
    Tolerance,
    Unavailable,
    checkpoint_states,
    compare_paths,
    compare_recordings,
    retrained_states,
)
from tracked_replay.compare.pair import naming
from tracked_replay.compare.runs import require_whole
from tracked_replay.errors import ConfigError, RunError, TrackedReplayError
from tracked_replay.progress import progress
from tracked_replay.recording import Recording, write_json, write_text
from tracked_replay.stages.magic import recorded_setup
from tracked_replay.stages.problem import Problem, publish
from tracked_replay.stages.train import open_recording, save_figure
from tracked_replay.tracking import StageRun, code_digest, fingerprint, names, resolve, stage_of, stage_run, ui_path
from tracked_replay.training import State

logger = logging.getLogger(__name__)

COMPARISON = "compare/comparison.json"
PAGE = "compare/comparison.html"
MATRIX = "compare/matrix.json"
MATRIX_PAGE = "compare/matrix.html"
MOST_RUNS = 20
SIDES = ascii_uppercase[:MOST_RUNS]
DESCRIBED = 10  # pairs in the description
CHECKED = "Every recorded file was read and is undamaged."
UNREAD = "All digests of states agree; the checkpoint files themselves were not read (check_files reads them)."
SAME_RUN = "The same run was given twice; it is identical to itself"
RUN_ID = re.compile(r"[0-9a-f]{32}")


class Compared(NamedTuple):
    """What a comparison of two or more sides gives.

    Attributes:
        run_id: the ``compare`` run; ``None`` where files were compared.
        names: what was compared.
        comparisons: by the places of their two sides in ``names``.
    """

    run_id: str | None
    names: tuple[str, ...]
    comparisons: dict[tuple[int, int], Comparison]

    @property
    def exit_code(self) -> int:
        """The largest of all comparisons: 0 identical, 1 different, 2 incomparable."""
        return max(comparison.exit_code for comparison in self.comparisons.values())

    @property
    def text(self) -> str:
        """A short table for the terminal."""
        if len(self.names) == 2:
            return report.comparison_text(self.comparisons[0, 1])
        return report.comparison_matrix_text(self.names, *matrix(self))


def matrix(compared: Compared) -> tuple[list[list[str]], list[list[int | None]]]:
    """Verdicts and first divergent steps, a row and a column a side."""
    count = len(compared.names)
    verdicts = [["identical"] * count for _ in range(count)]
    steps: list[list[int | None]] = [[None] * count for _ in range(count)]
    for (row, column), comparison in compared.comparisons.items():
        for one, other in ((row, column), (column, row)):
            verdicts[one][other] = comparison.verdict
            steps[one][other] = comparison.first_divergent_step
    return verdicts, steps


def run_compare(
    run_a: str,
    run_b: str,
    *,
    max_ulp: int = 0,
    ignore: Sequence[str] = (),
    check_files: bool = False,
    data_root: str | None = None,
    output: str | None = None,
) -> Compared:
    """Compare two or more finished ``train`` runs, or two checkpoint files or folders.

    Always computed anew, never reused: its purpose is to look now.

    Args:
        run_a: a run ID, or the path of a ``.safetensors`` file or of a folder of them.
        run_b: likewise; several run IDs joined by commas compare each with each.
        max_ulp: see :class:`~tracked_replay.compare.Tolerance`.
        ignore: likewise.
        check_files: whether every recorded file is read and checked first; files of paths always are.
        data_root: where the data are now, for steps that have to be taken again between two checkpoints.
        output: folder that gets page, table and figure too; needed for files, which make no run.

    Raises:
        TrackedReplayError: one clear sentence about why they cannot be compared.
    """
    tolerance = Tolerance(max_ulp, tuple(ignore))
    sides = [run_a.strip(), *_split(run_b)]
    if not sides[0] or len(sides) < 2:
        raise ConfigError("run_a, run_b: two sides are needed; allowed: run IDs, or paths of checkpoint files")
    if len(sides) > MOST_RUNS:
        raise ConfigError(f"run_b: found {len(sides) - 1} runs; allowed: at most {MOST_RUNS - 1}")
    paths = [_is_path(side) for side in sides]
    if any(paths) and not (all(paths) and len(sides) == 2):
        raise ConfigError(f"run_a, run_b: found {run_a!r} and {run_b!r}; allowed: run IDs only, or two paths")
    if output:
        make_output(output)
    if any(paths):
        compared = Compared(None, tuple(sides), {(0, 1): compare_paths(Path(sides[0]), Path(sides[1]), tolerance)})
    else:
        compared = _compare_runs(sides, tolerance, check_files, data_root)
    if output:
        with output_errors(output):
            write_comparison(Path(output), compared, {})
    return compared


def make_output(output: str) -> None:
    """Make the folder that gets a comparison too. Raises ConfigError where that is not possible."""
    with output_errors(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def output_errors(output: str) -> Iterator[None]:
    """Say of a file that cannot be written that it is the output folder that has to be another one."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename not in (None, output) else ""
        raise ConfigError(
            f"output: found {output!r}, which cannot be written ({error.strerror or error}{where}); allowed: a folder "
            f"that can be made and written to"
        ) from None


def _split(text: str) -> list[str]:
    """What commas join; a path may have some of its own."""
    if os.path.exists(text):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_path(side: str) -> bool:
    return not RUN_ID.fullmatch(side) and (os.sep in side or side.endswith(".safetensors") or os.path.exists(side))


def is_influence(run_a: str) -> bool:
    """Whether the first side of a comparison is a run of stage ``magic``, so that scores are to be compared."""
    side = run_a.strip()
    if not side or _is_path(side):
        return False
    try:
        return stage_of(side, "run_a") == names.MAGIC
    except RunError:
        return False  # run_compare says what is wrong with it


def _compare_runs(sides: Sequence[str], tolerance: Tolerance, check_files: bool, data_root: str | None) -> Compared:
    runs = [
        str(resolve(side, names.TRAIN, "run_a" if place == 0 else "run_b").info.run_id)
        for place, side in enumerate(sides)
    ]
    inputs = {f"run_{chr(ord('a') + place)}": run_id for place, run_id in enumerate(runs)}
    extra = {"max_ulp": tolerance.max_ulp, "ignore": list(tolerance.ignore)}
    identity = fingerprint(names.COMPARE, {}, "", code_digest(), inputs, **extra)
    title = f"compare · {len(runs)} runs" if len(runs) > 2 else f"compare · {runs[0][:8]} · {runs[1][:8]}"
    recordings = {run_id: open_recording(run_id) for run_id in runs}
    with stage_run(names.COMPARE, identity, title, inputs) as run:
        if check_files:
            for run_id, recording in progress(list(recordings.items()), len(recordings), "check files", "run"):
                with naming(run_id):
                    require_whole(recording)
        pairs = list(combinations(range(len(runs)), 2))
        comparisons = {}
        for row, column in progress(pairs, len(pairs), "compare", "pair"):
            a, b = runs[row], runs[column]
            found = compare_two(recordings[a], recordings[b], (a, b), tolerance, data_root)
            comparisons[row, column] = _noted(found, check_files)
        compared = Compared(run.run_id, tuple(runs), comparisons)
        log_comparison(run, compared)
        return compared


def compare_two(
    a: Recording,
    b: Recording,
    runs: tuple[str, str],
    tolerance: Tolerance,
    data_root: str | None = None,
) -> Comparison:
    """Compare two recordings; steps between two checkpoints are taken again where that is needed and possible here."""
    if runs[0] == runs[1]:
        summary = f"{SAME_RUN}, and nothing was compared."
        return Comparison(*runs, "identical", summary, tolerance, steps_a=a.trace.steps, steps_b=b.trace.steps)
    sources = (_states(a, data_root), _states(b, data_root))
    return compare_recordings(a, b, runs, tolerance, sources)


def _noted(found: Comparison, check_files: bool) -> Comparison:
    """Say of runs whose digests all agree whether their checkpoints were read."""
    if found.a == found.b:
        return replace(found, summary=f"{SAME_RUN}. {CHECKED}") if check_files else found
    agree = found.verdict == "identical" and not any(row.column == "state_digest" for row in found.trace)
    if not agree:
        return found
    return replace(found, summary=f"{found.summary} {CHECKED if check_files else UNREAD}")


def _states(recording: Recording, data_root: str | None) -> StateSource:
    """States from checkpoints; the setup for those between them is only made when the first is asked for."""
    kept = checkpoint_states(recording)
    made: list[StateSource] = []

    def state(step: int) -> State | Unavailable:
        found = kept(step)
        if not isinstance(found, Unavailable):
            return found
        if not made:
            try:
                changes = {"data.root": data_root} if data_root else {}
                problem = Problem.load(recording.config.override(changes))
                made.append(retrained_states(recording, recorded_setup(problem, recording)))
            except (TrackedReplayError, OSError) as error:
                reason = f"state {step} cannot be retrained here: {error}"
                made.append(lambda _: Unavailable(reason))
        return made[0](step)

    return state


def log_comparison(
    run: StageRun, compared: Compared, more: Mapping[str, str] | None = None, *, next_command: str = ""
) -> None:
    """Log pages, tables and figure to a run.

    Args:
        run: the run.
        compared: what was found.
        more: further text files by path.
        next_command: what the description ends with; to reproduce the first run where it is empty.
    """
    links = {run_id: ui_path(run_id) for run_id in compared.names}
    verdicts = sorted({comparison.verdict for comparison in compared.comparisons.values()})
    run.tag({names.VERDICT: ", ".join(verdicts)})
    if len(compared.names) == 2:
        comparison = compared.comparisons[0, 1]
        if comparison.first_divergent_step is not None:
            run.metric("first_divergent_step", comparison.first_divergent_step)
        run.metric("tensors/differing", sum(not tensor.equal for tensor in comparison.tensors))
    next_command = next_command or f"tracked-replay reproduce --run-id {compared.names[0]}"
    look = run.link(PAGE if len(compared.names) == 2 else MATRIX_PAGE)
    run.describe(_description(compared, links, look, next_command))
    with tempfile.TemporaryDirectory(prefix="tracked-replay-compare-") as folder:
        root = Path(folder)
        write_comparison(root, compared, links)
        for name, content in (more or {}).items():
            write_text(root / name, content)
        publish(run, root)


def _description(compared: Compared, links: Mapping[str, str], look: str, next_command: str) -> str:
    sides = [f"- {side}: [{name}]({links[name]})" for side, name in zip(SIDES, compared.names, strict=False)]
    look = f"- to look at: {look} among the artifacts"
    first = [*_pair(compared.comparisons[0, 1])] if len(sides) == 2 else [*_pairs(compared)]
    # The first lines are what MLflow shows before "Show more".
    return "\n\n".join([*first, "\n".join([*sides, look, f"- next: `{next_command}`"])]) + "\n"


def _pair(comparison: Comparison) -> Iterator[str]:
    yield f"**{report.comparison_headline(comparison)}** {report.markdown_text(comparison.summary)}"
    if comparison.causes:
        cause = comparison.causes[0]
        yield report.markdown_text(f"Likely cause: {cause.name}: {cause.text}")


def _pairs(compared: Compared) -> Iterator[str]:
    """Of several runs: how many pairs are the same, and what is said of the first that are not."""
    found = compared.comparisons
    same = sum(comparison.verdict == "identical" for comparison in found.values())
    yield f"**{same} of {len(found)} pairs of runs are identical.**"
    others = [(places, comparison) for places, comparison in found.items() if comparison.verdict != "identical"]
    for (row, column), comparison in others[:DESCRIBED]:
        yield f"{SIDES[row]} and {SIDES[column]}: {report.markdown_text(comparison.summary)}"


def write_comparison(root: Path, compared: Compared, links: dict[str, str]) -> None:
    """Write JSON, page and figure of a comparison under a folder."""
    if len(compared.names) == 2:
        _write_pair(root, "comparison", compared.comparisons[0, 1], links)
        return
    verdicts, steps = matrix(compared)
    write_json(root / MATRIX, {"runs": list(compared.names), "verdicts": verdicts, "first_divergent_steps": steps})
    write_text(root / MATRIX_PAGE, report.comparison_matrix_html(compared.names, verdicts, steps, links))
    for (row, column), comparison in compared.comparisons.items():
        _write_pair(root, f"{row + 1}-{column + 1}", comparison, links)


def _write_pair(root: Path, name: str, comparison: Comparison, links: dict[str, str]) -> None:
    write_json(root / f"compare/{name}.json", comparison.to_json_dict())
    picture = None
    if comparison.drift.steps:
        figure = report.comparison_figure(comparison)
        picture = report.figure_png_bytes(figure)
        save_figure(root, name, report.comparison_figure(comparison))
    write_text(root / f"compare/{name}.html", report.comparison_html(comparison, picture, links))


def compare(
    run_a: str,
    run_b: str,
    *,
    max_ulp: int = 0,
    ignore: Sequence[str] = (),
    check_files: bool = False,
    data_root: str | None = None,
) -> Comparison:
    """Compare two finished ``train`` runs (or checkpoint files or folders) bit by bit.

    Args:
        run_a: a run ID or a path.
        run_b: likewise.
        max_ulp: tensor elements and losses at most this many representable numbers apart count as equal.
        ignore: tensor name patterns or aspects that do not count; see :class:`~tracked_replay.compare.Tolerance`.
        check_files: whether every recorded file is read and checked first, so that damage is found where all digests
            agree too.
        data_root: where the data are now.

    Returns:
        The comparison; the MLflow run that holds it is logged.

    Raises:
        TrackedReplayError: one clear sentence about why they cannot be compared.
    """
    if "," in run_b:
        raise RunError(f"run_b: found {run_b!r}; allowed: one run ID; the command `compare` takes several")
    compared = run_compare(run_a, run_b, max_ulp=max_ulp, ignore=ignore, check_files=check_files, data_root=data_root)
    return compared.comparisons[0, 1]
