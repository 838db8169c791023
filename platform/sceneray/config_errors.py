"""What is wrong with a setting, as one sentence that names the key and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

from pydantic import BaseModel


def explain(cls: type[BaseModel], problem: Any) -> str:
    """One of pydantic's error records about settings of type `cls`, as a sentence with the key and the fix."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(cls, path)
    if problem["type"] == "missing":
        return f"'{key}' is required: set it in the file or with {_first_required(cls, path)}=VALUE"
    message = str(problem["msg"]).removeprefix("Value error, ")
    said = message if problem["type"] == "value_error" else f"{message}, got {problem['input']!r}"
    return f"{key}: {said}" if key else said


def _unknown_key(cls: type[BaseModel], path: Sequence[str]) -> str:
    everywhere = _keys(cls)
    siblings = list(_group(cls, path[:-1]).model_fields)
    near = [".".join([*path[:-1], name]) for name in difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)]
    # `lr=0.1` means optimizer.lr: the same word in another group is nearer than another word in this one.
    near = [key for key in everywhere if key.rpartition(".")[2] == path[-1]] or near
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(siblings)}"
    return f"unknown key '{'.'.join(path)}': {hint}"


def _first_required(cls: type[BaseModel], path: Sequence[str]) -> str:
    """The dotted key to set where `path` is missing: the first required one in it where it is a group."""
    required = [name for name, field in _group(cls, path).model_fields.items() if field.is_required()]
    inside = _group(cls, path) is not _group(cls, path[:-1])
    return ".".join([*path, *required[:1]] if inside else path)


def _group(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The settings class at `path`, or the last one on the way to it."""
    for name in path:
        field = cls.model_fields.get(name)
        if field is None or not _is_group(field.annotation):
            break
        cls = cast(type[BaseModel], field.annotation)
    return cls


def _keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a tree of settings."""
    keys = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        if _is_group(field.annotation):
            keys += _keys(cast(type[BaseModel], field.annotation), f"{prefix}{name}.")
    return keys


def _is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
