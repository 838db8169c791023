"""What crosses the endpoint's borders: the bodies it answers with, and what a replica hands to the ingress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from sceneray.data.store import ClassInfo
from sceneray.masks import Mask, Photo


@dataclass(frozen=True)
class ModelCard:
    """Which model answered."""

    name: str
    version: str
    digest: str
    classes: tuple[ClassInfo, ...]


InputRule = Literal["native", "resize", "window"]


@dataclass(frozen=True)
class Ask:
    """What a caller wants of one image, beside its mask."""

    confidence: bool = False  # the map of how sure the model is of each pixel
    rule: InputRule | None = None  # how the photograph becomes the model's input; None: as the bundle says
    deadline: float | None = None  # unix time after which nobody waits for the answer


@dataclass(frozen=True)
class Segmented:
    """A replica's answer to one image: mask uint8 [H, W], and how many images shared its forward pass."""

    mask: Mask
    model: ModelCard
    batch_size: int
    confidence: Mask | None = None  # uint8 [H, W]: probability of the mask's class, 0 to 255; where it was asked for
    times: dict[str, float] = field(default_factory=dict)  # seconds by stage: "queue", "model"


@dataclass(frozen=True)
class Answered:
    """All that an answer format may draw on. `image` is uint8 [H, W, 3], of the mask's height and width."""

    image: Photo
    mask: Mask
    model: ModelCard
    confidence: Mask | None = None
    batch_size: int = 1


class ErrorBody(BaseModel):
    """Every 4xx and 5xx answer."""

    error: str = Field(description="the rule, what came, and the fix")
    error_type: str = Field(description="a word for programs")
    request_id: str = Field(description="names this request in the server's log")


class ClassBody(BaseModel):
    """One class of the model."""

    id: int
    name: str
    color: tuple[int, int, int] = Field(description="RGB, 0 to 255")


class ClassShare(ClassBody):
    """One class present in an image."""

    share: float = Field(description="part of the image's pixels, above 0, at most 1")


class ModelName(BaseModel):
    """The model that answered."""

    name: str
    version: str


class SegmentationBody(BaseModel):
    """`POST /v1/segment` as application/json: what is in the image, without the mask itself."""

    width: int
    height: int
    classes: list[ClassShare] = Field(description="the classes present, the largest share first")
    model: ModelName


class PredictionBody(BaseModel):
    """`POST /predict`: class ids row by row, and the classes' names by id."""

    prediction: list[list[int]]
    classes: list[str]


class ModelBody(ModelName):
    """`GET /v1/model`: the bundle that is served."""

    digest: str = Field(description="sha256 that names the bundle's whole content")
    classes: list[ClassBody]
    ignore_index: int
    metrics: dict[str, Any] = Field(description="as measured before export, with the digest of the store")
    input: dict[str, Any]
    created: str
