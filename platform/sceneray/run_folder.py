"""The run folder before a run starts in it: settings checked against what stands there, and the right to write."""

from __future__ import annotations

import uuid

from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.data.store import Store
from sceneray.errors import ConfigError, StorageError


def prepare_run(settings: TrainSettings) -> TrainSettings:
    """Check `settings` against what stands in the run folder, write RUN/config.yaml, and return them with full paths.

    Raises ConfigError where the run was started with other settings, with each difference.
    """
    settings = with_full_paths(settings)
    Store.open(settings.data.store)
    url = storage.join(settings.run, "config.yaml")
    try:
        before = config.load(TrainSettings, url) if storage.is_file(url) else None
    except ConfigError as error:
        raise ConfigError(f"{error} The run folder was written by another version: give another run.") from error
    if before is not None:
        changed = config.differences(before, settings, config.RESUMABLE_WITH_OTHER)
        if changed:
            raise ConfigError(
                f"{settings.run} was started with other settings: {'; '.join(changed)}. Use those of {url}, or give "
                f"another run=URL. Free to change are: {', '.join(config.RESUMABLE_WITH_OTHER)}."
            )
    storage.write_bytes(url, config.dump(settings).encode())
    return settings


def with_full_paths(settings: TrainSettings) -> TrainSettings:
    """Relative paths made absolute: workers run in folders of their own."""
    return config.map_files(settings, lambda _, url: storage.absolute(url))


def check_rights(run: str) -> None:
    """Write and remove a small file in the run folder. Raises StorageError where that is refused."""
    probe = storage.join(run, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"sceneray")
        storage.remove(probe)
    except OSError as error:
        raise StorageError(f"cannot write to {run}: {error}. Check its rights and your credentials.") from error
