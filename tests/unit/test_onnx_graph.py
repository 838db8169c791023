"""The ONNX graph of a network: PyTorch's scores at any size, valid, repeatable, clear about what it cannot hold."""

from __future__ import annotations

import copy
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sceneray import onnx_graph
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.errors import ConfigError
from sceneray.models.pspnet import PSPNet, build_model

CLASSES = 5
# (B, H, W): the features' sides are no multiples of a bin's, and those of the last are fewer than the bin's cells.
SIZES = ((1, 75, 91), (2, 61, 83), (1, 101, 77), (3, 59, 45), (1, 67, 109), (2, 16, 23))
# PyTorch's own error against float64 is the measure: random weights magnify rounding more than trained ones do.
ROOM = 4


def random_network(backbone: str, output_stride: int = 8) -> PSPNet:
    """A narrow network in evaluation mode whose batch norms shift and scale, and whose answer depends on the picture.

    The running statistics are those of two scenes: with arbitrary ones, a deep network forgets what it was shown.
    """
    torch.manual_seed(3)
    settings = ModelSettings(
        backbone=backbone, output_stride=output_stride, pool_width=8, head_width=16, aux_width=4, dropout=0
    )
    net = build_model(settings, CLASSES, load_weights=False)
    with torch.no_grad():
        for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.momentum = 1
        net(as_batch(scenes(2, 65, 99)))
    return net.eval()


def scenes(batch: int, height: int, width: int) -> np.ndarray:
    """Drawn pictures, uint8 [B, H, W, 3]."""
    return np.stack([town.draw(seed, height, width)[0] for seed in range(batch)])


def as_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def session(graph: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def scores(running: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    return running.run([onnx_graph.OUTPUT], {onnx_graph.INPUT: images})[0]


@pytest.mark.parametrize(
    ("backbone", "output_stride"),
    [("resnet18", 8), ("resnet18", 16), ("mobilenet_v2", 8), ("mobilenet_v2", 16), ("resnet50", 8)],
)
def test_the_graph_computes_what_the_network_computes(backbone, output_stride):
    """One graph is as exact as PyTorch, and has its classes but for ties, at sizes that no bin or stride divides."""
    net = random_network(backbone, output_stride)
    exact_net = copy.deepcopy(net).double()
    running = session(onnx_graph.export(net))
    for size in SIZES:
        images = scenes(*size)
        with torch.inference_mode():
            exact = exact_net.scores(as_batch(images))
            ours, full = net.scores(as_batch(images)), net(as_batch(images)).main
        found = torch.from_numpy(scores(running, images))
        assert found.dtype == torch.float32
        assert found.shape == (size[0], CLASSES, -(-size[1] // output_stride), -(-size[2] // output_stride))
        assert exact.std(dim=(0, 2, 3)).max() > exact.std() / 10, "the answer depends on the place"
        allowed = ROOM * float((ours - exact).abs().max()) + 1e-6 * float(exact.std())
        worst = float((found - exact).abs().max())
        upsampled = F.interpolate(found, size=size[1:], mode="bilinear", align_corners=False)
        best, second = full.topk(2, dim=1).values.unbind(1)
        other, tied = upsampled.argmax(1) != full.argmax(1), best - second < 2 * allowed
        differ, ties = int(other.sum()), int(tied.sum())
        print(f"{size}: {worst:.1e} of {allowed:.1e}; {differ} of {other.numel()} pixels differ, {ties} are tied")
        assert worst <= allowed < exact.std() / 100
        assert not (other & ~tied).any()


def test_the_graph_is_valid_and_names_its_weights():
    """ONNX's own checker takes it; its weights are those of the deployed network, by name, and nothing else."""
    net = random_network("mobilenet_v2")
    model = onnx.load_from_string(onnx_graph.export(net))
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == onnx_graph.IR_VERSION
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", onnx_graph.OPSET)]
    weights = {tensor.name for tensor in model.graph.initializer if not tensor.name.startswith("constant_")}
    names = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    assert weights == {"mean", "std"} | {name for name in names if not name.startswith("aux_head.")}
    outputs = [name for node in model.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


def test_the_same_network_gives_the_same_bytes():
    """A second export, in training mode and in another memory format, is equal: digests of bundles stay."""
    net = random_network("resnet18")
    first = onnx_graph.export(net)
    assert onnx_graph.export(net.train().to(memory_format=torch.channels_last)) == first


def test_images_are_read_as_numpy_stacks_them():
    """The input is uint8 [B, H, W, 3] with three free sides; the order of the colours counts."""
    running = session(onnx_graph.export(random_network("mobilenet_v2", 16)))
    (given,), (gives,) = running.get_inputs(), running.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (gives.name, gives.type, gives.shape[:2]) == ("scores", "tensor(float)", ["batch", CLASSES])
    images = scenes(1, 48, 64)
    assert not np.allclose(scores(running, images), scores(running, images[..., ::-1]), rtol=0.01)


def test_a_layer_without_a_form_in_onnx_is_named():
    """Instead of a wrong graph there is an error that tells where the layer stands, what it is, and what to do."""
    net = random_network("resnet18")
    net.backbone.layer1[0].relu = nn.GELU()
    with pytest.raises(ConfigError, match=r"backbone\.layer1\.0\.relu .* GELU.*known: .*Conv2d.*another runtime"):
        onnx_graph.export(net)


def test_an_operation_without_a_form_in_onnx_is_named():
    """The same for what a forward method does between the layers."""
    net = random_network("resnet18")
    net.backbone.conv1 = nn.Sequential(net.backbone.conv1, Doubled())
    with pytest.raises(ConfigError, match=r"backbone has a mul, .*known: add"):
        onnx_graph.export(net)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_reflecting_convolutions_are_refused():
    """A convolution that pads with anything but zeros would get another padding: it is refused."""
    net = random_network("resnet18")
    net.head.conv.padding_mode = "reflect"
    with pytest.raises(ConfigError, match=r"head\.conv pads with 'reflect'"):
        onnx_graph.export(net)


def test_without_onnx_the_error_says_what_to_install(monkeypatch):
    """Where the package is missing, one sentence names the extra."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'sceneray\[onnx\]'"):
        onnx_graph.export(random_network("mobilenet_v2"))
