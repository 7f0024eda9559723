"""Command line: one command a stage, generated from the stage's parameters."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from tracked_replay import __version__
from tracked_replay.config import parse_overrides
from tracked_replay.errors import ConfigError, ReplayError, TrackedReplayError
from tracked_replay.stages.parameters import (
    CleanParameters,
    CommonParameters,
    CompareParameters,
    CounterfactualParameters,
    LdsParameters,
    MagicParameters,
    MainParameters,
    ReproduceParameters,
    ShowConfigParameters,
    StageParameters,
    SuspectsParameters,
    TrainParameters,
    VerifyParameters,
    fields_of,
    parse,
)

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
# MLflow tells at INFO what a user of these commands did not ask (system metrics, tables), and prints a URL of its own.
QUIET_MLFLOW = {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

MADE_BY_MLFLOW = "MLFLOW_RUN_ID"  # set by `mlflow run`; asked for here so that MLflow need not be loaded for it
WITHOUT_STORE = ("show_config", "compare", "verify")  # commands that may do without runs
LONGEST = 1500  # characters of an error
FIRST_WORDS, PRINTED = 60, 6000  # characters in the name and the description of a run that no stage took over

logger = logging.getLogger("tracked_replay")


class _Group(click.Group):
    """Takes a command's name with dashes too, as options are."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name.replace("-", "_"))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Train once under MLflow; then ask exact questions about the training data by run ID."""


class _Said(NamedTuple):
    """What a command without a run of its own has to say, for the run that `mlflow run` made.

    Attributes:
        about: what it was about, for the run's name.
        text: what it printed.
    """

    about: str
    text: str


class _Verdict(SystemExit):
    """Ends a command whose exit code is a verdict.

    Attributes:
        said: see :class:`_Said`; ``None`` where a run holds the result.
    """

    def __init__(self, code: int, said: _Said | None = None) -> None:
        super().__init__(code)
        self.said = said


def _say(about: str, text: str) -> _Said:
    click.echo(text.rstrip("\n"))
    return _Said(about, text)


def _show_config(parameters: ShowConfigParameters) -> _Said:
    from tracked_replay.stages.show_config import describe

    return _say(Path(parameters.preset).name, describe(parameters.config()))


def _train(parameters: TrainParameters) -> None:
    config = parameters.config()
    from tracked_replay.stages.train import run_train

    run_id = run_train(config, force=parameters.force)
    _closing("training run", run_id, f"tracked-replay magic --train-run-id {run_id} --targets 0-7")


def _magic(parameters: MagicParameters) -> None:
    overrides = parameters.overrides()
    config = None if parameters.train_run_id else parameters.config()
    from tracked_replay.stages.magic import run_magic

    _require_no_seed(parameters, parameters.train_run_id)
    run_id = run_magic(
        parameters.train_run_id or None,
        parameters.targets,
        config=config,
        overrides=overrides,
        data_root=parameters.data_root or None,
        force=parameters.force,
    )
    from tracked_replay.stages.influence import headlines

    for line in headlines(run_id):
        click.echo(line)
    _closing("magic run", run_id, f"tracked-replay lds --magic-run-id {run_id}")


def _require_no_seed(parameters: StageParameters, recorded_run: str) -> None:
    if recorded_run and parameters.seed:
        raise ConfigError(
            f"seed: found {parameters.seed!r}, but the recorded run {recorded_run} has its own; allowed: leave it empty"
        )


def _lds(parameters: LdsParameters) -> None:
    given = parameters.magic_run_id or parameters.train_run_id
    _require_no_seed(parameters, given)
    overrides = parameters.overrides()
    config = None if given else parameters.config()
    from tracked_replay.stages.lds import run_lds

    run_id = run_lds(
        parameters.magic_run_id or None,
        train_run_id=parameters.train_run_id or None,
        targets=parameters.targets,
        config=config,
        overrides=overrides,
        data_root=parameters.data_root or None,
        force=parameters.force,
    )
    from tracked_replay.tracking import input_by_id

    _show_lds(run_id)
    training = input_by_id(run_id, "train_run_id")
    _closing("LDS run", run_id, f"tracked-replay suspects --train-run-id {training}")


def _show_lds(run_id: str) -> None:
    from tracked_replay.stages.lds_result import headlines

    for line in headlines(run_id):
        click.echo(line)


def _main(parameters: MainParameters) -> None:
    for name in ("train_run_id", "magic_run_id"):
        if getattr(parameters, name):
            raise ConfigError(f"{name}: found {getattr(parameters, name)!r}; main makes its own runs; use lds or magic")
    config = parameters.config().override(parameters.overrides())
    from tracked_replay.stages.main import run_main

    run_id = run_main(config, parameters.targets, force=parameters.force)
    from tracked_replay.tracking import input_by_id

    _show_lds(input_by_id(run_id, "lds_run_id"))
    training = input_by_id(run_id, "train_run_id")
    _closing("main run", run_id, f"tracked-replay suspects --train-run-id {training}")


