import pytest
import torch

from tracked_replay.determinism import DeterministicSampler, derive_component_seed
from tracked_replay.errors import ConfigError


def test_the_order_is_the_permutation_of_the_epochs_own_seed():
    order = DeterministicSampler(50, seed=7).order(3)
    generator = torch.Generator().manual_seed(derive_component_seed(7, "epoch", 3))
    assert order.dtype == torch.int64
    assert order.shape == (50,)
    assert torch.equal(order, torch.randperm(50, generator=generator))


def test_every_index_comes_once():
    assert sorted(DeterministicSampler(100, seed=0)) == list(range(100))


def test_the_order_does_not_depend_on_what_was_drawn_before():
    sampler = DeterministicSampler(40, seed=1)
    first = list(sampler)
    torch.manual_seed(99)
    torch.rand(5)
    assert list(sampler) == first
    sampler.order(8)
    assert list(sampler) == first


def test_iterating_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(DeterministicSampler(40, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_set_epoch_chooses_the_order():
    sampler = DeterministicSampler(40, seed=1)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert sampler.epoch == epoch
        orders.append(list(sampler))
        assert orders[-1] == sampler.order(epoch).tolist()
    assert len({tuple(order) for order in orders}) == 4
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]


def test_an_iteration_keeps_the_epoch_that_it_started_with():
    sampler = DeterministicSampler(40, seed=1)
    iteration = iter(sampler)
    sampler.set_epoch(5)
    assert list(iteration) == sampler.order(0).tolist()


def test_neighbouring_seeds_share_no_order():
    orders = {
        tuple(DeterministicSampler(40, seed=seed).order(epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_without_shuffling_the_order_is_the_data_sets():
    sampler = DeterministicSampler(6, seed=1, shuffle=False)
    sampler.set_epoch(2)
    assert list(sampler) == [0, 1, 2, 3, 4, 5]
    assert sampler.order(9).tolist() == [0, 1, 2, 3, 4, 5]
    assert sampler.order(9).dtype == torch.int64
    assert len(sampler) == 6


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ConfigError, match="dataset_size"):
        DeterministicSampler(size, seed=0)


def test_negative_epochs_are_refused():
    sampler = DeterministicSampler(3, seed=0)
    with pytest.raises(ConfigError, match="epoch"):
        sampler.set_epoch(-1)
    with pytest.raises(ConfigError, match="epoch"):
        sampler.order(-1)


def test_negative_seeds_are_refused():
    with pytest.raises(ConfigError, match="seed"):
        DeterministicSampler(3, seed=-1)
