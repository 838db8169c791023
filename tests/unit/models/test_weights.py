"""Weights from files: what loads, what is left out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from sceneray.config import ModelSettings
from sceneray.errors import CheckpointError, StorageError
from sceneray.models.backbones import BACKBONES, Backbone
from sceneray.models.norm import BatchNorm2d
from sceneray.models.pspnet import PSPNet, build_model
from sceneray.models.weights import load_backbone, read_state, transfer
from tests.support import shared

State = dict[str, Tensor]


def backbone(seed: int, name: str = "mobilenet_v2") -> Backbone:
    torch.manual_seed(seed)
    return BACKBONES[name](BatchNorm2d)


def network(seed: int, classes: int, **settings: object) -> PSPNet:
    torch.manual_seed(seed)
    values = {"backbone": "mobilenet_v2", "head_width": 8, "aux_width": 8, "pool_width": 4} | settings
    return build_model(ModelSettings(**values), classes)


@pytest.fixture(scope="module")
def imagenet_like() -> State:
    """A whole torchvision classifier's state dict, with random weights."""
    torch.manual_seed(7)
    return torchvision.models.mobilenet_v2(weights=None).state_dict()


def assert_loaded(net: Backbone, state: State) -> None:
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_nothing_is_loaded_without_weights() -> None:
    """None leaves the random weights."""
    net = backbone(0)
    report = load_backbone(net, None)
    assert (report.loaded, report.ignored) == ((), ())
    assert_loaded(net, backbone(0).state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_state_dict_loads_from_a_file(imagenet_like: State, tmp_path: Path, suffix: str, prefix: str) -> None:
    """Torchvision's keys load from either format and below either prefix; the classifier is reported as left out."""
    path = tmp_path / f"weights{suffix}"
    renamed = {prefix + name: tensor for name, tensor in imagenet_like.items()}
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(renamed, path)
    net = backbone(0)
    report = load_backbone(net, str(path))
    assert_loaded(net, imagenet_like)
    assert set(report.loaded) == net.state_dict().keys()
    assert {name.rpartition(".")[0] for name in report.ignored} == {"features.18.0", "features.18.1", "classifier.1"}


def test_a_state_dict_loads_from_any_file_system(imagenet_like: State) -> None:
    """The file may lie at any URL that storage knows."""
    import fsspec

    with fsspec.open("memory://weights/net.safetensors", "wb") as file:
        file.write(safetensors.torch.save(imagenet_like))
    net = backbone(0)
    load_backbone(net, "memory://weights/net.safetensors")
    assert_loaded(net, imagenet_like)


def test_a_whole_network_gives_its_backbone(tmp_path: Path) -> None:
    """From a PSPNet's state dict the backbone is taken, and its heads are reported as left out."""
    source = network(3, classes=5)
    torch.save(source.state_dict(), tmp_path / "psp.pth")
    net = backbone(0)
    report = load_backbone(net, str(tmp_path / "psp.pth"))
    assert_loaded(net, source.backbone.state_dict())
    assert "head.classifier.weight" in report.ignored


def test_counters_may_be_absent(imagenet_like: State, tmp_path: Path) -> None:
    """A file without num_batches_tracked loads: older PyTorch did not write it."""
    plain = {name: t for name, t in imagenet_like.items() if not name.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "old.pth")
    net = backbone(0)
    load_backbone(net, str(tmp_path / "old.pth"))
    assert_loaded(net, imagenet_like)


def test_real_imagenet_features_load() -> None:
    """The real MobileNetV2 file fills the whole backbone; only the classifier's convolution is left out."""
    path = shared("weights/mobilenet_v2_imagenet_features.pth")
    net = backbone(0)
    report = load_backbone(net, str(path))
    state = torch.load(path, weights_only=True)
    assert_loaded(net, state)
    assert set(report.loaded) == net.state_dict().keys()
    assert all(name.startswith("features.18.") for name in report.ignored)


def test_missing_tensors_are_named(imagenet_like: State, tmp_path: Path) -> None:
    """A file without some of the backbone's tensors is refused with their number and the first of them."""
    part = {name: t for name, t in imagenet_like.items() if not name.startswith("features.5.")}
    torch.save(part, tmp_path / "part.pth")
    net = backbone(0)
    with pytest.raises(CheckpointError, match=r"15 missing \(features\.5\.conv\.0\.0\.weight, .*\.\.\.\)"):
        load_backbone(net, str(tmp_path / "part.pth"))
    assert_loaded(net, backbone(0).state_dict())


@pytest.mark.parametrize(("given", "wanted"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_weights_of_another_backbone_are_refused(tmp_path: Path, given: str, wanted: str) -> None:
    """A deeper or a shallower sibling's weights do not load by halves."""
    torch.save(backbone(1, given).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=f"does not fit the backbone {wanted}: tensors .*Give weights of this"):
        load_backbone(backbone(0, wanted), str(tmp_path / "other.pth"))


def test_a_file_that_is_no_state_dict_is_refused(imagenet_like: State, tmp_path: Path) -> None:
    """A wrong suffix, an absent, a truncated, a foreign and a nested file each get a sentence that names the file."""
    whole = tmp_path / "whole.pth"
    torch.save(imagenet_like, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "cut.safetensors").write_bytes(safetensors.torch.save(imagenet_like)[:100_000])
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    torch.save({"epoch": 3, "state_dict": imagenet_like}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match=r"ends in \.pth, \.pt, \.safetensors, got .*net\.ckpt"):
        read_state(str(tmp_path / "net.ckpt"))
    with pytest.raises(StorageError, match=r"no weights at .*absent\.pth"):
        read_state(str(tmp_path / "absent.pth"))
    for name in ("cut.pth", "cut.safetensors", "text.pt"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            read_state(str(tmp_path / name))
    with pytest.raises(CheckpointError, match=r"nested\.pth is not a state dict"):
        read_state(str(tmp_path / "nested.pth"))


class Opened:
    """Pickled, it would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    """A file with a pickled call in it is refused, and the call does not happen."""
    torch.save({"features.0.0.weight": Opened(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_imagenet_is_torchvisions_file(imagenet_like: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """'imagenet' reads the file of torchvision's default weights where its cache has it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.MobileNet_V2_Weights.DEFAULT.url
    torch.save(imagenet_like, cache / url.rsplit("/", 1)[1])
    net = backbone(0)
    load_backbone(net, "imagenet")
    assert_loaded(net, imagenet_like)


def test_imagenet_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache and a network the error names the file and the setting that takes a copy of it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: no request leaves this machine
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(StorageError, match=r"cannot download https://.*mobilenet_v2.*set model\.weights to a copy"):
        load_backbone(backbone(0), "imagenet")


@pytest.mark.parametrize("classes", [3, 5])
def test_transfer_to_other_classes_makes_the_classifiers_anew(classes: int) -> None:
    """All but the two 1×1 convolutions is loaded, and those are listed and keep their values, though their number may
    be the same: what they knew were other things."""
    source, target = network(1, classes).state_dict(), network(2, 3)
    fresh = network(2, 3).state_dict()
    report = transfer(target, source, same_classes=False)
    anew = [f"{head}.classifier.{kind}" for head in ("head", "aux_head") for kind in ("weight", "bias")]
    assert list(report.made_anew) == anew
    assert {*report.loaded, *anew} == target.state_dict().keys()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, (fresh if name in anew else source)[name]), name


def test_transfer_to_the_same_classes_loads_all() -> None:
    """With the same classes nothing is made anew."""
    source, target = network(1, 3).state_dict(), network(2, 3)
    report = transfer(target, source, same_classes=True)
    assert report.made_anew == ()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source[name]), name


def test_transfer_between_other_networks_is_refused() -> None:
    """Another head width, other bins or another backbone is no other set of classes: nothing is loaded."""
    target = network(2, 3)
    for source in (network(1, 3, head_width=16), network(1, 3, bins=(1, 2)), network(1, 3, backbone="resnet18")):
        with pytest.raises(CheckpointError, match="of another network"):
            transfer(target, source.state_dict(), same_classes=True)
    before = network(2, 3).state_dict()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name
