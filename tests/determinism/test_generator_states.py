import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

import tracked_replay.determinism._generators as generators
from tracked_replay.determinism import (
    capture_generator_states,
    derive_component_seed,
    deterministic_context,
    generator_state_steps,
    load_generator_states,
    restore_generator_states,
    save_generator_states,
)
from tracked_replay.errors import ConfigError, RecordingError, ReplayError


def _draw() -> tuple[list[float], list[float], list[float]]:
    """Odd numbers of normal deviates: Python's and NumPy's generators make them in pairs and keep the second."""
    return (
        [random.gauss(0, 1) for _ in range(3)] + [random.random()],  # noqa: S311
        [*np.random.standard_normal(3).tolist(), *np.random.randint(0, 1000, 700).tolist()],
        torch.cat([torch.randn(3), torch.rand(20)]).tolist(),
    )


def _draw_one_normal_each() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(1)


def test_a_stored_normal_deviate_is_part_of_the_state():
    random.seed(1)
    np.random.seed(1)
    _draw_one_normal_each()
    states = capture_generator_states()
    assert states.python_gauss_next == random.getstate()[2] is not None
    assert states.numpy_has_gauss == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_file_continues_every_sequence_exactly(tmp_path, stored):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    if stored:
        _draw_one_normal_each()
    path = tmp_path / "start.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    first = _draw()
    assert _draw() != first
    restore_generator_states(load_generator_states(path)[3])
    assert _draw() == first


def test_a_file_keeps_the_moments_apart(tmp_path):
    path = tmp_path / "several.safetensors"
    states, drawn = {}, {}
    for step in (0, 4, 11):
        states[step] = capture_generator_states()
        drawn[step] = _draw()
        _draw_one_normal_each()
    digests = save_generator_states(states, path)
    found = load_generator_states(path)
    assert list(found) == [0, 4, 11]
    for step in (4, 11, 0):
        restore_generator_states(found[step])
        assert _draw() == drawn[step]
    assert generator_state_steps(path) == list(digests) == [0, 4, 11]
    assert len(set(digests.values())) == 3
    assert save_generator_states({5: states[4]}, path)[5] != digests[4]  # a row is of its step
    with pytest.raises(ValueError, match="at least one"):
        save_generator_states({}, path)


def test_the_digest_is_the_one_that_is_documented(tmp_path):
    path = tmp_path / "documented.safetensors"
    _draw_one_normal_each()
    digests = save_generator_states({2: capture_generator_states(), 5: capture_generator_states()}, path)
    arrays = safetensors.numpy.load(path.read_bytes())
    with safetensors.safe_open(path, framework="np") as file:
        rows = json.loads(file.metadata()["generator_states"])["rows"]
    for place, row in enumerate(rows):
        content = json.dumps({**row["scalars"], "step": row["step"]}, sort_keys=True).encode()
        for name in sorted(arrays):
            one = arrays[name][place]
            content += f"\n{name} {one.dtype.str} {one.shape}\n".encode() + one.tobytes()
        assert hashlib.sha256(content).hexdigest() == row["digest"] == digests[row["step"]]


def test_captured_states_are_copies():
    states = capture_generator_states()
    first = _draw()
    restore_generator_states(states)
    assert _draw() == first


def test_the_fields_are_the_libraries_own_states():
    states = capture_generator_states()
    version, words, _ = random.getstate()
    legacy = np.random.get_state()
    assert (states.python_version, tuple(states.python_words.tolist())) == (version, words)
    assert np.array_equal(states.numpy_words, legacy[1])
    assert states.numpy_position == legacy[2]
    assert np.array_equal(states.torch_cpu, torch.get_rng_state().numpy())
    assert {states.python_words.dtype, states.numpy_words.dtype} == {np.dtype("uint32")}
    assert len(states.torch_cuda) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_same_states_give_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import random, sys, numpy, torch\n"
        "from tracked_replay.determinism import capture_generator_states, save_generator_states\n"
        "random.seed(3); numpy.random.seed(3); torch.manual_seed(3); random.gauss(0, 1)\n"
        "save_generator_states({3: capture_generator_states()}, sys.argv[1])\n"
    )
    contents = set()
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


