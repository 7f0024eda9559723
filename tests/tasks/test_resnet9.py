import pytest
import torch
from torch import nn

from tracked_replay.errors import ConfigError, DataError
from tracked_replay.tasks import ResNet9
from tracked_replay.tasks.resnet9 import GlobalPool, Pool2x2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_width_has_the_published_size():
    convolutions = 9 * (3 * 80 + 80 * 160 + 2 * 160**2 + 160 * 320 + 320 * 640 + 2 * 640**2)
    normalizations = 2 * (80 + 3 * 160 + 320 + 3 * 640)
    head = 641 * 10
    with torch.device("meta"):
        model = ResNet9(3, 10, width=2.5)
    assert parameters(model) == convolutions + normalizations + head == 10_266_970
    assert 2 * 4 * parameters(model) == pytest.approx(82e6, rel=0.01)


def test_layers_are_convolution_normalization_activation():
    model = ResNet9(3, 10, width=0.25)
    units = [model.prep, model.layer1, model.residual1.unit1, model.residual1.unit2, model.layer2, model.layer3]
    units += [model.residual2.unit1, model.residual2.unit2]
    assert [unit.convolution.out_channels for unit in units] == [8, 16, 16, 16, 32, 64, 64, 64]
    assert all(unit.convolution.bias is None for unit in units)
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Linear, nn.AvgPool2d, GlobalPool}
    assert model.head.bias is not None


@pytest.mark.parametrize("pooling", ["average", "log_sum_exp"])
@pytest.mark.parametrize("side", [8, 9, 32])
def test_forward_is_the_composition_that_is_documented(pooling, side):
    torch.manual_seed(0)
    model = ResNet9(2, 5, width=0.1, pooling=pooling, final_scale=0.25).double().eval()
    x = torch.randn(3, 2, side, side, dtype=torch.float64)

    def unit(part: nn.Module, value: torch.Tensor) -> torch.Tensor:
        value = nn.functional.conv2d(value, part.convolution.weight, padding=1)
        return nn.functional.gelu(part.normalization(value))

    def halve(value: torch.Tensor) -> torch.Tensor:
        height, width = value.shape[2] // 2 * 2, value.shape[3] // 2 * 2
        corners = torch.stack([value[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)])
        return corners.mean(0) if pooling == "average" else 0.1 * (corners / 0.1).exp().mean(0).log()

    h = halve(unit(model.layer1, unit(model.prep, x)))
    h = h + unit(model.residual1.unit2, unit(model.residual1.unit1, h))
    h = halve(unit(model.layer3, halve(unit(model.layer2, h))))
    h = h + unit(model.residual2.unit2, unit(model.residual2.unit1, h))
    flat = h.flatten(2)
    pooled = flat.mean(2) if pooling == "average" else 0.1 * (flat / 0.1).exp().mean(2).log()
    torch.testing.assert_close(model(x), 0.25 * (pooled @ model.head.weight.T + model.head.bias), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [Pool2x2("log_sum_exp", 0.3), GlobalPool("log_sum_exp", 0.3)])
def test_smooth_maximum_can_be_differentiated_twice(layer):
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_smooth_maximum_lies_between_mean_and_maximum():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maximum = nn.functional.max_pool2d(x, 2)
    torch.testing.assert_close(Pool2x2("log_sum_exp", 1e-4)(x), maximum, rtol=0, atol=2e-4)
    torch.testing.assert_close(Pool2x2("log_sum_exp", 1e5)(x), Pool2x2("average")(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(GlobalPool("log_sum_exp", 1e-4)(x), x.amax((2, 3)), rtol=0, atol=4e-4)
    torch.testing.assert_close(GlobalPool("log_sum_exp", 0.1)(torch.full_like(x, 3)), torch.full((2, 3), 3.0).double())


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 1, 8, 8), (2, 3, 64)])
def test_inputs_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match=r"ResNet-9: found inputs of shape .* >= 8"):
        ResNet9(3, 10, width=0.1)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0.001, r"model\.width: found 0\.001"),
        ("pooling", "maximum", r"model\.pooling: found 'maximum'; allowed: one of average, log_sum_exp"),
        ("pooling_epsilon", 0.0, r"model\.pooling_epsilon: found 0; allowed: > 0"),
        ("final_scale", 0.0, r"model\.final_scale: found 0; allowed: > 0"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        ResNet9(3, 10, **{field: value})


def test_same_generator_state_gives_the_same_model():
    def build() -> torch.Tensor:
        torch.manual_seed(7)
        return torch.cat([parameter.flatten() for parameter in ResNet9(1, 10, width=0.25).parameters()])

    assert torch.equal(build(), build())
