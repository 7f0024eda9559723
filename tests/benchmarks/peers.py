"""The exact scores beside other packages' scores: LDS on the same retrainings, and cost in training runs.

    python -m venv peers && . peers/bin/activate
    pip install . && pip install -r tests/benchmarks/peers_requirements.txt
    PYTHONPATH=. python tests/benchmarks/peers.py [--lds-run-id ID] [--quick] [--out peers.json]

Model, data, targets and retrainings are those of a finished `lds` run of the digits preset (ResNet-9 of 8 to 64
channels, 50 steps, the losses of 8 evaluation examples). Without `--lds-run-id` the stage is called; it reuses a
matching run of the tracking store, or trains, replays and retrains first, which takes minutes.

Every method gives each target a score a training example. What it predicts for a retraining is minus the sum of the
removed examples' scores, with the sign of a derivative of the loss with respect to an example's weight. The LDS is
`tracked_replay.lds.correlate` of that with what happened, mean over the targets, with a bootstrap interval over
subsets.

Peers get the recorded final state, or several recorded states where the method takes checkpoints, with BatchNorm in
eval mode: dattri and traker call `model.eval()` when they load a checkpoint, kronfluence in `prepare_model`. The states
of one training stand in for the independently trained models that TRAK's authors recommend: no other method here has
such models, and each would cost a further training.

A peer has a row for its default where that differs from what its documentation advises, one for what the documentation
advises, and one for the best of a small grid. The grid is judged on these very targets and retrainings, so its best
flatters the peer. What fails, or gives NaN, keeps its row and says so.

Time is that of one call, from the model to the scores, in units of the recorded training in the same process with the
same number of threads. The replay runs first and makes the process keep freed memory, which helps what runs after it,
too. Torch's deterministic mode is on for this project's methods and off for the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import tracked_replay as tr
from tracked_replay.config import Config
from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import ReplayError, RunError, TrackedReplayError
from tracked_replay.lds import correlate, final_state, predict
from tracked_replay.lds.baselines import gradient_products, tracin_checkpoints
from tracked_replay.recording import Checkpoint, Recording, state_digest
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target
from tracked_replay.stages.influence import Influence
from tracked_replay.stages.lds_result import OUTCOMES, SUBSETS
from tracked_replay.stages.magic import checked_setup
from tracked_replay.stages.problem import Problem
from tracked_replay.stages.train import open_recording
from tracked_replay.tracking import artifacts_of, input_of, names, resolve, tag_of
from tracked_replay.training import State, TrainingSetup

PACKAGES = {"dattri": "dattri", "kronfluence": "kronfluence", "trak": "traker"}
DROP = 0.01
TARGETS = "0-7"
QUICK_SUBSETS = 16
MISSING = 3


@dataclass(frozen=True)
class Case:
    """What all methods are asked about.

    Attributes:
        setup: of the recorded run.
        recording: the recorded run.
        targets: single evaluation examples.
        base: (targets,) measurements of the recorded run.
        removed: indices that each subset removes.
        actual: (subsets, targets) measurements after retraining.
        config: of the ``lds`` run.
    """

    setup: TrainingSetup
    recording: Recording
    targets: Sequence[Target]
    base: np.ndarray
    removed: Sequence[np.ndarray]
    actual: np.ndarray
    config: Config

    @classmethod
    def open(cls, lds_run_id: str) -> Case:
        """Read a finished ``lds`` run and what it validated. Raises RunError, RecordingError, ReplayError."""
        run = resolve(lds_run_id, names.LDS, "--lds-run-id")
        result = Recording(artifacts_of(run.info.run_id), tag_of(run, names.DIGESTS))
        influence = Influence.open(input_of(run, "magic_run_id"))
        if any(len(target.indices) != 1 or target.coefficients != (1.0,) for target in influence.targets):
            raise RunError(
                "--lds-run-id: the run has targets that are combinations; allowed: single evaluation examples"
            )
        recording = open_recording(influence.train_run_id)
        with result.open(SUBSETS) as path:
            subsets = [row for row in pq.read_table(path).to_pylist() if row["drop"] == DROP]
        if not subsets:
            raise RunError(f"--lds-run-id: the run has no subsets of the share {DROP}")
        with result.open(OUTCOMES) as path:
            rows = pq.read_table(path).to_pylist()
        actual = {(row["subset"], row["target"]): row["actual"] for row in rows}
        return cls(
            setup=checked_setup(Problem.load(recording.config), recording),
            recording=recording,
            targets=influence.targets,
            base=influence.measurements,
            removed=[np.array(row["removed"]) for row in subsets],
            actual=np.array([[actual[row["subset"], target.id] for target in influence.targets] for row in subsets]),
            config=result.config,
        )

    @cached_property
    def final(self) -> State:
        """The recorded final state."""
        return self.recording.state(self.recording.final).to(self.setup.device)

    @cached_property
    def train_set(self) -> TensorDataset:
        """All training examples as the model sees them in epoch 0."""
        batch = self.setup.data.batch(torch.arange(self.setup.data.num_train), 0)
        return TensorDataset(batch.inputs, batch.labels)

    @cached_property
    def target_set(self) -> TensorDataset:
        """The targets' evaluation examples."""
        batch = self.setup.data.evaluation_batch(torch.tensor([target.indices[0] for target in self.targets]))
        return TensorDataset(batch.inputs, batch.labels)

    def train_batches(self) -> DataLoader:
        """All training examples in one batch: on a CPU, projections are drawn anew for each batch.

        dattri's influence functions also add up one inverse a batch.
        """
        return DataLoader(self.train_set, batch_size=len(self.train_set))

    def target_batches(self) -> DataLoader:
        """All targets in one batch."""
        return DataLoader(self.target_set, batch_size=len(self.targets))

    def model(self, state: State | None = None) -> nn.Module:
        """A model of its own in eval mode, in the final state or another."""
        model = self.setup.task.model()
        model.load_state_dict((state or self.final).model_tensors)
        return model.eval()

    def states(self, checkpoints: Sequence[Checkpoint]) -> list[dict[str, Tensor]]:
        """What ``load_state_dict`` takes, of several recorded states."""
        return [dict(self.recording.state(checkpoint).model_tensors) for checkpoint in checkpoints]

    def ends_of_epochs(self, count: int) -> list[dict[str, Tensor]]:
        """States at the ends of the last epochs, the final one last."""
        per_epoch = len(self.recording.trace.epochs) // self.setup.config.train.epochs
        by_step = {checkpoint.step: checkpoint for checkpoint in self.recording.checkpoints}
        last = self.recording.final.step
        return self.states([by_step[last - per_epoch * back] for back in reversed(range(count))])

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The training loss of each example, which is also what is measured."""
        return self.setup.task.per_example_loss(outputs, labels)


Scores = Callable[[Case], np.ndarray]  # (targets, training examples), ∂loss/∂weight up to a positive factor


@dataclass(frozen=True)
class Setting:
    """One way to call a method.

    Attributes:
        kind: ``own``, ``default``, ``documented``, ``variant``, or ``grid``, which has no row of its own.
        text: what was set.
        scores: computes the scores.
    """

    kind: str
    text: str
    scores: Scores


@dataclass(frozen=True)
class Method:
    """A method and the ways in which it is called.

    Attributes:
        name: shown in the table.
        package: its package, empty for this project's own methods.
        source: where its documentation says what ``documented`` follows.
        common: what is set in all of its settings.
        settings: in the order of the rows.
    """

    name: str
    package: str
    source: str
    common: str
    settings: tuple[Setting, ...]


def exact_scores(case: Case) -> np.ndarray:
    """The replay, from the recorded files to the scores."""
    total = ScoreSum(case.targets, case.setup.data.num_train, case.recording.trace.steps)
    for step in Replay(case.setup, case.recording, case.targets, StepAdjoint(case.setup.step)):
        total.add(step)
    return total.scores


def tracin_scores(case: Case) -> np.ndarray:
    """The project's baseline over checkpoints."""
    rates = case.recording.trace.learning_rates
    return -sum(
        gradient_products(case.setup, case.recording.state(one), case.targets, rates[one.step].tolist())
        for one in tracin_checkpoints(case.recording)
    )


