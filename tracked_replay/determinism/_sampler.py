"""The order of the training examples as a pure function of seed and epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from tracked_replay.determinism._generators import _check_seed
from tracked_replay.determinism._seeds import _as_int, derive_component_seed
from tracked_replay.errors import ConfigError


class DeterministicSampler(Sampler[int]):
    """Yields all example indices in an order that depends on nothing but seed and epoch.

    The epoch's own seed is hashed from both. Their sum would not do: the run with seed s would have in epoch e + 1 the
    order that the run with seed s + 1 has in epoch e, so runs with neighbouring seeds would not be independent.

    Args:
        dataset_size: number of examples, at least 1.
        seed: the sampler's seed, in ``[0, 2**63)``.
        shuffle: False yields 0, 1, 2, ... in every epoch.

    Raises:
        ConfigError: ``dataset_size`` is smaller than 1, or ``seed`` is out of range.
    """

    def __init__(self, dataset_size: int, seed: int, shuffle: bool = True) -> None:
        self._dataset_size = _as_int(dataset_size, "dataset_size")
        if self._dataset_size < 1:
            raise ConfigError(f"dataset_size must be at least 1, found {self._dataset_size}")
        self._seed = _check_seed(seed)
        self._shuffle = bool(shuffle)
        self._epoch = 0

    @property
    def seed(self) -> int:
        """The seed that every epoch's seed is derived from."""
        return self._seed

    @property
    def shuffle(self) -> bool:
        """Whether the order differs from 0, 1, 2, ..."""
        return self._shuffle

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration yields, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterations that start from now on.

        Raises:
            ConfigError: ``epoch`` is negative or no integer.
        """
        self._epoch = _check_epoch(epoch)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the indices of one epoch, whatever epoch is set.

        Args:
            epoch: from 0.

        Returns:
            int64 tensor of shape (dataset_size,) on the CPU, each index once.

        Raises:
            ConfigError: ``epoch`` is negative or no integer.
        """
        epoch = _check_epoch(epoch)
        if not self._shuffle:
            return torch.arange(self._dataset_size, dtype=torch.int64, device="cpu")
        generator = torch.Generator(device="cpu")
        generator.manual_seed(derive_component_seed(self._seed, "epoch", epoch))
        return torch.randperm(self._dataset_size, generator=generator, dtype=torch.int64, device="cpu")

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self._epoch).tolist())

    def __len__(self) -> int:
        return self._dataset_size


def _check_epoch(epoch: int) -> int:
    value = _as_int(epoch, "epoch")
    if value < 0:
        raise ConfigError(f"epoch must be at least 0, found {value}")
    return value
