"""Hand-written derivatives against autograd on plain formulas, and the layout and layers of the replay's model."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from tracked_replay.errors import ReplayError
from tracked_replay.replay import DifferentiableModel, allocation
from tracked_replay.replay.derivatives import batch_norm, convolution, gelu

Outputs = tuple[Tensor, ...]
EPS = 1e-3
SHAPES = [(5, 3), (4, 3, 2), (4, 3, 2, 2), (2, 3, 2, 2, 2)]


def plain_batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Outputs:
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    variance, mean = torch.var_mean(x, dims, correction=0)
    y = (x - mean.view(shape)) / (variance.view(shape) + EPS).sqrt()
    if weight is not None and bias is not None:
        y = y * weight.view(shape) + bias.view(shape)
    return y, mean, x.var(dims)


def hand_batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Outputs:
    return batch_norm(x, weight, bias, EPS)


def plain_gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def normal(*shape: int, seed: int, offset: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + offset).requires_grad_()


def derivatives(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Values and derivatives up to the third of some function of them, the second as an end and on the way."""
    outputs = function(*inputs)
    total = sum((normal(*y.shape, seed=7).detach() * y**2).sum() for y in outputs)
    first = torch.autograd.grad(total, inputs, create_graph=True)
    total = sum((normal(*g.shape, seed=8).detach() * g**2).sum() for g in first) + sum((y**3).sum() for y in outputs)
    second = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total, inputs, create_graph=True)
    total = sum((normal(*g.shape, seed=9).detach() * g).sum() for g in again)
    third = torch.autograd.grad(total, inputs)
    return [*outputs, *first, *second, *again, *third]


