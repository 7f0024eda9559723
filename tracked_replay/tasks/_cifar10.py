"""CIFAR-10 through torchvision, which checks every file's MD5 before it reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracked_replay.errors import DataError
from tracked_replay.tasks._examples import Examples
from tracked_replay.tasks._task import Task
from tracked_replay.tasks.resnet9 import ResNet9

_MEAN = (0.4914, 0.4822, 0.4465)
_STANDARD_DEVIATION = (0.2470, 0.2435, 0.2616)


class Cifar10(Task):
    """50,000 training and 10,000 evaluation images, uint8 (N, 3, 32, 32), in 10 classes, for a ResNet-9.

    ``data.root`` is the folder that holds ``cifar-10-batches-py``; ``data.download`` lets torchvision fetch it.
    """

    name = "cifar10"
    label_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def train_examples(self) -> Examples:
        """50,000 examples in the order of the files. Raises DataError where a file is missing or damaged."""
        return self._examples(train=True)

    def evaluation_examples(self) -> Examples:
        """10,000 examples in the order of the file. Raises DataError where a file is missing or damaged."""
        return self._examples(train=False)

    def model(self) -> nn.Module:
        """A ResNet-9 as the ``model`` section of the config describes it."""
        model = self.config.model
        return ResNet9(3, 10, model.width, model.pooling, model.pooling_epsilon, model.final_scale)

    def prepare(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (B, 3, 32, 32) → ``dtype``, each colour with mean 0 and standard deviation 1 over the training set."""
        mean = torch.tensor(_MEAN, dtype=dtype, device=inputs.device)[:, None, None]
        deviation = torch.tensor(_STANDARD_DEVIATION, dtype=dtype, device=inputs.device)[:, None, None]
        return (inputs.to(dtype) / 255 - mean) / deviation

    def _examples(self, *, train: bool) -> Examples:
        dataset_class = _torchvision_cifar10()
        root = self.config.data.root
        if not root:
            raise DataError(f"cifar10: found an empty data.root; {_how_to_get(dataset_class)}")
        folder = Path(root).expanduser()
        try:
            # The constructor compares the MD5 of all batches first and unpickles only then.
            dataset = dataset_class(folder, train=train, download=self.config.data.download)
        except (RuntimeError, OSError) as error:
            raise DataError(_diagnosis(dataset_class, folder, error)) from error
        images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
        return Examples(torch.from_numpy(images), torch.tensor(dataset.targets, dtype=torch.int64))


def missing_cifar10(root: str) -> str:
    """Why a folder cannot be ``data.root`` of CIFAR-10, in a sentence; empty where it holds the data's folder.

    The data themselves are not read.

    Args:
        root: the folder that is to hold ``cifar-10-batches-py``.

    Raises:
        DataError: torchvision, which knows what the folder must hold, cannot be imported.
    """
    dataset_class, folder = _torchvision_cifar10(), Path(root).expanduser()
    if (folder / dataset_class.base_folder).is_dir():
        return ""
    return _diagnosis(dataset_class, folder, RuntimeError("Dataset not found"))


def _torchvision_cifar10() -> Any:
    # Imported here, so that a torchvision which does not fit the installed torch harms no other task.
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        raise DataError(
            f"cifar10: torchvision cannot be imported ({error}); install it from the package index that torch came from"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # "operator torchvision::nms does not exist" and its relatives.
        raise DataError(
            f"cifar10: torchvision cannot be imported ({error}): torch {torch.__version__} and torchvision come from "
            "different builds; install both from the same package index"
        ) from error
    return CIFAR10


def _how_to_get(dataset_class: Any) -> str:
    return (
        f"allowed: -P data_root=<folder that holds {dataset_class.base_folder}>, "
        "or data.download=true to let torchvision download it"
    )


def _diagnosis(dataset_class: Any, root: Path, error: Exception) -> str:
    """One sentence on why torchvision refused the data in ``root``."""
    from torchvision.datasets.utils import calculate_md5

    folder = root / dataset_class.base_folder
    meta = dataset_class.meta
    expected = dict([*dataset_class.train_list, *dataset_class.test_list, [meta["filename"], meta["md5"]]])
    missing = [name for name in expected if not (folder / name).is_file()]
    # Without a download, torchvision's own sentence says less than what follows here.
    failed = "" if str(error).startswith("Dataset ") else f" (the download failed: {error})"
    if len(missing) == len(expected):
        nested = "; that is the folder itself, data_root is the one above" if root.name == folder.name else ""
        return f"cifar10: no {folder.name} in {root}{nested}{failed}; {_how_to_get(dataset_class)}"
    if missing:
        return f"cifar10: {folder} is not complete, missing: {', '.join(missing)}{failed}; {_how_to_get(dataset_class)}"
    for name, md5 in expected.items():
        try:
            found = calculate_md5(folder / name)
        except OSError as unreadable:
            return f"cifar10: the file {folder / name} cannot be read: {unreadable}"
        if found != md5:
            return (
                f"cifar10: the file {folder / name} is corrupt: found MD5 {found}, expected {md5}; "
                "it was not read; delete it and get the data set again"
            )
    return f"cifar10: the data in {folder} cannot be read: {error}"
