import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tracked_replay.determinism import (
    DeterministicSampler,
    create_deterministic_loader,
    create_deterministic_model,
    create_deterministic_optimizer,
    create_deterministic_scheduler,
    derive_component_seed,
    seed_worker,
    set_global_deterministic_state,
    set_loader_epoch,
)
from tracked_replay.errors import ConfigError

# Python 3.12 warns wherever a process with threads forks, which is how a loader starts its workers on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Squares(Dataset):
    """Items that depend on the index alone."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index * index)), index


class Noise(Squares):
    """Items with random numbers of all three generators."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([random.random(), np.random.random(), torch.rand(()).item(), index], dtype=torch.float64)  # noqa: S311


def _indices(loader: DataLoader) -> list[list[int]]:
    return [batch[1].tolist() for batch in loader]


def _global_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def test_a_model_is_the_one_of_its_component_seed():
    model = create_deterministic_model(42, nn.Linear, "shared_training", in_features=4, out_features=3)
    torch.manual_seed(derive_component_seed(42, "model", "shared_training"))
    assert torch.equal(model.weight, nn.Linear(4, 3).weight)


def test_models_are_equal_exactly_where_they_share_an_instance():
    def weights(seed: int, instance: str | int | None) -> tuple[float, ...]:
        model = create_deterministic_model(seed, lambda: nn.Linear(4, 3), instance)
        return tuple(model.weight.flatten().tolist())

    first = weights(42, "shared_training")
    torch.rand(10)
    assert weights(42, "shared_training") == first
    others = [weights(42, None), weights(42, 0), weights(42, 1), weights(43, "shared_training")]
    assert len({first, *others}) == 5


def test_creating_components_leaves_the_generators_alone():
    before = _global_states()
    model = create_deterministic_model(1, nn.Linear, in_features=4, out_features=3)
    optimizer = create_deterministic_optimizer(1, torch.optim.SGD, model.parameters(), lr=0.5, momentum=0.9)
    create_deterministic_scheduler(1, torch.optim.lr_scheduler.StepLR, optimizer, step_size=2)
    loader = create_deterministic_loader(1, Squares(), batch_size=4)
    assert _global_states() == before
    _indices(loader)
    assert _global_states() == before


@pytest.mark.parametrize(
    ("purpose", "create"),
    [
        ("model", lambda factory: create_deterministic_model(5, factory, "x")),
        ("optimizer", lambda factory: create_deterministic_optimizer(5, lambda _: factory(), [], "x")),
        ("scheduler", lambda factory: create_deterministic_scheduler(5, lambda _: factory(), None, "x")),
    ],
)
def test_each_kind_of_component_has_a_seed_of_its_own(purpose, create):
    expected = torch.Generator().manual_seed(derive_component_seed(5, purpose, "x"))
    assert torch.equal(create(lambda: torch.rand(4)), torch.rand(4, generator=expected))


def test_optimizer_and_scheduler_get_their_arguments():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = create_deterministic_optimizer(1, torch.optim.SGD, [parameter], "a", lr=0.5, momentum=0.9)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.5, 0.9)
    scheduler = create_deterministic_scheduler(1, torch.optim.lr_scheduler.StepLR, optimizer, "a", step_size=7)
    assert scheduler.step_size == 7
    assert scheduler.optimizer is optimizer


def test_a_parameter_that_was_never_initialised_is_nan():
    set_global_deterministic_state(0)
    # Memory that was written before and is free again is what a fresh allocation may return.
    torch.full((1000,), 3.0)
    parameter = create_deterministic_model(1, lambda: nn.Parameter(torch.empty(1000)))
    assert torch.isnan(parameter).all()
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_a_factory_that_raises_leaves_everything_as_it_was():
    set_global_deterministic_state(0)
    before = _global_states()
    with pytest.raises(ZeroDivisionError):
        create_deterministic_model(1, lambda: torch.rand(3) / (1 // 0))
    assert _global_states() == before
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_a_loader_follows_the_sampler_of_its_component_seed():
    loader = create_deterministic_loader(42, Squares(), "shared_training", batch_size=5)
    sampler = DeterministicSampler(23, derive_component_seed(42, "dataloader", "shared_training"))
    for epoch in (0, 1, 4):
        set_loader_epoch(loader, epoch)
        order = sampler.order(epoch)
        assert _indices(loader) == [part.tolist() for part in order.split(5)]
        assert loader.worker_init_fn is seed_worker


def test_workers_give_the_batches_that_one_process_gives():
    alone = create_deterministic_loader(42, Squares(), batch_size=4)
    workers = create_deterministic_loader(42, Squares(), batch_size=4, num_workers=2)
    for epoch in range(2):
        set_loader_epoch(alone, epoch)
        set_loader_epoch(workers, epoch)
        pairs = list(zip(alone, workers, strict=True))
        assert len(pairs) == 6
        for (values, indices), (worker_values, worker_indices) in pairs:
            assert torch.equal(values, worker_values)
            assert torch.equal(indices, worker_indices)


def test_random_items_of_an_epoch_do_not_depend_on_the_epochs_before():
    def epoch_of(loader: DataLoader, epoch: int) -> torch.Tensor:
        set_loader_epoch(loader, epoch)
        return torch.cat(list(loader))

    loader = create_deterministic_loader(42, Noise(), batch_size=4, num_workers=2)
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    fresh = create_deterministic_loader(42, Noise(), batch_size=4, num_workers=2)
    assert torch.equal(epoch_of(fresh, 1), second)
    assert torch.equal(epoch_of(loader, 0), first)
    drawn = torch.cat([first[:, :3], second[:, :3]])
    # No generator repeats its numbers in the other worker, in the other epoch, or in another generator's column.
    assert drawn.unique().numel() == drawn.numel()


def test_the_other_arguments_reach_the_loader():
    loader = create_deterministic_loader(
        1, Squares(), batch_size=5, shuffle=False, drop_last=True, collate_fn=lambda items: [item[1] for item in items]
    )
    assert list(loader) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]


def test_loaders_of_other_instances_have_other_orders():
    def order(instance: str | None) -> list[list[int]]:
        return _indices(create_deterministic_loader(1, Squares(), instance, batch_size=5))

    assert order("a") == order("a")
    assert order("a") != order("b") != order(None)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ConfigError, match="dataset_size"):
        create_deterministic_loader(1, torch.utils.data.TensorDataset(torch.ones(0)), batch_size=1)


def test_an_empty_batch_is_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        create_deterministic_loader(1, Squares(), batch_size=0)


def test_a_loader_of_another_kind_has_no_epoch():
    with pytest.raises(ConfigError, match="RandomSampler"):
        set_loader_epoch(DataLoader(Squares(), shuffle=True), 1)


def test_a_worker_is_seeded_from_torchs_seed_and_leaves_torch_alone():
    torch.manual_seed(2**40 + 3)
    torch.rand(4)
    before = torch.get_rng_state()
    seed_worker(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.random() == random.Random(2**40 + 3).random()  # noqa: S311
    expected = np.random.RandomState(derive_component_seed(2**40 + 3, "numpy"))
    assert np.random.random() == expected.random_sample()
