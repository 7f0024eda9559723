"""The typed config of every stage: fields, allowed values, presets, overrides, and its TOML form.

A config is a frozen tree of pydantic models. It is resolved once, before anything runs: preset file, then the
common parameters (``seed``, ``data_root``), then ``set`` overrides. What is wrong is said in one sentence a field.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tracked_replay.errors import ConfigError

NO_IDENTITY = (
    ("data", "root"),
    ("data", "download"),
    ("replay", "mode"),
    ("replay", "budget"),
    ("lds", "executor"),
    ("lds", "workers"),
)

SIZE = re.compile(r"\s*(\d{1,18}|\d{0,9}\.\d{1,9})\s*([kmgtp]?b?|[kmgtp]ib)\s*", re.IGNORECASE | re.ASCII)


def _whole_size(value: object) -> object:
    # pydantic reads a size from the beginning of a text and would take 1,5GB for one byte.
    if isinstance(value, str) and not SIZE.fullmatch(value):
        raise PydanticCustomError("size", "no size")
    return value


Bytes = Annotated[ByteSize, Field(le=2**63 - 1), BeforeValidator(_whole_size)]
SIZE_ALLOWED: Any = {"allowed": "bytes >= 0, as a number or as 500MB, 1.5GB, 2GiB"}


class Section(BaseModel):
    """A group of config fields: unknown names, NaN and Inf are refused; values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would take true for 1, so that a preset's `epochs = true` would train one epoch.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float, ByteSize):
            raise PydanticCustomError("truth_value", "a truth value is no number")
        return value


class DataConfig(Section):
    """Which examples, and how an epoch's view of them is made."""

    task: str = Field(
        default="digits",
        min_length=1,
        description="`digits`, `cifar10`, or a task of your own as `path/to/file.py:ClassName` or `module:ClassName`",
    )
    root: str = Field(default="", description="folder that holds the data set on disk (cifar10: `cifar-10-batches-py`)")
    download: bool = Field(default=False, description="let torchvision download the data set where it is missing")
    train_examples: int = Field(default=0, ge=0, description="use only the first N training examples; 0 means all")
    evaluation_examples: int = Field(
        default=0, ge=0, description="use only the first N evaluation examples; 0 means all"
    )
    augmentation: Literal["none", "flip", "crop", "flip+crop"] = Field(
        default="none", description="random views of a training image, derived from seed, epoch and index"
    )
    crop_padding: int = Field(default=4, ge=1, description="pixels of reflected border that a crop moves within")
    flip_labels: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the training labels replaced by wrong ones, to test a search for them; drawn from seed",
    )


class ModelConfig(Section):
    """The network of the built-in tasks (a task of your own may ignore it)."""

    width: float = Field(default=1.0, gt=0, description="multiplier on the 32, 64, 128 and 256 channels of ResNet-9")
    pooling: Literal["average", "log_sum_exp"] = Field(default="average", description="how feature maps are reduced")
    pooling_epsilon: float = Field(
        default=0.1, gt=0, description="temperature of log-sum-exp pooling; towards 0 it becomes the maximum"
    )
    final_scale: float = Field(default=1.0, gt=0, description="factor on the logits")
    bias_scale: float = Field(
        default=1.0, gt=0, description="learning-rate multiplier of biases and normalisation parameters"
    )


