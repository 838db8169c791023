"""Which format a request asks for: by the query, else by `Accept`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sceneray.errors import unknown_name
from serve.admission import Refused
from serve.answers import FORMATS, INCLUDES, OPACITY, Format, Wish
from serve.schemas import Ask, InputRule


def _listed(values: Any) -> Any:
    """A parameter that may be given twice, and with commas, as one list."""
    if not isinstance(values, list):
        return values
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


class SegmentQuery(BaseModel):
    """The query of /v1/segment. A parameter that is not here, or that the format does not use, is refused."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = Field(
        None,
        description="form of the answer; wins over Accept. "
        + "; ".join(f"`{k}`: {f.description}" for k, f in FORMATS.items()),
        json_schema_extra={"enum": list(FORMATS)},
        examples=["json"],
    )
    classes: Annotated[list[str], BeforeValidator(_listed)] = Field(
        [],
        description="names or ids of classes, with commas between or repeated; pixels of other classes are 255, as of "
        "no class. Shares stay parts of the whole image",
        max_length=256,
        examples=[["road", "car"]],
    )
    include: Annotated[list[str], BeforeValidator(_listed)] = Field(
        [],
        description="added to `json`, with commas between or repeated: `rle` COCO run lengths and `polygons` of each "
        "class, `mask` the PNG in base64",
        json_schema_extra={"items": {"type": "string", "enum": list(INCLUDES)}},
        examples=[["rle", "polygons"]],
    )
    confidence: bool = Field(False, description="add the confidence map to `json`: a PNG in base64", examples=[True])
    opacity: float = Field(
        OPACITY,
        ge=0,
        le=1,
        description="weight of the colours in `overlay`, the photograph has the rest",
        examples=[0.7],
    )
    input: InputRule | None = Field(
        None,
        description="how the photograph becomes the model's input: as it is, scaled to the model's long side, or in "
        "windows; default: as the server's model says. The mask has the photograph's size with each",
        examples=["window"],
    )


@dataclass(frozen=True)
class Choice:
    """What is answered, and what the model is asked for."""

    format: Format
    wish: Wish
    ask: Ask
    classes: Sequence[str]


def choose(query: SegmentQuery, accept: str | None) -> Choice:
    """The format for a query and an Accept header.

    Raises Refused: 406 where no format is named and none is acceptable, 422 for a parameter that the format lacks.
    """
    name, media_type = negotiate(query.format, accept)
    form = FORMATS[name]
    _check_parameters(query, name)
    wish = Wish(media_type, frozenset(query.include), query.opacity, query.confidence)
    return Choice(form, wish, Ask(form.confidence or query.confidence, query.input), query.classes)


def negotiate(name: str | None, accept: str | None) -> tuple[str, str]:
    """Format and media type for `?format=` and an Accept header (RFC 9110, 12.5.1).

    A named format is answered whatever Accept says; of its media types, Accept chooses. Without a name the first
    format wins among those that Accept likes best.
    """
    ranges = _ranges(accept or "*/*")
    if name is not None:
        if name not in FORMATS:
            raise Refused(422, "invalid_parameter", unknown_name("format", name, FORMATS) + ".")
        kinds = FORMATS[name].media_types
        return name, max(kinds, key=lambda kind: _quality(kind, ranges))
    offers = [(key, kind) for key, form in FORMATS.items() if form.by_accept for kind in form.media_types]
    best = max(offers, key=lambda offer: _quality(offer[1], ranges))  # the earlier offer wins a tie
    if _quality(best[1], ranges) <= 0:
        known = ", ".join(kind for _, kind in offers)
        raise Refused(406, "not_acceptable", f"the forms of answer are {known}, got Accept: {accept}.")
    return best


def _check_parameters(query: SegmentQuery, name: str) -> None:
    special = {parameter for form in FORMATS.values() for parameter in form.parameters}
    for parameter in sorted((query.model_fields_set & special) - FORMATS[name].parameters):
        users = " or ".join(f"format={key}" for key, form in FORMATS.items() if parameter in form.parameters)
        raise Refused(422, "invalid_parameter", f"{parameter} goes with {users}; this answer has format {name}.")
    for item in query.include:
        if item not in INCLUDES:
            raise Refused(422, "invalid_parameter", f"include: {unknown_name('part', item, INCLUDES)}.")


def _ranges(accept: str) -> dict[str, float]:
    """Media ranges of an Accept header with their q; a q that is no number counts as 0."""
    ranges = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        q = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            ranges[name] = float(q)
        except ValueError:
            ranges[name] = 0.0
    return ranges


def _quality(offer: str, ranges: dict[str, float]) -> float:
    """The most specific range decides."""
    kind = offer.partition("/")[0]
    for name in (offer, f"{kind}/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
