"""Recorded files: read back bit for bit, the same bytes twice, and damage found."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny import TinyTask, tiny_config, tiny_setup
from torch import nn

from tracked_replay.determinism import load_generator_states
from tracked_replay.errors import RecordingError, ReplayError
from tracked_replay.recording import Recorder, Recording, folder_source, state_digest
from tracked_replay.recording import checkpoints as checkpoint_files
from tracked_replay.recording import generators as generator_files
from tracked_replay.recording.checkpoints import StateBuffer, checkpoint_bytes, read_checkpoint
from tracked_replay.replay import states_backward
from tracked_replay.training import State, set_up, train


def record(root: Path, copy_at_once: bool | None = None, **changes: object) -> tuple[Recording, list]:
    setup = tiny_setup(**changes)
    records = []
    with Recorder(root, setup, copy_at_once=copy_at_once) as recorder:
        for step in train(setup):
            recorder.add(step)
            records.append(step)
        identity = recorder.finish(records[-1].after)
    return Recording(folder_source(root), identity), records


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_everything_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    recording, records = record(tmp_path, record__every=2, train__nesterov=True)
    assert recording.config == tiny_config(record__every=2, train__nesterov=True)
    trace = recording.trace
    for t, step in enumerate(records):
        np.testing.assert_array_equal(trace.indices[t], step.indices)
        np.testing.assert_array_equal(trace.labels[t], step.labels)
        np.testing.assert_array_equal(trace.learning_rates[t].view(np.int64), step.learning_rates.view(np.int64))
        assert trace.losses[t].hex() == step.loss.hex()
        assert trace.epochs[t] == step.epoch
        assert trace.state_digests[t] == state_digest(step.before)
    assert [checkpoint.step for checkpoint in recording.checkpoints] == [0, 2, 4, 6, 8, 9]
    final = recording.state(recording.final)
    assert state_digest(final) == state_digest(records[-1].after) == recording.final.digest


def test_the_same_training_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, copy_at_once in (("a", False), ("b", False), ("c", True)):
        record(tmp_path / name, copy_at_once)
    first = files(tmp_path / "a")
    for second in (files(tmp_path / "b"), files(tmp_path / "c")):
        assert first.keys() == second.keys()
        # digests.json holds the digest of the environment record, which names free-running facts such as load; all
        # else must agree to the byte.
        differing = {name for name in first if first[name] != second[name]}
        assert differing <= {"environment/environment.json", "digests.json"}


def test_checkpoints_are_plain_safetensors_with_the_models_names(tmp_path: Path) -> None:
    _, records = record(tmp_path)
    with safe_open(tmp_path / "checkpoints/step-000003.safetensors", "pt") as file:
        names = set(file.keys())
        for name, tensor in records[3].before.parameters.items():
            assert torch.equal(file.get_tensor(f"parameters/{name}"), tensor)
    assert "buffers/1.running_mean" in names
    assert "momentum/0.weight" in names
    with safe_open(tmp_path / "checkpoints/step-000000.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("momentum/")]  # noqa: SIM118


def test_checkpoints_have_the_very_bytes_that_safetensors_writes_but_for_spaces(tmp_path: Path) -> None:
    mixed = {
        "b": torch.randn(3, 2).T,
        "a": torch.arange(5),
        "é": torch.tensor(True),
        "none": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.randn(1000, 70),
        "aligned": torch.randn(1, dtype=torch.float64),
    }
    parameters = {name: tensor for name, tensor in mixed.items() if tensor.is_floating_point()}
    buffers = {name: tensor for name, tensor in mixed.items() if name not in parameters}
    even = {"w": torch.randn(8, 4)}
    buffer = StateBuffer()
    sizes = []
    for state in (
        State(0, parameters, buffers, {}),
        State(7, parameters, buffers, parameters),
        State(12345, parameters, buffers, parameters),
        State(12346, {name: tensor + 1 for name, tensor in parameters.items()}, buffers, parameters),
        State(3, even, {}, even),
        State(4, {"none": torch.zeros(0)}, {}, {}),
    ):
        checkpoint = buffer.hold(state)
        path = tmp_path / checkpoint.file
        buffer.write(path)
        content = path.read_bytes()
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.flat().items()}
        library = safetensors.torch.save(tensors, {"step": str(state.step)})
        header, theirs = (one[8 : 8 + int.from_bytes(one[:8], "little")] for one in (content, library))
        assert header.rstrip() == theirs.rstrip()
        assert content[8 + len(header) :] == library[8 + len(theirs) :]
        assert checkpoint.bytes == len(content) == checkpoint_bytes(state)
        assert checkpoint.digest == state_digest(state)
        found = read_checkpoint(path, checkpoint)
        assert state_digest(found) == checkpoint.digest
        assert found.flat().keys() == state.flat().keys()
        sizes.append(len(content))
    assert sizes[4:] == [4096, 4096]  # the files end with a page where the tensors' sizes allow it, or just before
    assert all(-size % 4096 < 16 for size in sizes)


def test_pixels_hold_what_the_model_saw(tmp_path: Path) -> None:
    _, records = record(tmp_path, record__pixels=True)
    table = pq.read_table(tmp_path / "trace")
    assert str(table.schema.field("pixels").type).startswith("extension<arrow.fixed_shape_tensor")
    pixels = table["pixels"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(pixels, np.stack([step.inputs.numpy() for step in records]))


class InPlace(TinyTask):
    """Changes its inputs before it looks at them."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), *super().model())