class TrainConfig(Section):
    """Optimisation, precision and where it is computed."""

    epochs: int = Field(default=10, ge=1, le=1_000_000, description="passes over the training set")
    batch_size: int = Field(default=256, ge=1, description="examples a step; the last, partial batch is left out")
    optimizer: Literal["sgd"] = Field(default="sgd", description="torch.optim.SGD, bit for bit")
    lr: float = Field(default=0.1, gt=0, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    dampening: float = Field(default=0.0, ge=0, le=1, description="dampening of the momentum")
    nesterov: bool = Field(default=False, description="Nesterov momentum")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty inside the gradient, as torch.optim.SGD")
    decay_biases: bool = Field(default=True, description="apply weight_decay to biases and normalisation too")
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = Field(
        default="constant", description="learning-rate schedule after the warm-up, one value a step"
    )
    lr_start: float = Field(
        default=0.1, gt=0, le=1, description="one_cycle: first learning rate as a share of lr; warm-up: the same"
    )
    lr_end: float = Field(default=0.0, ge=0, le=1, description="one_cycle and cosine: last learning rate over lr")
    lr_peak: float = Field(default=0.5, gt=0, lt=1, description="one_cycle: share of the steps before the peak")
    lr_step_epochs: int = Field(default=10, ge=1, description="step: epochs between two decays")
    lr_gamma: float = Field(default=0.1, gt=0, le=1, description="step: factor of each decay")
    warmup_epochs: int = Field(default=0, ge=0, description="epochs of linear warm-up before the schedule")
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="precision of training and replay; half precision makes replayed scores noise"
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:(0|[1-9][0-9]?))?)$",
        description="where it is computed",
        json_schema_extra={"allowed": "cpu, cuda or cuda:N"},
    )
    threads: int = Field(
        default=2, ge=1, le=1024, description="CPU threads; the bits of a step depend on it, so it is pinned"
    )
    reproducibility: Literal["full", "kernels", "seeds"] = Field(
        default="full",
        description="full: a retraining repeats every bit; kernels: threads is not pinned; "
        "seeds: kernels need not be deterministic either",
    )

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening 0; found momentum {self.momentum:g}, "
                f"dampening {self.dampening:g}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must leave an epoch for the schedule; found {self.warmup_epochs} of {self.epochs}"
            )
        return self


class RecordConfig(Section):
    """What a training run keeps."""

    every: int = Field(
        default=1, ge=1, description="steps between two checkpoints; states between them are recomputed when replayed"
    )
    budget: Bytes = Field(
        default=ByteSize(0),
        description="bytes on disk for checkpoints and generator states; as many steps lie between two checkpoints as "
        "it takes, but no fewer than `every`; 0 means no limit",
        json_schema_extra=SIZE_ALLOWED,
    )
    evaluate_every: int = Field(
        default=1, ge=0, description="epochs between two evaluations while training; 0 evaluates at the end only"
    )
    pixels: bool = Field(
        default=False, description="keep the pixels of each batch, as the model saw them, in the trace"
    )


class ReplayConfig(Section):
    """How the training is replayed backwards."""

    mode: Literal["auto", "memory", "stream"] = Field(
        default="auto", description="keep all states in memory, or read them from the artifact store as needed"
    )
    budget: Bytes = Field(
        default=ByteSize(0),
        description="bytes of memory for states; 0 means half of what is free, and no limit where mode is `memory`",
        json_schema_extra=SIZE_ALLOWED,
    )
    targets_at_once: int = Field(
        default=0,
        ge=0,
        description="targets that are replayed in one call of each kernel, which changes the last digits of their "
        "scores; 0 chooses, 1 makes a target's scores independent of the others to the bit",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="compile the replayed step, which takes minutes once and changes the last digits of scores; `auto` "
        "compiles where that pays: 10,000 or more steps (times groups of targets) on the CPU, for one target or a "
        "small model",
    )
    per_step: bool = Field(default=False, description="keep the scores of every step as well (large)")
    clip_gradient: bool = Field(default=False, description="clip the replayed gradient's norm; makes scores inexact")
    clip_gradient_norm: float = Field(default=0.5, gt=0, description="largest gradient norm where clip_gradient is on")
    clip_parameters: bool = Field(default=False, description="clip replayed parameters' norms; makes scores inexact")
    clip_parameter_norm_warning: float = Field(
        default=5.0, gt=0, description="parameter norm above which a step is counted and logged"
    )
    clip_parameter_norm: float = Field(default=10.0, gt=0, description="largest norm of one parameter tensor")

    @model_validator(mode="after")
    def _check_together(self) -> ReplayConfig:
        if self.compile == "on" and not self.exact:
            raise ValueError("compile is on beside clip_gradient or clip_parameters; allowed: compile off or auto")
        return self

    @property
    def exact(self) -> bool:
        """Whether the replay differentiates the recorded training itself (no clipping)."""
        return not (self.clip_gradient or self.clip_parameters)


