"""What a result was made with: code, versions, hardware, data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sceneray
from sceneray.devices import usable_cores

PACKAGES = ("torch", "torchvision", "ray", "numpy", "pillow", "pyarrow", "safetensors", "fsspec", "s3fs")
# A job shipped to a cluster has no .git; `sceneray submit` passes on what it saw.
COMMIT_VARIABLE = "SCENERAY_COMMIT"


def describe(store_digest: str) -> dict[str, Any]:
    """The environment as plain JSON values."""
    return {
        "sceneray": sceneray.__version__,
        "code": code_version(),
        "python": platform.python_version(),
        "packages": versions(),
        "hardware": hardware(),
        "store_digest": store_digest,
    }


def code_version() -> dict[str, Any]:
    """The git commit of this code and whether files differ from it; nulls where neither is known."""
    told = os.environ.get(COMMIT_VARIABLE)
    if told:
        commit, _, state = told.partition(" ")
        return {"commit": commit, "dirty": state == "dirty"}
    head = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain") if head else None
    return {"commit": head, "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": usable_cores(), "gpus": gpus, "system": platform.platform()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()  # no /proc on this system
    return platform.processor()


def _git(*command: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or not a checkout
    return done.stdout.strip()
