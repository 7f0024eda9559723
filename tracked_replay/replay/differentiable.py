"""A model whose training step can be differentiated twice, running statistics included.

Native BatchNorm updates its running statistics outside autograd and refuses gradients with respect to them in eval
mode, so the replay differentiates a copy of the model in which every BatchNorm is written out in plain tensor
operations. It computes the same function, equal to rounding; no state is ever taken from it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracked_replay.errors import ReplayError
from tracked_replay.training.state import Tensors

STATISTICS = ("running_mean", "running_var")


class DifferentiableBatchNorm(nn.Module):
    """BatchNorm over all dimensions but the second, with running statistics that are functions of the input.

    Parameters and buffers have the names of the module it replaces, so it takes the same state. After a forward pass
    in train mode ``updated`` holds the next running statistics as differentiable tensors of shape (C,).
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, original: _BatchNorm) -> None:
        super().__init__()
        self.eps = original.eps
        self.momentum = original.momentum
        self.weight = original.weight
        self.bias = original.bias
        for name in (*STATISTICS, "num_batches_tracked"):
            self.register_buffer(name, getattr(original, name))
        self.updated: Tensors = {}
        self._calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``inputs`` of shape (N, C, ...)."""
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        tracked = self.running_mean is not None and self.running_var is not None
        if self.training or not tracked:
            dims = [dim for dim in range(inputs.ndim) if dim != 1]
            mean = inputs.mean(dims)
            centred = inputs - mean.view(shape)
            variance = centred.square().mean(dims)
            if tracked:
                self._update(mean, variance, inputs.numel() // inputs.shape[1])
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, variance = self.running_mean, self.running_var
            centred = inputs - mean.view(shape)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normalised = centred * scale.view(shape)
        return normalised if self.bias is None else normalised + self.bias.view(shape)

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        self._calls += 1
        if self.momentum is None:  # a plain average over all batches so far
            assert self.num_batches_tracked is not None
            share = 1.0 / float(self.num_batches_tracked + self._calls)
        else:
            share = self.momentum
        unbiased = variance * (count / (count - 1))
        # A layer that is called twice in one forward pass updates its statistics twice.
        before = {"running_mean": self.running_mean, "running_var": self.running_var} | self.updated
        self.updated = {
            "running_mean": (1 - share) * before["running_mean"] + share * mean,
            "running_var": (1 - share) * before["running_var"] + share * unbiased,
        }

    def take_updated(self) -> Tensors:
        """The next running statistics, or none after a pass that made none; forgets them."""
        found, self.updated, self._calls = self.updated, {}, 0
        return found


class DifferentiableModel:
    """A copy of a model for the replay; see the module's docstring.

    Attributes:
        module: the copy.
        statistics: names of the running statistics that have an adjoint.
        counters: names of the integer counters beside them, which change but carry no derivative.
    """

    def __init__(self, model: nn.Module) -> None:
        self._normalisations: dict[str, DifferentiableBatchNorm] = {}
        self._replaced: dict[int, DifferentiableBatchNorm] = {}
        self.module = self._replace(copy.deepcopy(model), "")
        self.statistics = tuple(
            _join(name, statistic)
            for name, layer in self._normalisations.items()
            for statistic in STATISTICS
            if getattr(layer, statistic) is not None
        )
        self.counters = tuple(_join(name, "num_batches_tracked") for name in self._normalisations)

    def _replace(self, module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, _BatchNorm):
            if id(module) not in self._replaced:  # a layer used under two names stays one layer
                _require_plain(module, name)
                self._replaced[id(module)] = self._normalisations[name] = DifferentiableBatchNorm(module)
            return self._replaced[id(module)]
        for child_name, child in list(module._modules.items()):  # named_children() skips a layer's second name
            if child is not None:
                setattr(module, child_name, self._replace(child, _join(name, child_name)))
        return module

    def updated_statistics(self) -> Tensors:
        """The running statistics after the last forward pass in train mode, by buffer name; forgets them."""
        return {
            _join(name, statistic): tensor
            for name, layer in self._normalisations.items()
            for statistic, tensor in layer.take_updated().items()
        }


def _require_plain(layer: _BatchNorm, name: str) -> None:
    """A layer that computes something else than BatchNorm must not be replaced by it."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if type(layer).forward is not _BatchNorm.forward or not isinstance(layer, plain):
        raise ReplayError(
            f"layer {name!r}: {type(layer).__name__} has no adjoint here; allowed: nn.BatchNorm1d, 2d and 3d as torch "
            f"has them"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ReplayError(f"layer {name!r}: hooks on a BatchNorm have no adjoint here; allowed: none")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
