"""Bundles of networks with random weights, and a network as a tutorial runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sceneray import bundle, onnx_graph
from sceneray.bundle import Bundle
from sceneray.config import ModelSettings
from sceneray.data.store import ClassInfo
from sceneray.models.pspnet import build_model
from sceneray.runtimes import Batch, Scorer


def write_random(folder: str, settings: ModelSettings, classes: Sequence[ClassInfo], with_graph: bool = False) -> None:
    """A bundle of a network with random weights: how fast it is does not depend on what it learned."""
    torch.manual_seed(0)
    model = build_model(settings, len(classes), load_weights=False)
    graph = onnx_graph.export(model.eval()) if with_graph else None
    bundle.write(folder, model, settings, classes, 255, {"name": "benchmark", "version": "0"}, graph)


def tutorial(loaded: Bundle, device: torch.device) -> Scorer:
    """The peer: images as contiguous NCHW, a network as PyTorch builds it, eager, float32. Changes `loaded`."""
    net = loaded.model.to(device, memory_format=torch.contiguous_format)

    @torch.inference_mode()
    def scores(batch: Batch) -> torch.Tensor:
        return net.scores(torch.as_tensor(batch).to(device).permute(0, 3, 1, 2).contiguous())

    return scores
