"""ResNet-9 as it is used for exact influence: smooth activations, BatchNorm before them, a scaled head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tracked_replay.errors import ConfigError, DataError

_POOLINGS = ("average", "log_sum_exp")
_BASE_CHANNELS = (32, 64, 128, 256)
_SMALLEST_SIDE = 8  # three 2×2 poolings: 8 → 4 → 2 → 1


def smooth_maximum(windows: Tensor, dims: tuple[int, ...], epsilon: float) -> Tensor:
    """``epsilon · (logsumexp(x / epsilon) − log n)`` over ``dims``, which hold n values.

    Between the mean (large ``epsilon``) and the maximum (``epsilon`` towards 0); differentiable any number of times,
    where a maximum has no second derivative that says anything.
    """
    count = math.prod(windows.shape[dim] for dim in dims)
    return epsilon * (torch.logsumexp(windows / epsilon, dim=dims) - math.log(count))


class Pool2x2(nn.Module):
    """Reduces every 2×2 window: (B, C, H, W) → (B, C, H // 2, W // 2). An odd last row or column is left out."""

    def __init__(self, pooling: str = "average", epsilon: float = 0.1) -> None:
        super().__init__()
        self.pooling, self.epsilon = _checked_pooling(pooling, epsilon)
        self.average = nn.AvgPool2d(2)  # a module, which the replay knows

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H // 2, W // 2)."""
        if self.pooling == "average":
            return self.average(x)
        batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
        windows = x[:, :, : 2 * height, : 2 * width].reshape(batch, channels, height, 2, width, 2)
        return smooth_maximum(windows, (3, 5), self.epsilon)


class GlobalPool(nn.Module):
    """Reduces the whole map: (B, C, H, W) → (B, C)."""

    def __init__(self, pooling: str = "average", epsilon: float = 0.1) -> None:
        super().__init__()
        self.pooling, self.epsilon = _checked_pooling(pooling, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C)."""
        if self.pooling == "average":
            return x.mean(dim=(2, 3))
        return smooth_maximum(x, (2, 3), self.epsilon)


class Unit(nn.Module):
    """3×3 convolution without bias, BatchNorm, GELU: (B, I, H, W) → (B, O, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) → (B, O, H, W)."""
        return self.activation(self.normalization(self.convolution(x)))


class Residual(nn.Module):
    """Two units beside an identity: (B, C, H, W) → the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unit1 = Unit(channels, channels)
        self.unit2 = Unit(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return x + self.unit2(self.unit1(x))


class ResNet9(nn.Module):
    """Eight 3×3 convolutions and a linear head: (B, ``in_channels``, H, W) → logits (B, ``classes``); H, W ≥ 8.

    Args:
        in_channels: channels of the images.
        classes: number of logits.
        width: multiplier on the 32, 64, 128 and 256 channels; 2.5 gives 80, 160, 320, 640 and 10.3 million parameters.
        pooling: ``average`` or ``log_sum_exp``, for the 2×2 windows and for the whole map.
        pooling_epsilon: temperature of ``log_sum_exp``.
        final_scale: factor on the logits; a small one makes training smoother in the examples' weights.

    Raises:
        ConfigError: a width that leaves a layer without channels, an unknown pooling, a factor that is not positive.
        DataError: in ``forward``, for inputs that are not (B, in_channels, H ≥ 8, W ≥ 8).
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: float = 1.0,
        pooling: str = "average",
        pooling_epsilon: float = 0.1,
        final_scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels = [round(base * width) for base in _BASE_CHANNELS]
        if channels[0] < 1:
            raise ConfigError(
                f"model.width: found {width:g}, which leaves {channels[0]} of {_BASE_CHANNELS[0]} channels; "
                f"allowed: > {0.5 / _BASE_CHANNELS[0]:g}"
            )
        if not final_scale > 0:
            raise ConfigError(f"model.final_scale: found {final_scale:g}; allowed: > 0")
        self.in_channels = in_channels
        self.final_scale = final_scale
        self.prep = Unit(in_channels, channels[0])
        self.layer1 = Unit(channels[0], channels[1])
        self.pool1 = Pool2x2(pooling, pooling_epsilon)
        self.residual1 = Residual(channels[1])
        self.layer2 = Unit(channels[1], channels[2])
        self.pool2 = Pool2x2(pooling, pooling_epsilon)
        self.layer3 = Unit(channels[2], channels[3])
        self.pool3 = Pool2x2(pooling, pooling_epsilon)
        self.residual2 = Residual(channels[3])
        self.pool = GlobalPool(pooling, pooling_epsilon)
        self.head = nn.Linear(channels[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → logits (B, classes)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise DataError(
                f"ResNet-9: found inputs of shape {tuple(x.shape)}; allowed: (batch, {self.in_channels}, height, "
                f"width) with height and width >= {_SMALLEST_SIDE}, because three poolings halve them"
            )
        x = self.pool1(self.layer1(self.prep(x)))
        x = self.residual1(x)
        x = self.pool2(self.layer2(x))
        x = self.pool3(self.layer3(x))
        x = self.residual2(x)
        return self.head(self.pool(x)) * self.final_scale


def _checked_pooling(pooling: str, epsilon: float) -> tuple[str, float]:
    if pooling not in _POOLINGS:
        raise ConfigError(f"model.pooling: found {pooling!r}; allowed: one of {', '.join(_POOLINGS)}")
    if not epsilon > 0:
        raise ConfigError(f"model.pooling_epsilon: found {epsilon:g}; allowed: > 0")
    return pooling, epsilon
