"""The checks that a recorded run passes before anything is concluded from retraining it.

Each is against something that was recorded or made anew; the first that fails raises, naming step and value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tracked_replay.config import Config
from tracked_replay.determinism import (
    create_deterministic_loader,
    create_deterministic_model,
    set_loader_epoch,
)
from tracked_replay.errors import ReplayError
from tracked_replay.lds.retraining import require_recorded_states, weight_tensor
from tracked_replay.lds.subsets import Subset
from tracked_replay.recording import Recording, state_digest
from tracked_replay.replay import require_recorded_plan, states_backward
from tracked_replay.training import SHARED_INSTANCE, TrainingSetup, initial_state

TRAINING_SECTIONS = ("seed", "data", "model", "train")


class Check(NamedTuple):
    """A check that was passed.

    Attributes:
        name: what was checked.
        detail: on what.
    """

    name: str
    detail: str


def run_checks(
    setup: TrainingSetup, recording: Recording, subsets: Sequence[Subset], config: Config | None = None
) -> Iterator[Check]:
    """Run all checks, one after the other.

    Args:
        setup: what retrainings here would use.
        recording: the recorded run.
        subsets: whose weights are checked; may be empty.
        config: the config that the scores were computed with; the recorded one where it is ``None``.

    Yields:
        Each check as it passes.

    Raises:
        ReplayError: the first that fails, naming the first differing step and value.
        RecordingError: a recorded file is missing or damaged.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("recorded files against their digests", lambda: _files(recording)),
        ("the same order in two loaders", lambda: _two_loaders(setup)),
        ("the order across epochs", lambda: _epochs(setup)),
        ("the whole sequence against the recorded trace", lambda: _sequence(setup, recording)),
        ("subset weights hit exactly the named examples", lambda: _weights(setup, subsets)),
        ("identical initial models", lambda: require_initial_model(setup, recording)),
        ("identical config where it is shared", lambda: _configs(setup, recording, config)),
        ("recorded states against their digests", lambda: _states(setup, recording)),
        ("a retraining with all weights 1 is the recorded run", lambda: _retraining(setup, recording)),
    ]
    for name, check in checks:
        try:
            detail = check()
        except ReplayError as error:
            raise ReplayError(f"the check {name!r} failed: {error}") from error
        yield Check(name, detail)


def _files(recording: Recording) -> str:
    recording.require_undamaged(figures=False)
    return "all but the figures"


def _orders(setup: TrainingSetup) -> list[np.ndarray]:
    """Order of every epoch from a loader of its own, cut to whole batches."""
    train = setup.config.train
    loader = create_deterministic_loader(
        setup.config.seed,
        range(setup.data.num_train),  # type: ignore[arg-type]
        SHARED_INSTANCE,
        batch_size=train.batch_size,
        drop_last=True,
    )
    orders = []
    for epoch in range(train.epochs):
        set_loader_epoch(loader, epoch)
        orders.append(torch.stack(list(loader)).numpy())
    return orders


def _two_loaders(setup: TrainingSetup) -> str:
    first, second = _orders(setup), _orders(setup)
    for epoch, (one, other) in enumerate(zip(first, second, strict=True)):
        _require_equal(one, other, f"epoch {epoch}: two loaders give different examples", epoch * len(one))
    return f"{len(first)} epochs"


def _epochs(setup: TrainingSetup) -> str:
    orders = _orders(setup)
    planned = setup.plan.indices.reshape(len(orders), -1, setup.config.train.batch_size)
    for epoch, order in enumerate(orders):
        if len(np.unique(order)) != order.size:
            raise ReplayError(f"epoch {epoch}: an example stands in it twice")
        _require_equal(order, planned[epoch], f"epoch {epoch}: loader and plan differ", epoch * len(order))
        if epoch and order.size > 10 and np.array_equal(order, orders[epoch - 1]):
            raise ReplayError(f"epoch {epoch}: the order is that of epoch {epoch - 1}; it should be drawn anew")
    return f"{len(orders)} epochs of {orders[0].size} examples"


def _sequence(setup: TrainingSetup, recording: Recording) -> str:
    require_recorded_plan(setup, recording)
    return f"{recording.trace.steps} steps: examples, labels, learning rates"


def _weights(setup: TrainingSetup, subsets: Sequence[Subset]) -> str:
    for subset in subsets:
        weights = weight_tensor(setup, subset.removed, np.zeros(len(subset.removed))).cpu().numpy()
        removed = set(subset.removed.tolist())
        for step, indices in enumerate(setup.plan.indices):
            expected = np.array([float(int(index) not in removed) for index in indices])
            if not np.array_equal(weights[indices], expected):
                place = int(np.flatnonzero(weights[indices] != expected)[0])
                raise ReplayError(
                    f"subset {subset.id}, step {step}: example {indices[place]} has the weight "
                    f"{weights[indices[place]]}, expected {expected[place]}"
                )
    return f"{len(subsets)} subsets"


def require_initial_model(setup: TrainingSetup, recording: Recording) -> str:
    """Two models made here must be the one that the recorded training began with. Raises ReplayError."""
    recorded = recording.checkpoints[0].digest
    for attempt in range(2):
        model = create_deterministic_model(setup.config.seed, setup.task.model, SHARED_INSTANCE)
        model = model.to(device=setup.device, dtype=setup.data.dtype)
        found = state_digest(initial_state(model))
        if found != recorded:
            raise ReplayError(f"step 0: initial model {attempt + 1} has the digest {found}, recorded was {recorded}")
    return f"two models, digest {recorded}"


def _configs(setup: TrainingSetup, recording: Recording, config: Config | None) -> str:
    recorded = recording.config
    for other in (setup.config, config or recorded):
        ours, theirs = other.identity(*TRAINING_SECTIONS), recorded.identity(*TRAINING_SECTIONS)
        if ours != theirs:
            names = [name for name in recorded.flat() if name.split(".")[0] in TRAINING_SECTIONS]
            name = next(name for name in names if other.value(name) != recorded.value(name))
            raise ReplayError(f"{name}: found {other.value(name)!r}, recorded was {recorded.value(name)!r}")
    return ", ".join(TRAINING_SECTIONS)


def _states(setup: TrainingSetup, recording: Recording) -> str:
    count = sum(1 for _ in states_backward(setup, recording, "stream"))
    return f"{count} states"


def _retraining(setup: TrainingSetup, recording: Recording) -> str:
    digests = (*recording.trace.state_digests, recording.final.digest)
    require_recorded_states(setup, digests, recording.trace.losses)
    return f"{len(digests)} states, bit for bit"


def _require_equal(found: np.ndarray, expected: np.ndarray, message: str, first_step: int) -> None:
    differing = np.flatnonzero((found != expected).any(axis=1))
    if len(differing):
        row = int(differing[0])
        raise ReplayError(
            f"step {first_step + row}: {message}; found {found[row][:4].tolist()}…, "
            f"expected {expected[row][:4].tolist()}…"
        )
