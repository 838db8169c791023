"""Runtimes: each gives the network's scores, uses the cores it was given, and refuses in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pytest
import torch

from sceneray import bundle, onnx_graph, runtimes, storage
from sceneray.bundle import Bundle
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.errors import BundleError, ConfigError
from sceneray.models.pspnet import build_model
from sceneray.predictor import Predictor
from serve.batching import Limits
from serve.schemas import Rules
from serve.segmenter import Segmenter
from serve.settings import ServeArgs
from tests.bundles import write_lively_bundle

CPU = torch.device("cpu")
SETTINGS = ModelSettings(backbone="resnet18", output_stride=16, pool_width=4, head_width=8, aux_width=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a narrow network with random weights, without a graph."""
    torch.manual_seed(5)
    url = str(tmp_path_factory.mktemp("plain"))
    net = build_model(SETTINGS, len(town.CLASSES), load_weights=False)
    bundle.write(url, net, SETTINGS, town.CLASSES, 255, {"name": "random", "version": "1"})
    return bundle.load(url)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose masks have many regions."""
    return bundle.load(write_lively_bundle(str(tmp_path_factory.mktemp("lively"))))


@pytest.fixture(scope="module")
def batch() -> runtimes.Batch:
    """Two scenes whose sides no stride divides."""
    return np.stack([town.draw(seed, 75, 91)[0] for seed in (1, 2)])


def expected(loaded: Bundle, batch: runtimes.Batch) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model.scores(torch.from_numpy(batch).permute(0, 3, 1, 2))


def with_graph(loaded: Bundle, folder: Path, graph: bytes) -> Bundle:
    """A copy of the bundle that holds `graph`."""
    committed = bundle.find(loaded.url)
    files = {name: committed.read(name) for name in committed.manifest["files"]}
    kind = {"format": bundle.FORMAT, "version": bundle.VERSION}
    storage.commit(str(folder), {**files, runtimes.GRAPH: graph}, kind)
    return bundle.load(str(folder))


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_a_runtime_gives_the_networks_scores(plain, batch, name):
    """Scores before upsampling, float32 on the device, for several images and for one."""
    scores = runtimes.start(name, plain, CPU)
    for images in (batch, batch[:1]):
        found = scores(images)
        assert found.device == CPU
        assert found.dtype == torch.float32
        assert found.shape == (len(images), len(town.CLASSES), 5, 6)
        torch.testing.assert_close(found, expected(plain, images), rtol=1e-4, atol=1e-4)


def test_onnx_runtime_answers_a_batch_as_its_images_alone(plain, batch):
    """Byte for byte, in a batch and alone, with one thread and with two: no neighbour shows in an answer."""
    together = runtimes.start("onnx", plain, CPU, 2)(batch)
    alone = runtimes.start("onnx", plain, CPU, 1)
    for at in range(len(batch)):
        assert torch.equal(together[at], alone(batch[at : at + 1])[0])


@pytest.mark.chaos  # minutes of compiling
def test_the_compiler_gives_the_networks_scores(plain, batch):
    """So does PyTorch's compiler, at another size too and where the features have a single row or column."""
    scores = runtimes.start("compile", plain, CPU)
    for size in ((75, 91), (61, 83), (16, 200), (200, 16)):
        for count in (2, 1):
            images = np.stack([town.draw(seed, *size)[0] for seed in range(count)])
            torch.testing.assert_close(scores(images), expected(plain, images), rtol=1e-4, atol=1e-4)


def test_a_cpu_computes_in_float32_unless_told(plain, batch):
    """`auto` is fp32 on a CPU, bit for bit, with every runtime there."""
    for name in ("torch", "onnx"):
        auto, told = (runtimes.start(name, plain, CPU, precision=word)(batch) for word in ("auto", "fp32"))
        assert torch.equal(auto, told)
    assert Predictor(plain, "cpu", precision="auto").precision == "fp32"


def test_bfloat16_answers_nearly_the_same(lively):
    """Forced on a CPU: other scores, in float32 for the upsampling, and at least 99 % of the golden pixels. The
    bundle's own weights stay as they were."""
    golden = np.stack([lively.golden])
    exact, rounded = (Predictor(lively, "cpu", precision=word) for word in ("fp32", "bf16"))
    assert (exact.precision, rounded.precision) == ("fp32", "bf16")
    scores = rounded.scores(golden)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact.scores(golden))
    assert rounded.self_check() >= 0.99
    assert exact.self_check() == 1
    assert {weight.dtype for weight in lively.model.parameters()} == {torch.float32}


def test_the_endpoint_offers_what_there_is():
    """Its settings name every runtime and every precision."""
    (runtime,) = [kind for kind in get_args(ServeArgs.model_fields["runtime"].annotation) if get_args(kind)]
    assert set(get_args(runtime)) == set(runtimes.RUNTIMES)
    assert get_args(ServeArgs.model_fields["precision"].annotation) == get_args(runtimes.Precision)
    assert ServeArgs(bundle="b").rules.precision == "auto"
    assert ServeArgs(bundle="b", precision="bf16").rules.precision == "bf16"


