import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError, DataError
from tracked_replay.tasks import Examples, Task, TaskData


class Toy(Task):
    label_names = ("zero", "one", "two")

    def train_examples(self) -> Examples:
        inputs = torch.arange(10 * 4, dtype=torch.float32).reshape(10, 4)
        return Examples(inputs, torch.arange(10) % 3)

    def evaluation_examples(self) -> Examples:
        return Examples(-torch.ones(5, 4), torch.arange(5) % 3)

    def model(self) -> nn.Module:
        return nn.Linear(4, 3)


class ToyImages(Toy):
    def train_examples(self) -> Examples:
        pixels = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        return Examples(pixels.to(torch.uint8), torch.arange(10) % 3)

    def evaluation_examples(self) -> Examples:
        return self.train_examples()


def data_of(kind: type[Task] = Toy, **fields: object) -> TaskData:
    config = Config().override({name.replace("__", "."): value for name, value in fields.items()})
    return TaskData(kind(config), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (7, 10), (256, 10), (500, 100)])
def test_default_loss_has_the_bits_of_cross_entropy(batch, classes, dtype):
    generator = torch.Generator().manual_seed(batch)
    outputs = (20 * torch.randn(batch, classes, dtype=dtype, generator=generator)).requires_grad_()
    labels = torch.randint(0, classes, (batch,), generator=generator)
    losses = Toy(Config()).per_example_loss(outputs, labels)
    bits = torch.int32 if dtype == torch.float32 else torch.int64

    assert torch.equal(losses.view(bits), F.cross_entropy(outputs, labels, reduction="none").view(bits))
    (ours,) = torch.autograd.grad(losses.sum() / batch, outputs)
    (theirs,) = torch.autograd.grad(F.cross_entropy(outputs, labels), outputs)
    assert torch.equal(ours.view(bits), theirs.view(bits))


def test_default_loss_is_twice_differentiable_in_both_modes():
    outputs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 3, 1])

    def loss(values: torch.Tensor) -> torch.Tensor:
        return Toy(Config()).per_example_loss(values, labels)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit
        assert torch.autograd.gradgradcheck(loss, (outputs,), check_fwd_over_rev=True)


def test_measurement_is_the_loss_unless_it_is_replaced():
    outputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = Toy(Config())
    assert torch.equal(task.measurement(outputs, labels), task.per_example_loss(outputs, labels))


def test_batches_hold_the_named_examples_in_the_configured_type():
    data = data_of(train__dtype="float64")
    batch = data.batch(torch.tensor([7, 2, 2]), epoch=0)
    assert batch.indices.tolist() == [7, 2, 2]
    assert batch.inputs.dtype == torch.float64
    assert batch.inputs.tolist() == [[28, 29, 30, 31], [8, 9, 10, 11], [8, 9, 10, 11]]
    assert batch.labels.tolist() == [1, 2, 2]
    assert data.evaluation_batch(torch.tensor([4])).inputs.tolist() == [[-1] * 4]
    assert (data.num_train, data.num_evaluation) == (10, 5)


def test_only_training_batches_are_augmented_and_epochs_differ():
    data = data_of(ToyImages, data__augmentation="flip+crop", data__crop_padding=2)
    everything = torch.arange(10)
    raw = data.train.inputs.float()
    assert torch.equal(data.evaluation_batch(everything).inputs, raw)
    assert not torch.equal(data.batch(everything, 0).inputs, raw)
    assert not torch.equal(data.batch(everything, 0).inputs, data.batch(everything, 1).inputs)
    assert torch.equal(data.batch(everything[3:5], 0).inputs, data.batch(everything, 0).inputs[3:5])


