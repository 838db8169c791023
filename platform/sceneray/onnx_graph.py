"""A network as an ONNX graph, for runtimes that are not PyTorch.

    images uint8 [B, H, W, 3] ─ normalise ─ backbone ─ pyramid ─ head ─ scores float32 [B, C, h, w]

B, H and W are free in every run; C classes; h, w: H and W over the output stride, rounded up. The scores are those
before the last upsampling, which whoever asks does at the size and on the device that suit. Images come as Pillow and
numpy hold them, so that nobody copies them into another order first.

The graph is written layer by layer, not by PyTorch's exporter: that takes 4 s (ResNet-18) to 9 s (MobileNetV2) of a
core and another graph with every release of torch, this takes 0.1 s, so that each bundle can hold one. The price: a
backbone with a layer of another kind needs a line in LAYERS. Weights keep the names they have in model.safetensors.

Batch norm is written with its running statistics and dropout not at all: the graph is that of evaluation, in whatever
mode the network is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sceneray.errors import ConfigError
from sceneray.models.dropout import ChannelDropout
from sceneray.models.pooling import PyramidPooling
from sceneray.models.pspnet import PSPNet

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "images", "scores"
# Resize got its present form in opset 18; the oldest format that holds it is what most runtimes read.
OPSET, IR_VERSION = 18, 8


def export(net: PSPNet) -> bytes:
    """The graph of `net` as a file's content: the same bytes for the same weights.

    Raises ConfigError where the package onnx is missing, or where `net` has a layer that LAYERS does not know.
    """
    try:
        import onnx  # noqa: F401 (so that its absence is told here, in words)
    except ImportError as error:
        raise ConfigError(
            "writing an ONNX graph needs the package onnx, which is not installed: pip install 'sceneray[onnx]'."
        ) from error
    graph = _Graph()
    x = _float(graph, graph.add("Transpose", INPUT, perm=[0, 3, 1, 2]))
    x = graph.add("Div", graph.add("Sub", x, graph.weight("mean", net.mean)), graph.weight("std", net.std))
    x = _traced(graph, "backbone", net.backbone, x)[1]
    x = _pyramid(graph, "pyramid", net.pyramid, x)
    head = net.head
    for name in ("conv", "norm", "relu", "classifier"):
        x = _layer(graph, f"head.{name}", getattr(head, name), x)
    graph.add("Identity", x, output=OUTPUT)
    return graph.finish(head.classifier.out_channels)


class _Graph:
    """Nodes and weights so far. A value is known by its name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node of one output; returns the output's name, which is the node's too."""
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def weight(self, name: str, tensor: Tensor | None) -> str:
        """A tensor of the network, in float32."""
        from onnx import numpy_helper

        assert tensor is not None
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def constant(self, values: Any, dtype: type = np.int64) -> str:
        """An array, kept once however often it is asked for."""
        from onnx import numpy_helper

        array: np.ndarray[Any, Any] = np.asarray(values, dtype)
        name = "_".join(map(str, ("constant", array.dtype, *array.shape, "of", *array.ravel())))
        self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def finish(self, classes: int) -> bytes:
        """The model's bytes."""
        from onnx import TensorProto, helper

        images = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", "height", "width", 3])
        low = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes, "rows", "columns"])
        graph = helper.make_graph(self._nodes, "pspnet", [images], [low], list(self._tensors.values()))
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="sceneray")
        return bytes(model.SerializeToString(deterministic=True))


