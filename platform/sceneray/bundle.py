"""What is deployed (interface 4): one committed folder with the network and all that a caller must know of it.

    BUNDLE/model.safetensors   weights, without the auxiliary head (it only helps training)
    BUNDLE/bundle.json         name, version, classes, input rule, network settings, metrics, where it came from
    BUNDLE/golden.png          a drawn town scene
    BUNDLE/golden_mask.png     what the network answered for it when the bundle was written
    BUNDLE/model.onnx          the network for ONNX Runtime, where it was exported with the extra `onnx`
    BUNDLE/manifest.json       sizes and sha256 of the others, written last: without it there is no bundle

The golden image is drawn, never a photograph of the training set: a bundle is handed to people and machines that may
not see the data it was trained on. Nothing is pickled. Mean and standard deviation are buffers of the network, so
callers pass plain uint8 RGB.
"""

from __future__ import annotations

import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from sceneray import __version__, environment, repository, storage
from sceneray.checkpoint import classes_from_json, classes_to_json
from sceneray.config import ModelSettings, validate
from sceneray.data import town
from sceneray.data.images import decode_image, decode_label
from sceneray.data.store import ClassInfo
from sceneray.errors import BundleError, ConfigError, StorageError
from sceneray.masks import Mask, Photo, indexed_png
from sceneray.models.pspnet import MEAN, STD, PSPNet, build_model
from sceneray.storage import Committed

FORMAT = "sceneray-bundle"
VERSION = 1
WEIGHTS, ABOUT, GOLDEN, GOLDEN_MASK = "model.safetensors", "bundle.json", "golden.png", "golden_mask.png"
GRAPH = "model.onnx"
GOLDEN_SEED, GOLDEN_HEIGHT, GOLDEN_WIDTH = 2017, 192, 256
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")
LIBRARIES = ("torch", "torchvision", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Bundle:
    """A bundle read back, every digest checked. `model` is in evaluation mode, channels_last, on the CPU."""

    url: str
    digest: str  # sha256 of the manifest: names the whole content
    model: PSPNet
    settings: ModelSettings
    classes: tuple[ClassInfo, ...]
    ignore_index: int
    about: dict[str, Any]  # bundle.json
    golden: Photo  # uint8 [H, W, 3]
    golden_mask: Mask  # uint8 [H, W]
    graph: bytes | None = None  # the network as ONNX, for ONNX Runtime

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.about["name"])

    @property
    def version(self) -> str:
        """The model's version, as its exporter named it."""
        return str(self.about["version"])

    @property
    def min_side(self) -> int:
        """The least height and width of an image, in pixels."""
        return int(self.about["input"]["min_side"])


