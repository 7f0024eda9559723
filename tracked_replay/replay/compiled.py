"""The adjoint of a step as one compiled function, for replays of many steps.

``torch.compile`` does not differentiate twice what it has compiled. So all that the adjoint asks of autograd, forward
pass, gradient and derivative of the gradient, is traced into a graph of plain operations first, and that is compiled.
What is traced is :class:`StepAdjoint`'s own code, and the states stay those of the recording.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tracked_replay.errors import ReplayError
from tracked_replay.replay.adjoint import SMALL_ACTIVATION, Cotangent, GradientGraph, StepAdjoint
from tracked_replay.replay.differentiable import STATISTICS as NAMES_OF_STATISTICS
from tracked_replay.training.state import State, Tensors

logger = logging.getLogger(__name__)

CALLS_THAT_PAY = 10_000  # of the compiled function in a replay; with fewer, compiling takes longer than it saves
TOLERANCE = 1e3  # units in the last place, tensor by tensor
ROUNDING = 30  # times what a change of the parameters' last digits does, where that is more
STATISTICS = 1e4  # units in the last place that running statistics may differ by, as the loss of a step may
TRACED_STEPS = 8  # whose forward passes are compared
MESSAGE = 200  # characters of another's error
CACHE = "TORCHINDUCTOR_CACHE_DIR"
MEAN, VARIANCE = NAMES_OF_STATISTICS
SWITCHED_OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


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
        chosen: whether the step was compiled before an interruption; ``None`` where there was none.
        compiled: whether the step is compiled; ``None`` before the first step.
        deviation: largest relative difference between compiled and not; ``None`` where nothing is compiled.
        seconds: what compilation took.
    """

    steps: int = 0
    chosen: bool | None = None
    compiled: bool | None = None
    deviation: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updated: tuple[str, ...] = ()  # running statistics that the step changes, by a pass not compiled
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
            ReplayError: also where the step cannot be compiled and ``replay.compile`` is ``on``, or it was compiled
                before an interruption; and where the compiled step is not that of the training.
        """
        plain = None
        if not self.compiled:
            plain = super().pull_back(before, after, inputs, labels, learning_rates, cotangents, recorded_loss)
            if self.compiled is None:
                self.compiled = self._pays(len(cotangents)) if self.chosen is None else self.chosen
            if not self.compiled:
                return plain
        step = _CompiledStep(self, before, after, inputs, labels)
        try:
            return self._pull_through(step, before, after, learning_rates, cotangents, recorded_loss)
        except _NotCompiledError as error:
            asked = self.config.compile == "on"
            if plain is None or asked or self.chosen:
                found = "found on" if asked else "the interrupted replay was compiled"
                raise ReplayError(
                    f"replay.compile: {found}, but the step cannot be compiled: {error}; allowed: off"
                    f"{' or auto' if asked else ', which replays from the start'}"
                ) from None
            logger.warning("the replay's step is not compiled: %s", error)
            self.compiled, self.deviation, self.seconds = False, None, 0.0
            self._programs.clear()
            self.model.updated_statistics()  # those of a forward pass that was broken off
            return plain

    def _pays(self, targets: int) -> bool:
        """Whether to compile, after the first step has shown the sizes."""
        if self.config.compile != "auto":
            return self.config.compile == "on"
        assert self.together is not None
        calls = self.steps * -(-targets // self.together)
        # Several targets of a large model share their gradient graph, which saves more than compilation.
        gains = targets == 1 or self.model.largest_activation <= SMALL_ACTIVATION
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.model.module.parameters())
        return self.config.exact and on_cpu and gains and calls >= CALLS_THAT_PAY

    def program(self, count: int, before: State, arguments: _Arguments) -> Callable[..., list[Tensor]]:
        """The compiled function for a number of targets, made and held against the adjoint where there is none yet.

        It gives the loss, how far the running statistics are from those that were recorded, relative to them, and what
        reaches parameters, statistics and weights.
        """
        if count not in self._programs:
            logger.info("compiling the replay's step: minutes the first time, seconds where torch has kept it")
            started = time.perf_counter()
            names, buffer_names = sorted(before.parameters), sorted(before.buffers)

            def whole(
                parameters: list[Tensor],
                buffers: list[Tensor],
                inputs: Tensor,
                labels: Tensor,
                tangents: list[Tensor],
                updated: list[Tensor],
            ) -> list[Tensor]:
                given = dict(zip(names, parameters, strict=True)), dict(zip(buffer_names, buffers, strict=True))
                graph = self.graph(*given, inputs, labels, None)
                apart = _apart(graph.updated, dict(zip(self.updated, updated, strict=True)), graph.loss)
                pulled = graph.pull(tangents, count, retain=count > 1)
                return [graph.loss.detach(), apart.detach(), *(tensor.detach() for tensor in pulled)]

            def losses(parameters: list[Tensor], buffers: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
                named = dict(zip((*buffer_names, *names), (*buffers, *parameters), strict=True))
                outputs = self.model.training_outputs(named, inputs, None)
                self.model.updated_statistics()
                return self.step.per_example_loss(outputs, labels)

            self._require_one_way(losses, arguments[:4])
            program = _compiled(whole, arguments)
            # The step's own tangents may be 0, where its learning rate is.
            tried = arguments._replace(tangents=_random(arguments.tangents))
            moved = tried._replace(parameters=_in_the_last_digit(tried.parameters))
            self._hold(program(*tried)[2:], whole(*tried)[2:], whole(*moved)[2:], count)
            self._programs[count] = program
            self.seconds += time.perf_counter() - started
            logger.info("compiled in %.0f s", self.seconds)
        return self._programs[count]

    def _require_one_way(self, forward: Callable[..., Tensor], arguments: Sequence[object]) -> None:
        """Trace the forward pass with the seeds of several steps: what they change, a compiled step would not.

        Raises:
            _NotCompiledError: the traces differ.
        """
        first: tuple[str, list[Tensor]] | None = None
        for step in sorted({place * (self.steps - 1) // (TRACED_STEPS - 1) for place in range(TRACED_STEPS)}):
            self._seed(step)
            traced = _traced(forward, arguments)
            found = traced.code, [tensor for tensor in vars(traced).values() if isinstance(tensor, Tensor)]
            first = first or found
            if found[0] != first[0] or not all(map(torch.equal, found[1], first[1])):
                raise _NotCompiledError(f"its forward pass in step {step} is another than in step 0, by the seed alone")

    def _hold(self, found: Sequence[Tensor], expected: Sequence[Tensor], rounded: Sequence[Tensor], count: int) -> None:
        """Compare what a compiled and an uncompiled step pull back, tensor by tensor and target by target.

        Args:
            found: by the compiled step.
            expected: by the uncompiled one.
            rounded: by the uncompiled one from parameters that differ in their last digits, which shows what rounding
                does: much, where a model is certain of its predictions.
            count: of targets.

        Raises:
            _NotCompiledError: they differ by more than rounding.
        """
        whole = torch.stack([tensor.reshape(count, -1).norm(dim=1) for tensor in expected]).norm(dim=0)
        for tensors in zip(found, expected, rounded, strict=True):
            one, other, third = (tensor.reshape(count, -1) for tensor in tensors)
            apart, size, noise = (one - other).norm(dim=1), other.norm(dim=1), (third - other).norm(dim=1)
            relative = torch.where(apart == 0, 0.0, apart / (size + noise)).max().item()
            eps = torch.finfo(one.dtype).eps
            if not (apart <= TOLERANCE * eps * size + ROUNDING * noise + eps * whole).all():
                raise _NotCompiledError(
                    f"compiled, its derivatives are {relative:.2g} of themselves from uncompiled ones"
                )
            self.deviation = max(self.deviation or 0.0, relative)

    def graph(
        self, parameters: Tensors, buffers: Tensors, inputs: Tensor, labels: Tensor, seed: Callable[[], None] | None
    ) -> GradientGraph:
        """As in :class:`StepAdjoint`."""
        found = super().graph(parameters, buffers, inputs, labels, seed)
        self.updated = tuple(found.updated)
        return found


class _Arguments(NamedTuple):
    """What the compiled function takes: tensors in an order that is that of their names."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    inputs: Tensor
    labels: Tensor
    tangents: list[Tensor]
    updated: list[Tensor]


