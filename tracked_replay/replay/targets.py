"""Targets: which measurement the influence is on."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracked_replay.errors import ConfigError

FORMS = "an index (21), a range (0-7), a list (0,5,9), all, a mean (mean:0-99), or several of these joined by ';'"


@dataclass(frozen=True)
class Target:
    """A linear combination of measurements: ``φ = Σ cⱼ · measurement(evaluation example j)``.

    One replay gives the influence on any such combination.

    Attributes:
        id: the evaluation index for a single example; −1, −2, … for combinations.
        name: what people read, for example ``21`` or ``mean:0-99``.
        indices: evaluation indices j, without repetition.
        coefficients: the factors cⱼ.
    """

    id: int
    name: str
    indices: tuple[int, ...]
    coefficients: tuple[float, ...]

    @classmethod
    def single(cls, index: int) -> Target:
        """The measurement of one evaluation example."""
        return cls(index, str(index), (index,), (1.0,))

    @classmethod
    def mean(cls, indices: Sequence[int], name: str, id: int = -1) -> Target:
        """The mean measurement over a set of evaluation examples."""
        return cls(id, name, tuple(indices), (1.0 / len(indices),) * len(indices))

    def to_json_dict(self) -> dict[str, Any]:
        """A JSON-able form with every field."""
        return {
            "target": self.id,
            "name": self.name,
            "indices": list(self.indices),
            "coefficients": list(self.coefficients),
        }


def combine(targets: Sequence[Target], measurements: np.ndarray) -> np.ndarray:
    """Measurements of targets, (targets,) float64, from those of every evaluation example, (evaluation examples,)."""
    return np.array([measurements[list(target.indices)] @ np.array(target.coefficients) for target in targets])


def parse_targets(text: str | int | Sequence[int], num_evaluation: int) -> tuple[Target, ...]:
    """Parse what ``targets`` takes.

    Args:
        text: ``"21"``, ``"0-7"``, ``"0,5,9"``, ``"mean:0-99"``, ``"mean:all;0-3"``; in Python also an index or a
            sequence of indices.
        num_evaluation: number of evaluation examples.

    Raises:
        ConfigError: empty, malformed, repeated or out of range.
    """
    text = text if isinstance(text, str) else _as_text(text)
    targets: list[Target] = []
    for group in text.split(";"):
        group = group.strip()
        if group.startswith("mean:"):
            indices = _indices(group.removeprefix("mean:"), num_evaluation)
            combined = sum(target.id < 0 for target in targets)
            targets.append(Target.mean(indices, group, -1 - combined))
        else:
            targets += [Target.single(index) for index in _indices(group, num_evaluation)]
    names = [target.name for target in targets]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"targets: {repeated} is given twice in {text!r}")
    return tuple(targets)


def _as_text(given: object) -> str:
    """An index or a sequence of them, NumPy's included, in the textual form."""
    given = given if isinstance(given, Iterable) else [given]
    parts = []
    for index in given:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ConfigError(f"targets: found {index!r}; allowed: {FORMS}")
        parts.append(str(operator.index(index)))
    return ",".join(parts)


def _indices(text: str, num_evaluation: int) -> list[int]:
    if not text.strip():
        raise ConfigError(f"targets: nothing was given; allowed: {FORMS}")
    indices: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", item)
        if item == "all":
            indices += range(num_evaluation)
            continue
        if span is None:
            shown = item if len(item) <= 40 else f"{item[:40]}…"
            raise ConfigError(f"targets: found {shown!r}; allowed: {FORMS}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise ConfigError(f"targets: the range {item!r} runs backwards; allowed: {last}-{first}")
        if last >= num_evaluation:
            raise ConfigError(f"targets: found {last}; allowed: 0 to {num_evaluation - 1}, the evaluation examples")
        indices += range(first, last + 1)
    repeated = next((index for index in indices if indices.count(index) > 1), None) if len(indices) < 1000 else None
    if repeated is not None or len(set(indices)) != len(indices):
        raise ConfigError(f"targets: {repeated if repeated is not None else 'an index'} is given twice in {text!r}")
    return indices