class LdsConfig(Section):
    """How scores are checked by retraining on subsets."""

    subsets: int = Field(default=64, ge=3, description="subsets drawn for each drop share, one retraining each")
    drop: str = Field(
        default="0.01", min_length=1, description="share of the training examples removed, or several: 0.01,0.05"
    )
    executor: Literal["local"] = Field(default="local", description="where retrainings run")
    workers: int = Field(default=1, ge=1, description="retrainings at once; 1 runs them in this process")
    models_at_once: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="retrainings in one batched step; above 1 they equal those done alone within a bound that each run "
        "checks, at the cost of one more retraining",
    )
    baselines: bool = Field(default=True, description="score the same subsets by TracIn, last gradient and random too")
    metasmoothness: bool = Field(
        default=False, description="measure whether training moves in a straight line with the weights (3 trainings)"
    )
    keep_states: bool = Field(default=False, description="keep the final state of every retraining")
    resamples: int = Field(default=1000, ge=100, description="bootstrap samples behind the interval of the mean LDS")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="confidence of that interval")

    @field_validator("drop")
    @classmethod
    def _check_drop(cls, value: str) -> str:
        try:
            parse_drop(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("drop: ")) from None
        return value


class ReportConfig(Section):
    """What people look at."""

    examples: int = Field(default=8, ge=1, le=50, description="helpful and harmful examples shown a target")


class Config(Section):
    """Everything that decides a result. ``config/config.toml`` of a run holds it whole."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="master seed; every component's seed is derived from it")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    lds: LdsConfig = Field(default_factory=LdsConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @classmethod
    def resolve(
        cls,
        preset: str = "digits",
        *,
        seed: int | str | None = None,
        data_root: str | None = None,
        overrides: str | dict[str, Any] = "",
    ) -> Config:
        """Preset, then ``seed`` and ``data_root``, then overrides.

        Args:
            preset: name of a preset, or the path of a TOML file of the same form.
            seed: master seed; ``None`` or an empty string keeps the preset's.
            data_root: folder of the data set; ``None`` or an empty string keeps the preset's.
            overrides: ``"train.epochs=3,train.batch_size=64"`` or a mapping of such names to values.

        Raises:
            ConfigError: naming the field, the value found and what is allowed.
        """
        values = load_preset(preset)
        pairs = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
        if seed is not None and seed != "":
            pairs = {"seed": seed} | pairs
        if data_root:
            pairs = {"data.root": data_root} | pairs
        for name, value in pairs.items():
            _assign(values, name, value)
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Config:
        """Validate a nested mapping, such as a parsed ``config.toml``. Raises ConfigError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    @classmethod
    def from_toml(cls, text: str) -> Config:
        """Read what :meth:`to_toml` wrote. Raises ConfigError."""
        try:
            return cls.from_values(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"the config is not valid TOML: {error}") from None

    def to_toml(self) -> str:
        """The whole config as TOML; :meth:`from_toml` gives back an equal config."""
        return tomli_w.dumps(self.model_dump())

    def flat(self) -> dict[str, Any]:
        """Dotted names to values, in the order of definition."""
        return {name: self.value(name) for name in field_names()}

    def value(self, name: str) -> Any:
        """The value of a dotted field name, for example ``train.lr``."""
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def override(self, overrides: str | dict[str, Any]) -> Config:
        """A copy with some fields changed, validated again. Raises ConfigError."""
        values = self.model_dump()
        pairs = parse_overrides(overrides) if isinstance(overrides, str) else overrides
        for name, value in pairs.items():
            _assign(values, name, value)
        return type(self).from_values(values)

    def identity(self, *sections: str) -> dict[str, Any]:
        """The fields of some sections that decide a result, for fingerprints.

        Left out is what cannot change a bit of it: where the data lie (their content has a fingerprint of its own),
        whether they may be downloaded, where replayed states are kept, and how retrainings are spread out.
        """
        dumped = self.model_dump()
        kept = {name: dumped[name] for name in sections}
        for section, field in NO_IDENTITY:
            if section in kept:
                kept[section] = {name: value for name, value in kept[section].items() if name != field}
        return kept