def write(
    url: str,
    model: PSPNet,
    settings: ModelSettings,
    classes: Sequence[ClassInfo],
    ignore_index: int,
    about: Mapping[str, Any],
    graph: bytes | None = None,
) -> Committed:
    """Commit a bundle at `url`.

    `about` holds `name` and `version`, and whatever else describes the model: `metrics` (with the digest of the store
    they were measured on), `source` (the checkpoint's digest), `input` (how photographs become the network's input: see
    `sceneray.export`). `graph`: the network as ONNX (`sceneray.onnx_graph`). The golden mask is what `model` answers.
    Raises ConfigError for a name or version that `check_names` refuses.
    """
    check_names(about["name"], about["version"])
    golden = golden_image()
    model = _ready(model)
    answer = golden_answer(model, golden)
    document = {
        **about,
        "format": FORMAT,
        "format_version": VERSION,
        "classes": classes_to_json(classes),
        "ignore_index": ignore_index,
        "input": {**_input_rule(settings), **about.get("input", {})},
        "output": {"layout": "HW", "dtype": "uint8", "values": "class ids"},
        # Where the backbone's first weights came from is of no use here, and may be somebody's private path.
        "model": settings.model_copy(update={"weights": None}).model_dump(mode="json"),
        "versions": versions(),
        "platform": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files = {
        WEIGHTS: safetensors.torch.save(_deployed(model)),
        ABOUT: (json.dumps(document, indent=1, sort_keys=True) + "\n").encode(),
        GOLDEN: _png(golden),
        GOLDEN_MASK: indexed_png(answer, classes),
    }
    if graph is not None:
        files[GRAPH] = graph
    return storage.commit(url, files, {"format": FORMAT, "version": VERSION})


def load(url: str) -> Bundle:
    """The bundle at `url`, verified and built.

    Raises BundleError where there is none, where it is damaged, or where it is of another format version.
    """
    committed = find(url)
    try:
        files = {name: committed.read(name) for name in committed.manifest["files"]}
        about = json.loads(files[ABOUT])
        settings = validate(ModelSettings, about["model"], f"{committed.url}/{ABOUT}")
        classes = classes_from_json(about["classes"])
        model = build_model(settings, len(classes), load_weights=False)
        del model.aux_head  # the bundle has no weights for it, and evaluation does not use it
        model.load_state_dict(safetensors.torch.load(files[WEIGHTS]), strict=True)
        return Bundle(
            url=committed.url,
            digest=committed.digest,
            model=_ready(model),
            settings=settings,
            classes=classes,
            ignore_index=int(about["ignore_index"]),
            about=about,
            golden=decode_image(files[GOLDEN]),
            golden_mask=decode_label(files[GOLDEN_MASK]),
            graph=files.get(GRAPH),
        )
    except (StorageError, SafetensorError, ConfigError, KeyError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"the bundle at {url} cannot be loaded: {_why(error)} Export it again: {_how(url)}"
        ) from error


def check_names(name: str, version: str) -> None:
    """Raise ConfigError unless both can stand in a header, a path and a metric's label."""
    for what, value in (("name", name), ("version", version)):
        if not _NAME.fullmatch(value):
            raise ConfigError(
                f"a model's {what} has 1 to 64 letters, digits, dots, dashes, underscores or pluses, got {value!r}."
            )


def find(url: str) -> Committed:
    """The committed folder of the bundle at `url`, or that REPO/MODEL@champion names (`sceneray.repository`); its
    format checked but its files not yet read.

    Raises BundleError where there is no bundle that this version reads.
    """
    committed = repository.resolve(url)
    url = committed.url
    kind, version = committed.manifest.get("format"), committed.manifest.get("version")
    if kind != FORMAT:
        raise BundleError(
            f"{url} holds a {kind or 'folder of another kind'}, not a bundle. Export it first: {_how('BUNDLE')}"
        )
    if version != VERSION:
        raise BundleError(
            f"the bundle at {url} is of format version {version}, and this sceneray ({__version__}) reads version "
            f"{VERSION}. Export it again with this sceneray, or serve it with the one that wrote it."
        )
    return committed


def verify(url: str) -> Committed:
    """The bundle at `url`, every file read and checked against its digest, without building the network.

    Raises BundleError where there is none, or where it is damaged.
    """
    committed = find(url)
    try:
        committed.verify()
    except StorageError as error:
        raise BundleError(f"{error} Export it again: {_how(url)}") from error
    return committed


def golden_image() -> Photo:
    """The drawn scene that every bundle answers: uint8 [192, 256, 3]."""
    return town.draw(GOLDEN_SEED, GOLDEN_HEIGHT, GOLDEN_WIDTH)[0]


def versions() -> dict[str, str]:
    """Versions of this code and of the libraries that can change an answer."""
    return {"sceneray": __version__} | {name: metadata.version(name) for name in LIBRARIES}


def machine() -> dict[str, Any]:
    """What of this machine can change the last bit of a CPU's answer, and with it a pixel between two classes."""
    cpu = environment.hardware()["processor"]
    about = {"system": platform.system(), "machine": platform.machine(), "processor": cpu}
    return about | {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def golden_answer(model: PSPNet, golden: Photo) -> Mask:
    """What `model` says of the golden image: uint8 [H, W]."""
    batch = torch.tensor(golden[None]).permute(0, 3, 1, 2)
    answer: Mask = model.predict(batch)[0].cpu().numpy()
    return answer


def _ready(model: PSPNet) -> PSPNet:
    """In place: evaluation mode, and the memory format in which convolutions are fastest."""
    return model.to(memory_format=torch.channels_last).eval()


def _deployed(model: PSPNet) -> dict[str, Tensor]:
    """The weights without the auxiliary head; contiguous, as safetensors wants them."""
    tensors = model.state_dict()
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if not name.startswith("aux_head.")}


def _input_rule(settings: ModelSettings) -> dict[str, Any]:
    """What a caller passes. The network applies mean and std itself; they are told for other runtimes."""
    rule: dict[str, Any] = {"layout": "HWC", "dtype": "uint8", "color": "RGB", "range": [0, 255]}
    return rule | {"min_side": settings.output_stride, "mean": list(MEAN), "std": list(STD)}


def _png(image: Photo) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
    return out.getvalue()


def _why(error: Exception) -> str:
    """One line of what went wrong: torch names every tensor that does not fit, the first will do."""
    if isinstance(error, KeyError):
        return f"{ABOUT} has no {error}."
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[:2])


def _how(url: str) -> str:
    return f"sceneray export CHECKPOINT {url}"
