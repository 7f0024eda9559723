"""BatchNorm, GELU, convolution and average pooling with first and second derivatives written out by hand.

The replay differentiates a step's gradient once more for every target. For these layers autograd then goes over
the activations many times, or takes kernels that were made for something else. The functions here give the same
derivatives on few passes, with torch's fused kernels; docs/how-it-works.md derives the formulas. What goes beyond,
derivatives of a second derivative, autograd makes from a plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tracked_replay.replay.kernels import (
    Geometry,
    Maybe,
    aten,
    batch_norm_gradient,
    by_channel,
    centred_product,
    channel_sums,
    convolution_gradient,
    folded,
    input_gradient,
    is_several,
    laid_out_like,
    pull,
    several_like,
    weight_gradient,
)
from tracked_replay.replay.kernels import convolution as convolve


def batch_norm(inputs: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch's own statistics.

    Args:
        inputs: (N, C, ...), more than one value a channel.
        weight: (C,) or ``None`` for 1.
        bias: (C,) or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The normalised inputs, and mean and unbiased variance of each channel, (C,).
    """
    return _BatchNorm.apply(inputs, weight, bias, eps)


def gelu(inputs: Tensor, approximate: str) -> Tensor:
    """``torch.nn.functional.gelu``; ``approximate`` is ``none`` or ``tanh``."""
    return _Gelu.apply(inputs, approximate)


def convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Maybe,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    weight_gradient: bool = True,
) -> Tensor:
    """``torch.nn.functional.conv2d`` for a batch (N, C, H, W) and padding in numbers.

    Without ``weight_gradient``, a gradient with respect to the weight that is itself differentiable holds NaN: its
    derivatives, which are right, do not need the values, and they cost a third of a training step.
    """
    return _Convolution.apply(inputs, weight, bias, (stride, padding, dilation, False, (0, 0), groups), weight_gradient)


