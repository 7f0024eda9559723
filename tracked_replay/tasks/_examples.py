"""Labelled examples as they are stored: raw inputs and integer labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tracked_replay.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Examples:
    """N labelled examples, indexed 0 … N − 1; the index is what traces and scores refer to.

    Attributes:
        inputs: (N, ...) raw storage: uint8 (N, C, H, W) for images, a floating type for most other data.
        labels: (N,) int64.

    Raises:
        DataError: no examples, lengths that differ, labels that are not int64, inputs that are complex, NaN or Inf.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor) or not isinstance(self.labels, Tensor):
            raise DataError(
                f"examples: found inputs of type {type(self.inputs).__name__} and labels of type "
                f"{type(self.labels).__name__}; allowed: two torch tensors"
            )
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            raise DataError(
                f"examples: found labels of shape {tuple(self.labels.shape)} and type {self.labels.dtype}; "
                "allowed: shape (N,) and type torch.int64"
            )
        if self.inputs.ndim == 0 or len(self.inputs) != len(self.labels):
            raise DataError(
                f"examples: found inputs of shape {tuple(self.inputs.shape)} for {len(self.labels)} labels; "
                "allowed: one input a label, along the first dimension"
            )
        if self.inputs.is_complex() or self.inputs.is_quantized:
            raise DataError(
                f"examples: found inputs of type {self.inputs.dtype}; allowed: a floating, integer or truth type (of "
                f"complex numbers, torch.view_as_real has both parts)"
            )
        if len(self.labels) == 0:
            raise DataError("examples: found none; allowed: at least 1")
        if self.inputs.is_floating_point() and not bool(torch.isfinite(self.inputs).all()):
            finite = torch.isfinite(self.inputs).reshape(len(self.inputs), -1).all(dim=1)
            raise DataError(
                f"examples: found NaN or Inf in {int((~finite).sum())} inputs, the first of them at index "
                f"{int((~finite).nonzero()[0])}; allowed: finite values"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over type, shape and bytes of inputs and labels; the same on every device."""
        digest = hashlib.sha256()
        for name, tensor in (("inputs", self.inputs), ("labels", self.labels)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_raw_bytes(tensor))
        return digest.hexdigest()

    def subset(self, count: int, *, field: str = "data.train_examples or data.evaluation_examples") -> Examples:
        """The first ``count`` examples, in storage of their own; 0 means all.

        Args:
            count: examples to keep.
            field: config field that an error names.

        Raises:
            ConfigError: ``count`` is negative or more than there are.
        """
        if not 0 <= count <= len(self):
            raise ConfigError(f"{field}: found {count}; allowed: 0 (all) to {len(self)}, the examples that there are")
        if count in (0, len(self)):
            return self
        # A view would keep the whole data set in memory.
        return Examples(self.inputs[:count].clone(), self.labels[:count].clone())

    def to(self, device: torch.device | str) -> Examples:
        """The same examples stored on ``device``."""
        return Examples(self.inputs.to(device), self.labels.to(device))


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
