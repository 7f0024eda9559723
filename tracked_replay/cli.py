"""Command line: one command a stage, generated from the stage's parameters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tracked_replay.errors import ConfigError, TrackedReplayError
from tracked_replay.stages.parameters import (
    MagicParameters,
    ShowConfigParameters,
    StageParameters,
    TrainParameters,
    parse,
)

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
LINES_OF_CAUSE = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tracked-replay")
def cli() -> None:
    """Train once under MLflow; then ask exact questions about the training data by run ID."""


def _show_config(parameters: ShowConfigParameters) -> None:
    from tracked_replay.stages.show_config import describe

    click.echo(describe(parameters.config()), nl=False)


def _train(parameters: TrainParameters) -> None:
    config = parameters.config()
    from tracked_replay.stages.train import run_train

    run_id = run_train(config, force=parameters.force)
    _closing("training run", run_id, f"tracked-replay magic --train-run-id {run_id} --targets 0-7")


def _magic(parameters: MagicParameters) -> None:
    overrides = parameters.overrides()
    config = None if parameters.train_run_id else parameters.config()
    from tracked_replay.stages.magic import run_magic

    if parameters.train_run_id and parameters.seed:
        raise ConfigError(
            f"seed: found {parameters.seed!r}, but the recorded run {parameters.train_run_id} has its own; leave it empty"
        )
    run_id = run_magic(
        parameters.train_run_id or None,
        parameters.targets,
        config=config,
        overrides=overrides,
        data_root=parameters.data_root or None,
        force=parameters.force,
    )
    _closing("influence run", run_id, f"python -c \"import tracked_replay as tr; print(tr.load_scores('{run_id}'))\"")


STAGES: dict[str, tuple[type[StageParameters], Callable[[Any], None]]] = {
    "train": (TrainParameters, _train),
    "magic": (MagicParameters, _magic),
    "show_config": (ShowConfigParameters, _show_config),
}


def _closing(what: str, run_id: str, next_command: str) -> None:
    from tracked_replay.tracking import ui_command

    click.echo(f"{what}: {run_id}")
    click.echo(f"look at it:  {ui_command(run_id)}")
    click.echo(f"next:        {next_command}")


def _command(name: str, model: type[StageParameters], run: Callable[[Any], None]) -> click.Command:
    options: list[click.Parameter] = []
    example = [f"tracked-replay {name}"]
    for field, info in model.model_fields.items():
        option = "--" + field.replace("_", "-")
        # Also with underscores, as in MLproject, so that a parameter copied from there works.
        declarations = [field, *dict.fromkeys([option, f"--{field}"])]
        if info.examples and field in ("targets", "set"):
            example.append(f"{option} {info.examples[0]}")
        if info.annotation is bool:
            options.append(
                click.Option(declarations, help=info.description, is_flag=False, flag_value="true", default="false", metavar="[true|false]")
            )
        else:
            shown = bool(info.default)
            options.append(click.Option(declarations, help=info.description, default=info.default, show_default=shown))

    def callback(**values: object) -> None:
        parameters = parse(model, values)
        _configure_logging(parameters)
        run(parameters)

    text = f"{model.__doc__}\n\n    Example: {' '.join(example)}"
    return click.Command(name, params=options, callback=callback, help=text, short_help=(model.__doc__ or "").split("\n")[0])


for _name, (_model, _run) in STAGES.items():
    cli.add_command(_command(_name, _model, _run))


def _configure_logging(parameters: StageParameters) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if parameters.log_file:
        try:
            Path(parameters.log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(parameters.log_file, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"log_file: {parameters.log_file!r} cannot be written: {error}") from None
    logger = logging.getLogger("tracked_replay")
    logger.setLevel(parameters.log_level)
    logger.handlers.clear()
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exits 1 with one sentence on a user's error, 130 when interrupted."""
    try:
        cli.main(args=arguments, prog_name="tracked-replay", standalone_mode=False)
    except TrackedReplayError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; the run was closed as KILLED", err=True)
        sys.exit(130)
