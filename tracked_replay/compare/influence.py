"""Compares the influence scores of two runs, target by target, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tracked_replay.compare.result import EXIT_CODES, NOT_IN_FILE, Difference, Verdict, _plain
from tracked_replay.errors import NumericalError
from tracked_replay.replay import Target

TOP = 20  # most helpful examples of a target, and as many most harmful ones
MOVED = 10  # examples listed for a target, by rank and by score
LISTED = 6  # targets named one by one in a summary
MAX_NAME = 24
# Share of the largest score up to which a difference is called rounding; a matter of words, no verdict hangs on it.
# float32 rounds a number by up to 6e-8 of it, and the errors of 10,000 terms add up to about a hundred times that.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class InfluenceTable:
    """The scores of one run.

    Attributes:
        run: what the run is called: its ID.
        data: fingerprint of the data that it was trained and evaluated on.
        targets: what influence was asked on.
        scores: (targets, training examples) float64.
        labels: (training examples,) int64.

    Raises:
        NumericalError: a score is NaN or Inf.
    """

    run: str
    data: str
    targets: Sequence[Target]
    scores: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        bad = np.argwhere(~np.isfinite(self.scores))
        if len(bad):
            row, index = bad[0]
            raise NumericalError(
                f"{self.run}: the score of training example {index} on target {self.targets[row].name} is "
                f"{self.scores[row, index]}"
            )


class MovedExample(NamedTuple):
    """A training example whose score on a target is not the same in both runs.

    Attributes:
        train_index: which one.
        label: its label.
        score_a, score_b: its score in each run.
        rank_a, rank_b: its place among all training examples, 1 for the most helpful (lowest) score; examples of equal
            score share the mean of their places.
    """

    train_index: int
    label: int
    score_a: float
    score_b: float
    rank_a: float
    rank_b: float


class Overlap(NamedTuple):
    """How many of the strongest examples of one run are among the strongest of the other.

    Attributes:
        common: examples that both have.
        of: examples that the run with more of them has: ``TOP``, or fewer where fewer scores have that sign.
    """

    common: int
    of: int

    @property
    def share(self) -> float | None:
        """0 to 1; ``None`` where neither run has any."""
        return self.common / self.of if self.of else None


@dataclass(frozen=True)
class TargetComparison:
    """The scores of all training examples on one target, in two runs.

    Attributes:
        name: of the target, as the first run calls it.
        target_a, target_b: its ID in each run.
        differing: scores whose bits differ.
        spearman: rank correlation; ``None`` where the scores of a run are all the same.
        pearson: linear correlation, likewise.
        helpful: overlap of the most helpful examples (the lowest scores, below 0).
        harmful: overlap of the most harmful examples (the highest scores, above 0).
        moved_in_rank: examples among the most helpful or harmful of either run whose rank changed most.
        moved_in_score: examples whose score changed most.
        same_ranking: whether every example has the same rank in both.
        largest: largest difference of a score, as a share of the largest score of either run.
    """

    name: str
    target_a: int
    target_b: int
    differing: int
    spearman: float | None
    pearson: float | None
    helpful: Overlap
    harmful: Overlap
    moved_in_rank: tuple[MovedExample, ...] = ()
    moved_in_score: tuple[MovedExample, ...] = ()
    same_ranking: bool = field(default=True, metadata=NOT_IN_FILE)
    largest: float = field(default=0.0, metadata=NOT_IN_FILE)


@dataclass(frozen=True)
class InfluenceComparison:
    """The influence scores of two runs side by side: the content of ``compare/influence.json``.

    Attributes:
        a, b: the runs.
        verdict: ``identical`` (all scores on common targets, bit for bit), ``different`` or ``incomparable``.
        summary: one or two sentences for people.
        examples: number of training examples; ``None`` where it is not the same.
        targets: those that both runs have, in the order of the first.
        only_a, only_b: names of the targets that one run alone has.
        spearman, pearson: mean over the targets where it is defined; ``None`` where it is for none.
        top_overlap: mean share of the most helpful and the most harmful examples that both runs have, over the targets
            and both sides; ``None`` where there are no such examples.
        training_a, training_b: what was replayed: the IDs of the training runs.
        training: whether that was the same, in one sentence.
        inputs: what the runs were computed from, where it differs: config fields, code, exactness.
    """

    a: str
    b: str
    verdict: Verdict
    summary: str
    examples: int | None = None
    targets: tuple[TargetComparison, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    spearman: float | None = None
    pearson: float | None = None
    top_overlap: float | None = None
    training_a: str = ""
    training_b: str = ""
    training: str = ""
    inputs: tuple[Difference, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 identical, 1 different, 2 incomparable."""
        return EXIT_CODES[self.verdict]

    @property
    def closeness(self) -> str:
        """How near different scores are to each other, a sentence without its full stop; empty where they are not."""
        return _closeness(self.targets) if self.verdict == "different" else ""

    @property
    def only_rounding(self) -> bool:
        """Whether scores differ, and none by more than rounding does."""
        return self.verdict == "different" and _largest(self.targets) <= ROUNDING

    def to_json_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold; named tuples become objects."""
        value: dict[str, Any] = _plain(self)
        return value


def compare_influence(a: InfluenceTable, b: InfluenceTable) -> InfluenceComparison:
    """Compare the scores of two runs on the targets that both have.

    Targets are the same where they are the same combination of evaluation examples, whatever they are called.
    """
    reason = _incomparable(a, b)
    if reason:
        return InfluenceComparison(a.run, b.run, "incomparable", reason)
    in_a, in_b = _finder(a.targets), _finder(b.targets)
    pairs = [(row, place) for row, target in enumerate(a.targets) if (place := in_b(target)) is not None]
    only_a = tuple(target.name for target in a.targets if in_b(target) is None)
    only_b = tuple(target.name for target in b.targets if in_a(target) is None)
    examples = a.scores.shape[1]
    if not pairs:
        summary = f"The runs have no target in common: A has {_listed(only_a)}; B has {_listed(only_b)}."
        return InfluenceComparison(a.run, b.run, "incomparable", summary, examples, (), only_a, only_b)
    found = tuple(_compare_target(a, row, b, other) for row, other in pairs)
    return InfluenceComparison(
        a.run,
        b.run,
        "different" if any(target.differing for target in found) else "identical",
        _summary(found, examples, only_a, only_b),
        examples,
        found,
        only_a,
        only_b,
        spearman=_mean([target.spearman for target in found]),
        pearson=_mean([target.pearson for target in found]),
        top_overlap=_mean([side.share for target in found for side in (target.helpful, target.harmful)]),
    )


def _incomparable(a: InfluenceTable, b: InfluenceTable) -> str:
    """Why scores of two runs are not of the same examples; nothing where they are."""
    counts = a.scores.shape[1], b.scores.shape[1]
    if a.data == b.data and counts[0] == counts[1]:
        return ""
    found = (
        f"{counts[0]:,} and {counts[1]:,} training examples"
        if counts[0] != counts[1]
        else f"their fingerprints are {a.data[:16]}… and {b.data[:16]}…"
    )
    return f"The runs were trained or evaluated on different data ({found}), so their scores are of different things."


def _finder(targets: Sequence[Target]) -> Callable[[Target], int | None]:
    """Says where the same combination stands; one in the same order goes first, since the order decides last bits."""
    in_order, as_set = (
        {key(target): place for place, target in reversed(list(enumerate(targets)))} for key in (_in_order, _as_set)
    )
    return lambda target: in_order.get(_in_order(target), as_set.get(_as_set(target)))


def _in_order(target: Target) -> tuple[tuple[int, float], ...]:
    return tuple(zip(target.indices, target.coefficients, strict=True))


def _as_set(target: Target) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(_in_order(target)))


def _compare_target(a: InfluenceTable, row: int, b: InfluenceTable, other: int) -> TargetComparison:
    one, two = (np.ascontiguousarray(values, dtype=np.float64) for values in (a.scores[row], b.scores[other]))
    differing = int(np.count_nonzero(one.view(np.uint64) != two.view(np.uint64)))
    helpful, harmful = ((_top(one, sign), _top(two, sign)) for sign in (1, -1))
    by_rank, by_score = _moved(one, two, a.labels, np.unique(np.concatenate([*helpful, *harmful])))
    return TargetComparison(
        a.targets[row].name,
        a.targets[row].id,
        b.targets[other].id,
        differing,
        _spearman(one, two),
        _pearson(one, two),
        _overlap(*helpful),
        _overlap(*harmful),
        by_rank,
        by_score,
        same_ranking=bool(np.array_equal(stats.rankdata(one), stats.rankdata(two))),
        largest=_share_of_largest(one, two),
    )


def _share_of_largest(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest score; scaled first, so that scores of any size have one."""
    largest = max(np.abs(a).max(), np.abs(b).max())
    return float(np.abs(a / largest - b / largest).max()) if largest else 0.0


