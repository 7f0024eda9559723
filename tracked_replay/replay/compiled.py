"""The adjoint of a step as one compiled function, for replays of many steps.

``torch.compile`` does not differentiate twice what it has compiled. So all that the adjoint asks of autograd, forward
pass, gradient and derivative of the gradient, is traced into a graph of plain operations first, and that is compiled.
What is traced is :class:`StepAdjoint`'s own code, and the states stay those of the recording.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tracked_replay.errors import ReplayError
from tracked_replay.replay.adjoint import SMALL_ACTIVATION, Cotangent, GradientGraph, StepAdjoint
from tracked_replay.training.state import State, Tensors

logger = logging.getLogger(__name__)

CALLS_THAT_PAY = 10_000  # of the compiled function in a replay; with fewer, compiling takes longer than it saves
TOLERANCE = 1e4  # units in the last place, as for the loss of a step
ROUNDING = 30  # times what a change of the parameters' last digits does, where that is more


class _NotCompiledError(Exception):
    """Says why a step cannot be compiled."""


@dataclass
class CompilingAdjoint(StepAdjoint):
    """A :class:`StepAdjoint` whose step is compiled where ``replay.compile`` asks for it, or where it pays.

    The first step is pulled back both ways, and both must agree: so it is known what the model does, and that the
    compiled function is the same.

    Attributes:
        steps: of the training that is replayed. The choice follows from it, from shapes and from the number of targets,
            not from time, so that every replay makes the same one.
        compiled: whether the step is compiled; ``None`` before the first step.
        deviation: largest relative difference between compiled and not; ``None`` where nothing is compiled.
        seconds: what compilation took.
    """

    steps: int = 0
    compiled: bool | None = None
    deviation: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._updated: tuple[str, ...] = ()  # running statistics that the step changes
        self._programs: dict[int, Callable[..., list[Tensor]]] = {}  # by number of targets

    def pull_back(
        self,
        before: State,
        after: State,
        inputs: Tensor,
        labels: Tensor,
        learning_rates: Sequence[float],
        cotangents: Sequence[Cotangent],
        recorded_loss: float | None = None,
    ) -> tuple[list[Cotangent], Tensor]:
        """As in :class:`StepAdjoint`.

        Raises:
            ReplayError: also where ``replay.compile`` is ``on`` and the step cannot be compiled.
        """
        plain = None
        if not self.compiled:
            plain = super().pull_back(before, after, inputs, labels, learning_rates, cotangents, recorded_loss)
            if self.compiled is None:
                self.compiled = self._chosen(len(cotangents))
            if not self.compiled:
                return plain
        step = _CompiledStep(self, before, inputs, labels)
        try:
            return self._pull_through(step, before, after, learning_rates, cotangents, recorded_loss)
        except _NotCompiledError as error:
            if plain is None or self.config.compile == "on":
                raise ReplayError(
                    f"replay.compile: found {self.config.compile}, but the step cannot be compiled: {error}; "
                    f"allowed: off or auto"
                ) from None
            logger.warning("the replay's step is not compiled: %s", error)
            self.compiled, self.deviation, self.seconds = False, None, 0.0
            self._programs.clear()
            self.model.updated_statistics()  # those of a forward pass that was broken off
            return plain

    def _chosen(self, targets: int) -> bool:
        """Whether to compile, after the first step has shown the sizes."""
        if self.config.compile != "auto":
            return self.config.compile == "on"
        assert self.together is not None
        calls = self.steps * -(-targets // self.together)
        # Several targets of a large model share their gradient graph, which saves more than compilation.
        gains = targets == 1 or self.model.largest_activation <= SMALL_ACTIVATION
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.model.module.parameters())
        return self.config.exact and on_cpu and gains and calls >= CALLS_THAT_PAY

    def _program(self, count: int, before: State, arguments: _Arguments) -> Callable[..., list[Tensor]]:
        """The compiled function for a number of targets, made and held against the adjoint where there is none yet."""
        if count not in self._programs:
            logger.info("compiling the replay's step, which takes minutes; torch keeps the result for the next time")
            started = time.perf_counter()
            order, buffers = sorted(before.parameters), sorted(before.buffers)

            def whole(
                parameters: list[Tensor], buffer: list[Tensor], inputs: Tensor, labels: Tensor, tangents: list[Tensor]
            ) -> list[Tensor]:
                named = dict(zip(order, parameters, strict=True))
                graph = self.graph(named, dict(zip(buffers, buffer, strict=True)), inputs, labels, None)
                pulled = graph.pull(tangents, count, retain=count > 1)
                return [graph.loss.detach(), *(tensor.detach() for tensor in pulled)]

            program = _compiled(whole, arguments)
            rounded = whole(*arguments._replace(parameters=_in_the_last_digit(arguments.parameters)))
            self._hold(program(*arguments)[1:], whole(*arguments)[1:], rounded[1:], len(order), count)
            self._programs[count] = program
            self.seconds += time.perf_counter() - started
            logger.info("compiled in %.0f s", self.seconds)
        return self._programs[count]

    def _hold(
        self,
        found: Sequence[Tensor],
        expected: Sequence[Tensor],
        rounded: Sequence[Tensor],
        parameters: int,
        count: int,
    ) -> None:
        """Compare what a compiled and an uncompiled step pull back: for parameters, statistics and weights, by target.

        Args:
            found: by the compiled step.
            expected: by the uncompiled one.
            rounded: by the uncompiled one from parameters that differ in their last digits, which shows what rounding
                does: much, where a model is certain of its predictions.
            parameters: how many of each are about parameters.
            count: of targets.

        Raises:
            _NotCompiledError: they differ by more than rounding.
        """
        for part in (slice(parameters), slice(parameters, -1), slice(-1, None)):
            one, other, third = (
                torch.cat([tensor.reshape(count, -1) for tensor in tensors[part]] or [torch.zeros(count, 0)], dim=1)
                for tensors in (found, expected, rounded)
            )
            apart, size, noise = (one - other).norm(dim=1), other.norm(dim=1), (third - other).norm(dim=1)
            relative = torch.where(apart == 0, 0.0, apart / size).max().item()
            allowed = torch.maximum(TOLERANCE * torch.finfo(one.dtype).eps * size, ROUNDING * noise)
            if not (apart <= allowed).all():
                raise _NotCompiledError(
                    f"compiled, its derivatives are {relative:.2g} of themselves from uncompiled ones"
                )
            self.deviation = max(self.deviation or 0.0, relative)

    def graph(
        self, parameters: Tensors, buffers: Tensors, inputs: Tensor, labels: Tensor, seed: Callable[[], None] | None
    ) -> GradientGraph:
        """As in :class:`StepAdjoint`."""
        found = super().graph(parameters, buffers, inputs, labels, seed)
        self._updated = tuple(found.updated)
        return found


class _Arguments(NamedTuple):
    """What the compiled function takes: tensors in an order that is that of their names."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    inputs: Tensor
    labels: Tensor
    tangents: list[Tensor]


