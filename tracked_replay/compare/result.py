"""What a comparison finds, as plain values: the content of ``compare/comparison.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Verdict = Literal["identical", "different", "incomparable"]
FirstDifference = Literal["data", "lr", "loss", "state"]
EXIT_CODES: dict[Verdict, int] = {"identical": 0, "different": 1, "incomparable": 2}
ULP = "neighbouring floating-point numbers are 1 ULP apart"  # for the first time that a text speaks of ULP
NOT_IN_FILE = {"in_file": False}  # metadata of a field that is no part of the JSON file
ASKED_FOR = ("seed", "config", "lr")  # causes that a config field is enough for


@dataclass(frozen=True)
class Tolerance:
    """What does not count as a difference; the default lets nothing pass.

    Attributes:
        max_ulp: losses and floating-point or complex tensor elements at most this many representable numbers apart
            count as equal; integers and bools must agree.
        ignore: what is left out of the verdict: patterns of tensor names (``momentum/*``), or the aspects ``data``,
            ``lr``, ``loss``, ``generators``.
    """

    max_ulp: int = 0
    ignore: tuple[str, ...] = ()


class Difference(NamedTuple):
    """A named value that differs, as text; ``None`` where one side does not have it.

    Attributes:
        name: of the value, such as ``train.lr`` or ``packages.installed.torch``.
        a: on the first side.
        b: on the second.
    """

    name: str
    a: str | None
    b: str | None


class Cause(NamedTuple):
    """Why two runs differ, where it is known.

    Attributes:
        name: ``seed``, ``threads``, ``lr``, ``data``, ``config``, ``code``, ``versions``, ``device``, ``processor``,
            ``determinism`` or ``unknown``.
        text: one sentence for people.
    """

    name: str
    text: str


@dataclass(frozen=True)
class TensorComparison:
    """Two tensors of one name, bit for bit.

    Attributes:
        name: ``kind/name``, for example ``parameters/head.weight``.
        equal: whether they count as equal under the tolerance.
        difference: ``none``, ``missing in a``, ``missing in b``, ``dtype``, ``shape`` or ``values``.
        dtype_a, dtype_b: for example ``float32``; ``None`` on the side that lacks the tensor.
        shape_a, shape_b: likewise.
        elements: number of elements (of the side that has the tensor, where one lacks it; of a, where shapes differ).
            Only tensors of one dtype and shape are compared further: all that follows stays empty for others.
        differing: elements whose bits differ.
        beyond: elements that differ by more than the tolerance lets pass (all of ``differing`` without one).
        largest_absolute: largest |a − b| over the differing elements, in float64; NaN and infinite differences are
            left out; ``None`` where nothing is left.
        largest_relative: largest |a − b| / max(|a|, |b|), likewise.
        largest_ulp: largest distance counted in representable numbers of the dtype (−0 and +0 are 1 apart); integers:
            |a − b|; elements with a NaN on one or both sides are left out.
        median_ulp: median over the same elements.
        first_index: index of the first element, in C order, that differs.
        first_a, first_b: that element on both sides as ``value (0xbits)``.
        nan_on_one_side: elements that are NaN on one side only.
        nan_payloads: elements that are NaN on both sides with different bits.
        signed_zeros: elements that are zero on both sides with different signs.
        subnormals: differing elements where a side is subnormal.
        infinities: differing elements where a side is infinite.
    """

    name: str
    equal: bool
    difference: str
    dtype_a: str | None
    dtype_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    elements: int
    differing: int = 0
    beyond: int = 0
    largest_absolute: float | None = None
    largest_relative: float | None = None
    largest_ulp: int | None = None
    median_ulp: float | None = None
    first_index: tuple[int, ...] | None = None
    first_a: str | None = None
    first_b: str | None = None
    nan_on_one_side: int = 0
    nan_payloads: int = 0
    signed_zeros: int = 0
    subnormals: int = 0
    infinities: int = 0

    @property
    def share(self) -> float:
        """Share of elements whose bits differ, 0 to 1."""
        return self.differing / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class TraceDifference:
    """The first step at which one column of the batch traces differs.

    Attributes:
        column: ``epoch``, ``indices``, ``labels``, ``lr``, ``loss`` or ``state_digest``.
        step: the step.
        count: steps at which it differs.
        a: its value there on the first side, shortened.
        b: on the second.
    """

    column: str
    step: int
    count: int
    a: str
    b: str


@dataclass(frozen=True)
class Drift:
    """How far the states are apart along the training, at some steps (for the figure).

    Attributes:
        steps: state numbers, rising.
        tensors: names of the tensors.
        largest_absolute: a row a tensor, a column a step; 0 where equal, ``None`` where it cannot be said.
    """

    steps: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    largest_absolute: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two training runs, or two sets of checkpoint files, side by side.

    Attributes:
        a, b: what was compared: run IDs, or paths.
        verdict: ``identical``, ``different`` or ``incomparable``.
        summary: one or two sentences for people, the tolerance in force included.
        tolerance: what did not count.
        first_divergent_step: first step at which the runs part, ``None`` where they do not (or for files without
            steps).
        first_difference: what differed first there.
        first_tensor: name of the first tensor that differs after that step, where states were at hand.
        causes: likely causes, most likely first.
        steps_a, steps_b: number of steps of each run.
        tensors: all tensors of the last common state; of files, those of the first that differs.
        tensors_step: number of that state.
        first_tensors: tensors that differ in the state after the first divergent step (before the first step, where
            the initial states differ).
        trace: columns of the batch trace that differ.
        generators: generator states that differ: of runs by the step that they stand before (their digests), of files
            by file name (SHA-256 of the files).
        seeds, config, environment, other: values that differ; ``other`` holds code digest, data fingerprint and the
            like.
        drift: distance of the states along the training.
    """

    a: str
    b: str
    verdict: Verdict
    summary: str
    tolerance: Tolerance = Tolerance()
    first_divergent_step: int | None = None
    first_difference: FirstDifference | None = None
    first_tensor: str | None = None
    causes: tuple[Cause, ...] = ()
    steps_a: int | None = None
    steps_b: int | None = None
    tensors: tuple[TensorComparison, ...] = ()
    tensors_step: int | None = None
    first_tensors: tuple[TensorComparison, ...] = ()
    trace: tuple[TraceDifference, ...] = ()
    generators: tuple[Difference, ...] = ()
    seeds: tuple[Difference, ...] = ()
    config: tuple[Difference, ...] = ()
    environment: tuple[Difference, ...] = ()
    other: tuple[Difference, ...] = ()
    drift: Drift = field(default_factory=Drift)

    @property
    def exit_code(self) -> int:
        """0 identical, 1 different, 2 incomparable."""
        return EXIT_CODES[self.verdict]

    @property
    def environment_matters(self) -> bool:
        """Whether the environments may be why they differ: not where they do not, or where the config is enough."""
        asked_for = self.causes and self.causes[0].name in ASKED_FOR and (self.config or self.seeds)
        return self.verdict == "different" and not asked_for

    def to_json_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold; named tuples become objects."""
        value: dict[str, Any] = _plain(self)
        return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [item.name for item in dataclasses.fields(value) if item.metadata.get("in_file", True)]
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
