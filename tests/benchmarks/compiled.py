"""A compiled second-order product ÷ training step, beside the replay's own: whether `torch.compile` would pay.

    PYTHONPATH=. python tests/benchmarks/compiled.py [--width 0.5] [--batch 128] [--rounds 9] [--device cuda]

The product is what one target needs of a step, H q and the examples' ⟨∇ℓᵢ, q⟩, as forward-over-reverse differentiation
of plain operations (`torch.func.jvp` of `torch.func.grad`, BatchNorm written out), compiled by `torch.compile`;
autograd's way, reverse over reverse, cannot be compiled. It leaves out the adjoint of BatchNorm's running statistics,
which the replay has, so a complete one would cost more. Both are held against each other before they are timed, in turn
in one process. On the CPU it needs a C++ compiler.
"""

from __future__ import annotations

import torch
from measuring import Row, in_turn, noise_setup, quotients, run_alone, seconds
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from tracked_replay.replay import Cotangent, StepAdjoint
from tracked_replay.replay.allocation import keep_freed_memory
from tracked_replay.training import State, TrainingSetup, train

QUICK = {"width": 0.125, "batch": 8, "rounds": 2, "threads": 1}
TOLERANCE = 1e-3  # of the largest score, in float32


class WrittenOut(nn.Module):
    """BatchNorm of a batch in plain operations: torch's own is wrong under forward-mode differentiation."""

    def __init__(self, original: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        centred = inputs - inputs.mean((0, 2, 3), keepdim=True)
        scale = torch.rsqrt((centred * centred).mean((0, 2, 3), keepdim=True) + self.eps) * self.weight.view(
            1, -1, 1, 1
        )
        return centred * scale + self.bias.view(1, -1, 1, 1)


def written_out(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm in it replaced."""
    for name, child in module.named_children():
        setattr(module, name, WrittenOut(child) if isinstance(child, nn.BatchNorm2d) else written_out(child))
    return module


class Product:
    """H q and ⟨∇ℓᵢ, q⟩ / B of a step, compiled."""

    def __init__(self, setup: TrainingSetup, before: State) -> None:
        batch = setup.batch(before.step)
        self.parameters = dict(before.parameters)
        model = written_out(setup.task.model().to(setup.device)).train()

        def loss(parameters: dict[str, Tensor], weights: Tensor) -> Tensor:
            outputs = functional_call(model, parameters, (batch.inputs,))
            losses = outputs.logsumexp(1) - outputs.gather(1, batch.labels[:, None])[:, 0]
            return (losses * weights).sum() / len(weights)

        def product(parameters: dict[str, Tensor], q: dict[str, Tensor], weights: Tensor) -> tuple:
            return jvp(lambda given: grad(loss, (0, 1))(given, weights), (parameters,), (q,))[1]

        self.weights = torch.ones(len(batch.labels), device=setup.device)
        self.compiled = torch.compile(product)

    def __call__(self, q: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """For one q by parameter name."""
        return self.compiled(self.parameters, q, self.weights)


def measure(width: float = 0.5, batch: int = 128, rounds: int = 9, threads: int = 2, device: str = "cpu") -> list[Row]:
    """Compile, compare, and time in turn."""
    setup = noise_setup(width, batch, 3, threads, device, train__momentum=0.0, train__weight_decay=0.0)
    *_, record = train(setup, stop=3)
    adjoint = StepAdjoint(setup.step)
    seen = setup.batch(record.before.step)
    rates = [1.0] * len(record.learning_rates)  # then q is the cotangent with the other sign
    generator = torch.Generator().manual_seed(0)
    q = {
        name: torch.randn(tensor.shape, generator=generator).to(setup.device) * tensor.std()
        for name, tensor in record.before.parameters.items()
    }
    statistics = {name: torch.zeros_like(record.before.buffers[name]) for name in adjoint.model.statistics}
    cotangent = Cotangent({name: -tensor for name, tensor in q.items()}, statistics, {})
    product = Product(setup, record.before)

    def pull_back() -> Tensor:
        given = (record.before, record.after, seen.inputs, seen.labels, rates, [cotangent])
        return adjoint.pull_back(*given)[1][0]

    keep_freed_memory()
    with torch.compiler.config.patch(force_disable_caches=True):
        compiling = seconds(lambda: product(q))
    expected, found = pull_back(), product(q)[1]
    if float((expected - found).abs().max()) > TOLERANCE * float(expected.abs().max()):
        raise SystemExit("the compiled product is another: it measures nothing")
    times = in_turn(
        {"step": lambda: setup.take(record.before), "own": pull_back, "compiled": lambda: product(q)}, rounds
    )
    sizes = {"width": width, "batch": batch, "threads": threads, "device": device}
    words = {"own": "the replay's own pull-back of 1 target", "compiled": "the compiled product of 1 target"}
    return [
        *(
            Row(name, f"{said} ÷ training step", quotients(times[name], times["step"]), parameters=sizes, raw=times)
            for name, said in words.items()
        ),
        Row("compilation", "compilation, without a cache", [compiling], "s", parameters=sizes),
    ]


if __name__ == "__main__":
    run_alone(measure, QUICK)
