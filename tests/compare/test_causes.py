"""Likely causes: named by what differs, ordered by what fits the first difference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tracked_replay.compare.causes import likely_causes
from tracked_replay.compare.result import Comparison, Difference, TraceDifference

SEED = Difference("seed", "0", "1")
THREADS = Difference("train.threads", "1", "2")
LR = Difference("train.lr", "0.05", "0.1")
ROOT = Difference("data.root", "/here", "/there")
EXAMPLES = Difference("data.train_examples", "0", "40")
BATCH = Difference("train.batch_size", "64", "128")
EPOCHS = Difference("train.epochs", "2", "3")
FLIPPED = Difference("data.flip_labels", "0.0", "0.1")
MOMENTUM = Difference("train.momentum", "0.8", "0.9")
TORCH = Difference("packages.installed.torch", "2.11.0", "2.13.0")
FLAGS = Difference("cpu.flags", "avx512f, avx512_bf16", None)
GPU = Difference("cuda.devices.0.name", "H100", "H200")
DRIVER = Difference("cuda.driver", "570.1", "580.2")
CODE = Difference("code", "a" * 64, "b" * 64)
FINGERPRINT = Difference("data.fingerprint", "1" * 64, "2" * 64)
INITIAL = TraceDifference("state_digest", 0, 10, "aa", "bb")


def comparison(first: str = "state", **parts: Any) -> Comparison:
    return Comparison(a="a", b="b", verdict="different", summary="", first_difference=first, **parts)  # type: ignore


def names(found: Comparison, **arguments: bool) -> list[str]:
    return [cause.name for cause in likely_causes(found, **arguments)]


@pytest.mark.parametrize(
    ("part", "difference", "name"),
    [
        ("config", SEED, "seed"),
        ("seeds", Difference("model[shared_training]", "5", "6"), "seed"),
        ("config", THREADS, "threads"),
        ("environment", Difference("threads.intra_op", "1", "2"), "threads"),
        ("config", LR, "lr"),
        ("config", Difference("train.lr_gamma", "0.1", "0.2"), "lr"),
        ("config", Difference("train.warmup_epochs", "0", "1"), "lr"),
        ("config", EXAMPLES, "config"),
        ("config", FLIPPED, "config"),
        ("config", Difference("data.augmentation", "none", "flip"), "config"),
        ("config", BATCH, "config"),
        ("other", FINGERPRINT, "data"),
        ("other", CODE, "code"),
        ("environment", TORCH, "versions"),
        ("environment", Difference("packages.installed.nvidia-cublas-cu12", "1", "2"), "versions"),
        ("environment", Difference("blas.numpy.version", "0.3.30", "0.3.31"), "versions"),
        ("config", Difference("train.device", "cpu", "cuda"), "device"),
        ("environment", Difference("cpu.model", "AMD EPYC", "Intel Xeon"), "processor"),
        ("environment", FLAGS, "processor"),
        ("config", Difference("train.reproducibility", "full", "seeds"), "determinism"),
        ("environment", Difference("determinism.cudnn.benchmark", "false", "true"), "determinism"),
        ("environment", Difference("variables.MKL_CBWR", None, "AVX2"), "determinism"),
        ("config", MOMENTUM, "config"),
        ("config", Difference("model.width", "1.0", "2.0"), "config"),
        ("other", Difference("parameter_groups.weights.weight_decay", "0.0", "0.1"), "config"),
    ],
)
@pytest.mark.parametrize("first", ["data", "lr", "loss", "state"])
def test_a_single_difference_is_the_cause(part: str, difference: Difference, name: str, first: str) -> None:
    causes = likely_causes(comparison(first, **{part: (difference,)}))
    assert [cause.name for cause in causes] == [name]
    for value in difference[1:]:
        assert (value or "none")[:50] in causes[0].text


@pytest.mark.parametrize(
    ("part", "difference"),
    [
        ("config", ROOT),
        ("config", Difference("lds.subsets", "64", "32")),
        ("config", Difference("record.every", "1", "4")),
        ("environment", Difference("cpu.memory_bytes", "1", "2")),
        ("environment", Difference("packages.installed.pytest", "8", "9")),
        ("environment", Difference("variables.OMP_NUM_THREADS", None, "1")),
        ("environment", Difference("determinism.interop_threads", "1", "2")),
        ("environment", GPU),
        ("environment", DRIVER),
        ("seeds", Difference("step[9]", "12", None)),
        ("seeds", Difference("augmentation[3]", None, "12")),
    ],
)
def test_what_changes_no_bit_is_no_cause(part: str, difference: Difference) -> None:
    causes = likely_causes(comparison(**{part: (difference,)}))
    assert [cause.name for cause in causes] == ["unknown"]
    assert "nondeterministic kernel" in causes[0].text
    assert "memory error" in causes[0].text
    if part == "environment":
        assert difference.name in causes[0].text


def test_gpus_and_drivers_count_where_a_run_used_one() -> None:
    found = comparison(environment=(DRIVER, GPU))
    assert names(found) == ["unknown"]
    assert names(found, gpu=True) == ["device", "versions"]


def test_kernels_that_need_not_be_deterministic_are_a_cause() -> None:
    (cause,) = likely_causes(comparison("loss"), deterministic=False)
    assert cause.name == "determinism"
    assert "train.reproducibility is seeds in both runs" in cause.text
    mode = Difference("train.reproducibility", "full", "seeds")
    (cause,) = likely_causes(comparison("loss", config=(mode,)), deterministic=False)
    assert "train.reproducibility is full in A and seeds in B" in cause.text


@pytest.mark.parametrize(
    ("first", "trace", "expected"),
    [
        ("state", (INITIAL,), "seed"),
        ("data", (TraceDifference("labels", 3, 1, "2 at position 4", "1 at position 4"),), "seed"),
        ("lr", (TraceDifference("lr", 30, 5, "0.05", "0.005"),), "lr"),
    ],
)
def test_the_first_difference_decides_the_order(first: str, trace: tuple, expected: str) -> None:
    found = comparison(first, trace=trace, config=(SEED, THREADS, LR, EXAMPLES), environment=(TORCH, FLAGS))
    assert names(found)[0] == expected
    assert set(names(found)) == {"seed", "threads", "lr", "config", "versions", "processor"}
    assert set(names(found)[-3:]) == {"threads", "versions", "processor"}


INDICES = TraceDifference("indices", 0, 9, "64 values", "128 values")
RATES = TraceDifference("lr", 3, 9, "0.05", "0.04")


@pytest.mark.parametrize(
    ("first", "trace", "field"),
    [
        ("data", (INDICES,), BATCH),
        ("data", (TraceDifference("labels", 0, 9, "1", "2"),), FLIPPED),
        ("data", (INDICES,), EXAMPLES),
        ("data", (), EPOCHS),
        ("lr", (RATES,), EPOCHS),
        ("loss", (), Difference("data.augmentation", "none", "flip")),
        ("state", (INITIAL,), Difference("train.dtype", "float32", "float64")),
        ("state", (), MOMENTUM),
    ],
)
def test_a_config_field_comes_before_what_follows_from_it(first: str, trace: tuple, field: Difference) -> None:
    found = comparison(
        first, trace=trace, config=(THREADS, field), other=(FINGERPRINT, CODE), environment=(TORCH, FLAGS)
    )
    causes = likely_causes(found)
    assert causes[0] == ("config", f"{field.name} is {field.a} in A and {field.b} in B")
    assert {cause.name for cause in causes[-3:]} == {"threads", "versions", "processor"}


def test_other_batches_are_no_cause_where_a_field_asks_for_them() -> None:
    assert names(comparison("data", trace=(INDICES,), config=(BATCH,))) == ["config"]
    assert names(comparison("data", trace=(INDICES,), config=(BATCH,), other=(FINGERPRINT,))) == ["config", "data"]
    assert names(comparison("data", trace=(INDICES,))) == ["data"]


def test_of_several_fields_the_one_that_explains_is_named_first() -> None:
    (cause, *_) = likely_causes(comparison("data", trace=(INDICES,), config=(MOMENTUM, BATCH)))
    assert cause.text == "train.batch_size is 64 in A and 128 in B, train.momentum is 0.8 in A and 0.9 in B"


def test_a_field_that_cannot_explain_the_difference_stands_behind_what_can() -> None:
    assert names(comparison("data", trace=(INDICES,), config=(MOMENTUM,), other=(FINGERPRINT,)))[0] == "data"
    assert names(comparison("lr", trace=(RATES,), config=(MOMENTUM,)))[0] == "lr"
    assert names(comparison("state", config=(EPOCHS,), environment=(TORCH,))) == ["versions", "config"]
    assert names(comparison("state", trace=(INITIAL,), config=(BATCH,), other=(CODE,))) == ["code", "config"]


@pytest.mark.parametrize("field", [BATCH, SEED, None])
def test_versions_are_counted_where_a_field_is_enough(field: Difference | None) -> None:
    packages = tuple(Difference(f"packages.installed.nvidia-{i}", "1", "2") for i in range(7))
    found = comparison("data", trace=(INDICES,), config=(field,) if field else (), environment=packages)
    causes = {cause.name: cause.text for cause in likely_causes(found)}
    counted = "library versions differ: nvidia-0, nvidia-1, nvidia-2, nvidia-3 and 3 more"
    assert (causes["versions"] == counted) == (field is not None)
    found = dataclasses.replace(found, causes=likely_causes(found))
    assert found.environment_matters == (field is None)
    assert not dataclasses.replace(found, verdict="identical", causes=()).environment_matters


def test_threads_are_named_by_the_field_that_was_in_force() -> None:
    in_force = Difference("threads.intra_op", "1", "2")
    (cause,) = likely_causes(comparison(config=(THREADS,), environment=(in_force,)))
    assert "differs: train.threads is 1 in A and 2 in B; sums" in cause.text
    pinned = Difference("threads.intra_op", "4", "8")
    (cause,) = likely_causes(comparison(config=(THREADS,), environment=(pinned,)))
    assert "differs: threads.intra_op is 4 in A and 8 in B; sums" in cause.text


@pytest.mark.parametrize("first", ["loss", "state"])
def test_threads_come_before_what_else_changes_rounding(first: str) -> None:
    found = comparison(first, config=(THREADS,), environment=(TORCH, FLAGS), other=(CODE,))
    assert names(found)[0] == "threads"


def test_what_changes_the_mathematics_comes_before_rounding() -> None:
    assert names(comparison("state", config=(THREADS, MOMENTUM)))[:2] == ["config", "threads"]
    assert names(comparison("loss", config=(THREADS,), other=(FINGERPRINT,)))[:2] == ["data", "threads"]


def test_what_the_trace_shows_is_a_cause_by_itself() -> None:
    rates = TraceDifference("lr", 30, 5, "0.05", "0.005")
    labels = TraceDifference("labels", 3, 1, "2 at position 4", "1 at position 4")
    indices = TraceDifference("indices", 7, 1, "2", "1")
    assert likely_causes(comparison("lr", trace=(rates,))) == (
        ("lr", "the learning rates differ from step 30 on: 0.05 in A and 0.005 in B"),
    )
    (cause,) = likely_causes(comparison("data", trace=(indices, labels)))
    assert cause == ("data", "the batches differ from step 3 on, labels: 2 at position 4 in A and 1 at position 4 in B")
    # Later differences follow from the first one and are no causes.
    assert names(comparison("state", trace=(rates, labels))) == ["unknown"]


def test_unknown_causes_say_what_they_may_be() -> None:
    (loss,) = likely_causes(comparison("loss"))
    assert "a recorded loss differs although all states agree" in loss.text
    (drawn,) = likely_causes(comparison("state", generators=(Difference("step 4", "1", "2"),)))
    assert "something drew random numbers between the steps" in drawn.text
    (cut,) = likely_causes(comparison("data"))
    assert "one run ends earlier" in cut.text
    (bits,) = likely_causes(comparison("state", trace=(TraceDifference("state_digest", 4, 6, "aa", "bb"),)))
    assert "although config, seeds, data, code and environment agree" in bits.text


def test_long_lists_and_values_are_shortened() -> None:
    rows = tuple(Difference(f"packages.installed.nvidia-{i}", "1", "2") for i in range(7))
    (cause,) = likely_causes(comparison(environment=rows))
    assert "nvidia-3 is 1 in A and 2 in B, and 3 more" in cause.text
    assert "nvidia-4" not in cause.text
    (cause,) = likely_causes(comparison(environment=(Difference("torch.build", "x" * 500, "y"),)))
    assert len(cause.text) < 200