def _top(scores: np.ndarray, sign: int) -> np.ndarray:
    """Indices of the strongest scores of one sign: most helpful (1), most harmful (−1)."""
    order = np.argsort(sign * scores, kind="stable")[:TOP]
    return order[sign * scores[order] < 0]


def _overlap(a: np.ndarray, b: np.ndarray) -> Overlap:
    return Overlap(len(np.intersect1d(a, b)), max(len(a), len(b)))


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if _constant(a) or _constant(b):
        return None
    return float(stats.spearmanr(a, b).statistic)


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if _constant(a) or _constant(b):
        return None
    one, two = _deviations(a), _deviations(b)
    # Apart in the last bits only, so that rounding leaves nothing.
    return float(stats.pearsonr(one, two).statistic) if one.any() and two.any() else None


def _constant(values: np.ndarray) -> bool:
    return bool(values.min() == values.max())


def _deviations(values: np.ndarray) -> np.ndarray:
    """Deviations from the mean in a unit of about their size: scipy's own sums would over- or underflow."""
    scaled = values / np.abs(values).max()
    deviations = scaled - scaled.mean()
    return deviations / (np.abs(deviations).max() or 1.0)


def _moved(
    a: np.ndarray, b: np.ndarray, labels: np.ndarray, strongest: np.ndarray
) -> tuple[tuple[MovedExample, ...], tuple[MovedExample, ...]]:
    """Examples whose rank changed most, of the strongest, and those whose score changed most, of all."""
    ranks_a, ranks_b = stats.rankdata(a), stats.rankdata(b)

    def listed(change: np.ndarray, among: np.ndarray) -> tuple[MovedExample, ...]:
        order = among[np.argsort(-change[among], kind="stable")][:MOVED]
        return tuple(
            MovedExample(i, int(labels[i]), float(a[i]), float(b[i]), float(ranks_a[i]), float(ranks_b[i]))
            for i in map(int, order)
            if change[i] > 0
        )

    with np.errstate(over="ignore"):
        changes = np.abs(a - b)
    return listed(np.abs(ranks_a - ranks_b), strongest), listed(changes, np.arange(len(a)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _largest(found: Sequence[TargetComparison]) -> float:
    return max(target.largest for target in found)


def _share_text(share: float) -> str:
    return f"{share:.1g} of the largest score".replace("e-0", "e-")


def _closeness(found: Sequence[TargetComparison]) -> str:
    """The headline of scores that are near to each other; empty where they are not."""
    largest = f"largest difference {_share_text(_largest(found))}"
    same = all(target.same_ranking for target in found)
    if _largest(found) <= ROUNDING:
        if same:
            return f"Same ranking; the scores differ only by rounding ({largest})"
        return f"The scores differ only by rounding ({largest}), which moves a few ranks"
    return f"Same ranking, but the scores differ ({largest})" if same else ""


def _difference(found: Sequence[TargetComparison], examples: int) -> str:
    """How many scores differ, and, where they are near to each other, by how much."""
    of = f"{_count(examples, 'training example')} on {_count(len(found), 'target')}"
    differing, total = sum(target.differing for target in found), examples * len(found)
    counts = f"{differing:,} of {total:,} scores differ in their bits"
    if not _closeness(found):
        return f"Different: {counts} ({of})."
    start = "Only rounding" if _largest(found) <= ROUNDING else "Same ranking, other scores"
    return f"{start}: {counts}, by at most {_share_text(_largest(found))} ({of})."


def _summary(found: Sequence[TargetComparison], examples: int, only_a: Sequence[str], only_b: Sequence[str]) -> str:
    equal = sum(not target.differing for target in found)
    if equal == len(found):
        of = f"{_count(examples, 'training example')} on {_count(len(found), 'target')}"
        sentences = [f"Identical bit for bit: the scores of {of}."]
    else:
        sentences = [_difference(found, examples)]
        if equal:
            sentences.append(f"On {_count(equal, 'target')} all are equal.")
    constant = [target.name for target in found if target.spearman is None]
    if constant:
        sentences.append(f"No correlation on {_listed(constant)}: in a run all scores there are the same.")
    if only_a or only_b:
        parts = [f"{_listed(only)} (only {run} has {'it' if len(only) == 1 else 'them'})"
                 for run, only in (("A", only_a), ("B", only_b)) if only]  # fmt: skip
        sentences.append(f"Not compared: {', '.join(parts)}.")
    return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(targets: Sequence[str]) -> str:
    shown = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in targets[:LISTED]]
    more = len(targets) - len(shown)
    return f"{', '.join(shown)}{f' and {more:,} more' if more else ''}"
