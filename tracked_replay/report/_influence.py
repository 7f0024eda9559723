"""What the report of influence scores shows, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ._canvas import check_length, finite
from ._pictures import Picture


@dataclass(frozen=True, eq=False)
class InfluentialExample:
    """A training example and its score.

    Attributes:
        picture: the image with label, index and score.
        along: (steps,) its score summed up to and including each step; ``None`` where that is not known.
    """

    picture: Picture
    along: np.ndarray | None = None

    @property
    def score(self) -> float:
        """Its score."""
        return float(self.picture.score or 0.0)

    @property
    def acting(self) -> tuple[int, int] | None:
        """The first and the last step that changed its score; ``None`` where that is not known or none did."""
        if self.along is None:
            return None
        steps = np.flatnonzero(np.diff(self.along, prepend=0.0))
        return (int(steps[0]), int(steps[-1])) if len(steps) else None


@dataclass(frozen=True)
class Prediction:
    """What the model says about an evaluation example.

    Attributes:
        label: the class with the largest output.
        right: whether it is the example's own.
        probability: that the model gives it; ``None`` where its outputs are no probabilities.
    """

    label: str
    right: bool
    probability: float | None = None


@dataclass(frozen=True, eq=False)
class RetrainedTarget:
    """What retrainings without a random share of the examples said about a target.

    Attributes:
        drop: the share.
        predicted: (subsets,) measurements that the scores predict.
        actual: (subsets,) measurements after retraining.
        spearman: their rank correlation; NaN where it is undefined.
    """

    drop: float
    predicted: np.ndarray
    actual: np.ndarray
    spearman: float


@dataclass(frozen=True, eq=False)
class InfluenceTarget:
    """A measurement that influence was asked on.

    Attributes:
        key: short and unique, of letters, digits and dashes: ``21``, ``combination-1``.
        name: what people call it: ``21``, ``mean:all``.
        measurement: its value on the trained model.
        pictures: the evaluation examples that it is about; of many, the first few.
        size: how many they are.
        prediction: what the model says, for a target of one example.
        helpful: training examples with the lowest scores, lowest first, all below 0.
        harmful: those with the highest, highest first, all above 0.
        scores: (training examples,) all scores.
        absolute: (steps,) the sum of the absolute scores of each step; ``None`` where that is not known.
        retrained: outcomes of retrainings, where there are any.
    """

    key: str
    name: str
    measurement: float
    pictures: Sequence[Picture]
    size: int
    prediction: Prediction | None
    helpful: Sequence[InfluentialExample]
    harmful: Sequence[InfluentialExample]
    scores: np.ndarray
    absolute: np.ndarray | None = None
    retrained: RetrainedTarget | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.measurement):
            raise ValueError(f"target {self.name}: its measurement is {self.measurement}")
        finite(f"scores of target {self.name}", self.scores, 1)
        for side, examples, sign in (("helpful", self.helpful, -1), ("harmful", self.harmful, 1)):
            for example in examples:
                if example.score * sign <= 0:
                    raise ValueError(
                        f"target {self.name}: {side} holds training example {example.picture.index} with score "
                        f"{example.score}; allowed: scores {'below' if sign < 0 else 'above'} 0"
                    )


@dataclass(frozen=True, eq=False)
class ClassInfluence:
    """Mean score of the training examples of each class on targets of each class.

    Attributes:
        rows: name of a class of targets and how many it has, or of a target that is a mean and 0.
        columns: names of the classes of training examples.
        means: (rows, columns); NaN for a class without training examples.
    """

    rows: Sequence[tuple[str, int]]
    columns: Sequence[str]
    means: np.ndarray

    def __post_init__(self) -> None:
        check_length("means", len(self.means), len(self.rows), "rows")
        check_length("each row of means", self.means.shape[1], len(self.columns), "columns")


@dataclass(frozen=True)
class Agreement:
    """How a method's predictions agree with retrainings: the linear datamodeling score (LDS).

    Attributes:
        drop: share of the training examples removed.
        method: ``magic`` or a baseline.
        lds: mean rank correlation over the targets; NaN where it is undefined.
        low: lower end of its interval.
        high: upper end.
        retrainings: how many there were.
    """

    drop: float
    method: str
    lds: float
    low: float
    high: float
    retrainings: int


@dataclass(frozen=True)
class Validation:
    """A validation of the scores by retraining.

    Attributes:
        agreements: one entry a share and method, those of ``magic`` at the first share first.
        confidence: of the intervals.
        smoothness: a sentence on the metasmoothness; empty where it was not asked for.
    """

    agreements: Sequence[Agreement]
    confidence: float
    smoothness: str = ""


@dataclass(frozen=True)
class Fact:
    """Where something on the page comes from.

    Attributes:
        name: what it is.
        value: shown as text, behind a link where the page has one for it.
        note: more words.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class InfluencePage:
    """Everything that `influence_page` shows.

    Attributes:
        task: name of the learning problem.
        targets: those that are shown.
        targets_in_all: how many the run has.
        training_examples: how many there are.
        steps: of the recorded training.
        accuracy: share of right predictions on the evaluation examples, where it is known.
        is_loss: whether the measurement is a loss, so that lower is better.
        exact: whether the scores are exact.
        classes: mean scores by class, where there are any.
        validation: by retraining, where it was done.
        validate_command: what to run where it was not.
        facts: lineage, seed, environment.
        links: URL by value of a fact; only http and https become links.
    """

    task: str
    targets: Sequence[InfluenceTarget]
    targets_in_all: int
    training_examples: int
    steps: int
    accuracy: float | None
    is_loss: bool
    exact: bool
    classes: ClassInfluence | None
    validation: Validation | None
    validate_command: str
    facts: Sequence[Fact]
    links: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("there are no targets to show: targets is empty")
        keys = [target.key for target in self.targets]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two targets have the same key: {keys}")
