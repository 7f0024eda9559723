"""torch's kernels for derivatives that may be those of several targets at once.

A tensor "of one or several" has its usual shape, or one more dimension K in front of it, one entry a target. What the
targets share (the recorded state, the batch, the gradient graph) never has it. Because of that one call of a kernel
does for all: K inputs with one weight are a batch K times as large, K weights with one input give K times the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import Function

aten = torch.ops.aten

Maybe = Tensor | None
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]  # aten.convolution's, in order
GROUPS = 5  # where the number of groups stands in it


def pull(function: Callable[..., tuple[Maybe, ...]], cotangents: Sequence[Maybe], *rest: Any) -> tuple[Maybe, ...]:
    """``function(*cotangents, *rest)``; under ``torch.vmap`` over the cotangents one call with all of them.

    Args:
        function: takes cotangents of one or several, and gives results of as many.
        cotangents: of one.
        rest: what the targets share.
    """
    if not any(given is not None and is_batchedtensor(given) for given in cotangents):
        return function(*cotangents, *rest)  # what a Function with a rule for vmap does too, some 50 µs later
    return _Pull.apply(lambda *given: function(*given, *rest), *cotangents)  # vmap looks into all arguments


class _Pull(Function):
    @staticmethod
    def forward(function: Callable[..., tuple[Maybe, ...]], *cotangents: Maybe) -> tuple[Maybe, ...]:
        return function(*cotangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing: its results are the end of what is differentiated."""

    @staticmethod
    def vmap(
        info: Any, dims: tuple, function: Callable[..., tuple[Maybe, ...]], *cotangents: Maybe
    ) -> tuple[tuple[Maybe, ...], tuple[int | None, ...]]:
        several = [
            given if given is None else _in_front(given, dim, info.batch_size)
            for given, dim in zip(cotangents, dims[1:], strict=True)
        ]
        results = function(*several)
        return results, tuple(None if result is None else 0 for result in results)


def _in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def is_several(tensor: Tensor, one: Tensor) -> bool:
    """Whether a tensor of one or several is of several; ``one`` has the shape of one."""
    return tensor.ndim > one.ndim


def each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of each of several."""
    return torch.stack([function(*parts) for parts in zip(*tensors, strict=True)])


def laid_out_like(tensor: Tensor, one: Tensor) -> Tensor:
    """The same values, each with the strides of ``one``, without which the kernels are slow."""
    if tensor.stride()[-one.ndim :] == one.stride():
        return tensor
    if not is_several(tensor, one):
        return torch.empty_like(one).copy_(tensor)
    return several_like(len(tensor), one).copy_(tensor)


def several_like(count: int, one: Tensor) -> Tensor:
    """Memory for several, each laid out like ``one``."""
    strides = (one.numel(), *torch.empty_like(one).stride())
    return torch.empty_strided((count, *one.shape), strides, dtype=one.dtype, device=one.device)


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts to ``like``, (N, C, ...); (K, C) in that for several."""
    return values.view([*values.shape[:-1], 1, -1] + [1] * (like.ndim - 2))


