"""Why two runs differ: what is known to change the bits of a training, in the order in which it fits what was seen."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from tracked_replay.compare.result import Cause, Comparison, Difference
from tracked_replay.config import NO_IDENTITY

SHOWN = 4  # values named in one sentence
LONGEST = 100  # characters of one value

LR_FIELDS = ("train.lr", "train.lr_*", "train.schedule", "train.warmup_epochs", "model.bias_scale")
DETERMINISM_FIELDS = ("train.reproducibility",)
NAMED_APART = (*LR_FIELDS, *DETERMINISM_FIELDS, "train.threads", "train.device")  # causes of their own
TRAINING_FIELDS = ("data.*", "model.*", "train.*")
DATA_FACTS = ("data.*",)
THREADS = ("threads.intra_op", "determinism.threads")
PROCESSOR = ("cpu.model", "cpu.flags", "cpu.torch_capability", "platform.machine")
DETERMINISM = ("determinism.*", "variables.*")
NO_DETERMINISM = (*THREADS, "determinism.interop_threads", "variables.OMP_NUM_THREADS")
LIBRARIES = ("torch", "torchvision", "numpy", "mkl*", "intel*", "nvidia*", "triton*")
VERSIONS = (
    *(f"packages.installed.{name}" for name in LIBRARIES),
    "torch.version",
    "torch.build",
    "blas.*",
    "python.version",
    "platform.libc",
)
GPU_DEVICES = ("cuda.available", "cuda.devices.*")
GPU_VERSIONS = ("cuda.build", "cuda.hip_build", "cuda.cudnn", "cuda.driver")

# Fields that can be why this differed first; a loss or a state may follow from any but the number of epochs, which
# decides where a run ends and how long its schedule is.
EXPLAINING = {
    "initial": ("data.*", "model.*", "train.dtype"),
    "data": ("data.*", "train.batch_size", "train.epochs"),
    "lr": ("data.*", "train.batch_size", "train.epochs"),
}

# By what differed first, most likely first; config fields that explain it stand further ahead (see _order). A value
# that changes the mathematics comes before one that only changes the rounding, because it is enough on its own.
ORDERS = {
    "initial": ("seed", "code", "device", "versions", "processor", "determinism", "threads", "data", "config", "lr"),
    "data": ("seed", "data", "code", "config", "versions", "lr", "device", "determinism", "processor", "threads"),
    "lr": ("lr", "config", "code", "versions", "processor", "seed", "data", "device", "determinism", "threads"),
    "loss": ("seed", "data", "threads", "device", "determinism", "code", "versions", "processor", "config", "lr"),
    "state": ("seed", "data", "threads", "device", "determinism", "code", "versions", "processor", "config", "lr"),
}
ROUNDING = ("threads", "device", "determinism", "versions", "processor")


def likely_causes(comparison: Comparison, *, gpu: bool = False, deterministic: bool = True) -> tuple[Cause, ...]:
    """What may have made two runs differ, most likely first.

    Args:
        comparison: with everything but the causes; its verdict is ``different``.
        gpu: whether either run was computed on a GPU; without one, other GPUs and drivers change nothing.
        deterministic: whether both runs were bound to deterministic kernels.

    Returns:
        At least one cause; ``unknown`` where nothing that was recorded explains the difference.
    """
    first, config = _first(comparison), _other_config(comparison)
    explains = any(_explains(row.name, first) for row in config)
    scheduled = first == "lr" and bool(_chosen(comparison.config, LR_FIELDS))
    enough = explains or scheduled or (first != "lr" and bool(_seed(comparison)))
    versions = _environment(comparison, VERSIONS, GPU_VERSIONS if gpu else ())
    told = _named if enough else _values  # of versions that need not explain it the names do
    sentences = {
        "seed": _seed(comparison),
        "threads": _threads(comparison),
        "lr": _lr(comparison),
        "data": _data(comparison, explained=explains),
        "code": _code(comparison),
        "versions": told("library versions differ: ", versions),
        "device": _device(comparison, gpu),
        "processor": _values("the processors differ: ", _environment(comparison, PROCESSOR)),
        "determinism": _determinism(comparison, deterministic),
        "config": _values("", sorted(config, key=lambda row: not _explains(row.name, first))),
    }
    order = _order(first, explains=explains, scheduled=scheduled)
    if enough:
        order.sort(key=lambda name: name in ROUNDING)
    causes = [Cause(name, text) for name in order if (text := sentences[name])]
    return tuple(causes) or (Cause("unknown", _unknown(comparison)),)


def _first(comparison: Comparison) -> str:
    """What differed first: a key of ``ORDERS``."""
    first = comparison.first_difference or "state"
    initial = first == "state" and any(row.column == "state_digest" and row.step == 0 for row in comparison.trace)
    return "initial" if initial else first


def _explains(field: str, first: str) -> bool:
    """Whether a config field can be why something differed first."""
    return _matches(field, EXPLAINING[first]) if first in EXPLAINING else field != "train.epochs"


def _order(first: str, *, explains: bool, scheduled: bool) -> list[str]:
    """Names of causes, most likely first.

    Args:
        first: what differed first.
        explains: whether a config field explains it: then that comes before what follows from it.
        scheduled: whether the learning rates differ because they were asked for so.
    """
    order = list(ORDERS[first])
    if explains:
        order.remove("config")
        order.insert(int(scheduled) if first == "lr" else order.index("seed") + 1, "config")
    return order


def _seed(comparison: Comparison) -> str:
    config = _chosen(comparison.config, ("seed",))
    derived = [row for row in comparison.seeds if row.a is not None and row.b is not None]
    return _values("the seeds differ: ", config or derived)


def _threads(comparison: Comparison) -> str:
    asked = _chosen(comparison.config, ("train.threads",))
    found = _chosen(comparison.environment, THREADS) or asked
    if not found:
        return ""
    named = next((row for row in asked if row[1:] == found[0][1:]), found[0])
    return (
        f"the number of CPU threads differs: {_value(named)}; sums are added up in another order, which changes their "
        f"last bits"
    )


def _lr(comparison: Comparison) -> str:
    config = _chosen(comparison.config, LR_FIELDS)
    if config:
        return _values("the learning rates are configured differently: ", config)
    groups = _chosen(comparison.other, ("parameter_groups.*.lr_scale",))
    seen = [row for row in comparison.trace if row.column == "lr"] if comparison.first_difference == "lr" else []
    if seen:
        return f"the learning rates differ from step {seen[0].step} on: {_sides(seen[0].a, seen[0].b)}"
    return _values("the learning rates are scaled differently: ", groups)


def _data(comparison: Comparison, *, explained: bool) -> str:
    found = _values("the data differ: ", _chosen(comparison.other, DATA_FACTS))
    # Other batches are no cause where a config field asks for them.
    if comparison.first_difference == "data" and not explained:
        seen = [row for row in comparison.trace if row.column in ("epoch", "indices", "labels")]
        if seen:
            first = min(seen, key=lambda row: row.step)
            text = f"the batches differ from step {first.step} on, {first.column}: {_sides(first.a, first.b)}"
            return f"{text}; {found}" if found else text
    return found


def _code(comparison: Comparison) -> str:
    found = _chosen(comparison.other, ("code",))
    return _values("the code differs: ", found)


def _device(comparison: Comparison, gpu: bool) -> str:
    found = _chosen(comparison.config, ("train.device",))
    return _values("the devices differ: ", found or (_environment(comparison, GPU_DEVICES) if gpu else []))


def _determinism(comparison: Comparison, deterministic: bool) -> str:
    settings = _environment(comparison, DETERMINISM)
    settings = [row for row in settings if not _matches(row.name, NO_DETERMINISM)]
    found = _chosen(comparison.config, DETERMINISM_FIELDS) + settings
    if not (found or deterministic):
        return "train.reproducibility is seeds in both runs, so that their kernels need not be deterministic"
    return _values("the settings of determinism differ: ", found)


def _other_config(comparison: Comparison) -> list[Difference]:
    """Fields that have no cause of their own; parameter groups where no field explains them."""
    apart = (*NAMED_APART, *(".".join(name) for name in NO_IDENTITY))
    found = [row for row in _chosen(comparison.config, TRAINING_FIELDS) if not _matches(row.name, apart)]
    groups = _chosen(comparison.other, ("parameter_groups.*",))
    return found or [row for row in groups if not row.name.endswith(".lr_scale")]


def _unknown(comparison: Comparison) -> str:
    if comparison.first_difference == "data":
        return "one run ends earlier although config and data agree: its recording may have been cut"
    if comparison.first_difference == "loss" and not any(row.column == "state_digest" for row in comparison.trace):
        return (
            "a recorded loss differs although all states agree: a nondeterministic reduction, a memory error, or a "
            "recording that was changed"
        )
    if comparison.generators and not comparison.trace:
        return (
            "the generator states differ although every step and state agrees: something drew random numbers between "
            "the steps"
        )
    others = [row.name for row in (*comparison.environment, *comparison.other)]
    agree = "although config, seeds, data, code and environment agree"
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        agree = f"although nothing differs that is known to change them (only {', '.join(others[:SHOWN])}{more})"
    return (
        f"bits differ {agree}: a nondeterministic kernel, a memory error, or memory that was read before anything was "
        f"written to it"
    )


def _environment(comparison: Comparison, *patterns: tuple[str, ...]) -> list[Difference]:
    return _chosen(comparison.environment, sum(patterns, ()))


def _chosen(rows: Iterable[Difference], patterns: tuple[str, ...]) -> list[Difference]:
    return [row for row in rows if _matches(row.name, patterns)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _values(start: str, rows: list[Difference]) -> str:
    """``start`` and ``train.lr is 0.05 in A and 0.1 in B``; nothing without rows."""
    if not rows:
        return ""
    more = f", and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{start}{', '.join(map(_value, rows[:SHOWN]))}{more}"


def _named(start: str, rows: list[Difference]) -> str:
    """``start`` and ``torch, numpy and 3 more``; nothing without rows."""
    if not rows:
        return ""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{start}{', '.join(map(_name, rows[:SHOWN]))}{more}"


def _value(row: Difference) -> str:
    return f"{_name(row)} is {_sides(row.a, row.b)}"


def _name(row: Difference) -> str:
    return row.name.removeprefix("packages.installed.")


def _sides(a: str | None, b: str | None) -> str:
    return f"{_short(a)} in A and {_short(b)} in B"


def _short(value: str | None) -> str:
    if not value:
        return "none" if value is None else "empty"
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}…"
