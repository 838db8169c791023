"""PSPNet (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017).

B batch, C classes, H W height and width of the input in pixels, S output stride of the backbone (8 or 16),
h w height and width of the features: ceil(H / S), ceil(W / S).

    images [B, 3, H, W] ─ backbone ┬─ aux_features [B, ., h, w] ─ aux head ─ bilinear ─ aux [B, C, H, W], in training
                                   └─ features     [B, ., h, w] ─ pyramid ─ head ─ bilinear ─ main [B, C, H, W]

Normalisation of the input lives in the network: training, serving and an exported graph cannot disagree on it.
Why align_corners=False: see pooling.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sceneray.config import ModelSettings
from sceneray.errors import ConfigError, DataError, ScenerayError
from sceneray.models.backbones import BACKBONES, Backbone, NormLayer
from sceneray.models.dropout import ChannelDropout
from sceneray.models.norm import BatchNorm2d
from sceneray.models.pooling import PyramidPooling
from sceneray.models.weights import load_backbone

# Of ImageNet's training photographs, RGB, in units of 0..255: what every torchvision backbone was trained with.
MEAN = tuple(255 * value for value in (0.485, 0.456, 0.406))
STD = tuple(255 * value for value in (0.229, 0.224, 0.225))
MAX_CLASSES = 255  # masks are 8-bit and 255 means "ignore"

log = logging.getLogger(__name__)


class Logits(NamedTuple):
    """Scores before softmax, float [B, C, H, W]; `aux` is None in evaluation."""

    main: Tensor
    aux: Tensor | None


class Head(nn.Module):
    """3×3 convolution to `width` channels, norm, ReLU, channel dropout, 1×1 convolution to the classes.

    Convolutions start from He et al. (ICCV 2015) normal weights by fan-in, biases from 0: logits start at about ±1. By
    fan-out, which torchvision uses, the 1×1 convolution from 512 channels to 11 classes would start at about ±7.
    """

    def __init__(
        self, channels: int, width: int, num_classes: int, dropout: ChannelDropout, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = dropout
        self.classifier = nn.Conv2d(width, num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor, sample_seeds: Tensor | None = None) -> Tensor:
        """[B, channels, h, w] → [B, C, h, w]; sample_seeds: int64 [B] for the dropout."""
        x = self.relu(self.norm(self.conv(x)))
        logits: Tensor = self.classifier(self.dropout(x, sample_seeds))
        return logits


class PSPNet(nn.Module):
    """The network, made of finished parts. `build_model` makes the parts from settings."""

    def __init__(self, backbone: Backbone, pyramid: PyramidPooling, head: Head, aux_head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.head = head
        self.aux_head = aux_head
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, sample_seeds: Tensor | None = None) -> Logits:
        """Logits at the input's size.

        images: uint8 or float [B, 3, H, W], RGB, 0..255; any memory format, H and W at least the output stride.
        sample_seeds: int64 [B] from which dropout draws in training; without them it draws from torch's generator.
        Raises DataError where the images are no such batch.
        """
        size = images.shape[-2:]
        aux_features, features = self._features(images)
        main = upscale(self.head(self.pyramid(features), sample_seeds), size)
        aux = upscale(self.aux_head(aux_features, sample_seeds), size) if self.training else None
        return Logits(main, aux)

    def scores(self, images: Tensor) -> Tensor:
        """Main logits float [B, C, h, w] at the features' size, of images as `forward` takes them; in evaluation mode.

        `upscale` brings them to any size. Apart from it, because a server runs images together that it then answers
        one by one. Raises ScenerayError in training mode, where batch norm and dropout would answer something else.
        """
        if self.training:
            raise ScenerayError("a network answers in evaluation mode: call eval() first.")
        _, features = self._features(images)
        logits: Tensor = self.head(self.pyramid(features))
        return logits

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Class ids uint8 [B, H, W] of images as `forward` takes them, computed on their device; in evaluation mode."""
        # The same ids as argmax, which is several times slower on a CPU.
        ids: Tensor = upscale(self.scores(images), images.shape[-2:]).max(dim=1).indices
        return ids.to(torch.uint8)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that may come from ImageNet weights; with `new_parameters` all there are."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def new_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of pyramid and heads, which start from nothing."""
        parts = (self.pyramid, self.head, self.aux_head)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._check(images)
        features: tuple[Tensor, Tensor] = self.backbone((images.to(self.mean.dtype) - self.mean) / self.std)
        return features

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"images must be a batch [B, 3, height, width] in RGB, got shape {list(images.shape)}.")
        height, width = images.shape[-2:]
        smallest = self.backbone.output_stride
        if height < smallest or width < smallest:
            raise DataError(
                f"an image must have at least {smallest} pixels on each side (the network's output stride), got "
                f"{height}×{width} (height × width): enlarge it first."
            )


def build_model(settings: ModelSettings, num_classes: int, load_weights: bool = True) -> PSPNet:
    """The network that `settings` describe, in training mode on the CPU.

    Random weights come from torch's global generator: seed it before for the same start. `load_weights=False` leaves
    `settings.weights` alone, for a caller who loads a whole checkpoint next.
    Raises ConfigError for a number of classes that an 8-bit mask cannot hold, and what `load_backbone` raises.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ConfigError(
            f"a network has 1 to {MAX_CLASSES} classes (masks are 8-bit, 255 is ignored), got {num_classes}."
        )
    norm_layer = partial(BatchNorm2d, mode=settings.norm)
    backbone = BACKBONES[settings.backbone](norm_layer, settings.output_stride, settings.full_dilation)
    pool_width = settings.pool_width or max(1, backbone.channels // len(settings.bins))
    pyramid = PyramidPooling(backbone.channels, settings.bins, pool_width, norm_layer)
    initialise(pyramid)
    main_dropout, aux_dropout = (ChannelDropout(settings.dropout, layer) for layer in (0, 1))
    head = Head(pyramid.out_channels, settings.head_width, num_classes, main_dropout, norm_layer)
    aux_head = Head(backbone.aux_channels, settings.aux_width, num_classes, aux_dropout, norm_layer)
    if load_weights:
        report = load_backbone(backbone, settings.weights)
        if report.loaded:
            log.info("backbone: %d tensors from %s; left out: %s", len(report.loaded), settings.weights, report.ignored)
    return PSPNet(backbone, pyramid, head, aux_head)


def initialise(part: nn.Module) -> None:
    """He-normal weights by fan-in for the convolutions of a new part, zero biases; norms keep scale 1 and shift 0."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def upscale(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, C, h, w] at `size` (height, width): bilinear, as in training."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
