"""Random views of training images that depend on seed, epoch and index alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import ConfigError

_KINDS = ("none", "flip", "crop", "flip+crop")


def augment_images(
    images: Tensor,
    indices: Tensor,
    *,
    epoch: int,
    seed: int,
    num_examples: int,
    kind: str,
    padding: int,
) -> Tensor:
    """Flip and crop a batch of images.

    The view of an example is a pure function of ``seed``, ``epoch``, its index and ``num_examples``: neither the rest
    of the batch nor its size, the order of calls, the device or the type of the images changes it. So a replay that
    visits the steps backwards sees what the training saw.

    Args:
        images: (B, C, H, W), any type; only whole pixels are moved, so no value changes.
        indices: (B,) int64, each image's index among the ``num_examples`` training examples.
        epoch: epoch, from 0.
        seed: master seed.
        num_examples: N, the size of the training set; an epoch's draws are made for all of them at once.
        kind: ``none``, ``flip`` (left to right, with probability 1/2), ``crop`` or ``flip+crop``.
        padding: pixels of reflected border on each side that a crop of the size of the image moves within.

    Returns:
        (B, C, H, W) of the same type and device; ``images`` itself where ``kind`` is ``none``.

    Raises:
        ConfigError: an unknown kind, inputs that are not (B, C, H, W), or a border as wide as the image.
    """
    if kind not in _KINDS:
        raise ConfigError(f"data.augmentation: found {kind!r}; allowed: one of {', '.join(_KINDS)}")
    if kind == "none":
        return images
    if images.ndim != 4:
        raise ConfigError(
            f"data.augmentation: found {kind!r} for inputs of shape {tuple(images.shape)}; "
            "allowed: none, unless inputs are (batch, channels, height, width)"
        )
    height, width = images.shape[2], images.shape[3]
    if "crop" in kind and not 1 <= padding < min(height, width):
        raise ConfigError(
            f"data.crop_padding: found {padding} for images of {height} × {width} pixels; "
            f"allowed: 1 to {min(height, width) - 1}, because the border is a reflection"
        )
    looked_up = indices.cpu()
    flips, shifts = _draws(derive_component_seed(seed, "augmentation", epoch), num_examples, padding)
    rows = torch.arange(height).expand(len(looked_up), height)
    columns = torch.arange(width).expand(len(looked_up), width)
    if "flip" in kind:
        columns = torch.where(flips[looked_up, None], width - 1 - columns, columns)
    if "crop" in kind:
        rows = _reflect(rows + shifts[looked_up, 0, None], height)
        columns = _reflect(columns + shifts[looked_up, 1, None], width)
    batch = torch.arange(len(looked_up))
    # One gather instead of pad, slice and flip: it works for every type, uint8 included, and moves bits unchanged.
    where = [part.to(images.device) for part in (batch[:, None, None], rows[:, :, None], columns[:, None, :])]
    return images.permute(0, 2, 3, 1)[where[0], where[1], where[2]].permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=2)  # the current epoch, and the one that a prefetching thread may already be in
def _draws(seed: int, num_examples: int, padding: int) -> tuple[Tensor, Tensor]:
    """Flips (N,) bool and shifts (N, 2) int64 in −padding … padding, on the CPU so that all devices agree."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    flips = torch.randint(0, 2, (num_examples,), generator=generator, device="cpu").bool()
    shifts = torch.randint(-padding, padding + 1, (num_examples, 2), generator=generator, device="cpu")
    return flips, shifts


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0 … size − 1 mirrored at the edge pixel, which is not repeated."""
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)