def test_a_file_holds_no_pickle_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "start.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    save_generator_states({3: capture_generator_states()}, path)
    assert os.listdir(tmp_path) == ["start.safetensors"]
    assert set(safetensors.numpy.load(path.read_bytes())) >= {"python_words", "numpy_words", "torch_cpu"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "start.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(generators.os, "replace", full)
    _draw()
    with pytest.raises(OSError, match="no space"):
        save_generator_states({3: capture_generator_states()}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["start.safetensors"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordingError, match="nowhere"):
        load_generator_states(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("length", [0, 7, 8, 100, 3000, -1])
def test_a_file_that_was_cut_is_named(tmp_path, length):
    path = tmp_path / "cut.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RecordingError, match=r"cut\.safetensors"):
        load_generator_states(path)


def test_a_single_changed_byte_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "flipped.safetensors"
    _draw_one_normal_each()
    save_generator_states({3: capture_generator_states()}, path)
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RecordingError, match=r"flipped\.safetensors"):
            load_generator_states(path)


@pytest.mark.parametrize("key", ["python_words", "numpy_words", "torch_cpu"])
def test_a_missing_array_is_named(tmp_path, key):
    path = tmp_path / "partial.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load(path.read_bytes())
    del arrays[key]
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(RecordingError, match=rf"partial\.safetensors.*{key}"):
        load_generator_states(path)


@pytest.mark.parametrize("metadata", [None, {}, {"generator_states": "[]"}, {"generator_states": "{"}])
def test_metadata_of_another_kind_are_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    save_generator_states({3: capture_generator_states()}, path)
    arrays = safetensors.numpy.load(path.read_bytes())
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(RecordingError, match=r"foreign\.safetensors"):
        load_generator_states(path)


def test_states_of_another_number_of_devices_restore_nothing(tmp_path):
    devices = (torch.cuda.device_count() if torch.cuda.is_available() else 0) + 1
    cuda = tuple(np.full(16, device, dtype=np.uint8) for device in range(devices))
    path = tmp_path / "cuda.safetensors"
    save_generator_states({0: dataclasses.replace(capture_generator_states(), torch_cuda=cuda)}, path)
    states = load_generator_states(path)[0]
    assert len(states.torch_cuda) == devices
    assert all(np.array_equal(found, expected) for found, expected in zip(states.torch_cuda, cuda, strict=True))
    _draw()
    before = random.getstate()
    with pytest.raises(ReplayError, match=rf"{devices} CUDA device\(s\), but this process has {devices - 1}"):
        restore_generator_states(states)
    assert random.getstate() == before


def test_cuda_states_go_to_their_devices(monkeypatch):
    held = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)]
    monkeypatch.setattr(generators, "_cuda_reachable", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in held])
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    restore_generator_states(capture_generator_states())
    assert [state.tolist() for state in given] == [state.tolist() for state in held]


def test_a_numpy_generator_of_another_kind_is_refused():
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ReplayError, match="PCG64"):
            capture_generator_states()
    finally:
        np.random.set_bit_generator(original)


def test_a_context_draws_from_its_seed_and_leaves_no_trace():
    _draw_one_normal_each()
    states = capture_generator_states()
    expected = _draw()
    restore_generator_states(states)
    with deterministic_context(77, "test"):
        assert random.random() == random.Random(77).random()  # noqa: S311
        assert np.random.random() == np.random.RandomState(derive_component_seed(77, "numpy")).random_sample()
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(77)))
    assert _draw() == expected


def test_contexts_nest():
    with deterministic_context(1):
        expected = [_draw(), _draw()]
    with deterministic_context(1):
        first = _draw()
        with deterministic_context(2):
            inner = _draw()
        second = _draw()
    assert [first, second] == expected
    assert inner not in expected


def test_a_context_restores_after_an_exception():
    states = capture_generator_states()
    expected = _draw()
    restore_generator_states(states)
    with pytest.raises(ZeroDivisionError), deterministic_context(1):
        _draw()[0][0] / 0
    assert _draw() == expected


def test_a_context_refuses_a_negative_seed():
    with pytest.raises(ConfigError, match="seed"), deterministic_context(-1):
        pass
