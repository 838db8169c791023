"""Readers of dataset layouts. To add one: a function `(source, options) -> Listing`, and a line in `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Callable

from sceneray.data.layouts.folder import folder
from sceneray.data.layouts.town import town
from sceneray.data.listing import LayoutOptions, Listing

Layout = Callable[[str | None, LayoutOptions], Listing]

LAYOUTS: dict[str, Layout] = {
    "folder": folder,  # images/ and labels/ with equal names, classes.json
    "town": town,  # drawn street scenes, no source
}
