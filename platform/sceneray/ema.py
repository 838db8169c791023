"""An exponential moving average of a network's weights (Polyak & Juditsky, 1992), a second network beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from sceneray.models.pspnet import PSPNet


class WeightAverage:
    """After update number t (from 1): average ← d · average + (1 - d) · weights, d = min(decay, (1 + t) / (10 + t)).

    The ramp of d lets the first weights fade soon (TensorFlow's `ExponentialMovingAverage(num_updates)`). Running
    statistics are averaged as weights are; counters are taken over.
    """

    def __init__(self, model: PSPNet, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: PSPNet, updates: int) -> None:
        """Take in the weights of `model` after optimizer step number `updates`."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        average, weights = list(_tensors(self.model).values()), list(_tensors(model).values())
        real = [i for i, tensor in enumerate(average) if tensor.is_floating_point()]
        torch._foreach_lerp_([average[i] for i in real], [weights[i] for i in real], 1 - decay)
        for i in set(range(len(average))) - set(real):
            average[i].copy_(weights[i])

    def tensors(self) -> dict[str, Tensor]:
        """The average, by the names of the network's state dict."""
        return dict(self.model.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        self.model.load_state_dict(dict(tensors), strict=True)


def _tensors(model: PSPNet) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