class _CompiledStep:
    """A step that is linearised and pulled back in one call; see :class:`Linearisation`."""

    def __init__(self, adjoint: CompilingAdjoint, before: State, after: State, inputs: Tensor, labels: Tensor) -> None:
        self.updated: Collection[str] = adjoint.updated
        self._adjoint, self._before, self._after = adjoint, before, after
        self._inputs, self._labels = inputs, labels
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
        names, count_of = list(self._before.parameters), len(self._before.parameters)
        of_gradients = dict(zip(names, tangents[:count_of], strict=True))
        order = sorted(names)
        arguments = _Arguments(
            [self._before.parameters[name].contiguous() for name in order],
            [tensor.contiguous() for _, tensor in sorted(self._before.buffers.items())],
            self._inputs.contiguous(),
            self._labels.contiguous(),
            [tensor.contiguous() for tensor in (*(of_gradients[name] for name in order), *tangents[count_of:])],
            [self._after.buffers[name].contiguous() for name in self.updated],
        )
        self._loss, apart, *pulled = self._adjoint.program(count, self._before, arguments)(*arguments)
        if not apart <= STATISTICS * torch.finfo(apart.dtype).eps:
            raise ReplayError(
                f"step {self._before.step}: the compiled step gives running statistics that are {apart.item():.2g} of "
                f"themselves from those of the training; allowed: replay.compile=off"
            )
        of_parameters = dict(zip(order, pulled[:count_of], strict=True))
        return [*(of_parameters[name] for name in names), *pulled[count_of:]]


