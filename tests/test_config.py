"""The config: what it takes, what it refuses, and the sentence that says so."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tracked_replay.config import Config, allowed, field_names, parse_overrides, preset_names
from tracked_replay.errors import ConfigError, DataError
from tracked_replay.stages.show_config import describe
from tracked_replay.tasks import load_task


def sentence(overrides: str | dict = "", preset: str = "digits", **more: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.resolve(preset, overrides=overrides, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def preset_file(folder: Path, content: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=abc", "train.lr: found 'abc'; allowed: finite number > 0"),
        ("train.lr=nan", "train.lr: found 'nan'; allowed: finite number > 0"),
        ("train.lr=inf", "train.lr: found 'inf'; allowed: finite number > 0"),
        ("train.lr=1e400", "train.lr: found '1e400'; allowed: finite number > 0"),
        ("train.lr=-0.1", "train.lr: found '-0.1'; allowed: finite number > 0"),
        ("train.lr=0", "train.lr: found '0'; allowed: finite number > 0"),
        ("train.lr=", "train.lr: found ''; allowed: finite number > 0"),
        ("train.epochs=0", "train.epochs: found '0'; allowed: integer >= 1 and <= 1000000"),
        ("train.epochs=2.5", "train.epochs: found '2.5'; allowed: integer >= 1 and <= 1000000"),
        ("train.epochs=99999999999999999999", "allowed: integer >= 1 and <= 1000000"),
        ("train.batch_size=0", "train.batch_size: found '0'; allowed: integer >= 1"),
        ("train.batch_size=-16", "train.batch_size: found '-16'; allowed: integer >= 1"),
        ("data.train_examples=-1", "data.train_examples: found '-1'; allowed: integer >= 0"),
        ("record.every=0", "record.every: found '0'; allowed: integer >= 1"),
        ("train.threads=0", "train.threads: found '0'; allowed: integer >= 1 and <= 1024"),
        ("train.threads=100000", "train.threads: found '100000'; allowed: integer >= 1 and <= 1024"),
        ("seed=-1", "seed: found '-1'; allowed: integer >= 0 and < 4294967296"),
        ("train.momentum=1", "train.momentum: found '1'; allowed: finite number >= 0 and < 1"),
        ("train.nesterov=maybe", "train.nesterov: found 'maybe'; allowed: true or false"),
        ("train.optimizer=adam", "train.optimizer: found 'adam'; allowed: only sgd"),
        ("train.schedule=linear", "found 'linear'; allowed: one of constant, step, cosine, one_cycle"),
        ("train.device=tpu", "train.device: found 'tpu'; allowed: cpu, cuda or cuda:N"),
        ("train.device=cuda:99999999999", "allowed: cpu, cuda or cuda:N"),
        ("train.device=cuda:01", "allowed: cpu, cuda or cuda:N"),
        ("data.task=", "data.task: found ''; allowed: text that is not empty"),
        ("replay.mode=disk", "replay.mode: found 'disk'; allowed: one of auto, memory, stream"),
    ],
)
def test_a_value_that_is_not_allowed(override: str, message: str) -> None:
    assert message in sentence(override)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "half", "torch.float16"])
def test_half_precision_is_refused_with_the_reason(dtype: str) -> None:
    assert sentence(f"train.dtype={dtype}") == (
        f"train.dtype: found '{dtype}'; allowed: one of float32, float64 "
        "(in half precision the replay's products drown in rounding: scores flip sign)"
    )


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        ("train.epohs=3", "train.epohs: unknown config field, did you mean train.epochs?; allowed: train.epochs, "),
        ("foo=1", "foo: unknown config field; allowed: seed, data.task, "),
        ("train=3", "train: unknown config field, did you mean train.lr?; allowed: train.epochs, "),
        ("train..lr=3", "train..lr: unknown config field, did you mean train.lr?"),
        ("TRAIN.LR=3", "TRAIN.LR: unknown config field"),
        ("__class__=3", "__class__: unknown config field"),
    ],
)
def test_an_unknown_field_is_answered_with_the_known_ones(override: str, beginning: str) -> None:
    assert sentence(override).startswith(beginning)


@pytest.mark.parametrize("text", ["train.lr", "=3", ",", "3", "train.lr:0.1"])
def test_overrides_that_are_no_pairs(text: str) -> None:
    assert sentence(text).startswith(f"set: found {text!r}; allowed: field=value pairs")


def test_a_field_given_twice() -> None:
    assert sentence("seed=1,seed=2") == "set: seed is given twice: '1' and '2'"


def test_several_wrong_fields_are_all_named() -> None:
    text = sentence("train.lr=-1,train.epochs=0")
    assert "train.lr: found '-1'" in text
    assert "train.epochs: found '0'" in text


def test_fields_that_contradict_each_other() -> None:
    assert "nesterov needs momentum > 0" in sentence("train.nesterov=true,train.momentum=0")
    assert "warmup_epochs must leave an epoch for the schedule; found 10 of 10" in sentence("train.warmup_epochs=10")


def test_values_may_hold_commas_and_equals_signs() -> None:
    assert parse_overrides("data.root=/a,b/c=d, train.lr = 0.5 ") == {"data.root": "/a,b/c=d", "train.lr": "0.5"}


@pytest.mark.parametrize("preset", ["nope", "", "../digits", "DIGITS", "digits.tom"])
def test_an_unknown_preset_lists_those_that_there_are(preset: str) -> None:
    assert sentence(preset=preset) == (
        f"preset: found {preset!r}; allowed: cifar10, cifar10-small, digits, or the path of a .toml file of that form"
    )


def test_a_preset_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read: No such file" in sentence(preset=str(tmp_path / "none.toml"))
    assert "cannot be read: Is a directory" in sentence(preset=str(tmp_path / "folder.toml"))
    assert "cannot be read: embedded null byte" in sentence(preset="a\0b.toml")
    assert "cannot be read: 'utf-8' codec" in sentence(preset=preset_file(tmp_path, b"\xff\xfe"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = ", "is not valid TOML"),
        ("[train\n", "is not valid TOML"),
        ("train = 3", "train: found 3; allowed: a group with the fields train.epochs, "),
        ("data = [1]", "data: found [1]; allowed: a group with the fields data.task, "),
        ("[foo]\na = 1", "foo: unknown config field"),
        ("[train]\nepohs = 1", "train.epohs: unknown config field, did you mean train.epochs?"),
        ("[train]\nlr = 'fast'", "train.lr: found 'fast'; allowed: finite number > 0"),
        ("[train]\nlr = inf", "train.lr: found inf; allowed: finite number > 0"),
        ("[train]\nlr = 2020-01-01", "train.lr: found datetime.date(2020, 1, 1); allowed: finite number > 0"),
        ("[train]\nepochs = true", "train.epochs: found True; allowed: integer >= 1"),
        ("[train]\nlr = true", "train.lr: found True; allowed: finite number > 0"),
        ("[data]\nroot = 3", "data.root: found 3; allowed: text"),
    ],
)
@pytest.mark.parametrize("overrides", ["", "train.momentum=0.5,data.download=true"])
def test_a_preset_file_with_wrong_content(content: str, message: str, overrides: str, tmp_path: Path) -> None:
    assert message in sentence(overrides, preset_file(tmp_path, content))


def test_later_sources_win() -> None:
    config = Config.resolve("digits", seed="7", data_root="/data", overrides="train.epochs=3")
    assert (config.seed, config.data.root, config.train.epochs) == (7, "/data", 3)
    assert Config.resolve("digits", seed=7, overrides="seed=8").seed == 8
    assert Config.resolve("digits", seed="", data_root="").seed == Config.resolve("digits").seed


@pytest.mark.parametrize("seed", ["x", "1.5", "-1", -1, 1.5, True, 2**32])
def test_a_seed_that_is_none(seed: object) -> None:
    assert sentence(seed=seed) == f"seed: found {seed!r}; allowed: integer >= 0 and < 4294967296"


@pytest.mark.parametrize("preset", preset_names())
def test_a_config_survives_its_toml_form(preset: str) -> None:
    config = Config.resolve(preset, overrides={"data.root": "a \"b\" 'c' # d\n[e] = \\ ü", "train.lr": 0.1 + 0.2})
    assert Config.from_toml(config.to_toml()) == config
    assert tomllib.loads(config.to_toml())["train"]["lr"] == 0.1 + 0.2


@pytest.mark.parametrize("preset", preset_names())
def test_show_config_prints_a_preset_file(preset: str, tmp_path: Path) -> None:
    root = tmp_path / "a \"b\" 'c' # d\n[e] = \\ ü"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    config = Config.resolve(preset, overrides={"data.root": str(root)})
    text = describe(config)
    assert Config.resolve(preset_file(tmp_path, text)) == config
    for name in field_names():
        assert allowed(name) in text


@pytest.mark.parametrize("preset", ["cifar10", "cifar10-small"])
@pytest.mark.parametrize("place", ["nowhere", "file", "empty", "full/cifar-10-batches-py"])
def test_show_config_refuses_a_data_root_in_the_words_of_the_training(preset: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full/cifar-10-batches-py").mkdir(parents=True)
    config = Config.resolve(preset, data_root=str(tmp_path / place))
    with pytest.raises(DataError) as training:
        load_task(config).train_examples()
    with pytest.raises(ConfigError) as error:
        describe(config)
    assert str(error.value) == f"data.root: found '{tmp_path / place}'; {training.value}"
    assert "allowed: -P data_root=<folder that holds cifar-10-batches-py>" in str(error.value)


def test_show_config_asks_for_no_data_root_that_is_not_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    for config in (
        Config.resolve("cifar10"),
        Config.resolve("cifar10", data_root=missing, overrides="data.download=true"),
        Config.resolve("digits", data_root=missing),
    ):
        assert tomllib.loads(describe(config))["data"]["root"] == config.data.root
    assert not Path(missing).exists()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 3  # type: ignore[misc]


def test_every_field_says_what_it_takes() -> None:
    assert all(allowed(name) for name in field_names())


def test_where_the_data_lie_is_no_part_of_the_identity() -> None:
    sections = ("seed", "data", "train", "replay")
    first, second = Config(), Config().override({"data.root": "x", "data.download": True, "replay.mode": "stream"})
    assert first.identity(*sections) == second.identity(*sections)
    for change in ({"seed": 1}, {"data.train_examples": 5}, {"train.lr": 0.2}, {"replay.per_step": True}):
        assert first.identity(*sections) != Config().override(change).identity(*sections)
