"""Examples for the OpenAPI page, made by the same functions as the answers, from a mask of 4 × 3 pixels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from sceneray.data.store import ClassInfo
from serve.admission import Refused
from serve.answer_several import Outcome, Rendered, json_array
from serve.answers import FORMATS, INCLUDES, Wish
from serve.schemas import Answered, ModelCard
from serve.uploads import Upload

JSON = "application/json"
CLASSES = (ClassInfo(0, "road", (128, 64, 128)), ClassInfo(1, "car", (0, 0, 142)))


def json_examples() -> dict[str, Any]:
    """OpenAPI's examples of the JSON answers: each format that is JSON, all that `json` may hold, several images."""
    bodies = {
        f"format={name}": (form.description, form.render(_answered(), Wish(JSON)))
        for name, form in FORMATS.items()
        if JSON in form.media_types
    }
    everything = Wish(JSON, frozenset(INCLUDES), confidence=True)
    bodies[f"include={','.join(INCLUDES)}&confidence=true"] = (
        "all that `json` may hold",
        FORMATS["json"].render(_answered(), everything),
    )
    bodies["several images"] = ("an answer, and an image that was refused", _several())
    return {name: {"summary": text, "value": json.loads(body)} for name, (text, body) in bodies.items()}


def _answered() -> Answered:
    mask = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.uint8)
    model = ModelCard("street", "3", "0" * 64, CLASSES)
    return Answered(np.zeros((3, 4, 3), np.uint8), mask, model, np.full((3, 4), 230, np.uint8))


def _several() -> bytes:
    outcomes: list[Outcome] = [
        Rendered(FORMATS["json"].render(_answered(), Wish(JSON)), (3, 4), {}),
        Refused(415, "unsupported_image", "the file is no JPEG, PNG or WebP image by its first bytes."),
    ]
    return json_array([Upload(b"", "photo.jpg"), Upload(b"", "notes.txt")], outcomes, "7f3c")
