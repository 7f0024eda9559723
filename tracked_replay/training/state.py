"""The state of a training run between two steps: a value, never changed after it was made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

PARAMETERS, BUFFERS, MOMENTUM = "parameters", "buffers", "momentum"


@dataclass(frozen=True)
class State:
    """Everything that step ``step`` starts from.

    Attributes:
        step: number of steps that were taken.
        parameters: trained tensors by their name in the model.
        buffers: all other tensors of the model: buffers (BatchNorm's running statistics) and frozen parameters.
        momentum: momentum buffers by parameter name; empty before the first step and without momentum, as in
            ``torch.optim.SGD``, whose first step sets the buffer to the gradient undampened.
    """

    step: int
    parameters: Tensors
    buffers: Tensors
    momentum: Tensors = field(default_factory=dict)

    @property
    def model_tensors(self) -> Tensors:
        """Parameters and buffers: what ``model.load_state_dict`` takes."""
        return {**self.parameters, **self.buffers}

    def flat(self) -> Tensors:
        """All tensors as ``kind/name``, for example ``parameters/head.weight``; the names used in checkpoint files."""
        kinds = ((PARAMETERS, self.parameters), (BUFFERS, self.buffers), (MOMENTUM, self.momentum))
        return {f"{kind}/{name}": tensor for kind, tensors in kinds for name, tensor in tensors.items()}

    @classmethod
    def from_flat(cls, step: int, tensors: Tensors) -> State:
        """The reverse of :meth:`flat`. Raises ValueError for a name of no known kind."""
        kinds: dict[str, Tensors] = {PARAMETERS: {}, BUFFERS: {}, MOMENTUM: {}}
        for name, tensor in tensors.items():
            kind, slash, rest = name.partition("/")
            if not slash or kind not in kinds:
                raise ValueError(f"{name!r} is not a state's tensor; allowed: {', '.join(f'{k}/NAME' for k in kinds)}")
            kinds[kind][rest] = tensor
        return cls(step, kinds[PARAMETERS], kinds[BUFFERS], kinds[MOMENTUM])

    def to(self, device: torch.device | str) -> State:
        """The same state on a device; tensors already there are shared."""

        def move(tensors: Tensors) -> Tensors:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return replace(self, parameters=move(self.parameters), buffers=move(self.buffers), momentum=move(self.momentum))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.flat().values())


def initial_state(model: nn.Module) -> State:
    """The state of a freshly made model, copied from it; contiguous, as a state that was recorded and read again is."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    trained = {name: copied(p) for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: copied(p) for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: copied(b) for name, b in model.named_buffers()}
    return State(0, trained, frozen | buffers)
