"""Backbones: dilation that keeps the values, torchvision's names."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sceneray.models.backbones import BACKBONES, Backbone
from sceneray.models.norm import BatchNorm2d

NORM = partial(BatchNorm2d, mode="local")
RESNETS = [name for name in BACKBONES if name.startswith("resnet")]


def build(name: str, output_stride: int = 8, full_dilation: bool = False) -> Backbone:
    torch.manual_seed(0)
    backbone = BACKBONES[name](NORM, output_stride, full_dilation).eval()
    generator = torch.Generator().manual_seed(1)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Statistics and shifts that make padding visible, scales that keep 152 layers in range.
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.weight.data.uniform_(0.2, 0.4, generator=generator)
    return backbone


def classifier(name: str, backbone: Backbone, **options: object) -> nn.Module:
    """Torchvision's own network with the backbone's weights."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None, **options)
    missing, unexpected = net.load_state_dict(backbone.state_dict(), strict=False, assign=True)
    assert not unexpected
    assert all(key.startswith(("fc.", "classifier.", "features.18.")) for key in missing)
    return net.eval()


def undilated(name: str, backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    net = classifier(name, backbone)
    if name == "mobilenet_v2":
        aux = net.features[:14](images)
        return aux, net.features[14:18](aux)
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    aux = net.layer3(net.layer2(net.layer1(x)))
    return aux, net.layer4(aux)


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_dilation_keeps_the_values_of_the_strided_network(name: str) -> None:
    """Sampled at the lost stride, dilated features equal torchvision's undilated ones, also at odd sizes."""
    for output_stride in (8, 16):
        backbone = build(name, output_stride)
        images = torch.randn(1, 3, 64, 49, generator=torch.Generator().manual_seed(2))
        maps, references = backbone(images), undilated(name, backbone, images)
        for map_, reference, native_stride in zip(maps, references, (16, 32), strict=True):
            step = native_stride // output_stride
            sampled = map_[:, :, ::step, ::step]
            assert sampled.shape == reference.shape
            assert (sampled - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_maps_have_the_announced_channels_and_size(name: str) -> None:
    """Both maps are ceil(size / 8) on a side at output stride 8 and have the channels the backbone names."""
    backbone = build(name)
    aux, features = backbone(torch.randn(2, 3, 33, 17))
    assert aux.shape == (2, backbone.aux_channels, 5, 3)
    assert features.shape == (2, backbone.channels, 5, 3)


@torch.inference_mode()
def test_mobilenet_keeps_the_published_channels() -> None:
    """MobileNetV2 gives the 96 and 320 channels of its paper, not the classifier's 1280."""
    backbone = build("mobilenet_v2")
    assert (backbone.aux_channels, backbone.channels) == (96, 320)


@torch.inference_mode()
def test_resnet50_is_torchvisions_own_dilated_resnet50() -> None:
    """Bit for bit the features of replace_stride_with_dilation=[False, True, True] with the same state dict."""
    backbone = build("resnet50")
    net = classifier("resnet50", backbone, replace_stride_with_dilation=[False, True, True])
    images = torch.randn(1, 3, 40, 56)
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    aux = net.layer3(net.layer2(net.layer1(x)))
    assert torch.equal(backbone(images)[0], aux)
    assert torch.equal(backbone(images)[1], net.layer4(aux))


@pytest.mark.parametrize("name", BACKBONES)
def test_full_dilation_reaches_the_first_block_too(name: str) -> None:
    """With full_dilation every 3×3 convolution of the two last stages has dilation 2 and 4, as in hszhao/semseg."""
    backbone = BACKBONES[name](NORM, 8, True)
    stages = (
        (backbone.features[7:14], backbone.features[14:18])
        if name == "mobilenet_v2"
        else (backbone.layer3, backbone.layer4)
    )
    for stage, rate in zip(stages, (2, 4), strict=True):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        assert all(conv.stride == (1, 1) for conv in convs)
        wide = [conv for conv in convs if conv.kernel_size == (3, 3)]
        assert wide
        assert {(conv.dilation, conv.padding) for conv in wide} == {((rate, rate), (rate, rate))}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_norm_layers_are_the_ones_passed(name: str) -> None:
    """Every norm of a backbone is made by norm_layer."""
    backbone = BACKBONES[name](partial(BatchNorm2d, mode="frozen"), 16)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {norm.mode for norm in norms if isinstance(norm, BatchNorm2d)} == {"frozen"}