def test_pixels_are_those_before_the_model_changed_them(tmp_path: Path) -> None:
    config = tiny_config(record__pixels=True)
    setup = set_up(config, InPlace(config))
    with Recorder(tmp_path, setup) as recorder:
        for step in train(setup):
            recorder.add(step)
        recorder.finish(step.after)
    pixels = pq.read_table(tmp_path / "trace")["pixels"].combine_chunks().to_numpy_ndarray()
    assert pixels.min() < 0
    np.testing.assert_array_equal(pixels, np.stack([setup.batch(t).inputs.numpy() for t in range(setup.plan.steps)]))


def test_a_model_with_tensors_of_another_layout_is_read_back_as_it_was_trained(tmp_path: Path) -> None:
    class Transposed(TinyTask):
        def model(self) -> nn.Module:
            model = super().model().to(memory_format=torch.channels_last)
            model[-1].weight = nn.Parameter(model[-1].weight.detach().t().contiguous().t())
            return model

    config = tiny_config(train__dtype="float32")
    setup = set_up(config, Transposed(config))
    assert all(tensor.is_contiguous() for tensor in setup.initial.flat().values())
    with Recorder(tmp_path, setup) as recorder:
        for step in train(setup):
            recorder.add(step)
        identity = recorder.finish(step.after)
    recording = Recording(folder_source(tmp_path), identity)
    for checkpoint in recording.checkpoints[:-1]:
        after = setup.take(recording.state(checkpoint))[0].state
        assert state_digest(after) == recording.checkpoints[checkpoint.step + 1].digest


def test_generator_states_are_kept_at_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_files, "ROWS_PER_FILE", 3)
    recording, _ = record(tmp_path, record__every=4)
    found = [list(load_generator_states(path)) for path in sorted((tmp_path / "rng").iterdir())]
    assert found == [[0, 4, 8], [9]]
    assert recording.generator_steps == [row.step for row in recording.checkpoints if row.generators] == [0, 4, 8, 9]
    assert sorted(path.name for path in (tmp_path / "rng").iterdir()) == [
        "part-00000.safetensors",
        "part-00001.safetensors",
    ]


def test_seed_derivations_name_every_component(tmp_path: Path) -> None:
    record(tmp_path)
    content = json.loads((tmp_path / "seeds/derivations.json").read_text())
    by_text = {row["hashed"]: row["seed"] for row in content["derivations"]}
    assert by_text["0_model_shared_training"] == tiny_setup().seeds.derive("model", "shared_training")
    assert {"0_dataloader_shared_training", "0_step_0", "0_step_8"} <= by_text.keys()


def test_digests_tell_minus_zero_nan_payloads_dtype_shape_and_name_apart() -> None:
    def digest(tensor: torch.Tensor, name: str = "w") -> str:
        return state_digest(State(0, {name: tensor}, {}))

    base = torch.tensor([0.0, float("nan")])
    payload = torch.tensor([0, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    variants = [
        digest(base),
        digest(torch.tensor([-0.0, float("nan")])),
        digest(payload),
        digest(base.double()),
        digest(base[:, None]),
        digest(base, "v"),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(base.clone()) == digest(base)
    wide = torch.arange(12.0).reshape(3, 4)
    assert digest(wide.T.contiguous().T) == digest(wide)


TARGETS_OF_DAMAGE = [
    "digests.json",
    "config/config.toml",
    "trace/part-00000.parquet",
    "checkpoints/manifest.parquet",
    "checkpoints/step-000004.safetensors",
    "checkpoints/step-000009.safetensors",
]


def read_all(recording: Recording) -> None:
    assert recording.config
    assert recording.trace
    list(states_backward(tiny_setup(), recording, "stream"))


@pytest.mark.parametrize("name", TARGETS_OF_DAMAGE)
@pytest.mark.parametrize("position", [0, 0.3, 0.999])
def test_one_changed_byte_is_found_and_the_file_named(name: str, position: float, tmp_path: Path) -> None:
    recording, _ = record(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RecordingError, match=name):
        read_all(Recording(folder_source(tmp_path), recording._identity))


@pytest.mark.parametrize("name", TARGETS_OF_DAMAGE)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    recording, _ = record(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RecordingError, match=name):
        read_all(Recording(folder_source(tmp_path), recording._identity))


def test_a_recomputed_state_that_differs_names_its_step(tmp_path: Path) -> None:
    recording, _ = record(tmp_path, record__every=4)
    other = tiny_setup(record__every=4, train__lr=0.051)
    with pytest.raises(ReplayError, match=r"step 5: the replayed state has the digest"):
        list(states_backward(other, recording, "stream"))[-1:]


@pytest.mark.parametrize("copy_at_once", [False, True])
def test_an_error_while_writing_stops_the_training(
    copy_at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_files.write_directly

    def write(path: Path, memory: memoryview, size: int) -> None:
        if path.stem == "step-000003":
            raise OSError("no space left")
        real(path, memory, size)

    monkeypatch.setattr(checkpoint_files, "write_directly", write)
    with pytest.raises(OSError, match="no space left"):
        record(tmp_path, copy_at_once)
    assert not (tmp_path / "digests.json").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_in_the_journal_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the writing is behind the training."""
    real = checkpoint_files.write_directly
    taken = []

    def write(path: Path, memory: memoryview, size: int) -> None:
        time.sleep(0.05)
        lines = (tmp_path / "resume/journal.jsonl").read_bytes().count(b"\n")
        assert path.stem == f"step-{lines:06d}"
        real(path, memory, size)
        taken.append(lines)

    monkeypatch.setattr(checkpoint_files, "write_directly", write)
    recording, records = record(tmp_path)
    assert taken == list(range(10))
    assert [state_digest(recording.state(one)) for one in recording.checkpoints[:-1]] == [
        state_digest(step.before) for step in records
    ]