def average_pool(inputs: Tensor, *arguments: Any) -> Tensor:
    """``torch.nn.functional.avg_pool2d`` of inputs (N, C, H, W), with all of its arguments in their order."""
    return _AveragePool.apply(inputs, arguments)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # With momentum 1 the kernel's running statistics become those of the batch.
        mean, variance = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        y, saved_mean, scale = aten.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, saved_mean, scale)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, g: Maybe, g_mean: Maybe, g_variance: Maybe) -> tuple[Maybe, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        if g is None and g_mean is None and g_variance is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            g = torch.zeros_like(x) if g is None else laid_out_like(g, x)
            gx, gw, gb = _BatchNormGradient.apply(g, x, weight, mean, scale, ctx.eps)
            if g_mean is not None or g_variance is not None:
                gx = gx + _statistics_gradient(x, g_mean, g_variance)
        else:
            gx, gw, gb = pull(_pull_batch_norm, (g, g_mean, g_variance), x, weight, mean, scale)
        return gx, None if weight is None else gw, gb if ctx.needs_input_grad[2] else None, None


class _BatchNormGradient(Function):
    """(g, x, γ) → the gradients with respect to x, γ and β."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Maybe, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = batch_norm_gradient(g, x, weight, mean, scale)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, mean, scale, gw, gb)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, a: Maybe, b: Maybe, c: Maybe) -> tuple[Maybe, ...]:
        g, x, weight, mean, scale, gw, gb = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = _by_autograd(_plain_batch_norm_gradient, (g, x, weight), (a, b, c), ctx.eps)
            return *plain, None, None, None
        wants_x = ctx.needs_input_grad[1]
        pulled = pull(_pull_batch_norm_gradient, (a, b, c), g, x, weight, mean, scale, gw, gb, wants_x)
        return *pulled, None, None, None


def _pull_batch_norm(
    g: Maybe, g_mean: Maybe, g_variance: Maybe, x: Tensor, weight: Maybe, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to x, γ and β; cotangents of one or several."""
    if g is None:
        one = next(part for part in (g_mean, g_variance) if part is not None)
        g = x.new_zeros(()).expand(*one.shape[:-1], *x.shape)
    g = laid_out_like(g, x)
    if g_mean is None and g_variance is None and not is_several(g, x):
        return batch_norm_gradient(g, x, weight, mean, scale)
    values = x.numel() // x.shape[1]
    gw, gb = channel_sums(g, x, mean, scale)
    on_g = scale if weight is None else scale * weight
    on_normalised = -on_g * gw / values
    if g_variance is not None:
        on_normalised = on_normalised + g_variance * (2 / (values - 1)) / scale
    constant = -on_g * gb / values
    if g_mean is not None:
        constant = constant + g_mean / values
    return _affine(x, on_normalised, mean, scale, constant, [(g, on_g)]), gw, gb


def _pull_batch_norm_gradient(
    a: Maybe,
    b: Maybe,
    c: Maybe,
    g: Tensor,
    x: Tensor,
    weight: Maybe,
    mean: Tensor,
    scale: Tensor,
    gw: Tensor,
    gb: Tensor,
    wants_x: bool,
) -> tuple[Maybe, Maybe, Maybe]:
    """What (g, x, γ) get of cotangents of one or several on the gradients with respect to x, γ and β."""
    values = x.numel() // x.shape[1]
    g_mean, g_normalised = gb / values, gw / values
    gamma = torch.ones_like(scale) if weight is None else weight
    zero = torch.zeros_like(next((part for part in (b, c) if part is not None), scale))
    if a is None:
        a_mean = a_normalised = product = zero
    else:
        a = laid_out_like(a, x)
        sum_normalised, sum_ = channel_sums(a, x, mean, scale)
        a_mean, a_normalised = sum_ / values, sum_normalised / values
        product = centred_product(a, g, g_mean) / values - g_normalised * a_normalised
    on_normalised = (zero if b is None else b) - gamma * scale * a_normalised
    on_a = gamma * scale
    constant = (zero if c is None else c) - on_a * a_mean
    result_g = _affine(x, on_normalised, mean, scale, constant, [(a, on_a)])
    result_weight = None if weight is None else scale * product * values
    if not wants_x:
        return result_g, None, result_weight
    on_g, on_a = scale * on_normalised, -gamma * scale.square() * g_normalised
    on_normalised = -gamma * scale.square() * product - on_g * g_normalised - on_a * a_normalised
    constant = -on_g * g_mean - on_a * a_mean
    result_x = _affine(x, on_normalised, mean, scale, constant, [(a, on_a), (g, on_g)])
    return result_g, result_x, result_weight


def _statistics_gradient(x: Tensor, g_mean: Maybe, g_variance: Maybe) -> Tensor:
    """What mean and unbiased variance add to the gradient with respect to x, as plain operations."""
    values = x.numel() // x.shape[1]
    part = torch.zeros_like(x)
    if g_mean is not None:
        part = part + by_channel(g_mean, x) / values
    if g_variance is not None:
        part = part + (x - _channel_mean(x)) * (by_channel(g_variance, x) * (2 / (values - 1)))
    return part


def _plain_batch_norm_gradient(g: Tensor, x: Tensor, weight: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    centred = x - _channel_mean(x)
    scale = torch.rsqrt(_channel_mean(centred.square()) + eps)
    normalised = centred * scale
    gx = (g - _channel_mean(g) - normalised * _channel_mean(g * normalised)) * scale
    dims = [dim for dim in range(x.ndim) if dim != 1]
    return gx if weight is None else gx * by_channel(weight, x), (g * normalised).sum(dims), g.sum(dims)


def _affine(
    x: Tensor,
    on_normalised: Tensor,
    mean: Tensor,
    scale: Tensor,
    constant: Tensor,
    others: Sequence[tuple[Maybe, Tensor]],
) -> Tensor:
    """``on_normalised · (x − mean) · scale + constant`` plus factor · tensor for each of ``others``, by channel.

    Of one or several: ``on_normalised``, ``constant``, and what ``others`` hold.
    """
    on_x = on_normalised * scale
    offset = constant - on_x * mean
    if offset.ndim == 1:
        result = torch.addcmul(by_channel(offset, x), x, by_channel(on_x, x))
    else:
        result = torch.addcmul(by_channel(offset, x), x, by_channel(on_x, x), out=several_like(len(offset), x))
    for tensor, factor in others:
        if tensor is not None:
            result.addcmul_(tensor, by_channel(factor, x))
    return result


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate, ctx.slope = approximate, None
        ctx.save_for_backward(x)
        return aten.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            result, ctx.slope = _GeluGradient.apply(laid_out_like(g, x), x, ctx.approximate)
            return result, None
        if ctx.slope is None:
            return aten.gelu_backward(g, x, approximate=ctx.approximate), None
        return g * ctx.slope, None


class _GeluGradient(Function):
    """For y = h(x): (g, x) → g · h′(x), and h′(x) as a constant."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
        ctx.approximate = approximate
        slope = aten.gelu_backward(x.new_ones(()).expand_as(x), x, approximate=approximate)
        ctx.slope, ctx.bend = slope, _gelu_curvature(x, approximate).mul_(g)
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x)
        return g * slope, slope

    @staticmethod
    def backward(ctx: Any, a: Maybe, _: None) -> tuple[Maybe, ...]:
        if a is None:
            return None, None, None
        if torch.is_grad_enabled():
            g, x = ctx.saved_tensors
            return *_by_autograd(_plain_gelu_gradient, (g, x), (a,), ctx.approximate), None
        return a * ctx.slope, a * ctx.bend, None


def _gelu_curvature(x: Tensor, approximate: str) -> Tensor:
    """h″(x)."""
    square = x * x
    if approximate == "none":  # h″ = (2 − x²) · density
        log_factor = x.new_tensor(-0.5 * math.log(2 * math.pi))
        density = torch.add(log_factor, square, alpha=-0.5).exp_()
        return torch.sub(x.new_tensor(2.0), square, out=square).mul_(density)
    # h = x (1 + tanh u) / 2 with u = k (x + c x³)
    k, c = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(k * (x + c * x * square))
    first, second = k * (1 + 3 * c * square), 6 * k * c * x
    return (1 - tanh.square()) * (first + x * (0.5 * second - tanh * first.square()))


def _plain_gelu_gradient(g: Tensor, x: Tensor, approximate: str) -> tuple[Tensor]:
    return (aten.gelu_backward(g, x, approximate=approximate),)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Maybe, geometry: tuple, weight_gradient: bool) -> Tensor:
        ctx.geometry, ctx.weight_gradient = geometry, weight_gradient
        ctx.save_for_backward(x, weight)
        return aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Maybe, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_ConvolutionGradient.apply(g, x, weight, ctx.geometry, wanted, ctx.weight_gradient), None, None
        return *pull(_pull_convolution, (g,), x, weight, ctx.geometry, wanted), None, None


class _ConvolutionGradient(Function):
    """(g, x, weight) → the gradients with respect to x, weight and bias, ``None`` where they are not wanted."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: tuple, wanted: tuple[bool, bool, bool], known: bool
    ) -> tuple[Maybe, ...]:
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight)
        gx, gw, gb = convolution_gradient(g, x, weight, geometry, (wanted[0], wanted[1] and known, wanted[2]))
        if wanted[1] and not known:
            gw = weight.new_tensor(math.nan).expand_as(weight)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, a: Maybe, b: Maybe, c: Maybe) -> tuple[Maybe, ...]:
        # All of this can be differentiated again by autograd: the tensors saved have their graphs.
        g, x, weight = ctx.saved_tensors
        # The gradient with respect to x holds the weight, that with respect to the weight holds x.
        wanted = (b is not None and ctx.needs_input_grad[1], a is not None and ctx.needs_input_grad[2])
        pulling = _pull_convolution_gradient
        if torch.is_grad_enabled():
            return *pulling(a, b, c, g, x, weight, ctx.geometry, wanted), None, None, None
        return *pull(pulling, (a, b, c), g, x, weight, ctx.geometry, wanted), None, None, None