def test_a_user_can_replace_augmentation():
    class Shifted(Toy):
        def augment(self, inputs, indices, *, epoch, num_examples):
            assert num_examples == 10
            return inputs + epoch

    assert Shifted.name == "Shifted"
    data = data_of(Shifted)
    assert torch.equal(data.batch(torch.tensor([1]), 5).inputs, data.batch(torch.tensor([1]), 0).inputs + 5)


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_outside_the_data_are_refused(index):
    with pytest.raises(IndexError, match=rf"found {index}; allowed: 0 to 9, the training examples"):
        data_of().batch(torch.tensor([0, index]), 0)


@pytest.mark.parametrize("indices", [torch.tensor([1.0]), torch.tensor(1), torch.tensor([1], dtype=torch.int32)])
def test_indices_of_another_kind_are_refused(indices):
    with pytest.raises(ValueError, match="indices: found shape"):
        data_of().evaluation_batch(indices)


def test_subsets_follow_the_config_and_change_the_fingerprint():
    data = data_of(data__train_examples=4, data__evaluation_examples=3)
    assert (data.num_train, data.num_evaluation) == (4, 3)
    assert data.fingerprint() != data_of().fingerprint()
    assert data_of().fingerprint() == data_of().to("cpu").fingerprint()
    with pytest.raises(ConfigError, match=r"data\.train_examples: found 11; allowed: 0 \(all\) to 10"):
        data_of(data__train_examples=11)
    with pytest.raises(ConfigError, match=r"data\.evaluation_examples: found 11"):
        data_of(data__evaluation_examples=11)


def test_fingerprint_sees_label_names():
    class Renamed(Toy):
        label_names = ("zero", "one", "three")

    assert data_of(Renamed).fingerprint() != data_of(Toy).fingerprint()


def test_labels_without_a_name_are_refused():
    class Short(Toy):
        label_names = ("zero", "one")

    with pytest.raises(DataError, match=r"Short: found training labels from 0 to 2; allowed: 0 to 1"):
        data_of(Short)


def test_prepare_must_give_the_type_of_the_config():
    class Integer(Toy):
        def prepare(self, inputs, dtype):
            return inputs

    with pytest.raises(
        DataError, match=r"Integer\.prepare: found 1 inputs of type torch\.float32; allowed: 1, .*float64"
    ):
        data_of(Integer, train__dtype="float64").batch(torch.tensor([0]), 0)


def test_moving_the_storage_moves_the_batches():
    data = data_of(ToyImages).to("meta")
    assert data.device.type == "meta"
    assert data.train.labels.device.type == data.evaluation.inputs.device.type == "meta"


def test_source_files_are_those_of_the_classes():
    assert Toy(Config()).source_files() == (Path(__file__).resolve(),)


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        (torch.zeros(1, 8, 6, dtype=torch.uint8), (8, 6)),
        (torch.zeros(3, 8, 6, dtype=torch.uint8), (8, 6, 3)),
        (torch.zeros(8, 6, dtype=torch.uint8), (8, 6)),
        (torch.randn(3, 8, 6), (8, 6, 3)),
        (torch.randn(5), (32, 16)),
        (torch.zeros(5), (32, 16)),
        (torch.randn(1000), (32, 193)),
        (torch.tensor(2.0), (32, 4)),
        (torch.tensor([3, 1, 2]), (32, 10)),
    ],
)
def test_every_kind_of_input_can_be_drawn(raw, shape):
    picture = Toy(Config()).draw(raw)
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.uint8
    assert picture.shape == shape


def test_uint8_images_are_drawn_as_they_are_without_sharing_memory():
    raw = torch.randint(0, 256, (3, 4, 5)).to(torch.uint8)
    picture = Toy(Config()).draw(raw)
    assert np.array_equal(picture, raw.permute(1, 2, 0).numpy())
    picture[:] = 0
    assert raw.any()


def test_bars_point_up_and_down_from_the_zero_line():
    picture = Toy(Config()).draw(torch.tensor([1.0, -1.0]))
    dark = picture == 40
    assert dark[:16, 1].all()
    assert not dark[:15, 4].any()
    assert dark[17:, 4].all()
    assert not dark[17:, 1].any()
