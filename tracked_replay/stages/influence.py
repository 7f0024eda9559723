"""A finished ``magic`` run, read back: targets, measurements, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.recording import Recording, parse_json
from tracked_replay.replay import Target, parse_targets
from tracked_replay.replay.scores import INFLUENCE, TARGETS
from tracked_replay.tracking import artifacts_of, input_of, names, resolve, tag_of

HEADLINES = 8  # targets in the terminal


@dataclass(frozen=True)
class Influence:
    """What a ``magic`` run found.

    Attributes:
        run_id: the run.
        train_run_id: the recorded training it replayed.
        exact: whether its scores are exact.
    """

    run_id: str
    train_run_id: str
    exact: bool
    recording: Recording

    @classmethod
    def open(cls, run_id: str, parameter: str = "magic_run_id") -> Influence:
        """Open a finished ``magic`` run. Raises RunError, RecordingError."""
        run = resolve(run_id, names.MAGIC, parameter)
        found, identity = str(run.info.run_id), tag_of(run, names.DIGESTS)
        if identity is None:
            raise RecordingError(f"{parameter}: run {found} has no tag {names.DIGESTS}, so its files cannot be checked")
        recording = Recording(artifacts_of(found), identity)
        return cls(found, input_of(run, "train_run_id"), tag_of(run, names.EXACT) == "true", recording)

    @property
    def config(self) -> Config:
        """The config it was computed with."""
        return self.recording.config

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Its targets."""
        try:
            return tuple(
                Target(row["target"], row["name"], tuple(row["indices"]), tuple(row["coefficients"]))
                for row in self._rows
            )
        except (KeyError, TypeError) as error:
            raise RecordingError(f"{TARGETS} does not describe targets: {error!r}") from None

    @cached_property
    def measurements(self) -> np.ndarray:
        """(targets,) measurements of the recorded run."""
        return np.array([row["measurement"] for row in self._rows])

    @cached_property
    def _rows(self) -> list[dict]:
        with self.recording.open(TARGETS) as path:
            rows = parse_json(path, TARGETS)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "measurement" in row for row in rows):
            raise RecordingError(f"{TARGETS} must hold a list of targets with their measurements")
        return rows

    def require_targets(self, text: str | int | Sequence[int], num_evaluation: int) -> None:
        """Check that targets given beside this run are its own, in whatever order.

        Args:
            text: see :func:`~tracked_replay.replay.parse_targets`; empty means "not given".
            num_evaluation: number of evaluation examples.

        Raises:
            ConfigError: the run has other targets.
        """
        if isinstance(text, str) and not text.strip():
            return
        given, own = (
            {(target.indices, target.coefficients) for target in targets}
            for targets in (parse_targets(text, num_evaluation), self.targets)
        )
        if given != own:
            names_of = ", ".join(target.name for target in self.targets[:8])
            raise ConfigError(
                f"targets: found {text!r}, but the magic run {self.run_id} has the targets {names_of}"
                f"{', …' if len(self.targets) > 8 else ''}; allowed: its own, or nothing"
            )

    @cached_property
    def table(self) -> pa.Table:
        """The contract's table: ``target``, ``train_index``, ``label``, ``score``."""
        with self.recording.open(INFLUENCE) as path:
            return pq.read_table(path)

    @cached_property
    def scores(self) -> np.ndarray:
        """(targets, training examples) float64."""
        scores = self.table["score"].to_numpy()
        if not self.targets or len(scores) % len(self.targets):
            raise RecordingError(f"{INFLUENCE} has {len(scores)} rows, which {len(self.targets)} targets cannot share")
        odd = np.flatnonzero(~np.isfinite(scores))
        if len(odd):
            index, target = (self.table[name][int(odd[0])].as_py() for name in ("train_index", "target"))
            raise RecordingError(f"the score of training example {index} on target {target} is {scores[odd[0]]}")
        return scores.reshape(len(self.targets), -1)


def headlines(run_id: str) -> list[str]:
    """What a finished ``magic`` run found, a line for each of the first targets. Raises RunError, RecordingError."""
    influence = Influence.open(run_id, "run_id")
    lines = []
    for target, scores in list(zip(influence.targets, influence.scores, strict=True))[:HEADLINES]:
        found = (("lowers", int(scores.argmin()), scores.min() < 0), ("raises", int(scores.argmax()), scores.max() > 0))
        sides = [
            f"training example {index} {verb} it most ({scores[index]:+.3g})" for verb, index, there in found if there
        ]
        lines.append(f"target {target.name}: {', '.join(sides) or 'no training example has influence'}")
    more = len(influence.targets) - HEADLINES
    return [*lines, f"and {more} more targets"] if more > 0 else lines


def load_scores(run_id: str) -> pa.Table:
    """The influence scores of a finished ``magic`` run.

    Args:
        run_id: the run.

    Returns:
        A table with ``target`` (evaluation index; negative for combinations, which ``scores/targets.json`` lists),
        ``train_index``, ``label`` and ``score`` = ∂measurement/∂weight of that example at weight 1.

    Raises:
        RunError: no such run, another stage, or not finished.
        RecordingError: the scores are missing or damaged.
    """
    return Influence.open(run_id, "run_id").table