def _verify(parameters: VerifyParameters) -> _Said | None:
    _require_only(parameters)
    if parameters.iterations:
        return _self_test(parameters)
    if parameters.certificate:
        from tracked_replay.stages.reproduce import run_check_certificate

        certificate, held = run_check_certificate(parameters.certificate, parameters.train_run_id)
        lines = [*(f"holds: {name}" for name in held), f"the certificate holds; its verdict: {certificate.verdict}"]
        return _say("certificate", "\n".join(lines))
    if not parameters.train_run_id:
        raise ConfigError(
            "train_run_id: nothing was given; allowed: a finished run of stage 'train', or certificate, or iterations"
        )
    from tracked_replay.stages.verify import run_verify

    run_id = run_verify(
        parameters.train_run_id,
        overrides=parse_overrides(parameters.set),
        data_root=parameters.data_root or None,
        seed=_whole("seed", parameters.seed, least=0) if parameters.seed else None,
    )
    click.echo("all checks passed")
    _closing("verify run", run_id, f"tracked-replay magic --train-run-id {parameters.train_run_id} --targets 0-7")
    return None


def _require_only(parameters: VerifyParameters) -> None:
    """Refuse what the asked kind of check does not look at: it would seem to have been checked."""
    if parameters.iterations:
        kind, read = "iterations", {"iterations", "certificate", "train_run_id"}
    elif parameters.certificate:
        kind, read = "certificate", {"certificate", "train_run_id"}
    else:
        kind, read = "train_run_id", {"train_run_id", "seed", "set", "data_root"}
    for name, field in fields_of(VerifyParameters).items():
        given = getattr(parameters, name)
        if name in read or name in CommonParameters.model_fields or given == field.default:
            continue
        raise ConfigError(f"{name}: found {given!r}, which a check of {kind} does not look at; allowed: leave it out")


def _self_test(parameters: VerifyParameters) -> _Said:
    if parameters.train_run_id or parameters.certificate:
        raise ConfigError("iterations: is about this machine alone; allowed: without train_run_id and certificate")
    iterations = _whole("iterations", parameters.iterations, least=2)
    from tracked_replay.determinism import verify_reproducibility

    found = verify_reproducibility(iterations)
    if not found:
        raise ReplayError(f"this machine does not repeat a training bit for bit: {found.difference}")
    return _say(
        f"{found.iterations} iterations",
        f"{found.iterations} iterations and a fresh process agree bit for bit "
        f"({', '.join(found.devices)}, {found.threads} threads, {found.seconds:.1f} s)",
    )


