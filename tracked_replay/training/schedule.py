"""Learning rates of every step, taken from torch's own schedulers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from tracked_replay.config import Config
from tracked_replay.determinism import create_deterministic_optimizer, create_deterministic_scheduler
from tracked_replay.training.groups import ParameterGroup

SHARED_INSTANCE = "shared_training"


def learning_rates(config: Config, groups: Sequence[ParameterGroup], steps_per_epoch: int) -> np.ndarray:
    """Learning rate of each step and group.

    The schedulers run over an optimizer with one scalar a group, and what they set is read off before each step, so
    the values are bitwise those of a training loop that calls ``scheduler.step()`` after each ``optimizer.step()``.

    Args:
        config: ``train.lr`` and the schedule's fields.
        groups: parameter groups; ``lr_scale`` multiplies the peak.
        steps_per_epoch: steps an epoch, at least 1.

    Returns:
        float64 array of shape (epochs · steps_per_epoch, groups).
    """
    train = config.train
    total = train.epochs * steps_per_epoch
    peaks = [train.lr * group.lr_scale for group in groups]
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": peak} for peak in peaks]
    optimizer = create_deterministic_optimizer(config.seed, torch.optim.SGD, parameters, SHARED_INSTANCE, lr=train.lr)
    warmup = train.warmup_epochs * steps_per_epoch

    schedule_class, arguments = _schedule(config, peaks, steps_per_epoch, total - warmup)
    scheduler = create_deterministic_scheduler(config.seed, schedule_class, optimizer, SHARED_INSTANCE, **arguments)
    rates = _run(optimizer, scheduler, total - warmup)
    if warmup:
        # torch's SequentialLR cannot hold a OneCycleLR (it replays constructors that reset each other's rates), so
        # the ramp is torch's LinearLR up to where the schedule starts, and the schedule follows it.
        ramp = torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": float(first)} for first in rates[0]], lr=train.lr
        )
        linear = lr_scheduler.LinearLR(ramp, start_factor=train.lr_start, end_factor=1.0, total_iters=warmup)
        rates = np.concatenate([_run(ramp, linear, warmup), rates])
    return rates


def _schedule(
    config: Config, peaks: Sequence[float], steps_per_epoch: int, steps: int
) -> tuple[type[lr_scheduler.LRScheduler], dict[str, Any]]:
    train = config.train
    if train.schedule == "step":
        return lr_scheduler.StepLR, {"step_size": train.lr_step_epochs * steps_per_epoch, "gamma": train.lr_gamma}
    if train.schedule == "cosine":
        # eta_min is one value for all groups in torch; groups with a scaled rate end at the same floor.
        return lr_scheduler.CosineAnnealingLR, {"T_max": steps, "eta_min": train.lr * train.lr_end}
    if train.schedule == "one_cycle":
        return lr_scheduler.OneCycleLR, {
            "max_lr": list(peaks),
            "total_steps": steps,
            "pct_start": train.lr_peak,
            "anneal_strategy": "linear",
            "cycle_momentum": False,
            "div_factor": 1 / train.lr_start,
            "final_div_factor": train.lr_start / train.lr_end if train.lr_end else math.inf,
        }
    return lr_scheduler.ConstantLR, {"factor": 1.0, "total_iters": 0}


def _run(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> np.ndarray:
    rates = np.empty((steps, len(optimizer.param_groups)))
    for step in range(steps):
        rates[step] = [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rates