def assert_same(function: Callable[..., Outputs], plain: Callable[..., Outputs], inputs: Sequence[Tensor]) -> None:
    for found, expected in zip(derivatives(function, inputs), derivatives(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_derivatives_right(function: Callable[..., Outputs], inputs: tuple[Tensor, ...]) -> None:
    """First and second against finite differences, and third by asking for the second of the gradient."""
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)

    def gradient(*at: Tensor) -> Outputs:
        return torch.autograd.grad(sum((y**3).sum() for y in function(*at)), at, create_graph=True)

    assert gradgradcheck(gradient, inputs)


def affine_inputs(shape: tuple[int, ...], affine: bool) -> tuple[Tensor, ...]:
    x = normal(*shape, seed=0, offset=2.0)
    return (x, normal(3, seed=1), normal(3, seed=2)) if affine else (x,)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_has_the_derivatives_of_the_plain_formula(shape: tuple[int, ...], affine: bool) -> None:
    assert_same(hand_batch_norm, plain_batch_norm, affine_inputs(shape, affine))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_against_finite_differences(affine: bool) -> None:
    assert_derivatives_right(hand_batch_norm, affine_inputs((3, 3, 2, 1), affine))


def test_batch_norm_with_a_factor_of_zero() -> None:
    x, weight, bias = affine_inputs((4, 3, 2, 2), True)
    weight = torch.tensor([0.0, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert_same(hand_batch_norm, plain_batch_norm, (x, weight, bias))


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_images_whose_gradient_has_another_layout(approximate: str) -> None:
    inputs = affine_inputs((4, 3, 2, 2), True)
    assert last(inputs[0]).stride() != inputs[0].stride()

    def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return (gelu(last(gelu(batch_norm(last(x), weight, bias, EPS)[0].contiguous(), approximate)), approximate),)

    def plain(*inputs: Tensor) -> Outputs:
        return (plain_gelu(plain_gelu(plain_batch_norm(*inputs)[0], approximate), approximate),)

    assert_same(by_hand, plain, inputs)


SOME = [(0,), (1,), (2,), (0, 2), (1, 2)]


def assert_same_for_some(
    function: Callable[..., Outputs], plain: Callable[..., Outputs], inputs: Sequence[Tensor], trained: Sequence[int]
) -> None:
    """As :func:`assert_same`, with the inputs at the other places held fixed."""

    def among(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
        def of(*chosen: Tensor) -> Outputs:
            at = dict(zip(trained, chosen, strict=True))
            return (function(*(at.get(place, tensor.detach()) for place, tensor in enumerate(inputs)))[0],)

        return of

    assert_same(among(function), among(plain), [inputs[place].detach().clone().requires_grad_() for place in trained])


@pytest.mark.parametrize("trained", SOME, ids=str)
def test_batch_norm_where_only_some_inputs_are_trained(trained: tuple[int, ...]) -> None:
    assert_same_for_some(hand_batch_norm, plain_batch_norm, affine_inputs((4, 3, 2, 2), True), trained)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    x = torch.linspace(-6, 6, 40, dtype=torch.float64).view(4, 2, 5).requires_grad_()

    def by_hand(x: Tensor) -> Outputs:
        return (gelu(x, approximate),)

    assert_same(by_hand, lambda x: (plain_gelu(x, approximate),), (x,))
    assert_derivatives_right(by_hand, (x,))
    assert_same(by_hand, lambda x: (plain_gelu(x, approximate),), (normal(seed=0),))  # a tensor without dimensions


GEOMETRIES = list(itertools.product([(1, 1), (2, 1)], [(0, 0), (1, 2)], [(1, 1), (1, 2)], [1, 2], [True, False]))


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups", "biased"), GEOMETRIES)
def test_convolution(stride: tuple, padding: tuple, dilation: tuple, groups: int, biased: bool) -> None:
    x, weight = normal(2, 2, 5, 6, seed=0), normal(4, 2 // groups, 2, 3, seed=1)
    inputs = (x, weight, normal(4, seed=2)) if biased else (x, weight)

    def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outputs:
        return (convolution(x, weight, bias, stride, padding, dilation, groups),)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outputs:
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups),)

    assert_same(by_hand, plain, inputs)
    for trained in SOME if biased else [(0,), (1,)]:
        assert_same_for_some(by_hand, plain, inputs, trained)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
        {"kernel_size": 2, "divisor_override": 3},
    ],
)
def test_average_pooling(arguments: dict) -> None:
    inputs = (normal(2, 2, 5, 6, seed=0),)
    layer = nn.AvgPool2d(**arguments)
    replaced = DifferentiableModel(layer).module
    assert type(replaced) is not nn.AvgPool2d
    assert_same(lambda x: (replaced(x),), lambda x: (layer(x),), inputs)
    assert_same(lambda x: (replaced(x[0]),), lambda x: (layer(x[0]),), inputs)  # one image without a batch dimension
    assert_derivatives_right(lambda x: (replaced(torch.sin(x)),), inputs)


def test_convolution_against_finite_differences() -> None:
    assert_derivatives_right(
        lambda x, weight, bias: (convolution(x, weight, bias, (2, 1), (1, 0), (1, 1), 1),),
        (normal(2, 2, 3, 3, seed=0), normal(2, 2, 2, 2, seed=1), normal(2, seed=2)),
    )


class Tied(nn.Module):
    """A weight that is made of a parameter, and one that is the parameter itself, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made = {"weight": torch.sin(self.first.weight), "bias": self.first.bias}
        x = torch.func.functional_call(self.first, made, (x,))
        return self.second(torch.tanh(self.second(torch.tanh(x))))


def test_a_gradient_that_nobody_reads_has_no_values_but_the_right_derivatives() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    x = normal(3, 2, 4, 4, seed=0).detach()
    found = []
    for read in (True, False):
        differentiable = DifferentiableModel(model, gradient_is_read=read)
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in model.named_parameters()}
        outputs = differentiable.training_outputs(tensors, x, lambda: None)
        gradients = torch.autograd.grad(outputs.square().sum(), tensors.values(), create_graph=True)
        known = {name for name, g in zip(tensors, gradients, strict=True) if not g.isnan().any()}
        assert set(tensors) - known == (set() if read else {"second.weight"})
        directions = [normal(*g.shape, seed=seed).detach() for seed, g in enumerate(gradients)]
        found.append(torch.autograd.grad(gradients, tensors.values(), directions))
        outputs = differentiable.training_outputs(tensors, x, lambda: None)
        found.append(torch.autograd.grad(outputs.square().sum(), tensors.values()))  # read without create_graph
    tensors = dict(model.named_parameters())
    gradients = torch.autograd.grad(model(x).square().sum(), tensors.values(), create_graph=True)
    second = torch.autograd.grad(gradients, tensors.values(), directions)
    for products, expected in zip(found, [second, gradients] * 2, strict=True):
        torch.testing.assert_close(products, expected, rtol=1e-10, atol=1e-10)


class Layout(nn.Module):
    """Notes the layouts of what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __deepcopy__(self, memo: dict) -> Layout:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append("last" if x.is_contiguous(memory_format=torch.channels_last) else "usual")
        return x


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("middle", "layouts"),
    [
        ([nn.Flatten()], ["last", "last"]),
        ([View()], ["last", "usual", "usual"]),
        ([Drop(), nn.Flatten()], ["last", "usual", "usual"]),
        ([nn.Dropout2d(), nn.Flatten()], ["last", "usual", "usual"]),
    ],
    ids=["plain", "view", "dropout", "dropout2d"],
)
def test_images_have_their_channels_last_where_the_model_allows_it(middle: list, layouts: list[str]) -> None:
    layout = Layout()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), layout, *middle, nn.Linear(16, 3)).double()
    differentiable = DifferentiableModel(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    inputs = torch.randn(6, 2, 4, 4, dtype=torch.float64)

    def seed() -> None:
        torch.manual_seed(3)

    seed()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    output = functional_call(copy.deepcopy(model).train(), expected, (inputs,))
    layout.seen.clear()
    for _ in range(2):
        found = differentiable.training_outputs(tensors, inputs, seed)
        torch.testing.assert_close(found, output, rtol=1e-12, atol=1e-12)
        updated = differentiable.updated_statistics()
        assert set(updated) == {"1.running_mean", "1.running_var"}
        for name, statistic in updated.items():
            torch.testing.assert_close(statistic, expected[name], rtol=1e-12, atol=1e-12)
    assert layout.seen == layouts


def test_an_error_of_the_model_is_not_taken_for_one_of_the_layout() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        DifferentiableModel(model).training_outputs(
            dict(model.named_parameters()), torch.randn(6, 2, 4, 4), lambda: None
        )


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ReplayError, match=r"^the model: Sequential cannot be copied.*parametrizations\.weight_norm$"):
        DifferentiableModel(model)


class Doubled(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_compute_something_else_stay() -> None:
    convolutions = [
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
    ]
    model = nn.Sequential(*convolutions, Doubled(), nn.GELU("tanh"), nn.Conv2d(2, 1, 1)).double()
    tensors = dict(model.named_parameters())
    inputs = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    found = DifferentiableModel(model).training_outputs(tensors, inputs, lambda: None)
    torch.testing.assert_close(found, model(inputs), rtol=1e-12, atol=1e-12)
    (single,) = DifferentiableModel(nn.Conv2d(2, 1, 1).double()).module(inputs[0])
    assert single.shape == (4, 4)  # one image without a batch dimension


FAULTS = """
import ctypes, resource, runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = c.malloc(2**26)
        ctypes.memset(block, 1, 2**26)
        c.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    if allocation.platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    command = [sys.executable, "-c", FAULTS, allocation.__file__]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    before, after = map(int, found.stdout.split())
    assert before > 100
    assert after < before / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("the C library was loaded"))
    allocation.keep_freed_memory()
