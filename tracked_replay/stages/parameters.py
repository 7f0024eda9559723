"""The parameters of each stage: one definition for the command line, ``MLproject`` and the documentation.

Every value arrives as text, because ``mlflow run`` cannot leave a parameter out: an empty one means "not given".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from tracked_replay.config import Config, parse_overrides
from tracked_replay.errors import ConfigError

TARGETS = "0"  # what influence is asked on where nothing is said
LDS_TARGETS = "0-7"
WHICH_TARGETS = "evaluation examples: an index, a range, a list, all, or mean:RANGE; several joined by ;"


class CommonParameters(BaseModel):
    """Parameters that every entry point takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    example: ClassVar[str] = ""

    force: bool = Field(default=False, description="compute even where a finished run has the same fingerprint")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least severe messages that are shown"
    )
    log_file: str = Field(default="", description="file that also gets the log messages", examples=["run.log"])

    @field_validator("force", mode="before")
    @classmethod
    def _empty_is_false(cls, value: object) -> object:
        return False if value == "" else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return (value.upper() or "INFO") if isinstance(value, str) else value


NOTHING_TO_FORCE = Field(default=False, description="no effect: this is always done anew")
DATA_ROOT = Field(default="", description="folder that holds the data set; empty: the preset's", examples=["data"])
RECORDED_DATA_ROOT = Field(default="", description="where the data are now; empty: as recorded", examples=["data"])


class StageParameters(CommonParameters):
    """Parameters of a stage that resolves a config."""

    example: ClassVar[str] = "--set train.epochs=3,train.batch_size=64"

    preset: str = Field(
        default="digits",
        description="digits, cifar10-small, cifar10, or the path of a TOML file of that form",
        examples=["cifar10-small"],
    )
    seed: str = Field(default="", description="master seed; empty: the preset's", examples=["7"])
    data_root: str = DATA_ROOT
    set: str = Field(
        default="",
        description="changes of config fields, name=value joined by commas; show_config lists them",
        examples=["train.epochs=3,train.batch_size=64"],
    )

    @field_validator("preset", mode="before")
    @classmethod
    def _default_preset(cls, value: object) -> object:
        return value or "digits"

    def config(self) -> Config:
        """The resolved config. Raises ConfigError."""
        return Config.resolve(self.preset, seed=self.seed, data_root=self.data_root, overrides=self.set)


class TrainParameters(StageParameters):
    """Record a deterministic training run."""


class ShowConfigParameters(StageParameters):
    """Print the resolved config, or what is wrong with it; run nothing."""

    example: ClassVar[str] = "--preset cifar10"

    force: bool = NOTHING_TO_FORCE


class MagicParameters(StageParameters):
    """Compute the exact influence of all training examples on the targets.

    Reuses a matching finished training run, or trains first.
    """

    example: ClassVar[str] = "--targets 0-7 --set train.epochs=3"

    train_run_id: str = Field(
        default="", description="a finished train run to replay; empty: find or make one", examples=["4f0c…"]
    )
    targets: str = Field(default=TARGETS, description=WHICH_TARGETS, examples=["0-7"])
    replay_mode: Literal["", "auto", "memory", "stream"] = Field(
        default="", description="where replayed states are kept: auto, memory or stream; empty: the preset's"
    )

    def overrides(self) -> dict[str, str]:
        """``set`` and ``replay_mode`` as config overrides. Raises ConfigError."""
        pairs = parse_overrides(self.set)
        if self.replay_mode:
            if "replay.mode" in pairs and pairs["replay.mode"] != self.replay_mode:
                raise ConfigError(
                    f"replay_mode: found {self.replay_mode!r}, but set says replay.mode={pairs['replay.mode']}"
                )
            pairs["replay.mode"] = self.replay_mode
        return pairs


class LdsParameters(MagicParameters):
    """Validate influence scores by retraining without random subsets.

    Runs or reuses magic where no magic run is named. An interrupted validation goes on where it stopped.
    """

    example: ClassVar[str] = "--magic-run-id RUN_ID --drop 0.01,0.05 --workers 2"

    targets: str = Field(
        default="",
        description=f"{WHICH_TARGETS}; empty: those of the magic run, or {LDS_TARGETS} where none is named",
        examples=["0-7"],
    )
    magic_run_id: str = Field(
        default="", description="a finished magic run to validate; empty: find or make one", examples=["9be1…"]
    )
    subsets: str = Field(default="", description="subsets for each drop share; empty: the preset's", examples=["64"])
    drop: str = Field(
        default="", description="share removed, or several: 0.01,0.05; empty: the preset's", examples=["0.01,0.05"]
    )
    executor: str = Field(default="", description="where retrainings run: local; empty: the preset's")
    workers: str = Field(default="", description="retrainings at once; empty: the preset's", examples=["2"])

    def overrides(self) -> dict[str, str]:
        """``set`` and the parameters of the stage as config overrides. Raises ConfigError."""
        pairs = super().overrides()
        for name in ("subsets", "drop", "executor", "workers"):
            value, field = getattr(self, name), f"lds.{name}"
            if not value:
                continue
            if field in pairs and pairs[field] != value:
                raise ConfigError(f"{name}: found {value!r}, but set says {field}={pairs[field]}")
            pairs[field] = value
        return pairs


class MainParameters(LdsParameters):
    """Train, compute influence, and validate it, under one parent run."""

    example: ClassVar[str] = "--targets 0-7 --subsets 24"

    targets: str = Field(default=LDS_TARGETS, description=WHICH_TARGETS, examples=["0-7"])


