"""What a recorded run is expected to be, and generators put back from it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_setup

from tracked_replay.determinism import deterministic_flags
from tracked_replay.errors import RecordingError
from tracked_replay.recording import Recorder, Recording, folder_source, write_digests
from tracked_replay.recording.expectations import require_expected, restore_generators
from tracked_replay.training import train

Draws = tuple[float, float, float]


def draw() -> Draws:
    return random.random(), np.random.random(), float(torch.rand(1))  # noqa: S311


def record(root: Path) -> tuple[Recording, dict[int, Draws]]:
    """Record 9 steps with every 4th checkpoint, drawing from the generators between any two steps.

    Returns:
        The recording, and what was drawn next by step.
    """
    setup = tiny_setup(seed=7, record__every=4)
    drawn: dict[int, Draws] = {}
    with Recorder(root, setup) as recorder:
        drawn[0] = peek()
        for step in train(setup):
            random.random()  # noqa: S311
            np.random.random()
            recorder.add(step)
            drawn[step.after.step] = peek()
        identity = recorder.finish(step.after)
    return Recording(folder_source(root), identity), drawn


def peek() -> Draws:
    """What would be drawn next, with the libraries' own means."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recording, dict[int, Draws]]:
    root = tmp_path_factory.mktemp("recorded")
    return root, *record(root)


@pytest.fixture
def recording(recorded: tuple[Path, Recording, dict[int, Draws]]) -> Recording:
    return recorded[1]


def changed(
    recorded: tuple[Path, Recording, dict[int, Draws]], copy: Path, name: str, change: Callable[[dict], dict]
) -> Recording:
    """A copy of the recording with other content of a JSON file, whole in its digests."""
    for path in recorded[0].rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(recorded[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(change(content)))
    return Recording(folder_source(copy), write_digests(copy))


def test_the_run_that_is_expected_passes(recording: Recording) -> None:
    require_expected(recording)
    require_expected(recording, seed=7, flags={"mode": "full", "threads": 1}, step=4)
    tiny_setup()
    require_expected(recording, flags=deterministic_flags(), step=9)


def test_another_seed_is_told(recording: Recording) -> None:
    with pytest.raises(RecordingError, match=r"^seed: found 7 in config/config.toml; expected: 8$"):
        require_expected(recording, seed=8, flags={"threads": 5})


def test_seeds_that_were_derived_from_another_seed_are_told(
    recorded: tuple[Path, Recording, dict[int, Draws]], tmp_path: Path
) -> None:
    other = changed(recorded, tmp_path, "seeds/derivations.json", lambda content: content | {"master_seed": 3})
    with pytest.raises(RecordingError, match=r"^seed: found 3 in seeds/derivations.json; expected: 7$"):
        require_expected(other, seed=7)


def test_the_first_flag_that_differs_is_told(recording: Recording) -> None:
    flags = {"deterministic_algorithms": True, "cudnn.benchmark": True, "threads": 64}
    with pytest.raises(
        RecordingError, match=r"^cudnn.benchmark: found False in environment/environment.json; expected: True$"
    ):
        require_expected(recording, flags=flags)


def test_a_flag_that_was_not_recorded_is_told(recording: Recording) -> None:
    with pytest.raises(RecordingError, match=r"^speed: found no such flag in .*; recorded are mode, determ"):
        require_expected(recording, flags={"speed": 1})


def test_an_environment_without_flags_is_told(
    recorded: tuple[Path, Recording, dict[int, Draws]], tmp_path: Path
) -> None:
    def without(content: dict) -> dict:
        del content["determinism"]
        return content

    other = changed(recorded, tmp_path, "environment/environment.json", without)
    with pytest.raises(RecordingError, match=r"environment/environment.json: found no 'determinism'"):
        require_expected(other, flags={"threads": 1})


@pytest.mark.parametrize("step", [5, 10, -1])
def test_a_step_without_a_checkpoint_is_told(recording: Recording, step: int) -> None:
    with pytest.raises(RecordingError, match=rf"^step: found no checkpoint of step {step}; .* 0, 4, 8, 9$"):
        require_expected(recording, step=step)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("seeds/derivations.json", lambda recording: require_expected(recording, seed=7)),
        ("environment/environment.json", lambda recording: require_expected(recording, flags={"threads": 1})),
        ("rng/part-00000.safetensors", lambda recording: restore_generators(recording, 8)),
    ],
)
def test_a_changed_file_is_found(name: str, use: Callable[[Recording], object], tmp_path: Path) -> None:
    recording, _ = record(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    before = torch.get_rng_state()
    with pytest.raises(RecordingError, match=f"{name}.* is damaged"):
        use(recording)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("step", "found"), [(0, 0), (4, 4), (7, 4), (8, 8), (9, 9), (100, 9), (None, 9)])
def test_generators_go_on_as_in_the_recorded_run(
    step: int | None, found: int, recorded: tuple[Path, Recording, dict[int, Draws]]
) -> None:
    _, recording, drawn = recorded
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert restore_generators(recording, step) == found
    assert draw() == drawn[found]


def test_no_generator_states_before_a_step(recording: Recording) -> None:
    with pytest.raises(RecordingError, match=r"^step: found -1; .* which are 0, 4, 8, 9$"):
        restore_generators(recording, -1)


def test_a_recording_without_generator_states(tmp_path: Path) -> None:
    record(tmp_path)
    for path in (tmp_path / "rng").iterdir():
        path.unlink()
    bare = Recording(folder_source(tmp_path), write_digests(tmp_path))
    with pytest.raises(RecordingError, match="the recording has no generator states"):
        restore_generators(bare)
    with pytest.raises(RecordingError, match="step: found no generator states of step 4; recorded are those of none"):
        require_expected(bare, step=4)
