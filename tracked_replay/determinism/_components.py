"""Models, optimizers, schedulers and data loaders, each created on a seed of its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from tracked_replay.determinism._generators import _seed_python_and_numpy, deterministic_context
from tracked_replay.determinism._sampler import DeterministicSampler
from tracked_replay.determinism._seeds import derive_component_seed
from tracked_replay.errors import ConfigError

# Torch gives this module its attribute at run time, where a type checker does not see it.
_deterministic: Any = torch.utils.deterministic

_ModelT = TypeVar("_ModelT")
_OptimizerT = TypeVar("_OptimizerT")
_SchedulerT = TypeVar("_SchedulerT")


def _label(purpose: str, instance_id: str | int | None) -> str:
    return f"{purpose} creation" if instance_id is None else f"{purpose} creation (instance {instance_id})"


@contextmanager
def _component_context(master_seed: int, purpose: str, instance_id: str | int | None) -> Iterator[None]:
    seed = derive_component_seed(master_seed, purpose, instance_id)
    with deterministic_context(seed, _label(purpose, instance_id)):
        yield


@contextmanager
def _filled_memory() -> Iterator[None]:
    """In deterministic mode, let memory that nothing wrote read as NaN instead of as what was there before."""
    before = bool(_deterministic.fill_uninitialized_memory)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        _deterministic.fill_uninitialized_memory = before


def create_deterministic_model(
    master_seed: int, factory: Callable[..., _ModelT], instance_id: str | int | None = None, **kwargs: Any
) -> _ModelT:
    """Create a model whose initial parameters depend on nothing but master seed and instance ID.

    All global generators are afterwards as they were before. In deterministic mode a parameter that the factory
    allocates but never initialises is NaN, which training reports, instead of whatever the memory held.

    Args:
        master_seed: the run's seed.
        factory: called as ``factory(**kwargs)``.
        instance_id: models that must be identical share one.
        **kwargs: arguments of the factory.

    Returns:
        What the factory returned.

    Raises:
        ConfigError: the seed or the instance ID is not valid.
    """
    with _component_context(master_seed, "model", instance_id), _filled_memory():
        return factory(**kwargs)


def create_deterministic_optimizer(
    master_seed: int,
    optimizer_class: Callable[..., _OptimizerT],
    parameters: Iterable[Any],
    instance_id: str | int | None = None,
    **kwargs: Any,
) -> _OptimizerT:
    """Create an optimizer on a seed of its own; all global generators are afterwards as they were before.

    Args:
        master_seed: the run's seed.
        optimizer_class: called as ``optimizer_class(parameters, **kwargs)``.
        parameters: parameters or parameter groups.
        instance_id: optimizers that must be identical share one.
        **kwargs: arguments of the optimizer.

    Returns:
        The optimizer.

    Raises:
        ConfigError: the seed or the instance ID is not valid.
    """
    with _component_context(master_seed, "optimizer", instance_id):
        return optimizer_class(parameters, **kwargs)


def create_deterministic_scheduler(
    master_seed: int,
    scheduler_class: Callable[..., _SchedulerT],
    optimizer: torch.optim.Optimizer,
    instance_id: str | int | None = None,
    **kwargs: Any,
) -> _SchedulerT:
    """Create a learning rate scheduler on a seed of its own; all global generators are afterwards as before.

    Args:
        master_seed: the run's seed.
        scheduler_class: called as ``scheduler_class(optimizer, **kwargs)``.
        optimizer: whose learning rates it sets.
        instance_id: schedulers that must be identical share one.
        **kwargs: arguments of the scheduler.

    Returns:
        The scheduler.

    Raises:
        ConfigError: the seed or the instance ID is not valid.
    """
    with _component_context(master_seed, "scheduler", instance_id):
        return scheduler_class(optimizer, **kwargs)


def seed_worker(worker_id: int) -> None:
    """Seed Python's and NumPy's generators in a data loader's worker process; pass it as ``worker_init_fn``.

    Torch's generator is left alone: the loader has already seeded it with its base seed plus the worker's number, and
    that seed is what the other two are derived from. The loader seeds those too, but how it does so is no promise of
    its interface.

    Args:
        worker_id: the worker's number; unused, because the seed already differs between workers.
    """
    del worker_id
    _seed_python_and_numpy(torch.initial_seed())


def create_deterministic_loader(
    master_seed: int,
    dataset: Dataset[Any],
    instance_id: str | int | None = None,
    *,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
    timeout: float = 0.0,
    prefetch_factor: int | None = None,
    multiprocessing_context: str | BaseContext | None = None,
) -> DataLoader[Any]:
    """Create a data loader whose batches depend on nothing but master seed, instance ID and epoch.

    Choose the epoch with `set_loader_epoch`; the loader starts at epoch 0. The batches are the same for any number of
    workers where an item depends on its index alone. Random numbers that a data set draws for an item are repeated
    from run to run only for the same number of workers, and with ``num_workers=0`` they come from the process's
    global generators. Workers do not outlive an epoch: their generators would carry over from one to the next.

    Args:
        master_seed: the run's seed.
        dataset: a map-style data set with a length of at least 1.
        instance_id: loaders that must give the same batches share one.
        batch_size: examples a batch, at least 1.
        shuffle: False gives the examples in the data set's order.
        drop_last: leave out a last batch that is not full.
        num_workers: worker processes; 0 loads in this process.
        collate_fn: makes a batch from a list of items; None stacks tensors.
        pin_memory: put batches into pinned memory, for copies to a GPU.
        timeout: seconds to wait for a worker's batch; 0 waits for ever.
        prefetch_factor: batches loaded ahead by each worker; None is Torch's default.
        multiprocessing_context: how workers are started, for example ``"spawn"``; None is Python's default.

    Returns:
        A Torch data loader with a `DeterministicSampler`.

    Raises:
        ConfigError: the seed or the instance ID is not valid, the data set is empty, or ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    seed = derive_component_seed(master_seed, "dataloader", instance_id)
    with deterministic_context(seed, _label("dataloader", instance_id)):
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=DeterministicSampler(len(dataset), seed, shuffle),  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=seed_worker,
            multiprocessing_context=multiprocessing_context,
            generator=torch.Generator(device="cpu"),
            prefetch_factor=prefetch_factor,
        )
    set_loader_epoch(loader, 0)
    return loader


def set_loader_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Choose the epoch of a loader's iterations that start from now on.

    Sets the order of the examples and the generator that the workers' seeds are drawn from, so that an epoch is the
    same whether or not the epochs before it were iterated.

    Args:
        loader: what `create_deterministic_loader` returned.
        epoch: from 0.

    Raises:
        ConfigError: ``epoch`` is negative or no integer, or the loader is of another kind.
    """
    sampler = loader.sampler
    if not isinstance(sampler, DeterministicSampler) or loader.generator is None:
        raise ConfigError(
            f"the loader must come from create_deterministic_loader, found one with a {type(sampler).__name__}"
        )
    sampler.set_epoch(epoch)
    loader.generator.manual_seed(derive_component_seed(sampler.seed, "workers", epoch))
