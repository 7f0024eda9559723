import numpy as np
import torch
from sklearn.datasets import load_digits

from tracked_replay.config import Config
from tracked_replay.tasks import TaskData, load_task


def test_split_is_stratified_complete_and_the_same_for_every_seed():
    task = load_task(Config())
    train, evaluation = task.train_examples(), task.evaluation_examples()
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert evaluation.inputs.shape == (360, 1, 8, 8)
    assert train.inputs.dtype == evaluation.inputs.dtype == torch.uint8

    digits = load_digits()
    ours = np.concatenate([train.inputs.numpy(), evaluation.inputs.numpy()]).reshape(1797, 64)
    labels = np.concatenate([train.labels.numpy(), evaluation.labels.numpy()])
    rows = np.column_stack([ours, labels])
    theirs = np.column_stack([digits.data.astype(np.uint8), digits.target])
    assert np.array_equal(rows[np.lexsort(rows.T)], theirs[np.lexsort(theirs.T)])

    share = np.bincount(evaluation.labels.numpy()) / np.bincount(digits.target)
    assert (np.abs(share - 0.2) < 0.01).all()

    config = Config(seed=5)
    assert TaskData(load_task(config), config).fingerprint() == TaskData(task, Config()).fingerprint()


def test_the_data_are_those_that_published_numbers_refer_to():
    config = Config()
    assert TaskData(load_task(config), config).fingerprint().startswith("b7fffe6d16fed70e")


def test_prepared_values_lie_between_minus_one_and_one():
    config = Config()
    inputs = TaskData(load_task(config), config).batch(torch.arange(1437), 0).inputs
    assert (inputs.min().item(), inputs.max().item()) == (-1.0, 1.0)


def test_digits_are_drawn_dark_on_white_with_full_contrast():
    task = load_task(Config())
    raw = torch.zeros(1, 8, 8, dtype=torch.uint8)
    raw[0, 0] = torch.arange(0, 16, 2, dtype=torch.uint8)
    raw[0, 7, 7] = 16
    picture = task.draw(raw)
    assert picture.shape == (8, 8)
    assert picture.dtype == np.uint8
    assert picture[1, 0] == 255
    assert picture[7, 7] == 0
    assert (np.diff(picture[0].astype(int)) < 0).all()


def test_model_follows_the_config():
    config = Config().override("model.width=0.25,model.final_scale=0.5,model.pooling=log_sum_exp")
    model = load_task(config).model()
    assert model.prep.convolution.weight.shape == (8, 1, 3, 3)
    assert model.final_scale == 0.5
    assert model.pool.pooling == model.pool1.pooling == "log_sum_exp"
