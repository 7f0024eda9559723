"""Pictures of raw inputs: images as they are, anything else as bars."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST_BARS = 64
_BAR_WIDTH = 3
_BAR_HEIGHT = 32


def draw_input(example_input: Tensor) -> NDArray[np.uint8]:
    """A raw input (...) as uint8 (H, W) or (H, W, 3).

    (1 or 3, H, W) and (H, W) uint8 inputs are pictures already; floating ones of that shape are stretched between
    their extremes. Anything else becomes at most 64 bars around a zero line, dark on white.
    """
    values = example_input.detach().cpu()
    if values.ndim == 2 and values.dtype == torch.uint8:
        return _copied(values.numpy())
    if values.ndim == 3 and values.shape[0] in (1, 3):
        picture = values if values.dtype == torch.uint8 else stretch(values)
        channels_last = picture.permute(1, 2, 0).numpy()
        return _copied(channels_last[:, :, 0] if values.shape[0] == 1 else channels_last)
    return _bars(values)


def stretch(values: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Values (...) mapped linearly so that ``low`` becomes 0 and ``high`` 255, as uint8; default: their extremes."""
    values = values.double()
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scale = 255.0 / (high - low) if high > low else 0.0
    return ((values - low) * scale).round().clamp(0, 255).to(torch.uint8)


def _bars(values: Tensor) -> NDArray[np.uint8]:
    features = values.reshape(-1).double().numpy()
    if len(features) > _MOST_BARS:
        features = np.array([part.mean() for part in np.array_split(features, _MOST_BARS)])
    low, high = min(0.0, float(features.min(initial=0))), max(0.0, float(features.max(initial=0)))
    per_value = (_BAR_HEIGHT - 1) / (high - low) if high > low else 0.0
    zero_row = round(high * per_value)
    picture = np.full((_BAR_HEIGHT, _BAR_WIDTH * max(1, len(features)) + 1), 255, dtype=np.uint8)
    picture[zero_row] = 160
    for position, feature in enumerate(features):
        top, bottom = sorted((zero_row, round((high - feature) * per_value)))
        left = 1 + position * _BAR_WIDTH
        picture[top : bottom + 1, left : left + _BAR_WIDTH - 1] = 40
    return picture


def _copied(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy, so that nothing drawn into a figure reaches the data set."""
    return np.array(picture, dtype=np.uint8, order="C")
