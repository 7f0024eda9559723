"""Self-influence of training examples: how much a step on an example lowers that example's own loss.

Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent" (2020), section 4.1:
TracInCP of an example with itself, ``Σ_t lr_t · ‖∇ℓᵢ(θ_t)‖²`` over recorded states θ_t. An example that others do not
explain keeps a large gradient, so mislabelled ones tend to have large values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tracked_replay.training import State, TrainingSetup
from tracked_replay.training.state import Tensors

GRADIENT_BYTES = 2**28  # of the gradients that are held at once
LARGEST_CHUNK = 64

Gradients = Callable[[Tensors, Tensor, Tensor], Tensors]


def self_influence(setup: TrainingSetup, state: State, rates: Sequence[float]) -> np.ndarray:
    """``Σ_groups lr · ‖∇ℓᵢ‖²`` of each training example at one state, in eval mode and without augmentation.

    Args:
        setup: of the recorded run.
        state: on the setup's device.
        rates: learning rate of each parameter group.

    Returns:
        (training examples,) float64.
    """
    model = setup.step.model.eval()
    scales = {name: rate for group, rate in zip(setup.step.groups, rates, strict=True) for name in group.parameters}

    def loss(parameters: Tensors, inputs: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, {**state.buffers, **parameters}, (inputs[None],))
        return setup.task.per_example_loss(outputs, label[None])[0]

    gradients = grad(loss)
    values = np.empty(setup.data.num_train)
    for indices in torch.arange(setup.data.num_train).split(_chunk(state.parameters)):
        batch = setup.data.plain_batch(indices)
        found = _per_example(gradients, state.parameters, batch.inputs, batch.labels)
        norms = [
            scales[name] * tensor.reshape(len(indices), -1).double().square().sum(1) for name, tensor in found.items()
        ]
        values[indices.numpy()] = torch.stack(norms).sum(0).cpu().numpy()
    return values


def _chunk(parameters: Tensors) -> int:
    size = sum(tensor.nbytes for tensor in parameters.values())
    return max(1, min(LARGEST_CHUNK, GRADIENT_BYTES // size))


def _per_example(gradients: Gradients, parameters: Tensors, inputs: Tensor, labels: Tensor) -> Tensors:
    """Gradients of B examples, (B, ...) each."""
    try:
        found: Tensors = vmap(gradients, in_dims=(None, 0, 0))(parameters, inputs, labels)
        return found
    except (RuntimeError, ValueError):
        # A model of the user's own may do what vmap cannot: one example after the other, then.
        single = [gradients(parameters, one, label) for one, label in zip(inputs, labels, strict=True)]
        return {name: torch.stack([row[name] for row in single]) for name in parameters}
