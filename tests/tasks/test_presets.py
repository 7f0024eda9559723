import pytest

from tracked_replay.config import Config, field_names, load_preset, preset_names

PRESETS = ("cifar10", "cifar10-small", "digits")


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def test_these_are_the_presets():
    assert preset_names() == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_sets_every_field_and_is_valid(preset):
    written = flatten(load_preset(preset))
    assert list(written) == list(field_names())
    config = Config.resolve(preset)
    assert {name: type(value)(written[name]) for name, value in config.flat().items()} == config.flat()
    assert config.replay.exact


def steps(config: Config, examples: int) -> int:
    return (config.data.train_examples or examples) // config.train.batch_size * config.train.epochs


def test_steps_of_the_presets():
    assert steps(Config.resolve("digits"), 1437) == 50
    assert steps(Config.resolve("cifar10-small"), 50_000) == 80
    assert steps(Config.resolve("cifar10"), 50_000) == 2000


def test_the_published_learning_rate_and_decay_are_divided_by_the_momentum_correction():
    train = Config.resolve("cifar10").train
    correction = 1 + 1 / (1 - 0.85)
    assert train.lr == pytest.approx(0.085 / correction, rel=1e-12)
    assert train.weight_decay == pytest.approx(5e-4 / correction, rel=1e-12)
    assert (train.momentum, train.nesterov, train.schedule) == (0.85, True, "one_cycle")
    assert (train.lr_start, train.lr_end, train.lr_peak) == (0.1, 0.0, 0.5)
