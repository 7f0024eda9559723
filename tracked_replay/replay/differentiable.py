"""A model whose training step can be differentiated twice, running statistics included.

Native BatchNorm updates its running statistics outside autograd and refuses gradients with respect to them in eval
mode, so the replay differentiates a copy of the model in which every BatchNorm gives them as functions of its input.
In the copy BatchNorm, GELU, convolution and average pooling also have second derivatives that are cheaper than
autograd's, and weight normalisation has the right one. It computes the same function, equal to rounding; no state is
ever taken from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair
from torch.nn.utils.parametrizations import _WeightNorm

from tracked_replay.errors import ReplayError
from tracked_replay.replay.derivatives import average_pool, batch_norm, convolution, gelu
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
        tracked = self.running_mean is not None and self.running_var is not None
        if self.training or not tracked:
            outputs, mean, variance = batch_norm(inputs, self.weight, self.bias, self.eps)
            if tracked:
                self._update(mean, variance)
            return outputs
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normalised = (inputs - self.running_mean.view(shape)) * scale.view(shape)
        return normalised if self.bias is None else normalised + self.bias.view(shape)

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        self._calls += 1
        if self.momentum is None:  # a plain average over all batches so far
            assert self.num_batches_tracked is not None
            share = 1.0 / float(self.num_batches_tracked + self._calls)
        else:
            share = self.momentum
        # A layer that is called twice in one forward pass updates its statistics twice.
        before = {"running_mean": self.running_mean, "running_var": self.running_var} | self.updated
        self.updated = {
            "running_mean": (1 - share) * before["running_mean"] + share * mean,
            "running_var": (1 - share) * before["running_var"] + share * variance,
        }

    def take_updated(self) -> Tensors:
        """The next running statistics, or none after a pass that made none; forgets them."""
        found, self.updated, self._calls = self.updated, {}, 0
        return found


class DifferentiableGELU(nn.GELU):
    """GELU with a cheap second derivative."""

    def forward(self, input: Tensor) -> Tensor:
        """As in the module it replaces."""
        return gelu(input, self.approximate)


class DifferentiableConv2d(nn.Conv2d):
    """A convolution whose second derivative uses the kernels of the first.

    Attributes:
        gradient_is_read: whether anything reads the values of a gradient that is differentiated once more.
    """

    gradient_is_read = True

    def forward(self, input: Tensor) -> Tensor:
        """As in the module it replaces."""
        if input.ndim != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        return convolution(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            # What a weight was made of reads the weight's gradient.
            weight_gradient=self.gradient_is_read or not self.weight.is_leaf,
        )


class DifferentiableAvgPool2d(nn.AvgPool2d):
    """Average pooling, whose gradient does not depend on its input."""

    def forward(self, input: Tensor) -> Tensor:
        """As in the module it replaces."""
        return average_pool(
            input,
            _pair(self.kernel_size),
            _pair(self.stride),
            _pair(self.padding),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class DifferentiableWeightNorm(_WeightNorm):
    """Weight normalisation in operations whose second derivatives are right: torch's own for it is not."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """As in the module it replaces."""
        return weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, self.dim))


# Layers that stay the modules they are and get another forward pass. A subclass stays as it is.
OTHER_FORWARD: dict[type[nn.Module], type[nn.Module]] = {
    _WeightNorm: DifferentiableWeightNorm,
    nn.AvgPool2d: DifferentiableAvgPool2d,
    nn.Conv2d: DifferentiableConv2d,
    nn.GELU: DifferentiableGELU,
}


