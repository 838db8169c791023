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
Mode = Literal["exact", "fast"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Rules:
    """How models are run and what they are given. None: as the bundle says, or its device."""

    mode: Mode = "exact"
    exact_batch: int | None = None  # images of a pass in exact mode; None: one on a CPU, a full batch elsewhere
    input: InputRule | None = None
    long_side: int | None = None  # of the network's input with the rule `resize`
    window: int | None = None  # side of a window with the rule `window`
    warm: tuple[tuple[int, int], ...] | None = None  # (height, width) to run before the first request
    runtime: str | None = None  # of sceneray.runtimes; None: what serves the bundle fastest
    precision: Precision = "auto"  # auto: bf16 on GPUs that compute in it, else fp32
    nice: int = 0  # how far the threads of the passes step back for others on the CPU, 0 to 19

    def pass_size(self, most: int, on_cpu: bool) -> int:
        """Images of a pass at most, of `most`: in exact mode a CPU gains nothing from black images in a pass."""
        if self.mode == "fast":
            return most
        return min(self.exact_batch or (1 if on_cpu else most), most)


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
    detail: dict[str, Any] | None = Field(None, description="the facts for programs: limits, what came, when to retry")
    request_id: str = Field(description="names this request in the server's log")


class ClassBody(BaseModel):
    """One class of the model."""

    id: int
    name: str
    color: tuple[int, int, int] = Field(description="RGB, 0 to 255")


class RunLengths(BaseModel):
    """COCO's compressed run lengths: what `pycocotools.mask.decode` takes."""

    size: tuple[int, int] = Field(description="height, width")
    counts: str = Field(description="runs down the columns, the first one outside of the class")


Corner = tuple[int, int]


class ClassShare(ClassBody):
    """One class present in an image."""

    share: float = Field(description="part of the image's pixels, above 0, at most 1")
    rle: RunLengths | None = Field(None, description="with include=rle")
    polygons: list[list[list[Corner]]] | None = Field(
        None,
        description="with include=polygons: a list of polygons, each a list of closed rings of corners [x, y] on the "
        "edges of pixels, the outline and then its holes (GeoJSON's MultiPolygon, in pixels, y downwards)",
    )


class ModelName(BaseModel):
    """The model that answered."""

    name: str
    version: str


class SegmentationBody(BaseModel):
    """`POST /v1/segment` as `json`: what is in the image, and where it is as far as the caller asks for it."""

    width: int
    height: int
    classes: list[ClassShare] = Field(description="the classes present, the largest share first")
    model: ModelName
    mask: str | None = Field(None, description="with include=mask: the indexed PNG in base64")
    confidence: str | None = Field(None, description="with confidence=true: the map as a grey PNG in base64")


class SegmentBody(BaseModel):
    """One class of an image in Hugging Face's shape (`format=hf`)."""

    label: str
    score: float | None = Field(description="mean confidence of the segment, 0 to 1; null where the model gives none")
    mask: str = Field(description="grey PNG in base64, 255 inside the segment and 0 elsewhere")


class ImageBody(BaseModel):
    """One image of a request with several: its answer, or why there is none."""

    name: str | None = Field(description="the file name that the caller gave")
    status: int = Field(description="200, or the status with which the image alone would have been refused")
    width: int | None = None
    height: int | None = None
    answer: SegmentationBody | list[SegmentBody] | None = Field(None, description="with the formats json and hf")
    file: str | None = Field(None, description="with the other formats: the answer's name in the zip")
    error: ErrorBody | None = Field(None, description="with another status than 200")


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
    candidate: dict[str, Any] | None = Field(
        None, description="what became of the last bundle that was to take over and did not: state, bundle, reason"
    )
