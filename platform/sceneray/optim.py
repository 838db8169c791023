"""Optimizers, parameter groups and learning-rate schedules.

A schedule is a pure function of the step; the loop sets the rate before each step with `set_lr`, so that a resumed run
needs nothing but the step's number. To add an optimizer or a schedule: a function, and a line in the dict.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from torch.optim import Optimizer

from sceneray.config import OptimizerSettings, ScheduleSettings
from sceneray.errors import ConfigError
from sceneray.models.pspnet import PSPNet

Groups = list[dict[str, Any]]


def param_groups(model: PSPNet, settings: OptimizerSettings) -> Groups:
    """Two groups: the backbone at `lr`, pyramid and heads at `lr` × `head_lr_factor` (hszhao/semseg's recipe).

    Weight decay applies to all parameters, scales and biases included, as published. `initial_lr` is the rate that
    `set_lr` scales.
    """
    head_lr = settings.lr * settings.head_lr_factor
    groups = [
        {"name": "backbone", "params": model.backbone_parameters(), "lr": settings.lr, "initial_lr": settings.lr},
        {"name": "new", "params": model.new_parameters(), "lr": head_lr, "initial_lr": head_lr},
    ]
    return [group for group in groups if group["params"]]


def sgd(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    """Stochastic gradient descent with momentum, without Nesterov."""
    optimizer = torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=_fused(groups)
    )
    if settings.momentum:
        # What PyTorch does at the first step, but there a fused step that GradScaler skips (fp16 overflowed) leaves
        # the buffers it just made unwritten.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019); `momentum` is beta1, beta2 is 0.999."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
        fused=_fused(groups),
    )


def _fused(groups: Groups) -> bool | None:
    """One kernel over all parameters where the device has one: PyTorch has it for CUDA and CPUs."""
    types = {parameter.device.type for group in groups for parameter in group["params"]}
    return True if types <= {"cuda", "cpu"} else None


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerSettings], Optimizer]] = {"sgd": sgd, "adamw": adamw}


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of every group to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def poly(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """(1 - progress)^power (Chen et al., DeepLab): 1 at the first step, falling to 0 after the last."""
    warmup, progress = _phase(step, total_steps, settings)
    return float(warmup * (1 - progress) ** settings.power)


def cosine(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """(1 + cos(π · progress)) / 2 (Loshchilov & Hutter, ICLR 2017), without restarts."""
    warmup, progress = _phase(step, total_steps, settings)
    return warmup * (1 + cos(pi * progress)) / 2


def constant(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """1 after the warm-up."""
    warmup, _ = _phase(step, total_steps, settings)
    return warmup


# f(step, total_steps, settings) → factor in [0, 1]; step counts from 0.
SCHEDULES: dict[str, Callable[[int, int, ScheduleSettings], float]] = {
    "poly": poly,
    "cosine": cosine,
    "constant": constant,
}


def _phase(step: int, total_steps: int, settings: ScheduleSettings) -> tuple[float, float]:
    """(warm-up factor in (0, 1], progress in [0, 1] of what follows the warm-up).

    The warm-up is linear: 1/n at the first of n steps, 1 at the last (Goyal et al., arXiv 1706.02677).
    """
    if total_steps < 1:
        raise ConfigError(f"a schedule needs at least one step, got {total_steps}: raise epochs.")
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps, 0.0
    remaining = max(1, total_steps - settings.warmup_steps)
    return 1.0, min(1.0, (step - settings.warmup_steps) / remaining)