@cache
def field_names() -> tuple[str, ...]:
    """Every dotted field name, in the order of definition."""
    names: list[str] = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            names += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            names.append(name)
    return tuple(names)


def field_info(name: str) -> Any:
    """pydantic's description of a dotted field name."""
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[last]


def allowed(name: str) -> str:
    """What a field takes, in words: ``integer >= 1``, ``one of constant, step``."""
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    schema = model.model_json_schema()["properties"][last]
    if "allowed" in schema:
        return str(schema["allowed"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return f"only {schema['const']}"
    kind = {"integer": "integer", "number": "finite number", "boolean": "true or false", "string": "text"}[
        schema["type"]
    ]
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema]
    if schema.get("minLength"):
        bounds.append("that is not empty")
    return " ".join([kind, " and ".join(bounds)]).strip()


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence a wrong field: the field, what was found, what is allowed."""
    sentences = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentences.append(_unknown_field(name))
        elif problem["type"] == "value_error":
            sentences.append(f"{name}: {problem['ctx']['error']}")
        elif name in Config.model_fields and name not in field_names():
            fields = ", ".join(field for field in field_names() if field.startswith(f"{name}."))
            sentences.append(f"{name}: found {problem['input']!r}; allowed: a group with the fields {fields}")
        elif name in field_names():
            sentences.append(
                f"{name}: found {problem['input']!r}; allowed: {allowed(name)}{_hint(name, problem['input'])}"
            )
        else:
            sentences.append(f"{name or model.__name__}: {problem['msg']}; found {problem['input']!r}")
    return "; ".join(sentences)


def _hint(name: str, found: object) -> str:
    if name == "train.dtype" and str(found).removeprefix("torch.") in {"float16", "bfloat16", "half", "fp16", "bf16"}:
        return " (in half precision the replay's products drown in rounding: scores flip sign)"
    return ""


def _unknown_field(name: str) -> str:
    close = difflib.get_close_matches(name, field_names(), n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    section = name.split(".")[0]
    known = [field for field in field_names() if field.startswith(f"{section}.")] or list(field_names())
    return f"{name}: unknown config field{hint}; allowed: {', '.join(known)}"


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    if name not in field_names():
        raise ConfigError(_unknown_field(str(name)))
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return  # a preset with `train = 3`: validation says what is wrong with it
    values[last] = value


def parse_overrides(text: str) -> dict[str, str]:
    """``"train.epochs=3,train.batch_size=64"`` as a mapping; values may hold commas. Raises ConfigError."""
    pairs: dict[str, str] = {}
    if not text.strip():
        return pairs
    for part in re.split(r",(?=\s*[A-Za-z_][\w.]*\s*=)", text):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"set: found {part.strip()!r}; allowed: field=value pairs such as train.epochs=3,train.lr=0.1"
            )
        if name in pairs:
            raise ConfigError(f"set: {name} is given twice: {pairs[name]!r} and {value.strip()!r}")
        pairs[name] = value.strip()
    return pairs


def parse_drop(text: str) -> tuple[float, ...]:
    """``"0.01,0.05"`` as shares. Raises ConfigError unless each is above 0 and below 1 and none is given twice."""
    shares: list[float] = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise ConfigError(f"drop: found {part.strip()!r}; allowed: shares above 0 and below 1, such as 0.01,0.05")
        if f"{share:g}" in {f"{other:g}" for other in shares}:  # seeds and figures are named by what is printed
            raise ConfigError(f"drop: {share:g} is given twice in {text!r}")
        shares.append(share)
    return tuple(shares)


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    folder = resources.files("tracked_replay") / "presets"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def load_preset(preset: str) -> dict[str, Any]:
    """The nested values of a preset name or TOML file. Raises ConfigError."""
    if preset in preset_names():
        text = (resources.files("tracked_replay") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    elif preset.endswith(".toml"):
        try:
            text = Path(preset).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a null character
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"preset: the file {preset!r} cannot be read: {reason}") from None
    else:
        raise ConfigError(
            f"preset: found {preset!r}; allowed: {', '.join(preset_names())}, or the path of a .toml file of that form"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"preset: {preset!r} is not valid TOML: {error}") from None
