import pytest
import torch
import torch.nn.functional as F

from tracked_replay.errors import ConfigError
from tracked_replay.tasks import augment_images

N = 40


def images(count: int = N, side: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def view(batch, indices, *, kind="flip+crop", epoch=0, seed=3, num_examples=N, padding=2):
    return augment_images(batch, indices, epoch=epoch, seed=seed, num_examples=num_examples, kind=kind, padding=padding)


def candidates(image: torch.Tensor, kind: str, padding: int) -> list[torch.Tensor]:
    """Every view that a definition by pad, slice and flip allows."""
    height, width = image.shape[1:]
    cropped = [image]
    if "crop" in kind:
        padded = F.pad(image[None].float(), (padding,) * 4, mode="reflect")[0].to(image.dtype)
        shifts = range(2 * padding + 1)
        cropped = [padded[:, row : row + height, left : left + width] for row in shifts for left in shifts]
    return cropped + ([crop.flip(-1) for crop in cropped] if "flip" in kind else [])


@pytest.mark.parametrize("kind", ["flip", "crop", "flip+crop"])
def test_each_view_is_one_of_those_that_pad_slice_and_flip_give(kind):
    data = images()
    for image, seen in zip(data, view(data, torch.arange(N), kind=kind), strict=True):
        assert any(torch.equal(seen, candidate) for candidate in candidates(image, kind, 2))


def test_draws_reach_every_flip_and_every_shift():
    count = 4000
    image = images(1)[0]
    data = image.expand(count, -1, -1, -1)
    seen = view(data, torch.arange(count), num_examples=count, padding=1)
    found = [int((seen == candidate).flatten(1).all(1).sum()) for candidate in candidates(image, "flip+crop", 1)]
    assert len(found) == 18
    assert sum(found) == count
    assert min(found) > count / 18 * 0.7


def test_none_returns_the_input_itself():
    data = images()
    assert view(data, torch.arange(N), kind="none") is data


def test_a_view_does_not_depend_on_the_rest_of_the_batch():
    data = images()
    whole = view(data, torch.arange(N))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(data[order], order), whole[order])
    for index in (0, 17, N - 1):
        assert torch.equal(view(data[index : index + 1], torch.tensor([index]))[0], whole[index])


def test_a_view_does_not_depend_on_the_order_of_the_epochs_or_on_global_generators():
    data = images()
    forward = [view(data, torch.arange(N), epoch=epoch) for epoch in range(4)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    backward = [view(data, torch.arange(N), epoch=epoch) for epoch in reversed(range(4))]
    assert all(torch.equal(one, two) for one, two in zip(forward, reversed(backward), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_and_epoch_change_the_views():
    data = images()
    first = view(data, torch.arange(N))
    assert not torch.equal(first, view(data, torch.arange(N), epoch=1))
    assert not torch.equal(first, view(data, torch.arange(N), seed=4))


def test_types_agree():
    data = images()
    assert torch.equal(view(data.double(), torch.arange(N)), view(data, torch.arange(N)).double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    data = images()
    assert torch.equal(view(data.cuda(), torch.arange(N)).cpu(), view(data, torch.arange(N)))


@pytest.mark.parametrize(
    ("batch", "kind", "padding", "message"),
    [
        (images(), "rotate", 2, r"data\.augmentation: found 'rotate'; allowed: one of none, flip"),
        (torch.zeros(N, 5), "flip", 2, r"data\.augmentation: .* shape \(40, 5\)"),
        (images(), "crop", 8, r"data\.crop_padding: found 8 for images of 8 × 8 pixels; allowed: 1 to 7"),
    ],
)
def test_what_cannot_be_augmented_is_refused(batch, kind, padding, message):
    with pytest.raises(ConfigError, match=message):
        view(batch, torch.arange(N), kind=kind, padding=padding)
