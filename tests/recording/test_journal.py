"""Recordings that were interrupted: what is found of them, and that going on gives the bits of never having stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from tiny import TinyTask, tiny_config, tiny_setup
from torch import Tensor, nn

from tracked_replay.determinism import capture_generator_states
from tracked_replay.errors import TrackedReplayError
from tracked_replay.recording import Recorder, Unfinished, files, find_unfinished, recorder, state_digest
from tracked_replay.recording.generators import changed, changes
from tracked_replay.tasks import TaskData
from tracked_replay.training import TrainingSetup, set_up, train

STEPS = 9
STOPPED = 6  # the interrupted recordings below hold the steps 0 to 5
FREE = {"environment/environment.json", "digests.json"}  # what may differ between two recordings of one training


class Drawing(nn.Module):
    """Draws from Python's and NumPy's global generators, which keep every second normal deviate in store."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs * (1 + random.gauss(0, 0.1)) + np.random.normal(0, 0.1))


class DrawingTask(TinyTask):
    def model(self) -> nn.Module:
        return Drawing(super().model())


class StoppedError(Exception):
    """Something that is no error of the package: a full disk, Ctrl-C."""


@pytest.fixture(autouse=True)
def _quick_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "environment_record", dict)


def drawing_setup(**changes: object) -> TrainingSetup:
    config = tiny_config(**changes)
    task = DrawingTask(config)
    return set_up(config, task, TaskData(task, config))


def record(root: Path, setup: TrainingSetup, stop: int | None = None, *, all_written: bool = True) -> Unfinished | None:
    """Record a training, or go on with what is there; leave before step ``stop`` (9: after the last) is taken."""
    unfinished = find_unfinished(root)
    state = setup.initial if unfinished is None else unfinished.state
    with suppress(StoppedError), Recorder(root, setup, unfinished) as recording:
        for step in train(setup, start=state):
            if state.step == stop:
                raise StoppedError
            recording.add(step)
            state = step.after
            if all_written:
                recording.wait()
        if stop is not None:
            raise StoppedError
        recording.finish(state)
    return unfinished


def contents(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in FREE}


def interrupted(root: Path, every: int = 1) -> list[bytes]:
    """Record six steps of the tiny task; returns the lines of the journal."""
    record(root, tiny_setup(record__every=every), STOPPED)
    lines = (root / "resume/journal.jsonl").read_bytes().splitlines()
    assert len(lines) == STOPPED
    return lines


def sealed(contents: Sequence[bytes]) -> bytes:
    """Lines with their digests, as somebody might write them who knows how."""
    digest, lines = "", []
    for content in contents:
        digest = xxhash.xxh3_128_hexdigest(digest.encode() + content)
        lines.append(f"{digest} ".encode() + content + b"\n")
    return b"".join(lines)


def content_of(line: bytes) -> bytes:
    return line.partition(b" ")[2]


def write_journal(root: Path, content: bytes) -> None:
    (root / "resume/journal.jsonl").write_bytes(content)