def _pull_convolution(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """The gradients with respect to x, weight and bias; ``g`` of one or several."""
    if not is_several(g, x):
        return convolution_gradient(g, x, weight, geometry, wanted)
    return (
        input_gradient(g, x, weight, geometry, "g") if wanted[0] else None,
        weight_gradient(g, x, weight, geometry, "g") if wanted[1] else None,
        g.sum([1, *range(3, g.ndim)]) if wanted[2] else None,
    )


def _pull_convolution_gradient(
    a: Maybe, b: Maybe, c: Maybe, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """What (g, x, weight) get of cotangents of one or several on the gradients with respect to x, weight and bias.

    Of one, all of it can be differentiated again by autograd where the tensors have their graphs.
    """
    several = any(part is not None and is_several(part, one) for part, one in ((a, x), (b, weight), (c, g[0, :, 0, 0])))
    parts = []
    if a is not None:
        parts.append(convolve(a, weight, c, geometry, several="x" if several else ""))
    if b is not None:
        parts.append(convolve(x, b, c if a is None else None, geometry, several="weight" if several else ""))
    if not parts and c is not None:
        parts.append(by_channel(c, g).expand(*c.shape[:-1], *g.shape))
    result = parts[0].add_(parts[1]) if len(parts) == 2 else parts[0] if parts else None
    if several:
        return (
            result,
            input_gradient(g, x, b, geometry, "weight") if wanted[0] and b is not None else None,
            weight_gradient(g, a, weight, geometry, "x") if wanted[1] and a is not None else None,
        )
    # b and a stand in for the weight and for x.
    of_x, of_weight, _ = convolution_gradient(
        g, x if a is None else a, weight if b is None else b, geometry, (*wanted, False)
    )
    return result, of_x, of_weight


class _AveragePool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple) -> Tensor:
        ctx.arguments = arguments
        ctx.save_for_backward(x)
        return aten.avg_pool2d(x, *arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Maybe, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _AveragePoolGradient.apply(g, x.detach(), ctx.arguments), None
        return pull(_pull_average_pool, (g,), x, ctx.arguments)[0], None


class _AveragePoolGradient(Function):
    """g → the gradient with respect to x, of which only the shape counts: autograd makes a tensor of zeros for it."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, arguments: tuple) -> Tensor:
        ctx.arguments, ctx.dimensions = arguments, x.ndim
        return aten.avg_pool2d_backward(g, x, *arguments)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Maybe, None, None]:
        if torch.is_grad_enabled():
            return _AveragePool.apply(a, ctx.arguments), None, None
        return pull(_pool, (a,), ctx.dimensions, ctx.arguments)[0], None, None


def _pull_average_pool(g: Tensor, x: Tensor, arguments: tuple) -> tuple[Tensor]:
    """The gradient with respect to x, of which only the shape counts; ``g`` of one or several."""
    if not is_several(g, x):
        return (aten.avg_pool2d_backward(g, x, *arguments),)
    inputs = several_like(len(g), x).flatten(0, 1)
    return (aten.avg_pool2d_backward(folded(g), inputs, *arguments).unflatten(0, g.shape[:2]),)


def _pool(a: Tensor, dimensions: int, arguments: tuple) -> tuple[Tensor]:
    """Average pooling of one, which has so many dimensions, or several."""
    if a.ndim == dimensions:
        return (aten.avg_pool2d(a, *arguments),)
    return (aten.avg_pool2d(folded(a), *arguments).unflatten(0, a.shape[:2]),)


def _by_autograd(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Maybe], cotangents: Sequence[Maybe], *rest: object
) -> tuple[Maybe, ...]:
    """Pull cotangents back through a plain function so that the result can be differentiated again."""
    # Views, because one input may be a function of another, and only what the function itself does is asked for.
    apart = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    made = [
        (output, cotangent)
        for output, cotangent in zip(function(*apart, *rest), cotangents, strict=True)
        if cotangent is not None
    ]
    sources = [tensor for tensor in apart if tensor is not None and tensor.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in made], sources, [given for _, given in made], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in apart)


def _channel_mean(x: Tensor) -> Tensor:
    return x.mean([dim for dim in range(x.ndim) if dim != 1], keepdim=True)