class DifferentiableModel:
    """A copy of a model for the replay; see the module's docstring.

    Args:
        model: in any mode; it stays as it is.
        gradient_is_read: whether anything reads the values of a gradient with ``create_graph``. If not, those of
            convolutions' weights are NaN, because computing them costs time; derivatives of the gradient are right
            all the same.

    Attributes:
        module: the copy.
        statistics: names of the running statistics that have an adjoint.
        counters: names of the integer counters beside them, which change but carry no derivative.
        largest_activation: bytes of the largest tensor that a layer gave in the first training pass, or of the inputs.
    """

    def __init__(self, model: nn.Module, *, gradient_is_read: bool = True) -> None:
        self._normalisations: dict[str, DifferentiableBatchNorm] = {}
        self._replaced: dict[int, DifferentiableBatchNorm] = {}
        self.module = self._replace(_copied(model), "")
        for layer in self.module.modules():
            if isinstance(layer, DifferentiableConv2d):
                layer.gradient_is_read = gradient_is_read
        self.statistics = tuple(
            _join(name, statistic)
            for name, layer in self._normalisations.items()
            for statistic in STATISTICS
            if getattr(layer, statistic) is not None
        )
        self.counters = tuple(_join(name, "num_batches_tracked") for name in self._normalisations)
        self._channels_last = True
        self.largest_activation = 0

    def training_outputs(self, tensors: Tensors, inputs: Tensor, seed: Callable[[], None] | None) -> Tensor:
        """Outputs in train mode, as a differentiable function of ``tensors``.

        On the CPU images are laid out with the channels last, in which convolution, pooling and BatchNorm are faster.
        A model that cannot take them so (it views its activations in the usual layout), or that draws random numbers
        (in another layout the same numbers would fall on other elements), gets them as they are.

        Args:
            tensors: parameters and buffers by name.
            inputs: (B, ...).
            seed: sets torch's generators for this pass; ``None`` where it draws nothing and an earlier pass has shown
                which layout the model takes.
        """
        self.module.train()
        with ExitStack() as contexts:
            # The other kernels of attention have no second derivative.
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
            if not self.largest_activation:
                contexts.enter_context(self._noting_activations())
                self.largest_activation = inputs.nbytes
            return self._training_outputs(tensors, inputs, seed)

    @contextmanager
    def _noting_activations(self) -> Iterator[None]:
        def note(layer: nn.Module, given: object, outputs: object) -> None:
            if isinstance(outputs, Tensor):
                self.largest_activation = max(self.largest_activation, outputs.nbytes)

        hooks = [layer.register_forward_hook(note) for layer in self.module.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _training_outputs(self, tensors: Tensors, inputs: Tensor, seed: Callable[[], None] | None) -> Tensor:
        channels_last = self._channels_last and inputs.ndim == 4 and inputs.device.type == "cpu"
        if seed is None:
            layout = torch.channels_last if channels_last else torch.preserve_format
            return functional_call(self.module, tensors, (inputs.clone(memory_format=layout),))
        if channels_last:
            outputs = self._with_channels_last(tensors, inputs, seed)
            if outputs is not None:
                return outputs
            self._channels_last = False
            self.updated_statistics()
        seed()
        return functional_call(self.module, tensors, (inputs,))

    def _with_channels_last(self, tensors: Tensors, inputs: Tensor, seed: Callable[[], None]) -> Tensor | None:
        """``None`` where the model needs the usual layout."""
        seed()
        generator = torch.get_rng_state()
        try:
            # A copy even where the layout is this one: a model may change its inputs in place and then need the other.
            outputs = functional_call(self.module, tensors, (inputs.clone(memory_format=torch.channels_last),))
        except RuntimeError:  # an error that is not about the layout comes again in the usual one
            return None
        return outputs if torch.equal(torch.get_rng_state(), generator) else None

    def _replace(self, module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, _BatchNorm):
            if id(module) not in self._replaced:  # a layer used under two names stays one layer
                _require_plain(module, name)
                self._replaced[id(module)] = self._normalisations[name] = DifferentiableBatchNorm(module)
            return self._replaced[id(module)]
        if type(module) in OTHER_FORWARD:
            module.__class__ = OTHER_FORWARD[type(module)]
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


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ReplayError(
            f"the model: {type(model).__name__} cannot be copied, and the replay differentiates a copy "
            f"({' '.join(str(error).split())[:200]}); known to do so: torch.nn.utils.weight_norm; allowed: what "
            f"copy.deepcopy takes, such as torch.nn.utils.parametrizations.weight_norm"
        ) from None


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
