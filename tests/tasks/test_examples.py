import hashlib

import pytest
import torch

from tracked_replay.errors import ConfigError, DataError
from tracked_replay.tasks import Examples


def make(count: int = 6) -> Examples:
    return Examples(torch.arange(count * 3, dtype=torch.uint8).reshape(count, 3), torch.arange(count) % 2)


def test_fingerprint_is_sha256_over_type_shape_and_bytes():
    examples = Examples(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), torch.tensor([0, 1]))
    expected = hashlib.sha256(
        b"inputs torch.uint8 (2, 2)\n"
        + bytes([1, 2, 3, 4])
        + b"labels torch.int64 (2,)\n"
        + bytes([0] * 8 + [1] + [0] * 7)
    ).hexdigest()
    assert examples.fingerprint() == expected


@pytest.mark.parametrize(
    "other",
    [
        Examples(torch.arange(18, dtype=torch.uint8).reshape(6, 3, 1), torch.arange(6) % 2),
        Examples(torch.arange(18, dtype=torch.int8).reshape(6, 3), torch.arange(6) % 2),
        Examples(torch.arange(18, dtype=torch.uint8).reshape(6, 3).flip(0), torch.arange(6) % 2),
        Examples(torch.arange(18, dtype=torch.uint8).reshape(6, 3), torch.arange(6) % 3),
    ],
    ids=["shape", "type", "order", "labels"],
)
def test_fingerprint_sees_every_part(other):
    assert other.fingerprint() != make().fingerprint()


def test_fingerprint_ignores_memory_layout():
    inputs = torch.arange(18, dtype=torch.float32).reshape(3, 6)
    labels = torch.arange(6)
    assert Examples(inputs.t(), labels).fingerprint() == Examples(inputs.t().contiguous(), labels).fingerprint()


def test_subset_takes_the_first_and_zero_means_all():
    examples = make()
    assert torch.equal(examples.subset(2).inputs, examples.inputs[:2])
    assert torch.equal(examples.subset(2).labels, examples.labels[:2])
    assert len(examples.subset(0)) == len(examples.subset(6)) == 6
    assert examples.subset(2).inputs.untyped_storage().nbytes() == 6


@pytest.mark.parametrize("count", [7, -1])
def test_subset_names_the_field_what_was_found_and_what_is_allowed(count):
    with pytest.raises(ConfigError, match=rf"data\.train_examples: found {count}; allowed: 0 \(all\) to 6"):
        make().subset(count, field="data.train_examples")
    with pytest.raises(ConfigError, match=r"data\.train_examples or data\.evaluation_examples"):
        make().subset(count)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"\(3, 2\) for 2 labels"),
        (torch.zeros(2, 2), torch.zeros(2), "torch.float32"),
        (torch.zeros(2, 2), torch.zeros(2, 1, dtype=torch.int64), r"\(2, 1\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "found none"),
        (torch.tensor(1.0), torch.zeros(1, dtype=torch.int64), r"shape \(\)"),
        (torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, dtype=torch.int64), "NaN or Inf in 1 .* index 1"),
        (torch.ones(2, 2) * 1j, torch.zeros(2, dtype=torch.int64), "torch.complex64; allowed: a floating, integer"),
        ([1, 2], torch.zeros(2, dtype=torch.int64), "type list"),
    ],
)
def test_malformed_examples_are_refused(inputs, labels, message):
    with pytest.raises(DataError, match=message):
        Examples(inputs, labels)
