"""A real bundle whose answers are known without running it: a PSPNet whose weights are set by hand.

One channel carries the brightness of a pixel through MobileNetV2 to the classifier; everything else is zero. Pixels
whose R + G + B lies clearly above ImageNet's mean are "bright" (1), the others "dark" (0); "never" (2) never comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sceneray import bundle
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.data.store import ClassInfo
from sceneray.masks import Mask, Photo
from sceneray.models.pspnet import STD, PSPNet, build_model

DARK, BRIGHT = 0, 1
CLASSES = (
    ClassInfo(DARK, "dark", (10, 20, 30)),
    ClassInfo(BRIGHT, "bright", (250, 240, 60)),
    ClassInfo(2, "never", (255, 0, 255)),
)
SETTINGS = ModelSettings(backbone="mobilenet_v2", bins=(1, 2), pool_width=4, head_width=8, aux_width=4)
# Near an edge between bright and dark the answer depends on the interpolation; further away it is certain.
EDGE = 8


def brightness_model() -> PSPNet:
    """The hand-set network, in evaluation mode."""
    model = build_model(SETTINGS, len(CLASSES), load_weights=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
        stem, *blocks = model.backbone.features  # type: ignore[misc]
        # Undo the division by std: channel 0 becomes (R + G + B - mean) / 100, cut at 0 by the ReLU.
        stem[0].weight[0, :, 1, 1] = torch.tensor(STD) / 100
        for block in blocks:
            if not block.use_res_connect:  # elsewhere the skip connection carries it, and the branch adds zero
                for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
                    middle = conv.kernel_size[0] // 2
                    conv.weight[0, 0, middle, middle] = 1
        model.head.conv.weight[0, 0, 1, 1] = 1
        model.head.classifier.weight[BRIGHT, 0] = 1
        model.head.classifier.bias.copy_(torch.tensor([0.0, -1.0, -10.0]))
    return model.eval()


def write_bundle(url: str, version: str = "7") -> str:
    """A bundle of the hand-set network at `url`; returns `url`."""
    about = {
        "name": "brightness",
        "version": version,
        "metrics": {"store_digest": "0" * 64, "values": {"miou": 0.5}},
        "source": {"checkpoint": "by-hand", "digest": "0" * 64, "step": 0},
    }
    bundle.write(url, brightness_model(), SETTINGS, CLASSES, 255, about)
    return url


def write_lively_bundle(url: str, **about: Any) -> str:
    """A bundle of a network with random weights and lively logits: many pixels lie close between two classes."""
    torch.manual_seed(3)
    settings = ModelSettings(backbone="mobilenet_v2", bins=(1, 2, 3, 6), pool_width=8, head_width=16, aux_width=8)
    model = build_model(settings, len(town.CLASSES), load_weights=False)
    with torch.no_grad():  # running statistics as of a trained network: an untrained one's make every image alike
        model(torch.stack([torch.from_numpy(town.draw(seed, 96, 96)[0]).permute(2, 0, 1) for seed in range(8)]))
    bundle.write(url, model, settings, town.CLASSES, 255, {"name": "lively", "version": "1", **about})
    return url


def half_bright(height: int = 48, width: int = 64) -> tuple[Photo, Mask]:
    """A picture, dark on the left and bright on the right, and its mask: uint8 [H, W, 3] and [H, W]."""
    image = np.full((height, width, 3), 20, np.uint8)
    image[:, width // 2 :] = 230
    mask = np.full((height, width), DARK, np.uint8)
    mask[:, width // 2 :] = BRIGHT
    return image, mask


def agree(answer: Mask, truth: Mask) -> bool:
    """True where `answer` is `truth` but for a strip of EDGE pixels on both sides of the middle column."""
    if answer.shape != truth.shape:
        return False
    middle = truth.shape[1] // 2
    columns = np.r_[0 : middle - EDGE, middle + EDGE : truth.shape[1]]
    return bool((answer[:, columns] == truth[:, columns]).all())
