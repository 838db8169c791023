"""Weights from elsewhere: an ImageNet classifier for the backbone, a checkpoint of ours for fine-tuning.

State dicts are read as tensors only (safetensors, or torch.load with weights_only=True): a file cannot run code.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from sceneray import storage
from sceneray.errors import CheckpointError, StorageError
from sceneray.models.backbones import Backbone

IMAGENET = "imagenet"
SUFFIXES = (".pth", ".pt", ".safetensors")

# What torchvision's classifiers have beyond the features: not a part of a backbone here.
_CLASSIFIER = ("fc.", "classifier.", "features.18.")
# Parts of a network whose shape depends on the number of classes.
_PER_CLASS = ("head.classifier.", "aux_head.classifier.")
_SHOWN = 4


@dataclass(frozen=True)
class BackboneReport:
    """Names of tensors: `loaded` into the backbone, `ignored` in the file."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class TransferReport:
    """Names of the network's tensors: `loaded` from the other network, `made_anew` with random values."""

    loaded: tuple[str, ...]
    made_anew: tuple[str, ...]


def load_backbone(backbone: Backbone, weights: str | None) -> BackboneReport:
    """Load `weights` into `backbone`: None (nothing), 'imagenet' (torchvision's download) or a URL of a state dict.

    A file's keys are torchvision's, with or without `module.` and `backbone.` before them. Classifier layers are
    ignored, and so is what is not below `backbone.` where the file has that prefix.
    Raises CheckpointError where a tensor is missing, has another shape or belongs to another network; StorageError
    where the file or the download fails. The backbone is unchanged then.
    """
    if weights is None:
        return BackboneReport((), ())
    found = imagenet_state(backbone.name) if weights == IMAGENET else read_state(weights)
    state, ignored = _backbone_part(found)
    own = backbone.state_dict()
    _check(own, state, f"{weights} does not fit the backbone {backbone.name}", "Give weights of this backbone.")
    backbone.load_state_dict({**own, **state})
    return BackboneReport(tuple(name for name in own if name in state), ignored)


def transfer(model: nn.Module, state: Mapping[str, Tensor], same_classes: bool) -> TransferReport:
    """Start `model` (a PSPNet) from the tensors of another one.

    Without `same_classes` the 1×1 convolutions to the classes keep their random values, also where their number is
    equal: what they knew were other things. All other tensors are loaded. Raises CheckpointError, and changes nothing,
    where a name or a shape of those disagrees.
    """
    own = model.state_dict()
    anew = [] if same_classes else [name for name in own if name.startswith(_PER_CLASS)]
    kept = {name: tensor for name, tensor in state.items() if name not in anew}
    rest = {name: tensor for name, tensor in own.items() if name not in anew}
    _check(rest, kept, "the checkpoint is of another network", "Use the model settings in its config.yaml.")
    model.load_state_dict({**own, **kept})
    return TransferReport(tuple(name for name in own if name in kept), tuple(anew))


def imagenet_state(name: str) -> dict[str, Tensor]:
    """Torchvision's recommended ImageNet weights of the classifier `name`, from its cache or the network."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network or no disk; a download whose hash differs
        raise StorageError(
            f"cannot download {weights.url}: {error}. Without a network set model.weights to a copy of it."
        ) from error
    return state


def read_state(url: str) -> dict[str, Tensor]:
    """The state dict in the file at `url` (.pth, .pt or .safetensors), on the CPU."""
    if not url.endswith(SUFFIXES):
        raise CheckpointError(f"weights must be a file that ends in {', '.join(SUFFIXES)}, got {url}.")
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise StorageError(f"no weights at {url}: check the path.") from error
    state = _parse(url, data)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{url} is not a state dict of tensors: save model.state_dict() alone.")
    return {str(name): tensor for name, tensor in state.items()}


def _parse(url: str, data: bytes) -> Any:
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds; each means the same to the user
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{url} cannot be read as a state dict of tensors ({first[0]}). It is damaged, or holds more than tensors: "
            "save model.state_dict() alone."
        ) from error


def _backbone_part(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    plain = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if any(name.startswith("backbone.") for name in plain):
        state = {name.removeprefix("backbone."): t for name, t in plain.items() if name.startswith("backbone.")}
        ignored = [name for name in plain if not name.startswith("backbone.")]
    else:
        state, ignored = plain, []
    classifier = [name for name in state if name.startswith(_CLASSIFIER)]
    return {name: t for name, t in state.items() if name not in classifier}, (*ignored, *classifier)


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, fix: str) -> None:
    # Files of PyTorch before 0.4.1, and converted ones, do not count batches; nothing here depends on it.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{what}: tensors {'; '.join(problems)}. {fix}")