def _apart(found: Tensors, recorded: Tensors, like: Tensor) -> Tensor:
    """The largest relative difference of running statistics, a scalar. A mean is near 0 where it is of the variance."""
    parts = [torch.zeros_like(like)]
    for name, tensor in recorded.items():
        size = tensor.norm()
        if name.endswith(MEAN):
            size = size + recorded[name.removesuffix(MEAN) + VARIANCE].abs().sqrt().norm()
        parts.append((found[name] - tensor).norm() / size)
    return torch.stack(parts).max()


def _random(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in tensors]


def _in_the_last_digit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that are some units in the last place away."""
    generator = torch.Generator().manual_seed(0)
    return [
        tensor * (1 + 2 * torch.finfo(tensor.dtype).eps * torch.randn(tensor.shape, generator=generator).to(tensor))
        for tensor in tensors
    ]


def _compiled(function: Callable[..., list[Tensor]], arguments: _Arguments) -> Callable[..., list[Tensor]]:
    """``function``, traced for tensors of these shapes and compiled. Raises _NotCompiledError."""
    kept = os.environ.get(CACHE) or tempfile.gettempdir()
    if len(kept.split()) != 1:
        raise _NotCompiledError(f"torch cannot compile in a folder whose path has a space, found {kept!r} ({CACHE})")
    off = next((name for name in SWITCHED_OFF if os.environ.get(name, "0") != "0"), None)
    if off is not None:
        raise _NotCompiledError(f"the environment variable {off} switches it off")
    traced = _traced(function, arguments)
    drawing = next((node for node in traced.graph.nodes if _draws(node)), None)
    if drawing is not None:
        raise _NotCompiledError(f"it draws random numbers, by {drawing.target}, which compiled code draws otherwise")
    with torch.no_grad():
        traced = _traced(functionalize(traced), arguments)
        _make_plain(traced)
        program = torch.compile(traced, fullgraph=True, dynamic=False)
        try:
            program(*arguments)
        except Exception as error:  # of whatever kind: it has dozens of its own
            raise _NotCompiledError(f"torch.compile failed ({_in_short(error)})") from None

    @torch.no_grad()
    def run(*given: object) -> list[Tensor]:
        with torch.compiler.set_stance("fail_on_recompile"):
            return program(*given)

    return run


def _traced(function: Callable[..., Any], arguments: Sequence[object]) -> GraphModule:
    """The plain operations of a function. Raises _NotCompiledError."""
    try:
        # With fake tensors, so that a branch on a value, which a trace would take once and for all, is an error. Others
        # than those that are given are constants: a training with any other state of its own is not recorded.
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    except Exception as error:  # of whatever kind: it has dozens of its own
        raise _NotCompiledError(
            f"the model or the loss branches on a value, uses NumPy, or does else what cannot be traced "
            f"({_in_short(error)})"
        ) from None


def _in_short(error: Exception) -> str:
    head, _, output = str(error).partition("\nOutput:\n")  # of a compiler, below a command of a thousand characters
    return f"{type(error).__name__}: {' '.join((output or head).split())[:MESSAGE]}"


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
