"""Writes ``docs/reference.md`` from the code: ``python docs/make_reference.py`` in the repository's root.

``tests/test_docs.py`` fails where the file is not what this script makes.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

# The code beside this script, whatever is installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import tracked_replay as tr
from tracked_replay import errors
from tracked_replay.cli import STAGES
from tracked_replay.config import Config, allowed, field_info, field_names, preset_names
from tracked_replay.stages.parameters import fields_of
from tracked_replay.tracking import names

TARGET = Path(__file__).parent / "reference.md"

HEAD = """# Reference

Made from the code by `python docs/make_reference.py`; a test fails where the two differ. Do not edit it by hand.

- [Entry points](#entry-points)
- [Config fields](#config-fields)
- [Tags](#tags)
- [Python](#python)
"""

# The code holds the names only; a tag without a meaning here stops the script.
TAGS = {
    "stage": (
        "every run",
        "what made the run: `train`, `magic`, `lds`, `retraining` (the child runs of `lds`, `counterfactual` and "
        "`suspects`), "
        "`counterfactual`, `suspects`, `compare`, `reproduce`, `verify` or `main`",
    ),
    "fingerprint": (
        "every FINISHED run that computed its whole result",
        "SHA-256 of everything that decides the result; set last, so a run that did not finish is never reused",
    ),
    "pending": (
        "every run that knows what it is going to compute",
        "the fingerprint that the run is to have, set at its start: an interrupted `train` or `magic` run is found by "
        "it and gone on with",
    ),
    "input.": (
        "runs that read other runs",
        "prefix: `tracked_replay.input.train_run_id` is the run ID of the recording, "
        "`tracked_replay.input.magic_run_id` that of the scores, "
        "`tracked_replay.input.lds_run_id` that of the validation under a `main` run, "
        "`tracked_replay.input.run_a`, `tracked_replay.input.run_b` and so on those that were compared, "
        "`tracked_replay.input.reproduced_run_id` that of the training that a `reproduce` run made",
    ),
    "digests": (
        "all",
        "SHA-256 of the run's `digests.json`, from which every other file is checked",
    ),
    "verdict": (
        "`compare`, `reproduce`",
        "`identical` or `different`; of several runs every verdict that there was, joined by a comma",
    ),
    "cleaned": (
        "runs that `clean` removed files of",
        "the kinds that were removed, joined by commas; such a run is no longer reused, unless it lost only `figures`",
    ),
    "exact": ("`magic`", "`true`, or `false` where a clipping option was on"),
    "reuses": (
        "runs made by `mlflow run` that found their result",
        "run ID of the earlier run that holds the result; wherever a run ID is taken, this one is followed",
    ),
    "reproduces": (
        "the `train` runs that `reproduce` made",
        "run ID of the training that is repeated; such a run is reused only where there is no other",
    ),
    "validated_by": (
        "`magic` runs that an `lds` run was about",
        "run ID of the newest such `lds` run; the description then says what it found",
    ),
    "task": ("every run but `compare` and those that reuse", "name of the task"),
    "failed_retrainings": (
        "`lds`",
        "how many retrainings failed twice and are missing from the result; such a run has no fingerprint",
    ),
    "equality": (
        "`lds`",
        "`bitwise` where each retraining was done alone; with `lds.models_at_once` above 1 the bound on how far they "
        "differ from one done alone, and what was found in this run",
    ),
    "process": (
        "every run but those that reuse",
        "machine, number and start of the process that made the run; a run that is RUNNING although its process is "
        "gone is closed as KILLED by the next stage on that machine",
    ),
}

FUNCTIONS = (
    "train",
    "magic",
    "lds",
    "counterfactual",
    "load_scores",
    "compare",
    "compare_influence",
    "reproduce",
    "require_expected",
    "restore_generators",
    "suspects",
    "verify_reproducibility",
)
CONFIG_METHODS = ("resolve", "override", "from_toml", "to_toml", "from_values", "value", "flat")
TASK_METHODS = (
    "train_examples",
    "evaluation_examples",
    "model",
    "prepare",
    "augment",
    "per_example_loss",
    "measurement",
    "draw",
    "source_files",
)


def reference() -> str:
    """The whole text of ``docs/reference.md``."""
    return "\n".join([HEAD, *_entry_points(), *_config(), *_tags(), *_python()]).rstrip() + "\n"


def _entry_points() -> list[str]:
    lines = [
        "## Entry points",
        "",
        "`mlflow run . -e NAME --env-manager local -P parameter=value` and `tracked-replay NAME --parameter value` are",
        "the same. On the command line a parameter may be written with dashes or underscores. An empty value means",
        '"not given".',
        "",
    ]
    for stage, (model, _) in STAGES.items():
        lines += [f"### `{stage}`", "", _text(model.__doc__), ""]
        lines += _row("parameter", "takes", "default", "meaning", "example") + _row(*["---"] * 5)
        for field, info in fields_of(model).items():
            example = f"`{info.examples[0]}`" if info.examples else ""
            shown = f"`{str(info.default).lower() if isinstance(info.default, bool) else info.default}`"
            lines += _row(
                f"`{field}`", _taken(info.annotation), shown if info.default != "" else "", info.description, example
            )
        lines.append("")
    return lines


def _taken(annotation: Any) -> str:
    choices = [choice for choice in typing.get_args(annotation) if choice]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    return "`true`, `false`" if annotation is bool else "text"


def _config() -> list[str]:
    presets = {name: Config.resolve(name) for name in ("digits", "cifar10-small", "cifar10")}
    if set(presets) != set(preset_names()):
        raise SystemExit(f"presets: found {preset_names()}, the reference knows {sorted(presets)}")
    lines = [
        "## Config fields",
        "",
        'Set one with `set` (`-P set="train.epochs=3,train.lr=0.01"`), or all of them in a TOML file whose path is',
        "given as `preset`; `tracked-replay show_config` prints such a file. *Default* holds where a preset file",
        "leaves a field out; the presets that come with the package set every field.",
        "",
    ]
    section = None
    for name in field_names():
        group = name.rpartition(".")[0]
        if group != section:
            section = group
            heading = f"### `{group}.*`" if group else "### Without a group"
            doc = _text(Config.model_fields[group].annotation.__doc__) if group else ""  # type: ignore[union-attr]
            lines += [heading, "", *([doc, ""] if doc else [])]
            lines += _row("field", "meaning", "allowed", "default", *presets) + _row(*["---"] * (4 + len(presets)))
        info = field_info(name)
        values = [_value(config.value(name)) for config in presets.values()]
        lines += _row(f"`{name}`", info.description, allowed(name), _value(info.default), *values)
        if name == list(field_names())[-1] or not _follows(name):
            lines.append("")
    return lines


def _follows(name: str) -> bool:
    """Whether the next field stands in the same section."""
    known = field_names()
    following = known[known.index(name) + 1]
    return following.rpartition(".")[0] == name.rpartition(".")[0]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return '`""`' if value == "" else f"`{value}`"


def _tags() -> list[str]:
    known = {str(value) for key, value in vars(names).items() if key.isupper() and str(value).startswith(names.PREFIX)}
    unknown = known - {names.PREFIX} - {f"{names.PREFIX}{name}" for name in TAGS}
    if unknown:
        raise SystemExit(f"tags without a meaning in docs/make_reference.py: {sorted(unknown)}")
    lines = ["## Tags", "", *_row("tag", "on", "meaning"), *_row("---", "---", "---")]
    for name, (where, meaning) in TAGS.items():
        if f"{names.PREFIX}{name}" in known:
            lines += _row(f"`{names.PREFIX}{name}`", where, meaning)
    return [*lines, ""]


def _python() -> list[str]:
    lines = ["## Python", "", "`import tracked_replay as tr`", ""]
    for name in FUNCTIONS:
        lines += _callable(f"tr.{name}", getattr(tr, name))
    lines += ["### `tr.Config`", "", _text(tr.Config.__doc__), ""]
    for name in CONFIG_METHODS:
        lines += _callable(f"tr.Config.{name}", getattr(tr.Config, name))
    lines += ["### `tr.Task`", "", *_doc(tr.Task), ""]
    for name in TASK_METHODS:
        lines += _callable(f"tr.Task.{name}", getattr(tr.Task, name))
    lines += ["### `tr.Examples`", "", *_doc(tr.Examples), "", "### Errors", ""]
    lines += _row("class", "meaning") + _row("---", "---")
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, errors.TrackedReplayError):
            lines += _row(f"`{name}`", _text(found.__doc__))
    return lines


def _callable(name: str, function: Any) -> list[str]:
    return [f"#### `{name}`", "", "```python", _signature(name, function), "```", "", *_doc(function), ""]


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parts, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{parameter.name}: {parameter.annotation}{default}")
    one_line = f"{name}({', '.join(parts)}) -> {signature.return_annotation}"
    if len(one_line) <= 110:
        return one_line
    inside = "".join(f"    {part},\n" for part in parts)
    return f"{name}(\n{inside}) -> {signature.return_annotation}"


def _doc(item: Any) -> list[str]:
    """First paragraphs as prose, the sections that follow (Args, Returns, Raises, …) as they stand."""
    text = _without_roles(inspect.getdoc(item) or "")
    prose, _, sections = re.sub(r"\n(?=(?:Args|Attributes|Returns|Raises|Yields):\n)", "\0", text, count=1).partition(
        "\0"
    )
    prose = " ".join(prose.split())
    return [prose, "", "```text", sections.strip(), "```"] if sections else [prose]


def _text(text: str | None) -> str:
    return " ".join(_without_roles(text or "").split())


def _without_roles(text: str) -> str:
    return re.sub(r":(?:class|meth|func):`~?([^`]*)`", r"`\1`", text).replace("``", "`")


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
