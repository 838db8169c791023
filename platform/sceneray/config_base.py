"""What all settings are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sceneray.errors import unknown_name

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


def known_in(registry: str) -> Callable[[str], str]:
    """A validator that accepts the keys of the dict at `module:NAME`, imported when a value is checked."""

    def check(name: str) -> str:
        module, attribute = registry.split(":")
        entries = getattr(importlib.import_module(module), attribute)
        if name not in entries:
            raise ValueError(unknown_name(attribute.lower().rstrip("s"), name, entries))
        return name

    return check


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
