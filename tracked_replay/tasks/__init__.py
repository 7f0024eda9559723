"""Tasks: data, model, loss and measurement; the built-in ones, and the loader for a user's own."""

from tracked_replay.tasks._augment import augment_images
from tracked_replay.tasks._cifar10 import Cifar10, missing_cifar10
from tracked_replay.tasks._data import Batch, FlippedLabels, TaskData
from tracked_replay.tasks._digits import Digits
from tracked_replay.tasks._examples import Examples
from tracked_replay.tasks._flip import flip_labels
from tracked_replay.tasks._load import BUILT_IN_TASKS, load_task
from tracked_replay.tasks._task import Task
from tracked_replay.tasks.resnet9 import ResNet9

__all__ = [
    "BUILT_IN_TASKS",
    "Batch",
    "Cifar10",
    "Digits",
    "Examples",
    "FlippedLabels",
    "ResNet9",
    "Task",
    "TaskData",
    "augment_images",
    "flip_labels",
    "load_task",
    "missing_cifar10",
]
