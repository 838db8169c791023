"""A model whose answer is known for every picture, behind the routes: it reads the mask off the picture itself."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from PIL import Image

from sceneray.data.images import decode_label
from sceneray.data.store import ClassInfo
from sceneray.masks import Mask, Photo
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.schemas import Ask, ModelCard, Segmented
from tests.unit.serve.uploads import Client, encoded

CLASSES = (ClassInfo(0, "road", (128, 64, 128)), ClassInfo(1, "car", (0, 0, 142)), ClassInfo(2, "tree", (60, 180, 40)))
CARD = ModelCard("reader", "2", "ab" * 32, CLASSES)
UPLOADS = UploadLimits(max_bytes=50_000, max_pixels=5000, max_side=100)


class Reader:
    """A model that finds the class of a pixel in its red and the confidence in its green value."""

    sure = True

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """What the picture says."""
        self.asks.append(ask)
        confidence = image[..., 1].copy() if ask.confidence and self.sure else None
        return Segmented(image[..., 0].copy(), CARD, 1, confidence)

    async def describe(self) -> dict[str, Any]:
        """Nothing asks for it here."""
        raise NotImplementedError


class Unsure(Reader):
    """The same without a confidence map."""

    sure = False


def client_of(reader: Reader) -> Client:
    """A client of the app over `reader`."""
    return Client(create_app(reader, ApiSettings(UPLOADS)))


def photo(mask: Mask, confidence: int | Mask = 200) -> bytes:
    """The picture whose mask is `mask`, as a PNG file."""
    picture = np.zeros((*mask.shape, 3), np.uint8)
    picture[..., 0], picture[..., 1] = mask, confidence
    return encoded(Image.fromarray(picture), "PNG")


def ask(client: Client, body: bytes, accept: str = "*/*", **query: Any) -> Any:
    """A raw upload to /v1/segment."""
    headers = {"Content-Type": "image/png", "Accept": accept}
    return client.post("/v1/segment", content=body, headers=headers, params=query)


def ask_several(client: Client, *files: tuple[str, bytes], **query: Any) -> Any:
    """Several files in one form."""
    return client.post("/v1/segment", files=[("image", file) for file in files], params=query)


def blocks(*rows: list[int]) -> Mask:
    """A mask of 16 × 16 blocks."""
    return np.array(rows, np.uint8).repeat(16, 0).repeat(16, 1)


def from_base64(text: str) -> Mask:
    """The indices of a PNG in base64."""
    return decode_label(base64.b64decode(text, validate=True))