def found_step(root: Path) -> int | None:
    unfinished = find_unfinished(root)
    if unfinished is None:
        return None
    assert [row.step for row in unfinished.rows] == list(range(unfinished.state.step))
    return unfinished.state.step


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("all_written", [True, False])
def test_going_on_gives_the_bytes_of_never_having_stopped(every: int, all_written: bool, tmp_path: Path) -> None:
    def setup() -> TrainingSetup:
        return drawing_setup(record__every=every, record__pixels=True)

    record(tmp_path / "whole", setup())
    expected = contents(tmp_path / "whole")
    assert {
        "trace/part-00000.parquet",
        "rng/part-00000.safetensors",
        "checkpoints/manifest.parquet",
    } <= expected.keys()
    gone_on = []
    for stop in range(STEPS + 1):
        root = tmp_path / f"stopped {stop}"
        record(root, setup(), stop, all_written=all_written)
        assert not (root / "digests.json").exists()
        for _ in range(5):
            random.gauss(0, 1)  # the generators stand somewhere else when it goes on
            np.random.normal()
        unfinished = record(root, setup())
        gone_on.append(0 if unfinished is None else unfinished.state.step)
        assert contents(root) == expected, stop
    if all_written:
        assert gone_on == [max(0, stop - 1) // every * every for stop in range(STEPS + 1)]


def test_stopped_again_and_again_it_still_ends_with_the_same_bytes(tmp_path: Path) -> None:
    record(tmp_path / "whole", drawing_setup())
    for stop in (4, 2, 6, 6, 9):  # a stop before the state it goes on from changes nothing
        record(tmp_path / "stopped", drawing_setup(), stop)
    assert record(tmp_path / "stopped", drawing_setup()).state.step == 8
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["write_digests", "manifest.parquet", "digests.json"])
def test_stopped_while_it_is_finished_it_is_still_unfinished(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise StoppedError

    record(tmp_path / "whole", drawing_setup())
    with monkeypatch.context() as patch:
        if name == "write_digests":
            patch.setattr(recorder, name, stop)
        else:
            real = files.os.replace
            patch.setattr(files.os, "replace", lambda a, b: stop() if Path(b).name == name else real(a, b))
        record(tmp_path / "stopped", drawing_setup())
    assert record(tmp_path / "stopped", drawing_setup()).state.step == STEPS - 1
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_recording_that_begins_anew_takes_nothing_from_an_earlier_one(tmp_path: Path) -> None:
    record(tmp_path, tiny_setup(train__lr=0.1))
    record(tmp_path, tiny_setup(), STOPPED)
    assert not (tmp_path / "digests.json").exists()  # it stands for a recording that is whole
    assert {path.stem for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{t:06}" for t in range(STOPPED)}
    record(tmp_path / "whole", tiny_setup())
    record(tmp_path, tiny_setup())
    expected = contents(tmp_path / "whole")
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith("whole/")} == expected


def test_what_is_found_is_the_state_the_losses_and_the_generators_of_the_training(tmp_path: Path) -> None:
    record(tmp_path, drawing_setup(), STOPPED)
    steps = []
    setup = drawing_setup()
    generators = [capture_generator_states()]
    for step in train(setup):
        steps.append(step)
        generators.append(capture_generator_states())
    found = find_unfinished(tmp_path)
    assert found is not None
    assert state_digest(found.state) == state_digest(steps[5].before)
    assert [row.loss.hex() for row in found.rows] == [step.loss.hex() for step in steps[:5]]
    assert [row.digest for row in found.rows] == [state_digest(step.before) for step in steps[:5]]
    for name, expected in vars(generators[5]).items():
        np.testing.assert_array_equal(getattr(found.generators, name), expected, name)
    earlier = find_unfinished(tmp_path, before=5)
    assert earlier is not None
    assert (earlier.state.step, len(earlier.rows)) == (4, 4)
    assert find_unfinished(tmp_path, before=0) is None


def test_a_journal_that_was_cut_anywhere_counts_as_far_as_its_lines_are_whole(tmp_path: Path) -> None:
    lines = interrupted(tmp_path)
    content = b"\n".join(lines) + b"\n"
    ends = np.cumsum([len(line) + 1 for line in lines]) - 1  # where the line is whole, its end of line not there yet
    near = {int(end) + shift for end in ends for shift in (-2, -1, 0, 1, 2)}
    for cut in sorted(cut for cut in {*range(0, len(content), 37), *near} if cut <= len(content)):
        write_journal(tmp_path, content[:cut])
        assert found_step(tmp_path) == last_of(int((ends <= cut).sum())), cut
        write_journal(tmp_path, content[:cut] + b"\0" * (len(content) - cut))  # a power cut may leave zeros
        assert found_step(tmp_path) == last_of(content[:cut].count(b"\n")), cut


def last_of(lines: int) -> int | None:
    return lines - 1 if lines else None


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", ["cut", "emptied", "zeroed", "changed", "deleted", "a folder"])
def test_a_damaged_file_leads_to_an_earlier_state(how: str, every: int, tmp_path: Path) -> None:
    interrupted(tmp_path, every)
    kept = [step for step in reversed(range(STOPPED)) if step % every == 0]
    assert found_step(tmp_path) == kept[0]
    for step, earlier in zip(kept, [*kept[1:], None], strict=True):
        path = tmp_path / "checkpoints" / f"step-{step:06d}.safetensors"
        content = path.read_bytes()
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how != "deleted":
            changed = {"cut": content[:-1], "emptied": b"", "zeroed": b"\0" * len(content)}
            path.write_bytes(changed.get(how, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]))
        assert found_step(tmp_path) == earlier


def test_after_a_damaged_file_it_still_ends_with_the_same_bytes(tmp_path: Path) -> None:
    record(tmp_path / "whole", drawing_setup(record__every=2))
    record(tmp_path / "stopped", drawing_setup(record__every=2), STOPPED)
    (tmp_path / "stopped/checkpoints/step-000004.safetensors").write_bytes(b"")
    assert record(tmp_path / "stopped", drawing_setup(record__every=2)).state.step == 2
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "edit",
    [
        lambda row: [*row[:2], "0" * 32, *row[3:]],
        lambda row: [*row[:3], row[3] + 1, row[4]],
        lambda row: [*row[:2], None, *row[3:]],
        lambda row: [*row[:3], "4096", row[4]],
    ],
)
def test_a_line_that_contradicts_its_checkpoint_is_not_gone_on_from(edit: Callable, tmp_path: Path) -> None:
    lines = interrupted(tmp_path)
    contents = list(map(content_of, lines))
    write_journal(tmp_path, sealed([*contents[:-1], json.dumps(edit(json.loads(contents[-1]))).encode()]))
    assert found_step(tmp_path) == 4


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        "words",
        {"torch_cpu": "no base64!"},
        {"torch_cpu": 5},
        {"torch_cuda": 5},
        {"python_words": "AAA="},
        {"numpy_position": None},
        {"numpy_cached_gaussian": "x"},
        {"python_gauss_next": 1.5},
        {"seed": 1},
    ],
    ids=repr,
)
def test_generator_states_that_are_none_are_not_gone_on_from(found: object, tmp_path: Path) -> None:
    lines = interrupted(tmp_path)
    contents = list(map(content_of, lines))
    row = json.loads(contents[-1])
    write_journal(tmp_path, sealed([*contents[:-1], json.dumps([*row[:4], found]).encode()]))
    assert found_step(tmp_path) == 4


