"""Two recorded runs: where they first part and in what, against differences put in by hand."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import NAMES, nudge_at, nudged, record, with_rates
from tiny import tiny_setup

from tracked_replay.compare.result import ULP, Tolerance
from tracked_replay.compare.runs import Unavailable, checkpoint_states, compare_recordings, retrained_states
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.recording import Recording, file_sha256, folder_source, state_digest, write_digests
from tracked_replay.recording.checkpoints import write_checkpoint, write_manifest
from tracked_replay.training import State


def compare(a: Recording, b: Recording, **arguments: object):
    return compare_recordings(a, b, NAMES, **arguments)


def cause_names(comparison) -> list[str]:
    return [cause.name for cause in comparison.causes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("base"))


def test_the_same_training_twice_is_identical_and_no_checkpoint_is_read(
    base: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = record(tmp_path)

    def fail(*arguments: object) -> State:
        raise AssertionError("a checkpoint was read")

    monkeypatch.setattr(Recording, "state", fail)
    found = compare(base, other)
    assert (found.verdict, found.exit_code) == ("identical", 0)
    assert found.summary == "Identical bit for bit: 9 steps."
    assert (found.steps_a, found.steps_b) == (9, 9)
    assert (found.trace, found.generators, found.seeds, found.config, found.other, found.causes) == ((),) * 6
    assert (found.first_divergent_step, found.first_difference, found.tensors) == (None, None, ())
    json.dumps(found.to_json_dict())


def test_another_seed_parts_the_runs_in_the_initial_state(base: Recording, tmp_path: Path) -> None:
    found = compare(base, record(tmp_path, seed=1))
    assert (found.verdict, found.first_divergent_step, found.first_difference) == ("different", 0, "state")
    assert cause_names(found) == ["seed"]
    assert found.first_tensor == "parameters/0.weight"
    initial = {row.name for row in found.first_tensors}
    # BatchNorm's own tensors start from constants.
    assert initial == {"parameters/0.weight", "parameters/0.bias", "parameters/4.weight", "parameters/4.bias"}
    assert ("seed", "0", "1") in found.config
    assert {"master_seed", "model[shared_training]", "step[0]", "step[8]"} <= {row.name for row in found.seeds}
    assert {row.column for row in found.trace} == {"indices", "labels", "loss", "state_digest"}


def test_another_schedule_parts_the_runs_where_it_changes_the_rate(base: Recording, tmp_path: Path) -> None:
    found = compare(base, record(tmp_path, train__schedule="step", train__lr_step_epochs=2))
    assert (found.first_divergent_step, found.first_difference) == (6, "lr")
    assert cause_names(found)[0] == "lr"
    assert "train.schedule is constant in A and step in B" in found.causes[0].text
    rate = next(row for row in found.trace if row.column == "lr")
    assert (rate.step, rate.count) == (6, 3)
    assert (float(rate.a.split()[0]), float(rate.b.split()[0])) == (0.05, pytest.approx(0.005))
    assert found.first_tensor == "parameters/0.weight"
    assert all(row.largest_ulp for row in found.first_tensors if row.name.startswith("parameters/"))


def test_a_rate_changed_by_one_bit_is_a_difference(base: Recording, tmp_path: Path) -> None:
    setup = tiny_setup()
    rates = setup.plan.learning_rates.copy()
    rates[4:, 1] = np.nextafter(rates[4:, 1], 1)
    found = compare(base, record(tmp_path, with_rates(setup, rates)))
    assert (found.first_divergent_step, found.first_difference) == (4, "lr")
    assert cause_names(found) == ["lr"]
    assert "from step 4 on: 0.05 at position 1 in A and 0.05000000000000001 at position 1 in B" in found.causes[0].text


def test_two_swapped_labels_part_the_runs_where_they_first_occur(base: Recording, tmp_path: Path) -> None:
    setup = tiny_setup()
    labels = setup.data.train.labels.clone()
    # Examples that stand neither in the first batch nor in each other's.
    first, second = int(setup.plan.indices[1][3]), int(setup.plan.indices[2][5])
    if labels[first] == labels[second]:
        second = next(int(i) for i in setup.plan.indices[2] if labels[i] != labels[first])
    labels[[first, second]] = labels[[second, first]]
    setup.data.train = dataclasses.replace(setup.data.train, labels=labels)
    found = compare(base, record(tmp_path, setup))
    assert (found.first_divergent_step, found.first_difference) == (1, "data")
    assert cause_names(found)[0] == "data"
    assert "labels" in found.causes[0].text
    row = next(row for row in found.trace if row.column == "labels")
    position = setup.plan.indices[1].tolist().index(first)
    assert row.a == f"{labels[second]} at position {position}"
    assert row.b == f"{labels[first]} at position {position}"


def test_the_thread_count_is_named_where_the_state_differs(base: Recording, tmp_path: Path) -> None:
    other = record(tmp_path, train__threads=2, change_state=nudge_at(3, "parameters/4.weight"))
    found = compare(base, other)
    assert found.verdict == "different"
    assert found.first_difference in ("loss", "state")
    assert cause_names(found)[0] == "threads"
    assert "1 in A and 2 in B" in found.causes[0].text


def test_a_changed_loss_alone_is_found(base: Recording, tmp_path: Path) -> None:
    def change(taken):
        return taken._replace(loss=float(np.nextafter(taken.loss, 9))) if taken.before.step == 4 else taken

    other = record(tmp_path, change_record=change)
    found = compare(base, other)
    assert (found.verdict, found.first_divergent_step, found.first_difference) == ("different", 4, "loss")
    assert cause_names(found) == ["unknown"]
    assert found.first_tensors == ()
    assert compare(base, other, tolerance=Tolerance(max_ulp=1)).verdict == "identical"
    assert compare(base, other, tolerance=Tolerance(ignore=("loss",))).verdict == "identical"
    assert compare(base, other, tolerance=Tolerance(ignore=("lr", "data"))).verdict == "different"


def test_losses_of_float32_trainings_are_counted_in_float32(tmp_path: Path) -> None:
    def change(taken):
        near = float(np.nextafter(np.float32(taken.loss), np.float32(9)))
        return taken._replace(loss=near) if taken.before.step >= 4 else taken

    a = record(tmp_path / "a", train__dtype="float32")
    b = record(tmp_path / "b", train__dtype="float32", change_record=change)
    assert compare(a, b).first_divergent_step == 4
    assert compare(a, b, tolerance=Tolerance(max_ulp=1)).verdict == "identical"


def test_the_first_loss_beyond_the_tolerance_decides(base: Recording, tmp_path: Path) -> None:
    def change(taken):
        loss = taken.loss
        for _ in range({2: 1, 3: 2, 6: 3, 7: 9}.get(taken.before.step, 0)):
            loss = float(np.nextafter(loss, 9))
        return taken._replace(loss=loss)

    other = record(tmp_path, change_record=change)
    steps = [compare(base, other, tolerance=Tolerance(max_ulp=ulp)).first_divergent_step for ulp in (0, 1, 2, 3, 9)]
    assert steps == [2, 3, 6, 7, None]


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_changed_state_is_found_at_its_step(base: Recording, tmp_path: Path, step: int) -> None:
    found = compare(base, record(tmp_path, change_state=nudge_at(step, "parameters/4.weight")))
    assert (found.first_divergent_step, found.first_difference) == (step - 1, "state")
    assert [row.name for row in found.first_tensors] == ["parameters/4.weight"]
    assert found.first_tensors[0].largest_ulp == 1
    assert (found.tensors_step, len(found.tensors)) == (9, 15)
    assert cause_names(found) == ["unknown"]
    assert f"at step {step - 1}, where the state after it differs, first in parameters/4.weight" in found.summary


def test_states_that_agree_again_are_different_all_the_same(base: Recording, tmp_path: Path) -> None:
    """A running variance forgets: every step takes 0.7 of it, so that the changed bit is rounded away."""
    found = compare(base, record(tmp_path, change_state=nudge_at(1, "buffers/1.running_var")))
    assert (found.verdict, found.first_divergent_step) == ("different", 0)
    assert [row.name for row in found.first_tensors] == ["buffers/1.running_var"]
    assert (found.tensors_step, found.tensors) == (None, ())
    assert "; state 9 agrees again." in found.summary


def test_tensors_stand_in_the_order_of_the_parameter_groups(base: Recording, tmp_path: Path) -> None:
    found = compare(base, record(tmp_path, train__lr=0.06))
    expected = ["0.weight", "4.weight", "0.bias", "1.weight", "1.bias", "4.bias"]
    names = [row.name.split("/") for row in found.tensors]
    for kind in ("parameters", "momentum"):
        assert [name for found_kind, name in names if found_kind == kind] == expected
    assert list(dict.fromkeys(kind for kind, _ in names)) == ["parameters", "buffers", "momentum"]


def test_drift_follows_the_distance_of_the_states(base: Recording, tmp_path: Path) -> None:
    other = record(tmp_path, train__schedule="step", train__lr_step_epochs=1)
    drift = compare(base, other).drift
    assert drift.steps == (4, 5, 6, 7, 8, 9)
    row = drift.largest_absolute[drift.tensors.index("parameters/4.weight")]
    for step, found in zip(drift.steps, row, strict=True):
        states = [recording.state(recording.checkpoints[step]).parameters["4.weight"] for recording in (base, other)]
        assert found == float((states[0] - states[1]).abs().max())


def test_drift_of_many_states_is_spread_logarithmically(tmp_path: Path) -> None:
    a = record(tmp_path / "a", train__epochs=30)
    b = record(tmp_path / "b", train__epochs=30, change_state=nudge_at(5, "parameters/0.weight"))
    steps = compare(a, b).drift.steps
    assert (steps[0], steps[-1]) == (5, 90)
    assert 16 <= len(steps) <= 24
    assert np.diff(steps)[0] == 1
    assert np.diff(steps)[-1] > 5


def test_states_that_were_not_kept_are_named(tmp_path: Path) -> None:
    a = record(tmp_path / "a", record__every=4)
    b = record(tmp_path / "b", record__every=4, change_state=nudge_at(6, "parameters/4.weight"))
    found = compare(a, b)
    assert (found.first_divergent_step, found.first_difference, found.first_tensor) == (5, "state", None)
    assert "The tensors of state 6 could not be compared (run-a: no checkpoint of state 6 was kept)." in found.summary
    assert found.tensors_step == 9
    assert found.drift.steps == (8, 9)


def test_states_that_were_not_kept_are_retrained(tmp_path: Path) -> None:
    a = record(tmp_path / "a", record__every=4)
    rates = tiny_setup().plan.learning_rates.copy()
    rates[5] *= 2
    setup = with_rates(tiny_setup(record__every=4), rates)
    b = record(tmp_path / "b", setup)
    plain = tiny_setup(record__every=4)
    torch.set_num_threads(2)
    found = compare(a, b, states=(retrained_states(a, plain), retrained_states(b, setup)))
    assert torch.get_num_threads() == 2
    assert (found.first_divergent_step, found.first_difference) == (5, "lr")
    assert found.first_tensor == "parameters/0.weight"
    # Step 5 differs in its learning rate only: the same momentum, hence twice the way.
    a5, a6 = (retrained_states(a, plain)(step) for step in (5, 6))
    b6 = retrained_states(b, setup)(6)
    assert all(isinstance(state, State) for state in (a5, a6, b6))
    assert [state_digest(a5), state_digest(a6)] == list(a.trace.state_digests[5:7])
    assert state_digest(b6) == b.trace.state_digests[6]
    for name, start in a5.parameters.items():
        torch.testing.assert_close(b6.parameters[name] - start, 2 * (a6.parameters[name] - start))


def test_a_retrained_state_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    recording = record(tmp_path, record__every=4, change_state=nudge_at(6, "parameters/4.weight"))
    source = retrained_states(recording, tiny_setup(record__every=4))
    assert isinstance(source(5), State)
    refused = source(7)
    assert isinstance(refused, Unavailable)
    assert refused.reason.startswith("state 6 has the digest ")
    assert recording.trace.state_digests[6] in refused.reason
    assert isinstance(source(8), State)  # a checkpoint
    assert isinstance(source(10), Unavailable)
    found = compare(record(tmp_path / "plain", record__every=4), recording, states=(None, source))
    assert "run-a: no checkpoint of state 6" in found.summary


def test_retraining_takes_steps_with_the_runs_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(tmp_path, record__every=4)
    setup = tiny_setup(record__every=4)
    seen = []
    take = type(setup).take

    def spy(self, state, weights=None):
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return take(self, state, weights)

    monkeypatch.setattr(type(setup), "take", spy)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    source = retrained_states(recording, setup)
    source(2)
    source(3)
    assert seen == [(1, True)] * 3  # two steps, then one more from the state that was kept
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("swap", [False, True])
def test_a_run_that_ends_earlier_parts_there(base: Recording, tmp_path: Path, swap: bool) -> None:
    short = record(tmp_path, train__epochs=2)
    found = compare(*((base, short) if swap else (short, base)))
    assert (found.verdict, found.first_divergent_step, found.first_difference) == ("different", 6, "data")
    ends, goes_on = NAMES[::-1] if swap else NAMES
    assert f"at step 6, where {ends} ends there and {goes_on} goes on to step 9" in found.summary
    assert cause_names(found) == ["config"]
    assert "train.epochs" in found.causes[0].text
    assert found.trace == ()
    assert compare(short, base, tolerance=Tolerance(ignore=("data",))).verdict == "different"


def test_another_batch_size_parts_the_runs_in_their_data(base: Recording, tmp_path: Path) -> None:
    found = compare(base, record(tmp_path, train__batch_size=12))
    assert (found.first_divergent_step, found.first_difference) == (0, "data")
    row = next(row for row in found.trace if row.column == "indices")
    assert (row.step, row.a, row.b) == (0, "16 values", "12 values")
    assert cause_names(found) == ["config"]
    assert found.causes[0].text == "train.batch_size is 16 in A and 12 in B"


def test_another_number_of_parameter_groups_parts_the_runs_in_their_rates(base: Recording, tmp_path: Path) -> None:
    setup = tiny_setup()
    groups = (dataclasses.replace(setup.step.groups[0], parameters=("0.weight",)), *setup.step.groups[1:])
    groups += (dataclasses.replace(setup.step.groups[0], name="head", parameters=("4.weight",)),)
    setup = dataclasses.replace(setup, step=dataclasses.replace(setup.step, groups=groups))
    rates = np.repeat(setup.plan.learning_rates[:, :1], 3, axis=1)
    found = compare(base, record(tmp_path, with_rates(setup, rates)))
    assert (found.first_divergent_step, found.first_difference) == (0, "lr")
    assert ("parameter_groups.weights.parameters", "4.weight", None) in found.other


def test_another_precision_parts_the_runs_in_the_initial_state(base: Recording, tmp_path: Path) -> None:
    found = compare(base, record(tmp_path, train__dtype="float32"), tolerance=Tolerance(max_ulp=5))
    assert (found.first_divergent_step, found.first_difference) == (0, "state")
    assert {row.difference for row in found.first_tensors} == {"dtype"}
    assert cause_names(found)[0] == "config"


def test_generator_states_alone_make_runs_different(base: Recording, tmp_path: Path) -> None:
    def draw(taken):
        if taken.before.step == 4:
            torch.rand(1)  # the next step is seeded anew, so no tensor changes
        return taken

    other = record(tmp_path, change_record=draw)
    found = compare(base, other)
    assert (found.verdict, found.first_difference) == ("different", "state")
    assert [row.name for row in found.generators] == ["step 5"]
    assert found.first_divergent_step == 4
    assert "only the generator states before step 5 differ" in found.summary
    assert cause_names(found) == ["unknown"]
    ignored = compare(base, other, tolerance=Tolerance(ignore=("generators",)))
    assert ignored.verdict == "identical"
    assert ignored.summary == "Identical bit for bit, generators left out: 9 steps."
    assert ignored.generators == found.generators


def test_rounding_within_max_ulp_passes(base: Recording, tmp_path: Path) -> None:
    other = record(tmp_path, change_state=nudge_at(9, "parameters/4.weight", ulp=2))
    within = compare(base, other, tolerance=Tolerance(max_ulp=2))
    assert within.verdict == "identical"
    within_2 = "Identical within 2 ULP (neighbouring floating-point numbers are 1 ULP apart)"
    assert within.summary == f"{within_2}: 9 steps; the digests of 1 state differ, state 9 was compared."
    beyond = compare(base, other, tolerance=Tolerance(max_ulp=1))
    assert (beyond.first_divergent_step, beyond.first_difference) == (8, "state")
    assert beyond.summary.startswith(f"Different beyond 1 ULP ({ULP}): the runs part at step 8")


def test_under_a_tolerance_the_first_state_beyond_it_decides(base: Recording, tmp_path: Path) -> None:
    """One nudge grows over the following steps: the expected step is found here by comparing the states directly."""
    other = record(tmp_path, change_state=nudge_at(3, "parameters/4.weight"))

    def apart(step: int) -> float:
        states = [recording.state(recording.checkpoints[step]).flat() for recording in (base, other)]
        return max(
            int((states[0][name].view(torch.int64) - states[1][name].view(torch.int64)).abs().max())
            for name in states[0]
            if bool((states[0][name] * states[1][name] > 0).all())
        )

    limit = apart(4)
    expected = next(step for step in range(3, 10) if apart(step) > limit)
    found = compare(base, other, tolerance=Tolerance(max_ulp=limit, ignore=("loss",)))
    assert found.verdict == "different"
    assert (found.first_divergent_step, found.first_difference) == (expected - 1, "state")
    assert f"Different beyond {limit} ULP ({ULP}), loss left out: " in found.summary


def test_ignored_tensors_do_not_decide(tmp_path: Path) -> None:
    a = record(tmp_path / "a", record__every=4)
    change = nudge_at(9, "momentum/0.bias", ulp=99)
    b = record(tmp_path / "b", record__every=4, change_state=change)
    assert compare(a, b).first_tensors[0].name == "momentum/0.bias"
    for pattern in ("momentum/*", "*/0.bias", "momentum/0.bias"):
        found = compare(a, b, tolerance=Tolerance(ignore=(pattern,)))
        assert found.verdict == "identical"
        assert found.summary.startswith(f"Identical bit for bit, {pattern} left out: 9 steps; ")
    assert compare(a, b, tolerance=Tolerance(ignore=("parameters/*", "buffers/*"))).verdict == "different"
    both = compare(a, b, tolerance=Tolerance(max_ulp=2, ignore=("momentum/*", "loss")))
    assert both.summary.startswith(f"Identical within 2 ULP ({ULP}), momentum/* and loss left out: ")


def test_under_a_tolerance_states_between_checkpoints_are_named_or_retrained(tmp_path: Path) -> None:
    a = record(tmp_path / "a", record__every=4)
    rates = tiny_setup().plan.learning_rates.copy()
    rates[5] *= 2
    setup = with_rates(tiny_setup(record__every=4), rates)
    b = record(tmp_path / "b", setup)
    tolerance = Tolerance(max_ulp=3, ignore=("lr", "loss"))
    found = compare(a, b, tolerance=tolerance)
    assert found.first_divergent_step == 7
    assert "(states 6 to 7 before it cannot be compared)" in found.summary
    sources = (retrained_states(a, tiny_setup(record__every=4)), retrained_states(b, setup))
    assert compare(a, b, tolerance=tolerance, states=sources).first_divergent_step == 5


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [
        (Tolerance(ignore=("momentun/*",)), r"ignore: found 'momentun/\*'; allowed: data, lr, loss, generators, or "),
        (Tolerance(ignore=("loss", "")), "ignore: found ''"),
        (Tolerance(ignore=("state",)), "ignore: found 'state'"),
        (Tolerance(max_ulp=-1), "max_ulp: found -1; allowed: integer >= 0"),
    ],
)
def test_a_tolerance_that_means_nothing_is_refused(base: Recording, tolerance: Tolerance, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(base, base, tolerance=tolerance)
    assert compare(base, base, tolerance=Tolerance(ignore=("buffers/*",))).verdict == "identical"


def test_momentum_patterns_need_momentum(tmp_path: Path) -> None:
    plain = record(tmp_path, train__momentum=0.0)
    with pytest.raises(ConfigError, match=r"ignore: found 'momentum/\*'"):
        compare(plain, plain, tolerance=Tolerance(ignore=("momentum/*",)))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["digests.json", "trace/part-00000.parquet", "seeds/derivations.json"])
def test_one_flipped_bit_is_damage_and_no_difference(base: Recording, tmp_path: Path, name: str) -> None:
    other = record(tmp_path)
    damage(tmp_path / name)
    fresh = Recording(folder_source(tmp_path), other._identity)
    with pytest.raises(RecordingError, match=f"run-b: {name} is damaged|{name} is damaged"):
        compare(base, fresh)


def test_a_damaged_checkpoint_is_found_where_it_is_read_or_asked_for(base: Recording, tmp_path: Path) -> None:
    same = record(tmp_path / "same")
    damage(tmp_path / "same/checkpoints/step-000005.safetensors")
    assert compare(base, same).verdict == "identical"
    with pytest.raises(RecordingError, match=r"run-b: checkpoints/step-000005.safetensors is damaged"):
        compare(base, same, check_files=True)
    other = record(tmp_path / "other", change_state=nudge_at(5, "parameters/0.weight"))
    damage(tmp_path / "other/checkpoints/step-000005.safetensors")
    with pytest.raises(RecordingError, match=r"run-b: checkpoints/step-000005.safetensors is damaged"):
        compare(base, other)


@pytest.mark.parametrize("name", ["rng/part-00000.safetensors", "environment/environment.json"])
def test_every_file_is_checked_where_asked(tmp_path: Path, base: Recording, name: str) -> None:
    other = record(tmp_path)
    assert compare(base, other, check_files=True).verdict == "identical"
    damage(tmp_path / name)
    with pytest.raises(RecordingError, match=f"run-b: {name} is damaged"):
        compare(base, other, check_files=True)


@pytest.mark.parametrize("place", [3, -1])
def test_a_manifest_that_does_not_fit_the_states_is_found(tmp_path: Path, base: Recording, place: int) -> None:
    """Rewritten with digests of files that fit, as somebody might who hides a change."""
    rows = list(record(tmp_path).checkpoints)
    write_manifest(tmp_path, [*rows[:place], dataclasses.replace(rows[place], digest="0" * 32), *rows[place:][1:]])
    write_digests(tmp_path)
    with pytest.raises(RecordingError, match=f"run-b: {rows[place].file} is damaged: .*, recorded were .* {'0' * 32}$"):
        compare(base, Recording(folder_source(tmp_path)), check_files=True)
    other = write_checkpoint(tmp_path, dataclasses.replace(base.state(base.checkpoints[2]), step=3))
    write_manifest(tmp_path, [*rows[:3], other, *rows[4:]])
    write_digests(tmp_path)
    with pytest.raises(RecordingError, match=f"run-b: {other.file}: its state has the digest .*, the trace says"):
        compare(base, Recording(folder_source(tmp_path)), check_files=True)
    write_manifest(tmp_path, rows[:-1])
    write_digests(tmp_path)
    with pytest.raises(RecordingError, match="run-b: the trace has 9 steps, but the last checkpoint is of state 8"):
        compare(base, Recording(folder_source(tmp_path)))


def test_facts_of_config_environment_and_data_are_listed(tmp_path: Path) -> None:
    content = {"task": "tiny", "fingerprint": "1" * 64, "label_names": ["a", "b"], "train_examples": 48, "code": "c"}
    other = content | {"fingerprint": "2" * 64, "label_names": ["a", "c"], "code": "d"}
    recordings = []
    for name, data in (("a", content), ("b", other)):
        root = tmp_path / name
        record(root, lds__subsets=4 if name == "b" else 64)
        (root / "config/data.json").write_text(json.dumps(data))
        environment = json.loads((root / "environment/environment.json").read_text())
        if name == "b":
            environment["cpu"]["flags"] = [*environment["cpu"]["flags"][1:], "new"]
            environment["packages"]["installed"].pop("numpy")
            environment["cuda"]["devices"] = [{"name": "gpu", "memory_bytes": 1}]
        removed = environment["cpu"]["flags"][0]
        (root / "environment/environment.json").write_text(json.dumps(environment))
        digests = {
            path.relative_to(root).as_posix(): file_sha256(path)
            for path in root.rglob("*")
            if path.is_file() and path.name != "digests.json" and path.suffix != ".safetensors"
        }
        recordings.append((root, digests, removed))
    removed = recordings[0][2]
    for root, digests, _ in recordings:
        (root / "digests.json").write_text(json.dumps(digests))
    found = compare(*(Recording(folder_source(root)) for root, _, _ in recordings))
    assert found.verdict == "identical"
    assert found.config == (("lds.subsets", "64", "4"),)
    environment = {row.name: row[1:] for row in found.environment}
    assert environment["cpu.flags"] == (removed, "new")
    assert environment["packages.installed.numpy"] == (np.__version__, None)
    assert environment["cuda.devices.0.name"] == (None, "gpu")
    assert "cuda.devices" not in environment
    assert {row.name: row[1:] for row in found.other} == {
        "code": ("c", "d"),
        "data.fingerprint": ("1" * 64, "2" * 64),
        "data.label_names": ("b", "c"),
    }


def test_checkpoints_give_only_what_was_kept(tmp_path: Path) -> None:
    recording = record(tmp_path, record__every=4)
    source = checkpoint_states(recording)
    found = source(8)
    assert isinstance(found, State)
    assert state_digest(found) == recording.trace.state_digests[8]
    assert source(3) == Unavailable("no checkpoint of state 3 was kept")


def test_hundreds_of_steps_are_compared_in_seconds(tmp_path: Path) -> None:
    a = record(tmp_path / "a", train__epochs=100, record__every=50)
    b = record(tmp_path / "b", train__epochs=100, record__every=50)
    started = time.perf_counter()
    assert compare(a, b).verdict == "identical"
    assert time.perf_counter() - started < 5


def test_runs_without_deterministic_kernels_are_told(tmp_path: Path) -> None:
    a = record(tmp_path / "a", train__reproducibility="seeds")
    b = record(tmp_path / "b", train__reproducibility="seeds", change_state=nudge_at(3, "parameters/4.weight"))
    assert cause_names(compare(a, b)) == ["determinism"]


def test_nudged_is_the_next_number() -> None:
    assert nudged(torch.tensor([1.0, 1.0])).tolist() == [1.0, 1.0 + 2**-23]
