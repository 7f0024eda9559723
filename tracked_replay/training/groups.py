"""Parameter groups: which parameters share a learning rate and a weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracked_replay.config import Config
from tracked_replay.errors import ConfigError
from tracked_replay.training.state import State


@dataclass(frozen=True)
class ParameterGroup:
    """One group of ``torch.optim.SGD``; its learning rate at each step comes from the schedule.

    Attributes:
        name: ``weights`` or ``biases``.
        parameters: names in the model, in its order.
        lr_scale: factor on the scheduled learning rate.
        momentum, dampening, nesterov, weight_decay: as in ``torch.optim.SGD``.
    """

    name: str
    parameters: tuple[str, ...]
    lr_scale: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float

    @property
    def sgd_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``torch.optim.SGD`` but for the learning rate."""
        return {
            "momentum": self.momentum,
            "dampening": self.dampening,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
        }


def parameter_groups(config: Config, state: State) -> tuple[ParameterGroup, ...]:
    """Weights in one group; biases and normalisation parameters (at most one dimension) in another.

    Raises:
        ConfigError: the model has nothing to train.
    """
    if not state.parameters:
        raise ConfigError("data.task: the task's model has no parameter that requires a gradient")
    weights = tuple(name for name, tensor in state.parameters.items() if tensor.ndim > 1)
    biases = tuple(name for name, tensor in state.parameters.items() if tensor.ndim <= 1)
    train = config.train
    bias_decay = train.weight_decay if train.decay_biases else 0.0
    candidates = (
        ("weights", weights, 1.0, train.weight_decay),
        ("biases", biases, config.model.bias_scale, bias_decay),
    )
    return tuple(
        ParameterGroup(name, names, scale, train.momentum, train.dampening, train.nesterov, decay)
        for name, names, scale, decay in candidates
        if names
    )