def last_gradient_scores(case: Case) -> np.ndarray:
    """The project's baseline at the final state."""
    return -gradient_products(case.setup, case.final, case.targets)


def batch_loss(case: Case, model: nn.Module, parameters: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
    """Mean loss of a batch, in the form that dattri takes."""
    inputs, labels = data
    return case.loss(functional_call(model, dict(parameters), (inputs,)), labels).mean()


def example_loss(case: Case, model: nn.Module, parameters: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
    """Loss of one example without a batch dimension, in the form that dattri takes."""
    inputs, labels = data
    return batch_loss(case, model, parameters, (inputs[None], labels[None]))


def margin(case: Case, model: nn.Module, parameters: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
    """log(p / (1 − p)) of one example's label, which TRAK takes gradients of."""
    log_p = -example_loss(case, model, parameters, data)
    return log_p - torch.log(1 - torch.exp(log_p))


def probability(case: Case, model: nn.Module, parameters: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
    """p of one example's label."""
    return torch.exp(-example_loss(case, model, parameters, data))


def dattri_task(
    case: Case, function: Callable[..., Tensor], checkpoints: list[dict[str, Tensor]] | None = None
) -> tuple[Any, nn.Module]:
    """dattri's description of the problem, for the final state or several."""
    from dattri.task import AttributionTask

    model = case.model()
    checkpoints = checkpoints or [dict(case.final.model_tensors)]

    def loss(parameters: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
        return function(case, model, parameters, data)

    return AttributionTask(loss_func=loss, model=model, checkpoints=checkpoints), model


def projector(dimension: int, kind: str = "normal") -> dict[str, Any]:
    """dattri keeps its projector's defaults in one dictionary that calls change: all of them are given each time."""
    return {
        "proj_dim": dimension,
        "proj_max_batch_size": 32,
        "proj_seed": 0,
        "proj_type": kind,
        "device": "cpu",
    }


def dattri_trak(case: Case, *, dimension: int, ridge: float, checkpoints: int) -> np.ndarray:
    """dattri's TRAK. The margin falls where the loss rises."""
    from dattri.algorithm import TRAKAttributor

    task, model = dattri_task(case, margin, case.ends_of_epochs(checkpoints))
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=partial(probability, case, model),
        projector_kwargs=projector(dimension),
        regularization=ridge,
    )
    with torch.no_grad():
        attributor.cache(case.train_batches())
        return -attributor.attribute(case.target_batches()).T.numpy()


def dattri_tracin(case: Case, *, kind: str, dimension: int, normalised: bool) -> np.ndarray:
    """dattri's TracIn over the same checkpoints as the project's baseline; it takes one learning rate a checkpoint."""
    from dattri.algorithm import TracInAttributor

    checkpoints = tracin_checkpoints(case.recording)
    task, _ = dattri_task(case, example_loss, case.states(checkpoints))
    rates = [case.recording.trace.learning_rates[checkpoint.step][0] for checkpoint in checkpoints]
    attributor = TracInAttributor(
        task=task,
        weight_list=torch.tensor(rates),
        normalized_grad=normalised,
        projector_kwargs=projector(dimension, kind),
    )
    with torch.no_grad():
        return -attributor.attribute(case.train_batches(), case.target_batches()).T.numpy()


def dattri_influence(case: Case, solver: str, **settings: Any) -> np.ndarray:
    """dattri's influence functions at the final state."""
    import dattri.algorithm

    task, _ = dattri_task(case, batch_loss)
    attributor = getattr(dattri.algorithm, solver)(task=task, **settings)
    attributor.cache(case.train_batches())
    with torch.no_grad():
        return -attributor.attribute(case.train_batches(), case.target_batches()).T.numpy()


def dattri_ekfac(case: Case, damping: float, *, convolutions: bool = False) -> np.ndarray:
    """dattri's EK-FAC on the layers that it takes by itself, or on all that have weights."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = [name for name, module in case.model().named_modules() if isinstance(module, kinds)]
    return dattri_influence(
        case, "IFAttributorEKFAC", damping=damping, **({"module_name": layers} if convolutions else {})
    )


def dattri_embedding(case: Case, *, layers: str, dimension: int, momentum: bool) -> np.ndarray:
    """dattri's data value embedding, which follows the recorded steps; plain SGD is assumed."""
    from dattri.algorithm import DVEmbAttributor

    setup, trace = case.setup, case.recording.trace
    if layers == "none":
        task, model = dattri_task(case, example_loss)
    else:
        from dattri.task import AttributionTask

        model = case.model()

        def loss(model: nn.Module, data: Sequence[Tensor], device: torch.device) -> Tensor:
            return case.loss(model(data[0]), data[1]).mean()

        task = AttributionTask(loss_func=loss, model=model, checkpoints=[dict(case.final.model_tensors)])
    attributor = DVEmbAttributor(task=task, proj_dim=dimension, factorization_type=layers)
    factor = 1 / (1 - setup.config.train.momentum) if momentum else 1.0
    for checkpoint in case.recording.checkpoints[:-1]:
        model.load_state_dict(case.recording.state(checkpoint).model_tensors)
        batch = setup.batch(checkpoint.step)
        rate = trace.learning_rates[checkpoint.step][0] * factor
        epoch = int(trace.epochs[checkpoint.step])
        attributor.cache_gradients(epoch, (batch.inputs, batch.labels), batch.indices, rate)
    attributor.cache()
    model.load_state_dict(case.final.model_tensors)
    found = -attributor.attribute(case.target_batches()).detach().T.numpy()
    # Examples that stand in no batch have no embedding, and the table ends at the last that has one.
    return np.pad(found, ((0, 0), (0, setup.data.num_train - found.shape[1])))


def kronfluence_ekfac(case: Case, damping: float | None) -> np.ndarray:
    """kronfluence's EK-FAC on all convolutions and the head; it does not take BatchNorm's parameters."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            outputs = model(inputs)
            if sample:
                labels = torch.distributions.Categorical(logits=outputs.detach()).sample()
            return case.loss(outputs, labels).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peers",
            prepare_model(case.model(), task),
            task,
            cpu=True,
            output_dir=folder,
            disable_tqdm=True,
            log_level=logging.ERROR,
        )
        analyzer.fit_all_factors(
            "factors",
            case.train_set,
            per_device_batch_size=len(case.train_set),
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=case.target_set,
            train_dataset=case.train_set,
            per_device_query_batch_size=len(case.targets),
            per_device_train_batch_size=len(case.train_set),
            score_args=ScoreArguments(damping_factor=damping),
        )
        return -analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


def traker_trak(case: Case, *, dimension: int, ridge: float, checkpoints: int, half: bool) -> np.ndarray:
    """traker's TRAK. The margin falls where the loss rises."""
    from trak import TRAKer

    states = case.ends_of_epochs(checkpoints)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=case.model(),
            task="image_classification",
            train_set_size=case.setup.data.num_train,
            save_dir=folder,
            device="cpu",
            proj_dim=dimension,
            use_half_precision=half,
            lambda_reg=ridge,
            logging_level=logging.CRITICAL,
        )
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in case.train_batches():
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("targets", state, model_id=number, num_targets=len(case.targets))
            for batch in case.target_batches():
                traker.score(batch=batch, num_samples=len(batch[0]))
        return -np.array(traker.finalize_scores("targets"), dtype=float).T


def settings(compute: Callable[..., np.ndarray], *rows: tuple[str, dict[str, Any]]) -> tuple[Setting, ...]:
    """One setting for each kind and keyword arguments, described by the arguments."""
    return tuple(
        Setting(kind, ", ".join(f"{name}={value}" for name, value in chosen.items()), partial(compute, **chosen))
        for kind, chosen in rows
    )


def own(name: str, text: str, compute: Scores) -> Method:
    """One of this project's methods."""
    return Method(name, "", "docs/validation.md", "", (Setting("own", text, compute),))


METHODS = (
    own("exact scores (this project)", "replay of all 50 steps", exact_scores),
    own("TracIn (this project)", "one checkpoint an epoch, learning rate of each parameter group", tracin_scores),
    own("gradient dot product (this project)", "final state", last_gradient_scores),
    Method(
        "TRAK",
        "dattri",
        "examples/pretrained_benchmark/trak_lds.py: margin, default projection to 512, no ridge; "
        "experiments/benchmark_result.py: ensembles of 1, 10, 50",
        "states at the ends of the last epochs",
        settings(
            dattri_trak,
            ("documented", {"dimension": 512, "ridge": 0.0, "checkpoints": 1}),
            ("grid", {"dimension": 512, "ridge": 0.01, "checkpoints": 1}),
            ("grid", {"dimension": 512, "ridge": 1.0, "checkpoints": 1}),
            ("grid", {"dimension": 1000, "ridge": 0.01, "checkpoints": 1}),
            ("grid", {"dimension": 512, "ridge": 0.0, "checkpoints": 10}),
            ("grid", {"dimension": 512, "ridge": 0.01, "checkpoints": 10}),
        ),
    ),
    Method(
        "TracIn",
        "dattri",
        "docstring of TracInAttributor: weight_list is the learning rate at each checkpoint; default projection to 512",
        "one checkpoint an epoch, learning rate of the weights",
        settings(
            dattri_tracin,
            ("documented", {"kind": "normal", "dimension": 512, "normalised": False}),
            ("grid", {"kind": "identity", "dimension": 512, "normalised": False}),
            ("grid", {"kind": "identity", "dimension": 512, "normalised": True}),
        ),
    ),
    Method(
        "influence, EK-FAC",
        "dattri",
        "docstring of IFAttributorEKFAC: linear layers and damping 0.0 by default; its own test has damping 0.1",
        "loss as target",
        settings(
            dattri_ekfac,
            ("documented", {"damping": 0.0}),
            ("variant", {"damping": 0.1, "convolutions": True}),
            ("grid", {"damping": 0.001}),
            ("grid", {"damping": 0.01}),
            ("grid", {"damping": 0.1}),
            ("grid", {"damping": 1.0}),
        ),
    ),
    Method(
        "influence, Arnoldi",
        "dattri",
        "examples/noisy_label_detection/influence_function_noisy_label.py; experiments/benchmark_result.py searches "
        "1e-5 to 1 with max_iter 50; its warning: increase regularization where eigenvalues are negative",
        "loss as target",
        settings(
            partial(dattri_influence, solver="IFAttributorArnoldi"),
            ("documented", {"regularization": 0.01, "max_iter": 10}),
            ("grid", {"regularization": 1.0, "max_iter": 50}),
            ("grid", {"regularization": 30.0, "max_iter": 50}),
            ("grid", {"regularization": 100.0, "max_iter": 50}),
            ("grid", {"regularization": 0.01, "max_iter": 10, "proj_dim": 4}),
        ),
    ),
    Method(
        "influence, conjugate gradients",
        "dattri",
        "README.md, quick start; experiments/benchmark_result.py searches 1e-5 to 1",
        "loss as target",
        settings(
            partial(dattri_influence, solver="IFAttributorCG"),
            ("documented", {"regularization": 0.01, "max_iter": 10}),
            ("grid", {"regularization": 0.001, "max_iter": 10}),
            ("grid", {"regularization": 1.0, "max_iter": 10}),
            ("grid", {"regularization": 30.0, "max_iter": 10}),
        ),
    ),
    Method(
        "data value embedding",
        "dattri",
        "examples/dvemb/dvemb_mlp.py: kronecker, proj_dim 4096, linear layers; the recorded steps and learning rates",
        "all recorded steps; momentum=True scales the learning rate by 1 / (1 − momentum)",
        settings(
            dattri_embedding,
            ("documented", {"layers": "kronecker", "dimension": 4096, "momentum": False}),
            ("grid", {"layers": "kronecker", "dimension": 4096, "momentum": True}),
            ("grid", {"layers": "none", "dimension": 512, "momentum": False}),
            ("grid", {"layers": "none", "dimension": 512, "momentum": True}),
        ),
    ),
    Method(
        "influence, EK-FAC",
        "kronfluence",
        "DOCUMENTATION.md: 'both 1e-08 and None are reasonable choices' of damping, 'not too large (e.g., 1e-01)', "
        "defaults otherwise, all convolutions and linear layers, true Fisher",
        "loss as measurement",
        settings(
            kronfluence_ekfac,
            ("documented", {"damping": 1e-8}),
            ("documented", {"damping": None}),
            ("grid", {"damping": 1e-4}),
            ("grid", {"damping": 1e-2}),
            ("grid", {"damping": 1e-1}),
            ("grid", {"damping": 1.0}),
        ),
    ),
    Method(
        "TRAK",
        "traker",
        "docs/source/quickstart.rst: default proj_dim 2048, recommended 1,000 to 40,000, several checkpoints; "
        "below the 1437 examples here, or XᵀX has no inverse; API reference: lambda_reg is a ridge on XᵀX",
        "task image_classification, states at the ends of the last epochs; float16 (half=True) is slow on a CPU",
        settings(
            traker_trak,
            ("documented", {"dimension": 1000, "ridge": 0.0, "checkpoints": 10, "half": False}),
            ("default", {"dimension": 2048, "ridge": 0.0, "checkpoints": 1, "half": True}),
            ("grid", {"dimension": 1000, "ridge": 0.0, "checkpoints": 1, "half": False}),
            ("grid", {"dimension": 1000, "ridge": 10.0, "checkpoints": 1, "half": False}),
            ("grid", {"dimension": 1000, "ridge": 1000.0, "checkpoints": 1, "half": False}),
            ("grid", {"dimension": 1000, "ridge": 10.0, "checkpoints": 10, "half": False}),
        ),
    ),
)


@contextlib.contextmanager
def as_a_stranger() -> Iterator[list[warnings.WarningMessage]]:
    """Torch's flags as other packages expect them, their output swallowed, their warnings collected."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    level = logging.root.manager.disable
    torch.use_deterministic_algorithms(False)
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(level)
        torch.use_deterministic_algorithms(deterministic)


def seconds_of_training(case: Case, rounds: int = 3) -> float:
    """Median time of the recorded training. Raises ReplayError where it does not end in the recorded state."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        state = final_state(case.setup)
        times.append(time.perf_counter() - started)
        if state_digest(state) != case.recording.final.digest:
            raise ReplayError(
                "a training here ends in another state than the recorded one: the scores would be of another run"
            )
    return statistics.median(times)


def try_setting(case: Case, method: Method, setting: Setting, training: float) -> dict[str, Any]:
    """Compute, time and correlate; a failure or NaN is the row's status."""
    row: dict[str, Any] = {
        "method": method.name,
        "package": f"{method.package} {importlib.metadata.version(method.package)}" if method.package else "",
        "kind": setting.kind,
        "settings": "; ".join(filter(None, [setting.text, method.common])),
        "source": method.source,
        "status": "ok",
        "seconds": None,
        "training_runs": None,
        "lds": None,
        "low": None,
        "high": None,
    }
    started = time.perf_counter()
    try:
        if method.package:
            with as_a_stranger() as caught:
                scores = setting.scores(case)
            said = [str(one.message) for one in caught if one.category is UserWarning]
        else:
            scores, said = setting.scores(case), []
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return row | {"status": f"failed: {type(error).__name__}: {first}"}
    row["seconds"] = time.perf_counter() - started
    row["training_runs"] = row["seconds"] / training
    expected = (len(case.targets), case.setup.data.num_train)
    if scores.shape != expected:
        return row | {"status": f"failed: scores of shape {scores.shape}, expected {expected}"}
    if not np.isfinite(scores).all():
        share = 1 - np.isfinite(scores).mean()
        warned = next((text for text in said if "eigenvalue" in text), "")
        return row | {"status": f"NaN or Inf in {share:.0%} of the scores{f'; it warned: {warned}' if warned else ''}"}
    predicted = np.stack([predict(case.base, scores, removed, np.zeros(len(removed))) for removed in case.removed])
    found = correlate(
        predicted,
        case.actual,
        seed=derive_component_seed(case.config.seed, "bootstrap", f"{DROP:g}_magic"),
        resamples=case.config.lds.resamples,
        confidence=case.config.lds.confidence,
    )
    if math.isnan(found.mean):
        return row | {"status": "failed: predictions do not vary"}
    return row | {"lds": found.mean, "low": found.low, "high": found.high, "undefined_targets": found.undefined}


def rows_of(case: Case, method: Method, training: float, quick: bool) -> list[dict[str, Any]]:
    """Rows of a method: one for each setting that is not of the grid, and the best of all."""
    chosen = [setting for setting in method.settings if not quick or setting.kind != "grid"]
    tried = []
    for setting in chosen:
        tried.append(try_setting(case, method, setting, training))
        print(line(tried[-1]), file=sys.stderr, flush=True)
    rows = [row for row in tried if row["kind"] != "grid"]
    if len(chosen) == len(rows):
        return rows
    scored = [row for row in tried if row["lds"] is not None]
    kind = f"best of {len(tried)} on these targets"
    grid = [{key: row[key] for key in ("settings", "status", "seconds", "lds")} for row in tried]
    if not scored:
        return [*rows, rows[0] | {"kind": kind, "status": "failed: none of them gave scores", "grid": grid}]
    return [*rows, max(scored, key=lambda row: row["lds"]) | {"kind": kind, "grid": grid}]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows.

    Args:
        options: ``lds_run_id`` (``None``: call the stage), ``quick``, ``only`` (part of a method's or package's name,
            or ``None``).

    Returns:
        One dictionary a row: ``method``, ``package`` with version, ``kind``, ``settings``, ``source``, ``status``
        (``ok``, or what went wrong), ``seconds``, ``training_runs``, ``lds``, ``low``, ``high``; where there is a grid
        also ``grid``. Numbers that are not there are ``None``.
    """
    run_id = options.lds_run_id
    if run_id is None:
        changes = {"lds.drop": str(DROP)} | ({"lds.subsets": QUICK_SUBSETS} if options.quick else {})
        run_id = tr.lds(targets=TARGETS, overrides=changes)
    case = Case.open(run_id)
    training = seconds_of_training(case)
    shown = f"{len(case.removed)} retrainings, {len(case.targets)} targets, {torch.get_num_threads()} threads"
    print(f"one training run: {training:.2f} s; {shown}", file=sys.stderr)
    wanted = [method for method in METHODS if (options.only or "") in f"{method.package} {method.name}"]
    rows = [row for method in wanted for row in rows_of(case, method, training, options.quick)]
    return [row | {"training_seconds": training, "lds_run_id": run_id} for row in rows]


def line(row: Mapping[str, Any]) -> str:
    """A row of the table, in Markdown."""
    cost = "–" if row["training_runs"] is None else f"{row['training_runs']:.1f}"
    quality = row["status"] if row["lds"] is None else f"{row['lds']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    name = " ".join(filter(None, [row["method"], f"({row['package']})" if row["package"] else ""]))
    return f"| {name} | {row['kind']} | {cost} | {quality} | {row['settings']} |"


def main() -> int:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lds-run-id", help="a finished lds run; the stage is called where it is left out")
    parser.add_argument(
        "--quick", action="store_true", help=f"no grids, and {QUICK_SUBSETS} retrainings where none are named"
    )
    parser.add_argument("--only", help="only methods with this text in their package or name")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    options = parser.parse_args()
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"{', '.join(missing)}: not installed; `pip install -r tests/benchmarks/peers_requirements.txt` brings it",
            file=sys.stderr,
        )
        return MISSING
    try:
        rows = measure(options)
    except TrackedReplayError as error:
        print(error, file=sys.stderr)
        return 1
    print("| method | kind | training runs | LDS at 1 % | settings |\n|---|---|---|---|---|")
    for row in rows:
        print(line(row))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