def _conv(graph: _Graph, name: str, conv: nn.Conv2d, x: str) -> str:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ConfigError(f"{name} pads with '{conv.padding_mode}' ({conv.padding}); ONNX here knows zeros in numbers.")
    inputs = [x, graph.weight(f"{name}.weight", conv.weight)]
    if conv.bias is not None:
        inputs.append(graph.weight(f"{name}.bias", conv.bias))
    window = {"kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation}
    return graph.add("Conv", *inputs, output=name, **window, pads=conv.padding * 2, group=conv.groups)


def _norm(graph: _Graph, name: str, norm: nn.BatchNorm2d, x: str) -> str:
    kinds = ("weight", "bias", "running_mean", "running_var")
    tensors = [graph.weight(f"{name}.{kind}", getattr(norm, kind)) for kind in kinds]
    return graph.add("BatchNormalization", x, *tensors, output=name, epsilon=norm.eps)


def _relu6(graph: _Graph, _name: str, _layer: nn.ReLU6, x: str) -> str:
    return graph.add("Clip", x, graph.constant(0, np.float32), graph.constant(6, np.float32))


def _max_pool(graph: _Graph, name: str, pool: nn.MaxPool2d, x: str) -> str:
    kernel, stride, padding, dilation = (
        value if isinstance(value, tuple) else (value, value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    window = {"kernel_shape": kernel, "strides": stride, "dilations": dilation}
    return graph.add("MaxPool", x, output=name, **window, pads=padding * 2, ceil_mode=int(pool.ceil_mode))


# Called as f(graph, name of the layer, layer, name of its input); gives the name of its output.
LAYERS: dict[type[nn.Module], Callable[[_Graph, str, Any, str], str]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm,
    nn.ReLU: lambda graph, _name, _layer, x: graph.add("Relu", x),
    nn.ReLU6: _relu6,
    nn.MaxPool2d: _max_pool,
    nn.Identity: lambda _graph, _name, _layer, x: x,
    ChannelDropout: lambda _graph, _name, _layer, x: x,
}
# What forward methods do besides calling layers.
FUNCTIONS: dict[Any, str] = {operator.add: "Add", operator.iadd: "Add", torch.add: "Add"}


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The entry of LAYERS that is for `layer`."""
    return next((kind for kind in type(layer).__mro__ if kind in LAYERS), None)


def _layer(graph: _Graph, name: str, layer: nn.Module, x: str) -> str:
    kind = _kind(layer)
    if kind is None:
        raise _unknown(name, type(layer).__name__, LAYERS)
    return LAYERS[kind](graph, name, layer, x)


class _Tracer(fx.Tracer):
    """Follows forward methods down to the layers that LAYERS knows, and to those that cannot be followed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _traced(graph: _Graph, prefix: str, module: nn.Module, x: str) -> Any:
    """Write what `module.forward` does with `x`; gives what it returns, with names for tensors."""
    values: dict[Any, str] = {}
    for node in _Tracer().trace(module).nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda given: values[given])
        inputs = [values[given] for given in node.all_input_nodes]
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_module":
            target = str(node.target)
            values[node] = _layer(graph, f"{prefix}.{target}", module.get_submodule(target), *inputs)
        elif node.target in FUNCTIONS:
            values[node] = graph.add(FUNCTIONS[node.target], *inputs)
        else:
            raise _unknown(prefix, getattr(node.target, "__name__", str(node.target)), FUNCTIONS)
    raise AssertionError("a traced module has an output")


def _pyramid(graph: _Graph, name: str, pyramid: PyramidPooling, x: str) -> str:
    """See `PyramidPooling.forward`: the map, and each bin's averages brought back to its size, side by side."""
    height, width = (graph.add("Squeeze", graph.add("Shape", x, start=axis, end=axis + 1)) for axis in (2, 3))
    size = graph.add("Shape", x, start=2)
    maps = [x]
    for at, (cells, branch) in enumerate(zip(pyramid.bins, pyramid.branches, strict=True)):
        rows = _averaging_matrix(graph, height, cells)
        columns = graph.add("Transpose", _averaging_matrix(graph, width, cells), perm=[1, 0])
        pooled = graph.add("MatMul", rows, graph.add("MatMul", x, columns))
        low = _traced(graph, f"{name}.branches.{at}", branch, pooled)
        maps.append(_resize(graph, low, size))
    return graph.add("Concat", *maps, axis=1)


def _averaging_matrix(graph: _Graph, size: str, cells: int) -> str:
    """See `pooling.averaging_matrix`; `size` is an integer that a run brings with it."""
    cell, one, many = np.arange(cells)[:, None], graph.constant(1), graph.constant(cells)
    position = graph.add("Range", graph.constant(0), size, one)
    start = graph.add("Div", graph.add("Mul", graph.constant(cell), size), many)
    past = graph.add("Add", graph.add("Mul", graph.constant(cell + 1), size), graph.constant(cells - 1))
    end = graph.add("Div", past, many)
    inside = graph.add("And", graph.add("GreaterOrEqual", position, start), graph.add("Less", position, end))
    width = graph.add("Sub", end, start)
    return graph.add("Div", _float(graph, inside), _float(graph, width))


def _float(graph: _Graph, x: str) -> str:
    from onnx import TensorProto

    return graph.add("Cast", x, to=TensorProto.FLOAT)


def _resize(graph: _Graph, x: str, size: str) -> str:
    """Bilinear, align_corners=False: half_pixel is PyTorch's rule, pytorch_half_pixel differs for outputs of side 1."""
    sizes = graph.add("Concat", graph.add("Shape", x, end=2), size, axis=0)
    return graph.add("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel")


def _unknown(where: str, what: str, known: Iterable[Any]) -> ConfigError:
    names = ", ".join(sorted(getattr(one, "__name__", str(one)) for one in known))
    return ConfigError(
        f"{where} has a {what}, which is not written to ONNX yet; known: {names}. Add it to sceneray.onnx_graph, or "
        "serve the bundle with another runtime."
    )