def _whole(name: str, text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(f"{name}: found {text!r}; allowed: integer >= {least}")
    return value


def _compare(parameters: CompareParameters) -> None:
    max_ulp = _whole("max_ulp", parameters.max_ulp, least=0)
    from tracked_replay.stages.compare import is_influence, run_compare

    if is_influence(parameters.run_a):
        _compare_influence(parameters, max_ulp)
        return
    compared = run_compare(
        parameters.run_a,
        parameters.run_b,
        max_ulp=max_ulp,
        ignore=[part.strip() for part in parameters.ignore.split(",") if part.strip()],
        check_files=parameters.check_files,
        data_root=parameters.data_root or None,
        output=parameters.output or None,
    )
    said = _say(" · ".join(Path(name).name for name in compared.names), compared.text)
    if compared.run_id is None:
        raise _Verdict(compared.exit_code, said)
    _closing("compare run", compared.run_id, f"tracked-replay reproduce --run-id {compared.names[0]}")
    raise _Verdict(compared.exit_code)


def _compare_influence(parameters: CompareParameters, max_ulp: int) -> None:
    for name, given in (("max_ulp", max_ulp), ("ignore", parameters.ignore)):
        if given:
            raise ConfigError(
                f"{name}: found {given!r}, but run_a is of stage 'magic', whose scores are compared bit for bit; "
                f"allowed: leave it out"
            )
    from tracked_replay.stages.compare_influence import run_compare_influence

    compared = run_compare_influence(
        parameters.run_a,
        parameters.run_b,
        check_files=parameters.check_files,
        data_root=parameters.data_root or None,
        output=parameters.output or None,
    )
    click.echo(compared.text)
    _closing("compare run", compared.run_id, compared.next_command)
    raise _Verdict(compared.exit_code)


def _reproduce(parameters: ReproduceParameters) -> None:
    from tracked_replay.stages.reproduce import run_reproduce

    reproduced = run_reproduce(parameters.run_id, data_root=parameters.data_root or None)
    click.echo(reproduced.compared.text)
    _closing("reproduce run", reproduced.run_id, f"tracked-replay verify --certificate {reproduced.run_id}")
    raise _Verdict(reproduced.compared.exit_code)


def _clean(parameters: CleanParameters) -> _Said:
    from tracked_replay.stages.clean import describe, run_clean

    cleaned = run_clean(parameters.run_id, parameters.what, dry_run=parameters.dry_run, force=parameters.force)
    return _say(cleaned.run_id[:8], describe(cleaned))


def _counterfactual(parameters: CounterfactualParameters) -> None:
    if parameters.set:
        raise ConfigError(f"set: found {parameters.set!r}; allowed: empty, since the run is retrained as recorded")
    _require_no_seed(parameters, parameters.magic_run_id or parameters.train_run_id)
    from tracked_replay.stages.counterfactual import headlines, run_counterfactual

    run_id = run_counterfactual(
        parameters.train_run_id,
        remove=parameters.remove,
        weights=parameters.weights,
        targets=parameters.targets,
        magic_run_id=parameters.magic_run_id,
        data_root=parameters.data_root,
        force=parameters.force,
    )
    for line in headlines(run_id):
        click.echo(line)
    from tracked_replay.tracking import input_by_id

    _closing("counterfactual run", run_id, f"tracked-replay lds --magic-run-id {input_by_id(run_id, 'magic_run_id')}")


def _suspects(parameters: SuspectsParameters) -> None:
    _require_no_seed(parameters, parameters.train_run_id)
    checkpoints = _whole("checkpoints", parameters.checkpoints, least=1)
    try:
        share = float(parameters.share)
    except ValueError:
        raise ConfigError(f"share: found {parameters.share!r}; allowed: above 0 and below 1") from None
    config = None if parameters.train_run_id else parameters.config()
    from tracked_replay.stages.suspects import run_suspects
    from tracked_replay.stages.suspects_result import describe, next_command, read_suspects

    run_id = run_suspects(
        parameters.train_run_id or None,
        share=share,
        checkpoints=checkpoints,
        config=config,
        overrides=parameters.set if parameters.train_run_id else "",
        data_root=parameters.data_root or None,
        force=parameters.force,
    )
    found = read_suspects(run_id)
    click.echo(describe(found))
    from tracked_replay.tracking import input_by_id

    then = next_command(input_by_id(run_id, "train_run_id"), found.table["train_index"].to_pylist())
    _closing("suspects run", run_id, then)


@contextmanager
def _code_2_for_errors() -> Iterator[None]:
    """Exit code 2 for whatever keeps a command from a verdict: its exit code 1 means "different"."""
    try:
        yield
    except Exception as error:
        if not _is_users(error):
            traceback.print_exc()
            sys.exit(2)
        logger.debug("where the error comes from:", exc_info=True)
        _fail(_sentence(error), 2)


@contextmanager
def _run_of_mlflow(command: str) -> Iterator[list[_Said]]:
    """Under ``mlflow run``: name and describe the run that MLflow made, where no stage takes it over.

    Args:
        command: its name.

    Yields:
        A list for what the command has to say.
    """
    made = os.environ.get(MADE_BY_MLFLOW)
    said: list[_Said] = []
    try:
        yield said
    except _Verdict as verdict:
        if verdict.said is not None:
            _close_run_of_mlflow(made, command, said=verdict.said)
        raise
    except BaseException as error:
        _close_run_of_mlflow(made, command, error=error)
        raise
    if said:
        _close_run_of_mlflow(made, command, said=said[0])


def _close_run_of_mlflow(
    run_id: str | None, command: str, *, said: _Said | None = None, error: BaseException | None = None
) -> None:
    if run_id is None:
        return
    from tracked_replay.tracking import close_unused

    if said is not None:
        words = "makes no run of its own. It printed:"
        close_unused(run_id, f"{command} · {said.about}", _page_of(command, words, said.text), "FINISHED")
        return
    if not isinstance(error, Exception) or isinstance(error, click.exceptions.Abort):
        close_unused(run_id, f"{command} · interrupted", f"`{command}` was interrupted.", "KILLED")
        return
    # MLflow forgets the run when any other ends: an interrupted one that could not be gone on with.
    refused = _is_users(error) and os.environ.get(MADE_BY_MLFLOW) == run_id
    sentence = " ".join(_sentence(error).split()) or type(error).__name__
    name = (
        f"{command} · {'refused' if refused else 'failed'}: {textwrap.shorten(sentence, FIRST_WORDS, placeholder=' …')}"
    )
    words = "was refused before it made a run:" if refused else "failed:"
    close_unused(run_id, name, _page_of(command, words, f"error: {sentence}"), "FAILED")


def _page_of(command: str, words: str, printed: str) -> str:
    """A description that shows what was printed as it is, whatever it holds."""
    cut = printed if len(printed) <= PRINTED else f"{printed[:PRINTED]}\n…"
    return f"`{command}` {words}\n\n{textwrap.indent(cut, '    ', lambda line: True)}\n"


VERDICTS = ("compare", "reproduce")  # stages whose exit code is a verdict

STAGES: dict[str, tuple[type[CommonParameters], Callable[[Any], _Said | None]]] = {
    "train": (TrainParameters, _train),
    "magic": (MagicParameters, _magic),
    "lds": (LdsParameters, _lds),
    "counterfactual": (CounterfactualParameters, _counterfactual),
    "suspects": (SuspectsParameters, _suspects),
    "compare": (CompareParameters, _compare),
    "reproduce": (ReproduceParameters, _reproduce),
    "verify": (VerifyParameters, _verify),
    "clean": (CleanParameters, _clean),
    "main": (MainParameters, _main),
    "show_config": (ShowConfigParameters, _show_config),
}


def _closing(what: str, run_id: str, next_command: str) -> None:
    from tracked_replay.tracking import ui_hint

    click.echo(f"{what}: {run_id}")
    click.echo(f"look at it:  {ui_hint(run_id)}")
    click.echo(f"next:        {next_command}")


def _command(name: str, model: type[CommonParameters], run: Callable[[Any], _Said | None]) -> click.Command:
    options: list[click.Parameter] = []
    for field, info in fields_of(model).items():
        option = "--" + field.replace("_", "-")
        # Also with underscores, as in MLproject, so that a parameter copied from there works.
        declarations = [field, *dict.fromkeys([option, f"--{field}"])]
        if info.annotation is bool:
            options.append(
                click.Option(
                    declarations,
                    help=info.description,
                    is_flag=False,
                    flag_value="true",
                    default="false",
                    metavar="[true|false]",
                )
            )
        else:
            shown = bool(info.default)
            options.append(click.Option(declarations, help=info.description, default=info.default, show_default=shown))

    def callback(**values: object) -> None:
        with _code_2_for_errors() if name in VERDICTS else nullcontext(), _run_of_mlflow(name) as said:
            parameters = parse(model, values)
            _configure_logging(parameters)
            if name not in WITHOUT_STORE:
                _require_server()
            said += filter(None, [run(parameters)])

    text = f"{model.__doc__}\n\n    Example: tracked-replay {name} {model.example}"
    return click.Command(
        name, params=options, callback=callback, help=text, short_help=(model.__doc__ or "").split("\n")[0]
    )


for _name, (_model, _run) in STAGES.items():
    cli.add_command(_command(_name, _model, _run))


def _require_server() -> None:
    from tracked_replay.tracking import require_server

    require_server()


def _configure_logging(parameters: CommonParameters) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if parameters.log_file:
        try:
            Path(parameters.log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(parameters.log_file, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"log_file: found {parameters.log_file!r}, which cannot be written ({error.strerror}); allowed: a file "
                f"in a folder that can be written to"
            ) from None
    logger.setLevel(parameters.log_level)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    A user's error is one sentence on standard error and exit code 1, or 2 where the command line itself is wrong;
    with ``--log-level DEBUG`` the traceback is logged. An interrupted command exits with 130.
    """
    for name, value in QUIET_MLFLOW.items():
        os.environ.setdefault(name, value)
    try:
        cli.main(args=arguments, prog_name="tracked-replay", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo(
            "interrupted; a run that was open is KILLED; train, magic and lds go on where they were when given again",
            err=True,
        )
        sys.exit(130)
    except Exception as error:
        if not _is_users(error):
            raise
        logger.debug("where the error comes from:", exc_info=True)
        _fail(_sentence(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    words = " ".join(message.split())
    if len(words) > LONGEST:  # what was found may be long; what is allowed stands at the end
        words = f"{words[: LONGEST // 2]} … {words[-LONGEST // 2 :]}"
    click.echo(f"error: {words}", err=True)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    """What an error says; a database's own words stand in ``orig`` of the one that wraps it with the statement."""
    return str(getattr(error, "orig", None) or error)


def _is_users(error: Exception) -> bool:
    """Whether an error is the user's or the machine's (a full disk, a tracking server that does not answer)."""
    if isinstance(error, TrackedReplayError | OSError):
        return True
    # Not imported for this: commands that do without them start faster.
    mlflow, database = sys.modules.get("mlflow.exceptions"), sys.modules.get("sqlalchemy.exc")
    if mlflow is not None and isinstance(error, mlflow.MlflowException):
        return True
    return database is not None and isinstance(error, database.SQLAlchemyError)
