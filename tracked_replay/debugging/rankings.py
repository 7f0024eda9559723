"""Rankings of all training examples by how suspicious they are, each with the question that it answers.

Sources: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent" (2020) for ``tracin_harm`` and
``self_influence``; Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking" (2020) for
``margin_area``. Theirs takes the margins while it trains; here they are those of recorded states in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tracked_replay.debugging.gradients import self_influence
from tracked_replay.debugging.outputs import Outputs, outputs_of
from tracked_replay.errors import NumericalError
from tracked_replay.lds.baselines import gradient_products, tracin_checkpoints
from tracked_replay.recording import Checkpoint, Recording
from tracked_replay.replay import Target
from tracked_replay.training import TrainingSetup

# In the order in which they are shown: those that found flipped labels best come first.
QUESTIONS = {
    "margin": "Is it mislabelled? At the end of the training the model prefers another class to its label.",
    "margin_area": "Is it mislabelled? All along the training the model preferred another class to its label.",
    "training_loss": "Is it mislabelled or hard? At the end of the training its loss is still large.",
    "training_loss_area": "Is it mislabelled or hard? All along the training its loss was large.",
    "harm": "Does it hurt predictions? Removing it would lower the mean evaluation loss; its label may well be right.",
    "tracin_harm": "Does it hurt predictions? As harm, estimated from some recorded states without the replay.",
    "self_influence": "How much does a step on it change its own loss? Large where no other example teaches the same.",
}


@dataclass(frozen=True)
class Ranking:
    """All training examples by one measure.

    Attributes:
        name: a key of ``QUESTIONS``.
        values: (training examples,) float64; the higher, the more suspicious.

    Raises:
        NumericalError: a value is NaN or Inf, so there is no order.
    """

    name: str
    values: np.ndarray

    def __post_init__(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.values))
        if len(bad):
            raise NumericalError(
                f"ranking {self.name}: the value of training example {bad[0]} is {self.values[bad[0]]}"
            )

    @property
    def question(self) -> str:
        """What it answers, in a sentence or two."""
        return QUESTIONS[self.name]

    @property
    def order(self) -> np.ndarray:
        """(training examples,) int64 indices, the most suspicious first; of equal values the lower index."""
        return np.argsort(-self.values, kind="stable")


class Suspicion(NamedTuple):
    """What is known about every training example.

    Attributes:
        rankings: the best one first.
        final: what the last state says.
    """

    rankings: tuple[Ranking, ...]
    final: Outputs


def choose_checkpoints(recording: Recording, count: int) -> list[Checkpoint]:
    """At most ``count`` recorded states, evenly spread over the last ones of each epoch; the final state is not one.

    Each of them has a step that starts from it, and so learning rates.
    """
    ends = tracin_checkpoints(recording)
    places = np.linspace(len(ends) - 1, 0, min(count, len(ends))).round().astype(int)
    return [ends[place] for place in sorted(places)]


def rank_examples(
    setup: TrainingSetup,
    recording: Recording,
    checkpoints: Iterable[Checkpoint],
    target: Target,
    harm: np.ndarray,
) -> Suspicion:
    """Rank all training examples in every way that the task allows.

    Args:
        setup: of the recorded run.
        recording: the recorded run.
        checkpoints: states along the training, from :func:`choose_checkpoints`; at least one.
        target: mean measurement over the whole evaluation set.
        harm: (training examples,) exact influence on that target.

    Raises:
        NumericalError: a ranking holds NaN or Inf.
        RecordingError: a recorded file is missing or damaged.
    """
    self_, tracin = np.zeros(setup.data.num_train), np.zeros(setup.data.num_train)
    along: list[Outputs] = []
    for checkpoint in checkpoints:
        state = recording.state(checkpoint).to(setup.device)
        rates = recording.trace.learning_rates[checkpoint.step].tolist()
        along.append(outputs_of(setup, state))
        self_ += self_influence(setup, state, rates)
        tracin -= gradient_products(setup, state, [target], rates)[0] / setup.config.train.batch_size
    final = outputs_of(setup, recording.state(recording.final).to(setup.device))
    along.append(final)
    values = {
        "training_loss": final.losses,
        "training_loss_area": np.mean([outputs.losses for outputs in along], axis=0),
        "self_influence": self_,
        "harm": harm,
        "tracin_harm": tracin,
    }
    margins = [outputs.margins for outputs in along if outputs.margins is not None]
    if margins:
        values |= {"margin": -margins[-1], "margin_area": -np.mean(margins, axis=0)}
    return Suspicion(tuple(Ranking(name, values[name]) for name in QUESTIONS if name in values), final)


class Detection(NamedTuple):
    """How well a ranking finds examples that are known to be mislabelled.

    Attributes:
        auc: area under the ROC curve: how often a mislabelled example stands above a rightly labelled one.
        precision: share of the top ``count`` examples that are mislabelled.
        recall: share of the mislabelled examples that stand among the top ``count``.
    """

    auc: float
    precision: float
    recall: float


def detection(ranking: Ranking, mislabelled: Sequence[int] | np.ndarray, count: int) -> Detection:
    """Hold a ranking against the truth.

    Args:
        ranking: of N examples.
        mislabelled: their indices; at least one, and not all.
        count: how many examples of the top are looked at.
    """
    # Imported here: scikit-learn takes a second to load.
    from sklearn.metrics import roc_auc_score

    truth = np.zeros(len(ranking.values), dtype=bool)
    truth[mislabelled] = True
    hits = int(truth[ranking.order[:count]].sum())
    return Detection(float(roc_auc_score(truth, ranking.values)), hits / count, hits / int(truth.sum()))