def test_the_endpoints_precision_reaches_the_runtime(plain):
    """Here it is the one that the runtime refuses."""
    limits = Limits(max_items=1, max_cost=2**20, max_queued_cost=2**20, max_wait_s=0)
    with pytest.raises(ConfigError, match="got precision 'bf16'"):
        Segmenter.load(plain.url, limits, "cpu", rules=Rules(runtime="onnx", precision="bf16"))


def test_the_bundles_own_graph_is_the_one_that_runs(plain, batch, tmp_path):
    """A bundle with a graph is answered by it: here one whose last bias was raised by 1."""
    other = build_model(SETTINGS, len(town.CLASSES), load_weights=False)
    other.load_state_dict(plain.model.state_dict(), strict=False)
    with torch.no_grad():
        other.head.classifier.bias += 1
    holder = with_graph(plain, tmp_path / "holder", onnx_graph.export(other))
    found = runtimes.start("onnx", holder, CPU)(batch)
    torch.testing.assert_close(found, expected(plain, batch) + 1, rtol=1e-4, atol=1e-4)


def test_a_damaged_graph_is_refused_with_its_bundle(plain, tmp_path):
    """The graph is one of the bundle's files: its digest is checked when the bundle is loaded, and held in memory."""
    folder = tmp_path / "holder"
    holder = with_graph(plain, folder, onnx_graph.export(plain.model))
    (folder / runtimes.GRAPH).write_bytes(holder.graph[:-1] + b"x")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        bundle.load(holder.url)
    runtimes.start("onnx", holder, CPU)


def test_a_cpu_serves_a_bundle_with_a_graph_by_onnx_runtime(plain, tmp_path):
    """Where the bundle has a graph and the device is a CPU; PyTorch everywhere else."""
    holder = with_graph(plain, tmp_path / "holder", onnx_graph.export(plain.model))
    assert runtimes.best(holder, CPU) == "onnx"
    assert runtimes.best(holder, torch.device("cuda")) == "torch"
    assert runtimes.best(plain, CPU) == "torch"
    assert Predictor(holder, "cpu", runtime=None).self_check() > 0.99


def test_a_graph_that_is_none_is_refused(plain, tmp_path):
    """A file of that name which ONNX Runtime cannot read is a damaged bundle, told in words."""
    with pytest.raises(BundleError, match=r"model\.onnx .* cannot be run: .*Export the bundle again"):
        runtimes.start("onnx", with_graph(plain, tmp_path / "bad", b"no graph"), CPU)


def test_onnx_runtime_uses_the_threads_it_was_given(plain, batch):
    """With 3 threads there are 2 more than before, with 1 none: the machine's other cores stay free."""
    process = psutil.Process()
    for threads in (1, 3):
        before = process.num_threads()
        scores = runtimes.start("onnx", plain, CPU, threads)
        scores(batch)
        assert process.num_threads() - before == threads - 1
        del scores


def test_pytorch_uses_the_threads_it_was_given(plain):
    """`threads` is set for PyTorch; without it nothing changes."""
    before = torch.get_num_threads()
    try:
        runtimes.start("torch", plain, CPU, before + 1)
        assert torch.get_num_threads() == before + 1
        runtimes.start("torch", plain, CPU)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_cannot_run_is_refused_in_words(plain, monkeypatch):
    """An unknown name, no threads, ONNX Runtime for a GPU, and a missing package each have their sentence."""
    with pytest.raises(ConfigError, match="unknown runtime 'onxx': did you mean 'onnx'"):
        runtimes.start("onxx", plain, CPU)
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        runtimes.start("torch", plain, CPU, 0)
    with pytest.raises(ConfigError, match="computes on the CPU, and the device is cuda:1"):
        runtimes.start("onnx", plain, torch.device("cuda:1"))
    with pytest.raises(ConfigError, match=r"computes on a CUDA device, and the device is cpu\. Use torch or .*onnx\."):
        runtimes.start("cuda_graph", plain, CPU)
    with pytest.raises(ConfigError, match="unknown precision 'fp23': did you mean 'fp32'"):
        runtimes.start("torch", plain, CPU, precision="fp23")
    with pytest.raises(ConfigError, match="'onnx' computes in fp32, got precision 'bf16'"):
        runtimes.start("onnx", plain, CPU, precision="bf16")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'sceneray\[onnx\]'"):
        runtimes.start("onnx", plain, CPU)


def test_only_a_bundle_without_a_graph_needs_the_package_onnx(plain, batch, tmp_path, monkeypatch):
    """A server whose bundle holds a graph runs it with ONNX Runtime alone; else the graph is written first."""
    holder = with_graph(plain, tmp_path / "holder", onnx_graph.export(plain.model))
    monkeypatch.setitem(sys.modules, "onnx", None)
    torch.testing.assert_close(runtimes.start("onnx", holder, CPU)(batch), expected(plain, batch), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="needs the package onnx,"):
        runtimes.start("onnx", plain, CPU)
