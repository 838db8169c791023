"""Errors a user can act on: each message says the rule, what came, and the fix.

The command line prints the message alone and exits with `exit_code`; a traceback is shown only with --debug.

    ScenerayError
    ├── ConfigError        a setting is unknown, malformed, or disagrees with another
    ├── DataError          a photograph, label or dataset store breaks a rule
    ├── StorageError       a file system refused or lost something
    │   ├── UnreachableError  it kept failing or refused: nothing is known of what it holds
    │   └── ConflictError  somebody else wrote first; never retried as a storage fault
    ├── CheckpointError    a checkpoint is missing, incomplete or of another shape
    ├── SupersededError    a later attempt has taken over the run
    ├── BundleError        a bundle is missing, incomplete or of another format version
    ├── TrainingError      training cannot go on (a loss that is not finite)
    ├── ServingError       an endpoint cannot start, or answered with an error
    └── Interrupted        asked to stop; what was done is saved and can be resumed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScenerayError(Exception):
    """Anything that went wrong in a way the user can understand and mend."""

    exit_code = 1


class ConfigError(ScenerayError):
    """A setting is unknown, malformed, or disagrees with another one."""

    exit_code = 2


class DataError(ScenerayError):
    """A photograph, a label or a dataset store breaks a rule."""


class StorageError(ScenerayError):
    """A file system refused an operation or lost an object."""


class UnreachableError(StorageError):
    """A file system kept failing or refused: nothing is known of what it holds."""


class ConflictError(StorageError):
    """Another writer was first: a create or compare-and-swap lost. Never retried."""


class CheckpointError(ScenerayError):
    """A checkpoint is missing, incomplete, damaged or of another shape."""


class SupersededError(ScenerayError):
    """A later attempt has taken over the run: this one, number `attempt`, has nothing more to say in it."""

    def __init__(self, message: str, attempt: int = 0) -> None:
        super().__init__(message, attempt)
        self.attempt = attempt

    def __str__(self) -> str:
        return str(self.args[0])


class BundleError(ScenerayError):
    """A bundle is missing, incomplete, damaged or of another format version."""


class TrainingError(ScenerayError):
    """Training cannot go on; the last committed checkpoint is untouched."""


class ServingError(ScenerayError):
    """An endpoint cannot start, or answered a request with an error."""


class Interrupted(ScenerayError):
    """Asked to stop. What was done is saved; the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL: run it again


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is in no registry: the nearest known names first.

    >>> unknown_name("loss", "cross_entrpy", ["dice", "cross_entropy"])
    "unknown loss 'cross_entrpy': did you mean 'cross_entropy'? known: cross_entropy, dice"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    ordered = near + [n for n in names if n not in near]
    hint = f" did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}':{hint} known: {', '.join(ordered) or 'none'}"
