"""What a recorded state says about each training example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from tracked_replay.training import State, TrainingSetup

BATCH = 500


@dataclass(frozen=True)
class Outputs:
    """The training examples seen by one state: in eval mode, without augmentation.

    Attributes:
        losses: (training examples,) float64, the training loss of each on its own.
        margins: (training examples,) float64, output of the label minus the largest output of another class; ``None``
            where outputs are not one value a class, as are the next two.
        predictions: (training examples,) int64, the class with the largest output.
        probabilities: (training examples,) float64, softmax of the outputs at that class.
    """

    losses: np.ndarray
    margins: np.ndarray | None
    predictions: np.ndarray | None
    probabilities: np.ndarray | None


@torch.no_grad()
def outputs_of(setup: TrainingSetup, state: State) -> Outputs:
    """Show every training example to a state, which lies on the setup's device."""
    model = setup.step.model.eval()
    losses: list[Tensor] = []
    rows: list[Tensor] = []
    for indices in torch.arange(setup.data.num_train).split(BATCH):
        batch = setup.data.plain_batch(indices)
        outputs = functional_call(model, state.model_tensors, (batch.inputs,))
        losses.append(setup.task.per_example_loss(outputs, batch.labels))
        rows.append(outputs)
    found = torch.cat(losses).double().cpu().numpy()
    if rows[0].ndim != 2 or not 1 < rows[0].shape[1] == len(setup.task.label_names):
        return Outputs(found, None, None, None)
    everything = torch.cat(rows).double()
    best, predictions = everything.softmax(1).max(1)
    return Outputs(
        losses=found,
        margins=margins(everything, setup.data.train.labels).cpu().numpy(),
        predictions=predictions.cpu().numpy(),
        probabilities=best.cpu().numpy(),
    )


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """Output of the label minus the largest output of another class: outputs (B, classes ≥ 2), labels (B,) → (B,)."""
    own = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)
