"""Torchvision classifiers as dilated feature extractors, at output stride 8 or 16.

A backbone gives two maps: `aux_features` (what the auxiliary head reads) and `features` (what the pyramid reads). Its
parameters carry torchvision's names, so a torchvision state dict loads as it is.

| backbone        | aux_features                  | features                      |
|-----------------|-------------------------------|-------------------------------|
| resnet18/34     | layer3, 256 channels          | layer4, 512 channels          |
| resnet50/101/152| layer3, 1024 channels         | layer4, 2048 channels         |
| mobilenet_v2    | features[13], 96 channels     | features[17], 320 channels    |

To add one: a function that returns a `Backbone`, and a line in `BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


class Backbone(nn.Module):
    """A feature extractor; subclasses hold the layers and implement `forward`.

    Attributes: `name` (torchvision's), `aux_channels`, `channels`, `output_stride`.
    """

    def __init__(self, name: str, aux_channels: int, channels: int, output_stride: int) -> None:
        super().__init__()
        self.name = name
        self.aux_channels = aux_channels
        self.channels = channels
        self.output_stride = output_stride

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(aux_features, features) of normalised images.

        images: float [B, 3, H, W]. features: [B, channels, ceil(H / output_stride), ceil(W / output_stride)];
        aux_features: [B, aux_channels, ...] of the same height and width at output stride 8 and 16.
        """
        raise NotImplementedError


class ResNetBackbone(Backbone):
    """ResNet (He et al., CVPR 2016) in torchvision's form: 7×7 stem, the stride in the 3×3 convolutions."""

    def __init__(self, name: str, net: Any, output_stride: int, full_dilation: bool) -> None:
        super().__init__(name, _out_channels(net.layer3), _out_channels(net.layer4), output_stride)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        dilate([(16, self.layer3), (32, self.layer4)], output_stride, full_dilation)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Backbone.forward`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        aux_features = self.layer3(self.layer2(self.layer1(x)))
        return aux_features, self.layer4(aux_features)


class MobileNetV2Backbone(Backbone):
    """MobileNetV2 (Sandler et al., CVPR 2018) without its 1280-channel convolution, which serves the classifier."""

    def __init__(self, name: str, net: Any, output_stride: int, full_dilation: bool) -> None:
        features = net.features[:18]
        super().__init__(name, _out_channels(features[13]), _out_channels(features[17]), output_stride)
        self.features = features
        dilate([(16, features[7:14]), (32, features[14:18])], output_stride, full_dilation)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Backbone.forward`."""
        x = aux_features = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index == 13:
                aux_features = x
        return aux_features, x


def dilate(stages: Sequence[tuple[int, nn.Module]], output_stride: int, full_dilation: bool = False) -> None:
    """Give up the strides of `stages` beyond `output_stride`, in place, and dilate the 3×3 convolutions instead.

    stages: (stride of the stage's output as built, stage), in order; each halves the map once.

    The à-trous rule (Chen et al., DeepLab, TPAMI 2018): sampled at the lost stride, the new map equals the old one.
    For that, the convolution that carried the stride keeps the dilation of what comes before it. With `full_dilation`
    it takes the stage's own, as hszhao/semseg has it.
    """
    before = 1
    for native_stride, stage in stages:
        if native_stride <= output_stride:
            continue
        after = 2 * before
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                _dilate_convolution(module, before, after, full_dilation)
        before = after


def _dilate_convolution(conv: nn.Conv2d, before: int, after: int, full_dilation: bool) -> None:
    carried_the_stride = conv.stride != (1, 1)
    conv.stride = (1, 1)
    if conv.kernel_size == (3, 3):
        rate = before if carried_the_stride and not full_dilation else after
        conv.dilation = conv.padding = (rate, rate)


def _out_channels(stage: nn.Module) -> int:
    """Channels that a stage gives: those of the last convolution on its main path."""
    convs = [
        module for name, module in stage.named_modules() if isinstance(module, nn.Conv2d) and "downsample" not in name
    ]
    return convs[-1].out_channels


def _resnet(name: str, norm_layer: NormLayer, output_stride: int = 8, full_dilation: bool = False) -> Backbone:
    net = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
    return ResNetBackbone(name, net, output_stride, full_dilation)


def _mobilenet_v2(norm_layer: NormLayer, output_stride: int = 8, full_dilation: bool = False) -> Backbone:
    net = torchvision.models.mobilenet_v2(weights=None, norm_layer=norm_layer)
    return MobileNetV2Backbone("mobilenet_v2", net, output_stride, full_dilation)


# Called as f(norm_layer, output_stride=8, full_dilation=False); weights are random until `weights.load_backbone`.
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18": partial(_resnet, "resnet18"),
    "resnet34": partial(_resnet, "resnet34"),
    "resnet50": partial(_resnet, "resnet50"),
    "resnet101": partial(_resnet, "resnet101"),
    "resnet152": partial(_resnet, "resnet152"),
    "mobilenet_v2": _mobilenet_v2,
}
