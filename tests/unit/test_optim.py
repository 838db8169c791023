"""Optimizers, groups of parameters and schedules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sceneray.config import ModelSettings, OptimizerSettings, ScheduleSettings
from sceneray.errors import ConfigError
from sceneray.models.pspnet import PSPNet, build_model
from sceneray.optim import OPTIMIZERS, SCHEDULES, param_groups, set_lr


@pytest.fixture(scope="module")
def model() -> PSPNet:
    return build_model(ModelSettings(backbone="mobilenet_v2", head_width=4, aux_width=4, pool_width=2), 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_layers_learn_faster(model: PSPNet, name: str) -> None:
    """The backbone has the rate, pyramid and heads ten times it; decay is on all; each parameter is in one group."""
    settings = OptimizerSettings(name=name, lr=0.02, weight_decay=5e-4)
    optimizer = OPTIMIZERS[name](param_groups(model, settings), settings)
    backbone, new = optimizer.param_groups
    assert (backbone["lr"], new["lr"]) == (0.02, 0.2)
    assert {backbone["weight_decay"], new["weight_decay"]} == {5e-4}
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_a_frozen_backbone_has_no_group(model: PSPNet) -> None:
    """Where no parameter of the backbone trains, only the new layers' group is left."""
    model.backbone.requires_grad_(False)
    groups = param_groups(model, OptimizerSettings())
    model.backbone.requires_grad_(True)
    assert [group["name"] for group in groups] == ["new"]


def test_set_lr_scales_the_initial_rates(model: PSPNet) -> None:
    """Each rate is a factor of its first value, however often it was set before."""
    settings = OptimizerSettings(lr=0.01, head_lr_factor=4)
    optimizer = OPTIMIZERS["sgd"](param_groups(model, settings), settings)
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.02]


def test_sgd_is_the_published_recipe(model: PSPNet) -> None:
    """SGD takes momentum and weight decay from the settings, without Nesterov; AdamW takes momentum as beta1."""
    settings = OptimizerSettings(momentum=0.8, weight_decay=1e-3)
    (group, _) = OPTIMIZERS["sgd"](param_groups(model, settings), settings).param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 1e-3, False)
    (group, _) = OPTIMIZERS["adamw"](param_groups(model, settings), settings).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.999), 1e-3)


def test_one_sgd_step_by_hand() -> None:
    """Two steps of w ← w - lr · v, v ← momentum · v + (g + decay · w), are what the formula gives."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    settings = OptimizerSettings(lr=0.1, momentum=0.5, weight_decay=0.25)
    optimizer = OPTIMIZERS["sgd"]([{"params": [weight], "lr": 0.1, "initial_lr": 0.1}], settings)
    expected, velocity = 2.0, 0.0
    for _ in range(2):
        weight.grad = torch.tensor([3.0])
        optimizer.step()
        velocity = 0.5 * velocity + 3.0 + 0.25 * expected
        expected -= 0.1 * velocity
        assert weight.item() == pytest.approx(expected)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    power=st.floats(0.1, 3),
)
def test_schedules_stay_in_range_and_fall_after_the_warm_up(name: str, total: int, warmup: int, power: float) -> None:
    """A factor is in [0, 1] at every step, rises in the warm-up to 1, and never rises again; beyond the end too."""
    settings = ScheduleSettings(name=name, warmup_steps=warmup, power=power)
    factors = [SCHEDULES[name](step, total, settings) for step in range(total + 2)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup <= total:
        assert max(factors) == 1.0


def test_poly_is_the_published_schedule() -> None:
    """Without warm-up: 1 at the first step, (1 - step/total)^0.9 after, and 0 after the last."""
    settings = ScheduleSettings()
    assert SCHEDULES["poly"](0, 100, settings) == 1.0
    assert SCHEDULES["poly"](75, 100, settings) == pytest.approx(0.25**0.9)
    assert SCHEDULES["poly"](99, 100, settings) > 0
    assert SCHEDULES["poly"](100, 100, settings) == 0.0


def test_warm_up_is_linear() -> None:
    """Four steps of warm-up are 1/4, 2/4, 3/4, 1; the decay starts from there over the steps that are left."""
    settings = ScheduleSettings(warmup_steps=4, power=1.0)
    factors = [SCHEDULES["poly"](step, 8, settings) for step in range(9)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert SCHEDULES["cosine"](6, 8, settings) == pytest.approx(0.5)
    assert SCHEDULES["constant"](7, 8, settings) == 1.0


def test_a_schedule_without_steps_is_refused() -> None:
    """No step to take is a mistake in the settings, and the error says which."""
    with pytest.raises(ConfigError, match="at least one step, got 0: raise epochs"):
        SCHEDULES["poly"](0, 0, ScheduleSettings())
