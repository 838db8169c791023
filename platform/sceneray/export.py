"""Checkpoint to bundle, and proof that the bundle answers before anybody relies on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from sceneray import bundle, checkpoint, onnx_graph, storage
from sceneray.bundle import GOLDEN_HEIGHT, GOLDEN_WIDTH
from sceneray.errors import BundleError, ConflictError
from sceneray.predictor import Predictor


def export(
    checkpoint_url: str,
    bundle_url: str,
    name: str,
    version: str | None = None,
    overwrite: bool = False,
    rule: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the bundle of a checkpoint, load what was written and run its golden image.

    `rule` says how photographs become the network's input: {"rule": "native", "resize" or "window", "long_side": pixels
    of `resize`, "window": side of a window, "warm": [[height, width], ...] to run before a server is ready}; what it
    leaves out follows from the training crop. `version` names the model's version; None: the first 12 digits of the
    checkpoint's digest.

    Returns {bundle, digest, name, version, checkpoint, metrics, golden_pixels, bytes}. Raises ConflictError where a
    bundle stands at `bundle_url` already and `overwrite` is not set, and BundleError where the written bundle does not
    answer as the checkpoint does: its manifest is removed then, so that no reader takes it for a bundle; ConfigError
    for a name or version that cannot stand in a header.
    """
    url = storage.absolute(bundle_url)
    bundle.check_names(name, version or "-")
    _refuse(url, overwrite)
    source = checkpoint.load(checkpoint_url)
    version = version or source.digest[:12]
    about = {
        "name": name,
        "version": version,
        "metrics": {
            "store_digest": source.store_digest,
            "split": source.settings.data.val_split,
            "values": source.metrics,
        },
        "source": {"checkpoint": storage.basename(source.url), "digest": source.digest, "step": source.step},
    }
    about["input"] = input_rule(source.settings.augment.crop, rule or {})
    model = checkpoint.build(source)
    # Only now does an old bundle go, its manifest first: old manifest and new files together would be a damaged bundle.
    _withdraw(url)
    # Its package is an extra: without it a bundle is served by PyTorch everywhere.
    graph = onnx_graph.export(model.eval()) if find_spec("onnx") is not None else None
    written = bundle.write(url, model, source.settings.model, source.classes, source.ignore_index, about, graph)
    _prove(url)
    return {
        "bundle": url,
        "digest": written.digest,
        "name": name,
        "version": version,
        "checkpoint": source.url,
        "metrics": source.metrics,
        "golden_pixels": GOLDEN_HEIGHT * GOLDEN_WIDTH,
        "bytes": sum(entry["bytes"] for entry in written.manifest["files"].values()),
    }


def input_rule(crop: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """The input rule of a network trained on crops of (height, width) `crop`; `given` has the last word."""
    return {"rule": "native", "window": max(crop), "warm": [list(crop)], **given}


def _refuse(url: str, overwrite: bool) -> None:
    """Raise ConflictError rather than write over a bundle, or over a committed folder of any other kind."""
    standing = storage.open_committed(url)
    if standing is None:
        return
    kind = standing.manifest.get("format")
    if kind != bundle.FORMAT:
        raise ConflictError(f"{url} holds a {kind or 'folder of another kind'}. Give another BUNDLE.")
    if not overwrite:
        raise ConflictError(f"a bundle stands at {url} already. Give another BUNDLE, or --overwrite to replace it.")


def _prove(url: str) -> None:
    """Run the golden image through the bundle at `url`; on one machine every pixel must agree."""
    try:
        loaded = bundle.load(url)
        mask = Predictor(loaded, device="cpu").predict([loaded.golden])[0]
    except BaseException:
        _withdraw(url)
        raise
    wrong = int((mask != loaded.golden_mask).sum())
    if wrong:
        _withdraw(url)
        raise BundleError(
            f"the bundle written to {url} answers {wrong} of {mask.size} pixels of the golden image unlike the "
            "checkpoint. It was withdrawn. Export again; if it repeats, the network is not deterministic."
        )


def _withdraw(url: str) -> None:
    storage.remove(storage.join(url, storage.MANIFEST))
