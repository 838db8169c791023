"""Committed checkpoints (interface 3): a folder written file by file and made to exist by its manifest, last.

    RUN/checkpoints/step-00000120-a001/   model.safetensors optimizer.safetensors state.json config.yaml manifest.json
                                          and ema.safetensors where an average of the weights is kept
    RUN/last, RUN/best                    pointers: small JSON files that name one of those folders

What exists is decided by the store alone. A checkpoint carries the attempt that wrote it: a lower attempt (a worker
group that a controller gave up but that still runs) never moves a pointer and never prunes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.data.store import ClassInfo
from sceneray.errors import CheckpointError, ConflictError, StorageError, UnreachableError
from sceneray.models.pspnet import PSPNet, build_model
from sceneray.retention import FOLDER as FOLDER
from sceneray.retention import FORMAT as FORMAT
from sceneray.retention import VERSION as VERSION
from sceneray.retention import name_of as name_of
from sceneray.retention import names as names
from sceneray.retention import prune as prune
from sceneray.retention import resolve as resolve

EMA = "ema.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and verified. Tensors are contiguous and on the CPU."""

    url: str
    digest: str  # sha256 of the manifest, which holds the sha256 of every file
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "parameter name/state name"
    state: dict[str, Any]
    settings: TrainSettings
    ema: dict[str, Tensor] = field(default_factory=dict)  # averaged weights by name; empty where no average is kept

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The val metrics measured on this checkpoint's weights; empty where none were."""
        return dict(self.state["metrics"])

    @property
    def store_digest(self) -> str:
        """Digest of the dataset store it was trained on."""
        return str(self.state["store_digest"])

    @property
    def ignore_index(self) -> int:
        """The label value that means "no class"."""
        return int(self.state["ignore_index"])

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes, in the order of the network's outputs."""
        return classes_from_json(self.state["classes"])


def classes_to_json(classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """Classes as plain JSON values."""
    return [{"id": c.id, "name": c.name, "color": list(c.color)} for c in classes]


def classes_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[ClassInfo, ...]:
    """The inverse of `classes_to_json`."""
    return tuple(ClassInfo(int(v["id"]), str(v["name"]), tuple(v["color"])) for v in values)


def save(
    run: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    settings: TrainSettings,
    ema: Mapping[str, Tensor] | None = None,
) -> str:
    """Commit a checkpoint of `run` and return its name below RUN. `state` holds `step`, `attempt` and `metrics`.

    Every file is read back before the checkpoint exists; raises StorageError where one is not what was written.
    """
    name = name_of(state["step"], state["attempt"])
    files = {
        "model.safetensors": _tensor_bytes(model),
        "optimizer.safetensors": _tensor_bytes(optimizer),
        "state.json": json.dumps(dict(state), indent=1, sort_keys=True).encode(),
        "config.yaml": config.dump(settings).encode(),
    }
    if ema:
        files[EMA] = _tensor_bytes(ema)
    # Those who list or prune need no more than this: one small read a checkpoint.
    brief = {"step": state["step"], "attempt": state["attempt"], "miou": state["metrics"].get("miou")}
    storage.commit(storage.join(run, name), files, {"format": FORMAT, "version": VERSION, **brief}, verify=True)
    return name


def load(url: str) -> Checkpoint:
    """The checkpoint at `url`: a checkpoint folder, or a pointer such as RUN/best or RUN/last.

    Every file is checked against the manifest. Raises CheckpointError with what is wrong and what to do.
    """
    folder = resolve(url)
    try:
        committed = storage.open_committed(folder)
        if committed is None:
            raise CheckpointError(_nothing_at(url))
        found = (committed.manifest.get("format"), committed.manifest.get("version"))
        if found != (FORMAT, VERSION):
            raise CheckpointError(
                f"{folder} is a {found[0]} of version {found[1]}; this sceneray reads {FORMAT} of version {VERSION}. "
                "Give a checkpoint, or use the sceneray that wrote it."
            )
        return Checkpoint(
            url=folder,
            digest=committed.digest,
            model=safetensors.torch.load(committed.read("model.safetensors")),
            optimizer=safetensors.torch.load(committed.read("optimizer.safetensors")),
            state=json.loads(committed.read("state.json")),
            settings=TrainSettings.model_validate(yaml.safe_load(committed.read("config.yaml"))),
            ema=safetensors.torch.load(committed.read(EMA)) if EMA in committed.manifest["files"] else {},
        )
    except UnreachableError:
        raise  # says nothing about the checkpoint
    except (StorageError, SafetensorError) as error:
        raise CheckpointError(f"{error} Use another checkpoint of the run: RUN/{FOLDER} lists them.") from error


def build(checkpoint: Checkpoint) -> PSPNet:
    """The network of a checkpoint, in evaluation mode on the CPU.

    Where an average of the weights is kept, it is the network: it was scored, and it is what is exported.
    """
    model = build_model(checkpoint.settings.model, len(checkpoint.classes), load_weights=False)
    model.load_state_dict({**checkpoint.model, **checkpoint.ema}, strict=True)
    return model.eval()


def newest(run: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest committed checkpoint of `run` that verifies; None where there is none.

    A committed one that is damaged is passed over, and `warn` is told.
    """
    for name in reversed(names(run)):
        url = storage.join(run, name)
        if not storage.exists(storage.join(url, storage.MANIFEST)):
            continue
        try:
            return load(url)
        except CheckpointError as error:
            warn(f"passing over a damaged checkpoint: {error}")
    return None


def point(run: str, pointer: str, name: str, state: Mapping[str, Any], better: bool = False) -> bool:
    """Move RUN/`pointer` to the checkpoint `name` and return True; by compare-and-swap, fenced by attempt.

    With `better`, only where its val mIoU is above that of the checkpoint that the pointer names now. Returns False
    where the pointer stays: a later attempt moved it, or it is no better.
    """
    url = storage.join(run, pointer)
    miou = state["metrics"].get("miou")
    value = {"checkpoint": name, "step": state["step"], "attempt": state["attempt"], "miou": miou}
    data = (json.dumps(value, indent=1) + "\n").encode()
    while True:
        tag = storage.etag(url)
        now = storage.read_json(url) if tag is not None else None
        if now is not None and now["attempt"] > state["attempt"]:
            return False
        if now is not None and better and not _above(miou, now["miou"]):
            return False
        try:
            storage.compare_and_swap(url, tag, data)
            return True
        except ConflictError:
            continue  # somebody moved it between our read and our write: look again


def point_both(run: str, name: str, state: Mapping[str, Any]) -> bool:
    """Move `last` to a committed checkpoint, and `best` where its score is higher; False where a later attempt moved
    `last`, and nothing is moved then."""
    if not point(run, "last", name, state):
        return False
    if state["metrics"]:
        point(run, "best", name, state, better=True)
    return True


def _above(new: float | None, old: float | None) -> bool:
    return new is not None and (old is None or new > old)


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors stores contiguous tensors only; channels_last weights are restrided when they are loaded.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain)
    return data


def _nothing_at(url: str) -> str:
    text = f"no committed checkpoint at {url}"
    if storage.is_file(storage.join(url, "config.yaml")) and not storage.exists(storage.join(url, storage.MANIFEST)):
        return (
            f"{text}: without a manifest its writing never finished, or it is a run folder. Give RUN/best or RUN/last."
        )
    return f"{text}: nothing is there. Give RUN/best, RUN/last or a folder below RUN/{FOLDER}."