def test_lines_hold_of_the_generators_what_changed() -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = [capture_generator_states()]
    random.gauss(0, 1)
    states.append(capture_generator_states())
    torch.rand(1)
    states.append(capture_generator_states())
    np.random.normal()
    states.append(capture_generator_states())
    states.append(capture_generator_states())
    written = [json.loads(json.dumps(changes(*pair))) for pair in zip(states, [None, *states], strict=False)]
    assert set(written[0]) == set(vars(states[0]))
    assert set(written[1]) == {"python_words", "python_gauss_next"}
    assert set(written[2]) == {"torch_cpu"}
    assert set(written[3]) == {"numpy_words", "numpy_position", "numpy_has_gauss", "numpy_cached_gaussian"}
    assert written[4] == {}
    found = None
    for expected, line in zip(states, written, strict=True):
        found = changed(found, line)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value, name)
            assert not isinstance(value, np.ndarray) or getattr(found, name).dtype == value.dtype


GARBAGE = [
    b"",
    b"\0" * 50,
    b"\xff\xfe\x00x",
    b"null",
    b"{}",
    b"[]",
    b"[3]",
    b"[" * 100_000,
    b'[3, "0x1p0", "d"]',
    b'[3, "0x1p0", "d", null]',
    b'[3, "0x1p0", "d", null, null, null]',
    b'[3, 1.5, "d", null, null]',
    b'[3, "loss", "d", null, null]',
    b'["3", "0x1p0", "d", null, null]',
    b'[3.0, "0x1p0", "d", null, null]',
    b'[3, "0x1p0", "d", 4096, null]',
    b'[3, "0x1p0", "d", null, {}]',
    b'[3, "0x1p0", "d", null, 3]',
    b'[2, "0x1p0", "d", null, null]',
    b'[4, "0x1p0", "d", null, null]',
    b'[-1, "0x1p0", "d", null, null]',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_nothing_counts_from_a_line_on_that_is_none(garbage: bytes, tmp_path: Path) -> None:
    lines = interrupted(tmp_path)
    contents = list(map(content_of, lines))
    for some in ([*contents[:3], garbage, *contents[3:]], [garbage, *contents]):
        write_journal(tmp_path, sealed(some))
        assert found_step(tmp_path) == (2 if some[0] == contents[0] else None)
    write_journal(tmp_path, b"\n".join([*lines[:3], garbage, *lines[3:]]))
    assert found_step(tmp_path) == 2


def test_nothing_counts_from_a_line_on_that_was_changed_anywhere(tmp_path: Path) -> None:
    content = b"\n".join(interrupted(tmp_path)) + b"\n"
    for position in range(0, len(content), 11):
        changed_content = bytearray(content)
        changed_content[position] ^= 1
        write_journal(tmp_path, bytes(changed_content))
        assert found_step(tmp_path) == last_of(content[:position].count(b"\n")), position
    lines = content.splitlines(keepends=True)
    write_journal(tmp_path, b"".join([*lines[:2], *lines[3:]]))
    assert found_step(tmp_path) == 1
    write_journal(tmp_path, b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    assert found_step(tmp_path) == 1


@pytest.mark.parametrize("every", [1, 3])
def test_stopped_again_before_anything_is_done_nothing_more_is_lost(every: int, tmp_path: Path) -> None:
    def setup() -> TrainingSetup:
        return drawing_setup(record__every=every)

    record(tmp_path / "whole", setup())
    root = tmp_path / "stopped"
    record(root, setup(), 5)
    first = found_step(root)
    checkpoint = root / f"checkpoints/step-{first:06d}.safetensors"
    written = checkpoint.stat().st_mtime_ns
    for stop in (first, first, first + 1, first + 1):
        assert record(root, setup(), stop).state.step == first
        assert found_step(root) == first
    assert checkpoint.stat().st_mtime_ns == written  # what was found whole is not written again
    assert record(root, setup()).state.step == first
    assert contents(root) == contents(tmp_path / "whole")


def test_there_is_nothing_to_go_on_from_without_a_journal(tmp_path: Path) -> None:
    assert find_unfinished(tmp_path / "nowhere") is None
    record(tmp_path, tiny_setup())
    assert find_unfinished(tmp_path) is None
    assert not (tmp_path / "resume").exists()


def test_an_error_of_ours_leaves_the_journal_to_its_caller(tmp_path: Path) -> None:
    setup = tiny_setup()

    def fail() -> None:
        with Recorder(tmp_path, setup) as recording:
            for step in train(setup, stop=3):
                recording.add(step)
            recording.wait()
            raise TrackedReplayError("of ours")

    with pytest.raises(TrackedReplayError):
        fail()
    assert found_step(tmp_path) == 2