class SuspectsParameters(StageParameters):
    """Rank all training examples by how suspicious they are: mislabelled, hard, or harmful.

    Trains and replays first where no finished run matches. Where data.flip_labels put wrong labels in, it also says
    how well each ranking finds them.
    """

    example: ClassVar[str] = "--train-run-id RUN_ID"

    train_run_id: str = Field(
        default="", description="a finished train run to look at; empty: find or make one", examples=["4f0c…"]
    )
    share: str = Field(default="0.05", description="share of the training examples that counts as the top of a ranking")
    checkpoints: str = Field(
        default="10", description="recorded states along the training that are looked at, at most one an epoch"
    )


class VerifyParameters(StageParameters):
    """Check a recorded run: order, trace, weights, initial model, config, digests, and a retraining.

    Or check a certificate of reproduction, or, with nothing but iterations, that this machine repeats every bit.
    """

    example: ClassVar[str] = "--train-run-id RUN_ID"

    force: bool = NOTHING_TO_FORCE
    seed: str = Field(default="", description="master seed that the run must have; empty: any", examples=["7"])
    train_run_id: str = Field(default="", description="the finished train run to check", examples=["4f0c…"])
    certificate: str = Field(
        default="",
        description="a certificate to check without training: its file, or the reproduce run that made it",
        examples=["certificate.json"],
    )
    iterations: str = Field(
        default="", description="repeat a small training this often here and compare every bit", examples=["10"]
    )


class CompareParameters(CommonParameters):
    """Say whether recorded runs are the same, bit by bit, and where they first part.

    Takes run IDs of finished train runs, or of two magic runs, whose scores are then compared, or two checkpoint
    files or folders. Exit code: 0 identical, 1 different, 2 cannot be compared. Always computed anew.
    """

    example: ClassVar[str] = "--run-a RUN_ID --run-b RUN_ID"

    force: bool = NOTHING_TO_FORCE
    run_a: str = Field(default="", description="a finished train run, or a .safetensors file, or a folder of them")
    run_b: str = Field(default="", description="the other one; several run IDs joined by commas make a matrix")
    max_ulp: str = Field(
        default="0", description="tensor elements and losses this many representable numbers apart count as equal"
    )
    ignore: str = Field(
        default="",
        description="what does not count: data, lr, loss, generators, or patterns of tensor names, joined by commas",
        examples=["momentum/*"],
    )
    check_files: bool = Field(
        default=False,
        description="check every recorded file first; without it no checkpoint is read where all digests agree",
    )
    data_root: str = RECORDED_DATA_ROOT
    output: str = Field(default="", description="folder that also gets page, table and figure", examples=["out"])

    @field_validator("check_files", mode="before")
    @classmethod
    def _empty_is_no_check(cls, value: object) -> object:
        return False if value == "" else value


class ReproduceParameters(CommonParameters):
    """Train a recorded run again from its own artifacts, compare bit by bit, and certify the outcome.

    Shows first in what this environment differs from the recorded one. Exit codes as those of compare.
    """

    example: ClassVar[str] = "--run-id RUN_ID"

    force: bool = NOTHING_TO_FORCE
    run_id: str = Field(default="", description="a finished train run", examples=["4f0c…"])
    data_root: str = RECORDED_DATA_ROOT


class CleanParameters(CommonParameters):
    """Remove artifacts of a run by kind; with dry_run only list them with their sizes.

    Refuses to remove what a finished run downstream needs, unless force is given.
    """

    example: ClassVar[str] = "--run-id RUN_ID --what checkpoints --dry-run"

    force: bool = Field(default=False, description="remove even what a finished run needs")
    run_id: str = Field(default="", description="the run to clean", examples=["4f0c…"])
    what: str = Field(
        default="", description="checkpoints, trace, scores, figures, lds or all; several joined by commas"
    )
    dry_run: bool = Field(default=False, description="list what would be removed, and remove nothing")

    @field_validator("dry_run", mode="before")
    @classmethod
    def _empty_is_not_dry(cls, value: object) -> object:
        return False if value == "" else value


class CounterfactualParameters(StageParameters):
    """Remove or reweight named examples, retrain, and show predicted beside actual for every target."""

    example: ClassVar[str] = "--magic-run-id RUN_ID --remove harmful:20@3"

    train_run_id: str = Field(default="", description="the finished train run to retrain", examples=["4f0c…"])
    magic_run_id: str = Field(
        default="", description="a finished magic run whose scores and targets are used; empty: targets says which"
    )
    targets: str = Field(
        default="",
        description=f"{WHICH_TARGETS}; empty: those of the magic run, or {TARGETS} where none is named",
        examples=["0-7"],
    )
    remove: str = Field(
        default="",
        description="examples to remove: indices (3,17,40-49), a file of them, or harmful:20@3 (with magic_run_id)",
        examples=["3,17,40-49"],
    )
    weights: str = Field(
        default="", description="examples to reweight: 3=0,17=2.5, or a JSON file", examples=["3=0,17=2.5"]
    )


def fields_of(model: type[CommonParameters]) -> dict[str, FieldInfo]:
    """The parameters of a stage as they are listed: its own first, then those that all take."""
    own = {name: info for name, info in model.model_fields.items() if name not in CommonParameters.model_fields}
    return own | {name: model.model_fields[name] for name in CommonParameters.model_fields}


def parse(model: type[CommonParameters], values: dict[str, object]) -> CommonParameters:
    """Validate the parameters of a stage; an empty one means "not given". Raises ConfigError."""
    try:
        return model.model_validate({name: value for name, value in values.items() if value != ""})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        schema = model.model_json_schema()["properties"].get(name, {})
        allowed = ", ".join(filter(None, schema.get("enum", []))) or {"boolean": "true or false"}.get(
            schema.get("type", ""), "text"
        )
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{name}: unknown parameter; allowed: {', '.join(model.model_fields)}") from None
        raise ConfigError(f"{name}: found {problem['input']!r}; allowed: {allowed}") from None
