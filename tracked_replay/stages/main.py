"""Stage ``main``: train, magic and lds under one parent run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tracked_replay import report
from tracked_replay.config import Config
from tracked_replay.recording import write_text
from tracked_replay.recording.recorder import CONFIG
from tracked_replay.replay import parse_targets, require_budget
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.influence_report import PAGE
from tracked_replay.stages.lds import checked_subsets, lds_stage
from tracked_replay.stages.magic import magic_stage
from tracked_replay.stages.parameters import LDS_TARGETS
from tracked_replay.stages.problem import Problem, publish, task_errors
from tracked_replay.stages.train import ACCURACY, SECTIONS, log_problem, train_stage
from tracked_replay.tracking import StageRun, names, stage_run, ui_path
from tracked_replay.training import set_up

LDS_METRICS = ("lds", "lds_low", "lds_high")


def run_main(config: Config, targets: str | int | Sequence[int] = LDS_TARGETS, *, force: bool = False) -> str:
    """Record a training, compute influence on the targets, and validate it.

    Args:
        config: what to train, replay and validate.
        targets: see :func:`~tracked_replay.replay.parse_targets`.
        force: compute all three even where finished runs hold them.

    Returns:
        The ID of the parent run; its children are the three stages, or, where one was reused, an input tag names it.
    """
    problem = Problem.load(config)
    chosen = parse_targets(targets, problem.data.num_evaluation)
    with task_errors(config):
        checked_subsets(problem)  # what is wrong with a later stage is said before the first
        require_budget(set_up(problem.config, problem.task, problem.data))
    sections = (*SECTIONS, "replay", "lds", "report")
    fingerprint = problem.fingerprint(names.MAIN, sections, {}, targets=[target.to_json_dict() for target in chosen])
    title = f"main · {problem.task.name} · seed {config.seed}"
    with stage_run(names.MAIN, fingerprint, title, {}) as run, tempfile.TemporaryDirectory() as folder:
        log_problem(problem, run)
        write_text(Path(folder) / CONFIG, config.to_toml())
        train_run = train_stage(problem, force=force).run_id
        run.tag({f"{names.INPUT}train_run_id": train_run})
        magic_run = magic_stage(problem, chosen, train_run, force=force, may_point=False).run_id
        run.tag({f"{names.INPUT}magic_run_id": magic_run})
        lds_run = lds_stage(problem, Influence.open(magic_run), force=force, may_point=False).run_id
        run.tag({f"{names.INPUT}lds_run_id": lds_run})
        found = _headline(train_run, lds_run)
        for name, value in found.items():
            run.metric(name, value)
        links = {"training": train_run, "influence": magic_run, "validation": lds_run}
        run.describe(_description(problem, len(chosen), found, links))
        publish(run, Path(folder))
        return run.run_id


def _headline(train_run: str, lds_run: str) -> dict[str, float]:
    """The numbers of the stages by which people sort, as far as there are any."""
    accuracies = StageRun(train_run).history(ACCURACY)
    found = {"evaluation_accuracy": accuracies, **{name: StageRun(lds_run).history(name) for name in LDS_METRICS}}
    return {name: history[max(history)] for name, history in found.items() if history}


def _description(problem: Problem, targets: int, found: Mapping[str, float], links: Mapping[str, str]) -> str:
    numbers = []
    if "lds" in found:
        numbers.append(f"**LDS {found['lds']:.3f}** [{found['lds_low']:.3f}, {found['lds_high']:.3f}]")
    if "evaluation_accuracy" in found:
        numbers.append(f"evaluation accuracy {found['evaluation_accuracy']:.1%}")
    lines = [
        f"{'; '.join(numbers) or 'Finished'}: a recorded training of {report.markdown_text(problem.task.name)}, the "
        f"influence of its {problem.data.num_train} training examples on {targets} target{'s' * (targets != 1)}, and "
        "how well that predicts retraining.\n",
        *(f"- {what}: [{run_id}]({ui_path(run_id)})" for what, run_id in links.items()),
        f"- to look at: [the report]({ui_path(links['validation'], PAGE)}), `{PAGE}` of the validation",
        f"- next, which training examples to doubt: `tracked-replay suspects --train-run-id {links['training']}`",
    ]
    return "\n".join(lines) + "\n"