class _CompiledStep:
    """A step that is linearised and pulled back in one call; see :class:`Linearisation`."""

    def __init__(self, adjoint: CompilingAdjoint, before: State, inputs: Tensor, labels: Tensor) -> None:
        self.updated: Collection[str] = adjoint._updated
        self._adjoint, self._before, self._inputs, self._labels = adjoint, before, inputs, labels
        self._loss: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Of the batch; known after the first pull."""
        assert self._loss is not None
        return self._loss

    def pull(self, tangents: Sequence[Tensor], count: int, retain: bool) -> Sequence[Tensor]:
        """As in :class:`Linearisation`; nothing has to be retained, because every call does the whole."""
        # A state that was read from a file has its tensors in another order than one that a step has made, and the
        # first cotangents may be laid out as a kernel left them: the compiled function takes one order and layout.
        names = list(self._before.parameters)
        of_gradients = dict(zip(names, tangents, strict=False))
        order = sorted(names)
        arguments = _Arguments(
            [self._before.parameters[name].contiguous() for name in order],
            [tensor.contiguous() for _, tensor in sorted(self._before.buffers.items())],
            self._inputs.contiguous(),
            self._labels.contiguous(),
            [tensor.contiguous() for tensor in (*(of_gradients[name] for name in order), *tangents[len(names) :])],
        )
        self._loss, *pulled = self._adjoint._program(count, self._before, arguments)(*arguments)
        of_parameters = dict(zip(order, pulled, strict=False))
        return [*(of_parameters[name] for name in names), *pulled[len(names) :]]


def _in_the_last_digit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that are some units in the last place away."""
    generator = torch.Generator().manual_seed(0)
    return [
        tensor * (1 + 2 * torch.finfo(tensor.dtype).eps * torch.randn(tensor.shape, generator=generator).to(tensor))
        for tensor in tensors
    ]


def _compiled(function: Callable[..., list[Tensor]], arguments: _Arguments) -> Callable[..., list[Tensor]]:
    """``function``, traced for tensors of these shapes and compiled. Raises _NotCompiledError."""
    doing = "tracing the model"
    try:
        # With fake tensors, so that a branch on a value, which a trace would take once and for all, is an error.
        traced = make_fx(function, tracing_mode="fake")(*arguments)
        drawing = next((node for node in traced.graph.nodes if _draws(node)), None)
        if drawing is not None:
            raise _NotCompiledError(
                f"it draws random numbers, by {drawing.target}, which compiled code draws otherwise"
            )
        with torch.no_grad():
            traced = make_fx(functionalize(traced), tracing_mode="fake")(*arguments)
            _make_plain(traced)
            doing = "torch.compile"
            program = torch.compile(traced, fullgraph=True, dynamic=False)
            program(*arguments)
    except _NotCompiledError:
        raise
    except Exception as error:  # of whatever kind: either has dozens of its own
        words = " ".join(str(error).split())[:200]
        raise _NotCompiledError(f"{doing} failed ({type(error).__name__}: {words})") from None

    @torch.no_grad()
    def run(*given: object) -> list[Tensor]:
        with torch.compiler.set_stance("fail_on_recompile"):
            return program(*given)

    return run


def _make_plain(traced: GraphModule) -> None:
    """Leave out what nothing reads, and copy where there may be no view.

    In compiled code a tensor may have another layout than it has here. Nothing is changed in place any more, so a copy
    does as well as a view.
    """
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()


def _draws(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
