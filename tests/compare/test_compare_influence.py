"""Two tables of influence scores: correlation, overlap, what moved, and when they cannot be compared."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tracked_replay.compare.influence import (
    MOVED,
    ROUNDING,
    TOP,
    InfluenceComparison,
    InfluenceTable,
    compare_influence,
)
from tracked_replay.errors import NumericalError
from tracked_replay.replay import Target

DATA = "d" * 64


def table(run: str, scores: object, *targets: Target, data: str = DATA) -> InfluenceTable:
    values = np.asarray(scores, dtype=np.float64)
    values = values[None] if values.ndim == 1 else values
    labels = np.arange(values.shape[1]) % 3
    return InfluenceTable(run, data, targets or tuple(map(Target.single, range(len(values)))), values, labels)


def compare(a: object, b: object) -> InfluenceComparison:
    return compare_influence(table("one", a), table("two", b))


def random_scores(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the lowest; equal values share the mean of their places."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_the_same_scores_are_identical() -> None:
    scores = random_scores(3, 100)
    found = compare(scores, scores.copy())
    assert (found.verdict, found.exit_code) == ("identical", 0)
    assert (found.a, found.b, found.examples, len(found.targets)) == ("one", "two", 100, 3)
    assert found.summary == "Identical bit for bit: the scores of 100 training examples on 3 targets."
    assert [target.differing for target in found.targets] == [0, 0, 0]
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)
    assert found.top_overlap == 1
    assert not any(target.moved_in_rank or target.moved_in_score for target in found.targets)


@pytest.mark.parametrize("other", [np.nextafter(0.5, 1), -0.0])
def test_one_bit_is_a_difference(other: float) -> None:
    scores = np.concatenate([[0.5 if other > 0 else 0.0], random_scores(40)])
    changed = scores.copy()
    changed[0] = other
    found = compare(scores, changed)
    assert (found.verdict, found.exit_code, found.targets[0].differing) == ("different", 1, 1)
    assert found.spearman == pytest.approx(1)
    assert re.fullmatch(
        r"Only rounding: 1 of 41 scores differ in their bits, by at most (0|\de-17) of the largest score "
        r"\(41 training examples on 1 target\)\.",
        found.summary,
    )


ROUNDED = "largest difference 3e-8 of the largest score"


@pytest.mark.parametrize(
    ("a", "b", "closeness", "rounding"),
    [
        ([4.0, -2.0, 1.0], [4.0, -2.0 + 12e-8, 1.0],
         f"Same ranking; the scores differ only by rounding ({ROUNDED})", True),
        ([4.0, 1.0, 1.0 + 4e-8], [4.0, 1.0 + 12e-8, 1.0 + 4e-8],
         f"The scores differ only by rounding ({ROUNDED}), which moves a few ranks", True),
        ([4.0, -2.0, 1.0], [4.0, -2.0, 2.0],
         "Same ranking, but the scores differ (largest difference 0.2 of the largest score)", False),
        ([4.0, -2.0, 1.0], [-2.0, 4.0, 1.0], "", False),
        ([4.0, -2.0, 1.0], [4.0, -2.0, 1.0], "", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1e-300, 1.0, 4e307])
def test_scores_that_differ_by_rounding_are_told_from_others(
    a: list[float], b: list[float], closeness: str, rounding: bool, scale: float
) -> None:
    one, two = np.array([a, a]) * scale, np.array([b, a]) * scale
    found = compare(one, two)
    assert (found.closeness, found.only_rounding) == (closeness, rounding)
    assert found.verdict == ("identical" if a == b else "different")  # the bits decide
    assert found.summary.startswith("Only rounding: ") == rounding
    assert not {"same_ranking", "largest"} & set(found.to_json_dict()["targets"][0])


def test_the_bound_of_rounding() -> None:
    scores = np.array([2.0, 1.0, -1.0])
    for share, rounding in ((0.9 * ROUNDING, True), (1.1 * ROUNDING, False)):
        found = compare(scores, scores + np.array([0, 0, 2 * share]))
        assert found.only_rounding == rounding
        assert found.closeness.startswith("Same ranking")
    assert compare(np.zeros(3), -np.zeros(3)).closeness.endswith("(largest difference 0 of the largest score)")


def test_correlations_are_those_of_ranks_and_numbers() -> None:
    a = random_scores(2, 200)
    b = a + 0.5 * random_scores(2, 200, seed=1)
    b[1, :50] = b[1, 0]  # ties
    found = compare(a, b)
    for row, target in enumerate(found.targets):
        assert target.pearson == pytest.approx(np.corrcoef(a[row], b[row])[0, 1])
        assert target.spearman == pytest.approx(np.corrcoef(ranks(a[row]), ranks(b[row]))[0, 1])
    assert found.spearman == pytest.approx(np.mean([target.spearman for target in found.targets]))
    assert found.pearson == pytest.approx(np.mean([target.pearson for target in found.targets]))
    turned = compare(a, -a)
    assert (turned.spearman, turned.pearson) == (pytest.approx(-1), pytest.approx(-1))
    assert turned.top_overlap == 0


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200, 1e308])
def test_scores_of_any_size_have_a_correlation(scale: float) -> None:
    a, b = np.abs(random_scores(2, 50)) / 3  # all of one sign, so that their sum overflows
    found = compare(a * scale, b * scale)
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-3)
    assert json.dumps(found.to_json_dict(), allow_nan=False)


def test_without_variation_there_is_no_correlation() -> None:
    vary = random_scores(2, 30)
    same = np.stack([np.zeros(30), vary[1]])
    found = compare(vary, same)
    assert (found.targets[0].spearman, found.targets[0].pearson) == (None, None)
    assert found.spearman == found.targets[1].spearman == pytest.approx(1)
    assert found.summary == (
        "Different: 30 of 60 scores differ in their bits (30 training examples on 2 targets). "
        "On 1 target all are equal. No correlation on 0: in a run all scores there are the same."
    )
    neither = compare(np.full((1, 30), 2.0), np.full((1, 30), 2.0))
    assert (neither.verdict, neither.spearman, neither.pearson) == ("identical", None, None)
    zeros = compare(np.zeros((1, 30)), np.zeros((1, 30)))
    assert (zeros.verdict, zeros.top_overlap) == ("identical", None)


def test_scores_apart_in_the_last_bits_only() -> None:
    values = np.full(9, 1 / 3)
    values[0] = np.nextafter(values[0], 1)
    found = compare(values, random_scores(9))
    assert found.targets[0].spearman is not None
    assert found.targets[0].pearson is None or abs(found.targets[0].pearson) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_examples(count: int) -> None:
    found = compare(np.arange(count) - 1.0, -np.arange(count))
    assert found.verdict == "different"
    assert (found.spearman is None) == (count == 1)


def test_the_strongest_of_each_sign_overlap() -> None:
    a, b = random_scores(1, 300), random_scores(1, 300, seed=5)
    (target,) = compare(a, b).targets
    lowest, highest = (set(np.argsort(a[0])[:TOP]) & set(np.argsort(b[0])[:TOP]),
                       set(np.argsort(-a[0])[:TOP]) & set(np.argsort(-b[0])[:TOP]))  # fmt: skip
    assert target.helpful == (len(lowest), 20)
    assert target.harmful == (len(highest), 20)
    few = np.array([-3.0, -2.0, -1.0, 0.0, 0.0])
    (target,) = compare(few, [-3.0, 0.0, 0.0, 0.0, 1.0]).targets
    assert (target.helpful, target.harmful) == ((1, 3), (0, 1))
    assert compare(few, [-3.0, 0.0, 0.0, 0.0, 1.0]).top_overlap == pytest.approx((1 / 3 + 0) / 2)


def test_what_moved_most_is_listed() -> None:
    a = random_scores(1, 400)
    b = a + 0.3 * random_scores(1, 400, seed=3)
    (target,) = compare(a, b).targets
    one, two = ranks(a[0]), ranks(b[0])
    strongest = {
        int(index) for values in (a[0], b[0]) for index in (*np.argsort(values)[:TOP], *np.argsort(-values)[:TOP])
    }
    by_rank = sorted(strongest, key=lambda index: (-abs(one[index] - two[index]), index))[:MOVED]
    assert [example.train_index for example in target.moved_in_rank] == by_rank
    by_score = sorted(range(400), key=lambda index: (-abs(a[0, index] - b[0, index]), index))[:MOVED]
    assert [example.train_index for example in target.moved_in_score] == by_score
    for example in (*target.moved_in_rank, *target.moved_in_score):
        index = example.train_index
        assert example[1:] == (index % 3, a[0, index], b[0, index], one[index], two[index])


def test_only_what_moved_is_listed() -> None:
    a = np.arange(-50.0, 50.0)
    b = a.copy()
    b[0], b[99] = a[99], a[0]
    (target,) = compare(a, b).targets
    assert [example.train_index for example in target.moved_in_rank] == [0, 99]
    assert [example.train_index for example in target.moved_in_score] == [0, 99]


def test_targets_are_matched_by_what_they_measure() -> None:
    scores = random_scores(4, 30)
    a = table("one", scores, Target.single(3), Target.mean((0, 1), "mean:0-1"), Target.single(8), Target.single(9))
    b = table(
        "two",
        scores[[1, 3, 0, 2]],
        Target.mean((1, 0), "mean:1,0", -1),
        Target.mean((9, 8), "mean:9,8", -2),
        Target.mean((3,), "mean:3", -3),
        Target.single(8),
    )
    found = compare_influence(a, b)
    assert found.verdict == "identical"
    assert [(target.name, target.target_a, target.target_b) for target in found.targets] == [
        ("3", 3, -3),
        ("mean:0-1", -1, -1),
        ("8", 8, 8),
    ]
    assert (found.only_a, found.only_b) == (("9",), ("mean:9,8",))
    assert found.summary.endswith("Not compared: 9 (only A has it), mean:9,8 (only B has it).")


def test_of_two_equal_combinations_the_one_in_the_same_order_is_taken() -> None:
    scores = random_scores(2, 30)
    targets = (Target.mean((0, 1), "mean:0-1", -1), Target.mean((1, 0), "mean:1,0", -2))
    a = table("one", scores, *targets)
    for order in ((0, 1), (1, 0)):
        b = table("two", scores[list(order)], *(targets[place] for place in order))
        assert compare_influence(a, b).verdict == "identical"


def test_other_coefficients_are_another_target() -> None:
    a = table("one", random_scores(30), Target(-1, "sum", (0, 1), (1.0, 1.0)))
    b = table("two", random_scores(30), Target.mean((0, 1), "mean:0-1"))
    found = compare_influence(a, b)
    assert (found.verdict, found.exit_code, found.targets) == ("incomparable", 2, ())
    assert found.summary == "The runs have no target in common: A has sum; B has mean:0-1."


def test_long_lists_of_targets_are_cut_in_the_summary() -> None:
    a = table("one", random_scores(10, 5), *(Target.single(place) for place in range(10)))
    b = table("two", random_scores(1, 5), Target.mean(range(11), "mean:" + ",".join(map(str, range(11)))))
    found = compare_influence(a, b)
    assert found.summary == (
        "The runs have no target in common: A has 0, 1, 2, 3, 4, 5 and 4 more; B has mean:0,1,2,3,4,5,6,7,8,…."
    )
    assert len(found.only_a) == 10


def test_other_data_cannot_be_compared() -> None:
    a = table("one", random_scores(30))
    found = compare_influence(a, table("two", random_scores(30), data="e" * 64))
    assert (found.verdict, found.exit_code, found.targets) == ("incomparable", 2, ())
    assert f"their fingerprints are {'d' * 16}… and {'e' * 16}…" in found.summary
    found = compare_influence(a, table("two", random_scores(31), data="e" * 64))
    assert "(30 and 31 training examples)" in found.summary
    assert compare_influence(a, table("two", random_scores(31))).verdict == "incomparable"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_named(value: float) -> None:
    scores = random_scores(2, 5)
    scores[1, 3] = value
    with pytest.raises(NumericalError, match=rf"^one: the score of training example 3 on target 1 is {value}$"):
        table("one", scores)


def test_the_content_of_the_json_file() -> None:
    a = random_scores(2, 60)
    content = json.loads(json.dumps(compare(a, a[:, ::-1]).to_json_dict(), allow_nan=False))
    assert content["verdict"] == "different"
    first = content["targets"][0]
    assert set(first["helpful"]) == {"common", "of"}
    assert set(first["moved_in_rank"][0]) == {"train_index", "label", "score_a", "score_b", "rank_a", "rank_b"}
    assert first["moved_in_score"][0]["score_b"] == a[0, ::-1][first["moved_in_score"][0]["train_index"]]
