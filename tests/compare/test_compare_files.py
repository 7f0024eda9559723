"""Checkpoint files and folders of them, compared without a tracking store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_setup
from torch import Tensor

from tracked_replay.compare.files import compare_paths
from tracked_replay.compare.result import Difference, Tolerance
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.recording import Recorder, file_sha256
from tracked_replay.training import train

STATE = {
    "momentum/w": torch.arange(3.0),
    "parameters/10.w": torch.ones(2, 2),
    "parameters/9.w": torch.ones(4),
    "buffers/n": torch.tensor(7),
}


def save(path: Path, step: int | None = None, **changes: Tensor) -> Path:
    """Write STATE; ``parameters__9.w=…`` changes a tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = STATE | {name.replace("__", "/"): tensor for name, tensor in changes.items()}
    save_file(tensors, path, None if step is None else {"step": str(step)})
    return path


def edit(path: Path, name: str, value: Tensor) -> None:
    step = int(path.stem.removeprefix("step-"))
    save_file(load_file(path) | {name: value}, path, {"step": str(step)})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a tiny run of 9 steps; tests change copies only."""
    root = tmp_path_factory.mktemp("recorded")
    setup = tiny_setup(record__every=4)
    with Recorder(root, setup) as recorder:
        for record in train(setup):
            recorder.add(record)
        recorder.finish(record.after)
    return root


def copied(root: Path, target: Path) -> Path:
    return Path(shutil.copytree(root, target))


def test_equal_files_are_identical_whatever_their_names(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.safetensors", 4), save(tmp_path / "b.safetensors", 4)
    found = compare_paths(a, b)
    assert (found.verdict, found.exit_code) == ("identical", 0)
    assert found.summary == "identical bit for bit: 4 tensors."
    assert (found.a, found.b) == (str(a), str(b))
    assert [tensor.name for tensor in found.tensors] == [
        "parameters/9.w",
        "parameters/10.w",
        "buffers/n",
        "momentum/w",
    ]
    assert all(tensor.equal for tensor in found.tensors)
    assert (found.tensors_step, found.first_divergent_step, found.first_difference, found.other) == (4, None, None, ())


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    near = torch.from_numpy(np.nextafter(np.ones(4, dtype=np.float32), np.float32(2)))
    a = save(tmp_path / "a.safetensors", 4)
    b = save(tmp_path / "b.safetensors", 4, **{"parameters__9.w": near, "buffers__n": torch.tensor(8)})
    found = compare_paths(a, b)
    assert (found.verdict, found.exit_code) == ("different", 1)
    assert (found.first_tensor, found.first_difference) == ("parameters/9.w", "state")
    assert (found.first_divergent_step, found.tensors_step) == (4, 4)
    assert found.summary == (
        "different: 2 of 4 tensors, first parameters/9.w (4 of 4 elements, at most 1 ULP apart; "
        "neighbouring floating-point numbers are 1 ULP apart)."
    )
    assert [tensor.equal for tensor in found.tensors] == [False, True, False, True]


def test_what_is_tolerated(tmp_path: Path) -> None:
    near = torch.from_numpy(np.nextafter(np.ones(4, dtype=np.float32), np.float32(2)))
    a = save(tmp_path / "a.safetensors")
    b = save(tmp_path / "b.safetensors", **{"parameters__9.w": near, "momentum__w": torch.zeros(5)})
    rounding = compare_paths(a, b, Tolerance(max_ulp=1))
    assert rounding.summary == (
        "different beyond 1 ULP (neighbouring floating-point numbers are 1 ULP apart): "
        "1 of 4 tensors, first momentum/w (shape (3,) in a, (5,) in b)."
    )
    both = compare_paths(a, b, Tolerance(max_ulp=1, ignore=("momentum/*",)))
    assert both.verdict == "identical"
    assert both.summary == (
        "identical within 1 ULP (neighbouring floating-point numbers are 1 ULP apart), momentum/* left out: 3 tensors."
    )
    assert both.tensors[0].differing == 4
    assert both.tolerance == Tolerance(1, ("momentum/*",))
    with pytest.raises(ConfigError, match=r"^ignore: found 'momentun/\*'; allowed: data, .*tensors here: parameters/9"):
        compare_paths(a, b, Tolerance(ignore=("momentun/*",)))
    with pytest.raises(ConfigError, match=r"^max_ulp: found -1; allowed: integer >= 0$"):
        compare_paths(a, b, Tolerance(max_ulp=-1))


def test_a_tensor_on_one_side(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.safetensors"), save(tmp_path / "b.safetensors", more=torch.ones(1))
    found = compare_paths(a, b)
    assert found.summary == "different: 1 of 5 tensors, first more (missing in a)."
    assert compare_paths(b, a).tensors[-1].difference == "missing in b"
    assert compare_paths(a, b, Tolerance(ignore=("mor?",))).verdict == "identical"


def test_metadata_is_told_but_does_not_count(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.safetensors", 4), save(tmp_path / "b.safetensors", 5)
    found = compare_paths(a, b)
    assert found.verdict == "identical"
    assert found.other == (Difference("metadata.step", "4", "5"),)
    assert found.tensors_step is None


def test_nothing_in_common(tmp_path: Path) -> None:
    a = save(tmp_path / "a/x.safetensors")
    b = tmp_path / "b/y.safetensors"
    b.parent.mkdir()
    save_file({"w": torch.ones(2)}, b)
    for one, other in ((a, b), (b, a)):
        found = compare_paths(one, other)
        assert (found.verdict, found.exit_code) == ("incomparable", 2)
        assert found.summary == "incomparable: no tensor that both sides have (bit for bit)."
        assert (found.first_divergent_step, found.first_tensor) == (None, None)
    folders = compare_paths(a.parent, b.parent)
    assert folders.verdict == "incomparable"
    assert folders.summary == "incomparable: no file that both sides have (1 in a, 1 in b)."
    ignored = compare_paths(a, save(tmp_path / "c.safetensors"), Tolerance(ignore=("*",)))
    assert ignored.summary == "incomparable: no tensor that both sides have (bit for bit, * left out)."


def test_the_same_path_twice(tmp_path: Path) -> None:
    a = save(tmp_path / "a/x.safetensors", w=torch.full((2,), float("nan")))
    (tmp_path / "link").symlink_to(a.parent)
    for one, other, what in (
        (a, a, "file"),
        (a, tmp_path / "link/x.safetensors", "file"),
        (a.parent, tmp_path / "link", "folder"),
    ):
        found = compare_paths(one, other)
        assert found.verdict == "identical"
        assert found.summary == f"identical: both paths are the same {what}."


def test_folders_are_compared_in_numeric_order(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path / f"a/run-{step}/model.safetensors", step)
        changed = {} if step == 9 else {"momentum__w": torch.arange(3.0) + step}
        save(tmp_path / f"b/run-{step}/model.safetensors", step, **changed)
    found = compare_paths(tmp_path / "a", tmp_path / "b")
    assert found.verdict == "different"
    assert (found.first_divergent_step, found.tensors_step, found.first_tensor) == (10, 10, "momentum/w")
    assert found.summary.startswith("different: 2 of 3 common files, first run-10/model.safetensors: 1 of 4 tensors")
    left = compare_paths(tmp_path / "a", tmp_path / "b", Tolerance(ignore=("momentum/*",)))
    assert left.summary == "identical bit for bit, momentum/* left out: 3 files."
    assert left.tensors_step == 100


def test_files_on_one_side_are_a_difference(tmp_path: Path) -> None:
    for step in range(3):
        save(tmp_path / f"a/{step}.safetensors", step)
    copied(tmp_path / "a", tmp_path / "b")
    for step in range(3, 8):
        save(tmp_path / f"b/{step}.safetensors", step)
    save(tmp_path / "a/x.safetensors")
    found = compare_paths(tmp_path / "a", tmp_path / "b")
    assert found.verdict == "different"
    assert found.summary == (
        "different: none of 3 common files; only in a: x.safetensors; "
        "only in b: 3.safetensors, 4.safetensors, 5.safetensors and 2 more."
    )
    assert (found.first_divergent_step, found.first_difference, found.tensors_step) == (None, None, 2)


def test_recorded_runs(recorded: Path, tmp_path: Path) -> None:
    b = copied(recorded, tmp_path / "b")
    same = compare_paths(recorded, b)
    assert same.summary == "identical bit for bit: 5 files."  # states 0, 4, 8, 9, and their generators
    assert same.tensors_step == 9
    assert {tensor.name for tensor in same.tensors} == load_file(b / "checkpoints/step-000009.safetensors").keys()
    folder = compare_paths(recorded / "checkpoints", b / "checkpoints")
    assert folder.summary == "identical bit for bit: 4 files."


def test_another_training_is_different_from_its_first_state_on(recorded: Path, tmp_path: Path) -> None:
    setup = tiny_setup(record__every=4, train__lr=0.06)
    with Recorder(tmp_path, setup) as recorder:
        for record in train(setup):
            recorder.add(record)
        recorder.finish(record.after)
    found = compare_paths(recorded, tmp_path)
    assert (found.verdict, found.first_divergent_step) == ("different", 4)
    assert found.summary.startswith("different: 3 of 5 common files, first checkpoints/step-000004.safetensors: ")
    assert found.generators == ()
    assert found.tensors[0].name.startswith("parameters/")
    assert found.tensors[0].elements == found.tensors[0].differing


@pytest.mark.parametrize("name", ["checkpoints/step-000004.safetensors", "rng/part-00000.safetensors"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_flipped_bit_is_damage(recorded: Path, tmp_path: Path, name: str, position: float, side: str) -> None:
    damaged = copied(recorded, tmp_path / "damaged")
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    paths = (damaged, recorded) if side == "a" else (recorded, damaged)
    with pytest.raises(RecordingError, match=rf"^{damaged}: {name} is damaged"):
        compare_paths(*paths)
    if name.startswith("checkpoints/"):
        paths = (paths[0] / "checkpoints", paths[1] / "checkpoints")
        with pytest.raises(RecordingError, match=rf"^{damaged}/checkpoints: {name} is damaged"):
            compare_paths(*paths)


def test_a_damaged_or_incomplete_recording_is_refused(recorded: Path, tmp_path: Path) -> None:
    manifest = copied(recorded, tmp_path / "manifest")
    content = bytearray((manifest / "checkpoints/manifest.parquet").read_bytes())
    content[20] ^= 1
    (manifest / "checkpoints/manifest.parquet").write_bytes(content)
    with pytest.raises(RecordingError, match=r"checkpoints/manifest\.parquet is damaged"):
        compare_paths(recorded, manifest)
    (manifest / "checkpoints/manifest.parquet").write_bytes(content[:50])
    (manifest / "digests.json").unlink()
    with pytest.raises(RecordingError, match=r"checkpoints/manifest\.parquet cannot be read: "):
        compare_paths(recorded, manifest)
    missing = copied(recorded, tmp_path / "missing")
    (missing / "checkpoints/step-000004.safetensors").unlink()
    with pytest.raises(RecordingError, match=r"checkpoints/step-000004\.safetensors is missing, though"):
        compare_paths(recorded, missing)


def test_without_a_manifest_a_changed_file_is_a_difference(recorded: Path, tmp_path: Path) -> None:
    b = copied(recorded, tmp_path / "b")
    (b / "checkpoints/manifest.parquet").unlink()
    edit(b / "checkpoints/step-000008.safetensors", "buffers/1.running_mean", torch.zeros(3, dtype=torch.float64))
    found = compare_paths(recorded, b)
    assert (found.verdict, found.first_divergent_step, found.first_tensor) == (
        "different",
        8,
        "buffers/1.running_mean",
    )


def test_generator_states_count_with_what_their_metadata_holds(recorded: Path, tmp_path: Path) -> None:
    b = copied(recorded, tmp_path / "b")
    for path in (b / "checkpoints/manifest.parquet", b / "digests.json"):
        path.unlink()
    name = "rng/part-00000.safetensors"
    content = (b / name).read_bytes()
    assert b"numpy_position" in content
    (b / name).write_bytes(content.replace(b'numpy_has_gauss\\": 0', b'numpy_has_gauss\\": 1'))
    found = compare_paths(recorded, b)
    assert found.verdict == "different"
    assert found.generators == (Difference(name, file_sha256(recorded / name), file_sha256(b / name)),)
    assert found.summary.endswith(f"1 of 5 common files, first {name}: the generator states, outside of their tensors.")
    assert compare_paths(recorded / name, b / name).verdict == "different"
    left = compare_paths(recorded, b, Tolerance(ignore=("generators",)))
    assert left.summary == "identical bit for bit, generators left out: 4 files."
    shutil.rmtree(b / "rng")
    assert compare_paths(recorded, b, Tolerance(ignore=("generators",))).verdict == "identical"
    assert compare_paths(recorded, b).verdict == "different"


def test_pickles_are_never_read(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors")
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(opened),)

    for name in ("b.pt", "b", "b.safetensors"):
        torch.save({"w": Trap()}, tmp_path / name)
    for name in ("b.pt", "b"):
        for pair in ((a, tmp_path / name), (tmp_path / name, a)):
            with pytest.raises(ConfigError, match=rf"{name}: found no \.safetensors file; .* pickles are not read$"):
                compare_paths(*pair)
    with pytest.raises(RecordingError, match=r"b\.safetensors: cannot be read as a safetensors file"):
        compare_paths(a, tmp_path / "b.safetensors")
    assert not opened.exists()


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    a, b = save(tmp_path / "a.safetensors"), save(tmp_path / "b.safetensors")
    b.write_bytes(b.read_bytes()[:keep])
    with pytest.raises(RecordingError, match=rf"^{b}: cannot be read as a safetensors file: "):
        compare_paths(a, b)


def test_paths_that_hold_nothing_to_compare(tmp_path: Path) -> None:
    a = save(tmp_path / "a/a.safetensors")
    empty = tmp_path / "empty"
    (empty / "below").mkdir(parents=True)
    (empty / "below/notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"gone\.safetensors: no such file or folder$"):
        compare_paths(a, tmp_path / "gone.safetensors")
    with pytest.raises(RecordingError, match=rf"^{empty}: found no \.safetensors file in it$"):
        compare_paths(a.parent, empty)
    with pytest.raises(
        ConfigError, match=r"found a file \(.*\) and a folder \(.*\); allowed: two files or two folders$"
    ):
        compare_paths(a, a.parent)


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save(a / "x.safetensors")
    save(b / "x.safetensors")
    outside = save(tmp_path / "outside/y.safetensors")
    for name, target in (
        ("y.safetensors", outside),
        ("y.safetensors", Path("../outside/y.safetensors")),
        ("checkpoints", outside.parent),
        ("manifest.parquet", outside),
    ):
        link = b / name
        link.symlink_to(target)
        for pair in ((a, b), (b, a)):
            with pytest.raises(RecordingError, match=rf"^{link}: found a link that leads out of {b}"):
                compare_paths(*pair)
        link.unlink()
    (a / "y.safetensors").symlink_to("x.safetensors")
    save(b / "y.safetensors")
    assert compare_paths(a, b).summary == "identical bit for bit: 2 files."
    (b / "z.safetensors").symlink_to("z.safetensors")
    with pytest.raises(RecordingError, match=r"z\.safetensors: cannot be read: it is no regular file$"):
        compare_paths(a, b)
