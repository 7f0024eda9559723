import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tracked_replay.config import Config
from tracked_replay.errors import DataError
from tracked_replay.tasks import TaskData, load_task

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
FILES = [*BATCHES, "test_batch", "batches.meta"]


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def task(root: object, download: bool = False):
    return load_task(Config().override({"data.task": "cifar10", "data.root": str(root), "data.download": download}))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """Files of the form of CIFAR-10 with two images each, which torchvision takes for the real ones."""
    folder = tmp_path / "data root" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES[:-1]):
        pixels = np.random.default_rng(number).integers(0, 256, (2, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number, number + 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"] * 10}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(folder / name)] for name in BATCHES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    return folder


def test_images_keep_order_and_layout_of_the_files(tiny):
    examples = task(tiny.parent).train_examples()
    first = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    assert examples.inputs.shape == (10, 3, 32, 32)
    assert examples.inputs.dtype == torch.uint8
    assert np.array_equal(examples.inputs[:2].numpy(), first.reshape(2, 3, 32, 32))
    assert examples.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert task(tiny.parent).evaluation_examples().labels.tolist() == [5, 6]


@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_file_is_named_with_both_checksums(tiny, name):
    expected = md5(tiny / name)
    damaged = bytearray((tiny / name).read_bytes())
    damaged[-10] ^= 1
    (tiny / name).write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        task(tiny.parent).train_examples()
    assert f"the file {tiny / name} is corrupt: found MD5 {md5(tiny / name)}, expected {expected}" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", ["train_examples", "evaluation_examples"])
def test_a_file_with_another_checksum_is_never_unpickled(tiny, name, part, tmp_path):
    trace = tmp_path / "unpickled"
    payload = pickle.dumps(Bomb(trace))
    (tiny / name).write_bytes(payload)
    with pytest.raises(DataError, match=rf"{name} is corrupt"):
        getattr(task(tiny.parent), part)()
    assert not trace.exists()
    pickle.loads(payload)  # noqa: S301
    assert trace.exists(), "the payload must be one that works"


def test_a_missing_file_is_told_from_a_corrupt_one(tiny):
    (tiny / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"is not complete, missing: data_batch_3; allowed: -P data_root=") as caught:
        task(tiny.parent).train_examples()
    assert "corrupt" not in str(caught.value)


def test_missing_data_name_the_folder_and_the_parameter(tmp_path):
    sentence = (
        r"cifar10: no cifar-10-batches-py in .*; allowed: "
        r"-P data_root=<folder that holds cifar-10-batches-py>, or data\.download=true"
    )
    with pytest.raises(DataError, match=sentence) as caught:
        task(tmp_path / "nowhere").train_examples()
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_root_names_the_parameter():
    with pytest.raises(DataError, match=r"found an empty data\.root; allowed: -P data_root=<folder"):
        task("").train_examples()


def test_the_folder_itself_as_root_is_explained(tiny):
    with pytest.raises(DataError, match="that is the folder itself, data_root is the one above"):
        task(tiny).train_examples()


def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch):
    calls = []

    def download(self: CIFAR10) -> None:
        calls.append(self.root)
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", download)
    with pytest.raises(DataError):
        task(tmp_path).train_examples()
    assert calls == []
    with pytest.raises(DataError, match=r"\(the download failed: no network\)"):
        task(tmp_path, download=True).train_examples()
    assert calls == [tmp_path] or calls == [str(tmp_path)]


@pytest.mark.parametrize("error", [RuntimeError, OSError, ImportError])
def test_a_torchvision_of_another_build_is_explained(tmp_path, monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision.datasets":
                raise error("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision.datasets")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DataError, match=r"nms does not exist.* different builds; .* same package index"):
        task(tmp_path).train_examples()
    assert load_task(Config()).train_examples(), "other tasks do not care"


def test_a_missing_torchvision_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="torchvision cannot be imported"):
        task(tmp_path).train_examples()


def test_the_package_does_not_import_torchvision():
    import subprocess

    code = "import sys, tracked_replay.tasks; sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture
def real_root() -> str:
    root = os.environ.get("TRACKED_REPLAY_DATA_ROOT", "")
    if not root:
        pytest.skip("TRACKED_REPLAY_DATA_ROOT names no folder with the real CIFAR-10")
    return root


@pytest.mark.cifar
def test_the_real_data_are_the_published_ones(real_root):
    found = task(real_root)
    data = TaskData(found, found.config)
    assert (data.num_train, data.num_evaluation) == (50_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.evaluation.labels).tolist() == [1000] * 10
    assert tuple(CIFAR10(real_root).classes) == found.label_names

    inputs = data.batch(torch.arange(50_000), 0).inputs
    assert inputs.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=2e-3)
    assert inputs.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=2e-3)


@pytest.mark.cifar
def test_the_real_first_image_is_torchvisions(real_root):
    image, label = CIFAR10(real_root)[0]
    examples = task(real_root).train_examples()
    assert np.array_equal(task(real_root).draw(examples.inputs[0]), np.asarray(image))
    assert examples.labels[0] == label