def batch_norm_gradient(
    g: Tensor,
    x: Tensor,
    weight: Maybe,
    mean: Tensor,
    scale: Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's fused kernel for the gradients with respect to x, γ and β; ``g`` is of one.

    The eps among the kernel's arguments belongs to another mode.
    """
    return aten.native_batch_norm_backward(g, x, weight, None, None, mean, scale, True, 0.0, wanted)


def channel_sums(a: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ a · (x − mean) · scale and Σ a for each channel, (C,), of one or several ``a``."""
    if not is_several(a, x):
        _, products, sums = batch_norm_gradient(a, x, None, mean, scale, (False, True, True))
        return products, sums
    found = [batch_norm_gradient(part, x, None, mean, scale, (False, True, True))[1:] for part in a]
    products, sums = zip(*found, strict=True)
    return torch.stack(products), torch.stack(sums)


def centred_product(a: Tensor, g: Tensor, mean: Tensor) -> Tensor:
    """Σ a · (g − mean) for each channel, (C,): what the kernel takes for γ's gradient; of one or several ``a``."""
    ones = torch.ones_like(mean)

    def product(part: Tensor) -> Tensor:
        return batch_norm_gradient(part, g, None, mean, ones, (False, True, False))[1]

    return each(product, a) if is_several(a, g) else product(a)


def convolution(x: Tensor, weight: Tensor, bias: Maybe, geometry: Geometry, *, several: str = "") -> Tensor:
    """``aten.convolution``.

    Args:
        x: (N, C, H, W).
        weight: (O, C, h, w).
        bias: (O,), of as many as the others.
        geometry: its other arguments.
        several: ``x`` or ``weight``, whichever is of several; neither where it is empty.
    """
    if not several:
        return aten.convolution(x, weight, bias, *geometry)
    if several == "x":
        result = aten.convolution(folded(x), weight, None, *geometry).unflatten(0, x.shape[:2])
    elif geometry[GROUPS] == 1:
        result = _apart(aten.convolution(x, weight.flatten(0, 1), None, *geometry), len(weight))
    else:
        result = each(lambda part: aten.convolution(x, part, None, *geometry), weight)
    return result if bias is None else result + by_channel(bias, result[0])


def convolution_gradient(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """``aten.convolution_backward`` of one: the gradients with respect to x, weight and bias."""
    if not any(wanted):
        return None, None, None
    sizes = [weight.shape[0]] if wanted[2] else None
    return aten.convolution_backward(g, x, weight, sizes, *geometry, list(wanted))


def _only_input(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    found, _, _ = convolution_gradient(g, x, weight, geometry, (True, False, False))
    assert found is not None
    return found


def _only_weight(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    _, found, _ = convolution_gradient(g, x, weight, geometry, (False, True, False))
    assert found is not None
    return found


def input_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, several: str) -> Tensor:
    """The gradient with respect to x, of which only the shape counts; ``g`` or ``weight`` is of several.

    Args:
        g: (N, O, H', W') cotangent of the output.
        x: (N, C, H, W).
        weight: (O, C, h, w).
        geometry: as in :func:`convolution`.
        several: ``g`` or ``weight``.

    Returns:
        (K, N, C, H, W).
    """
    if several == "g":
        inputs = several_like(len(g), x).flatten(0, 1)
        return _only_input(folded(g), inputs, weight, geometry).unflatten(0, g.shape[:2])
    if geometry[GROUPS] != 1:
        return each(lambda part: _only_input(g, x, part, geometry), weight)
    count = len(weight)
    shape = (x.shape[0], count * x.shape[1], *x.shape[2:])
    inputs = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return _apart(_only_input(g, inputs, weight.transpose(0, 1).flatten(1, 2), geometry), count)


def weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, several: str) -> Tensor:
    """The gradient with respect to the weight, of which only the shape counts; ``g`` or ``x`` is of several.

    Arguments as in :func:`input_gradient`; returns (K, O, C, h, w).
    """
    outputs, inputs, *kernel = weight.shape
    if several == "g":
        if geometry[GROUPS] != 1:
            return each(lambda part: _only_weight(part, x, weight, geometry), g)
        weights = weight.new_empty((len(g) * outputs, inputs, *kernel))
        return _only_weight(_together(g), x, weights, geometry).unflatten(0, (len(g), outputs))
    if geometry[GROUPS] != 1:
        return each(lambda part: _only_weight(g, part, weight, geometry), x)
    weights = weight.new_empty((outputs, len(x) * inputs, *kernel))
    return _only_weight(g, _together(x), weights, geometry).unflatten(1, (len(x), inputs)).transpose(0, 1)


def folded(tensors: Tensor) -> Tensor:
    """(K, N, C, H, W) → (K · N, C, H, W); copied, with the channels last, where the memory does not allow a view."""
    count, batch, *shape = tensors.shape
    if tensors.stride(0) == batch * tensors.stride(1):
        return tensors.flatten(0, 1)
    result = torch.empty(
        (count * batch, *shape), dtype=tensors.dtype, device=tensors.device, memory_format=torch.channels_last
    )
    result.unflatten(0, (count, batch)).copy_(tensors)
    return result


def _together(tensors: Tensor) -> Tensor:
    """(K, N, C, H, W) → (N, K · C, H, W) with the channels last, each target's channels in one piece."""
    return tensors.permute(1, 3, 4, 0, 2).flatten(3, 4).permute(0, 3, 1, 2)


def _apart(tensor: Tensor, count: int) -> Tensor:
    """The other way, without a copy."""
    return tensor.unflatten(1, (count, -1)).transpose(0, 1)
