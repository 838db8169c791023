"""Photos and labels as bytes: decode, encode, and what a dataset store takes.

A photo is uint8 [height, width, 3] in RGB. A label is uint8 [height, width] of class ids; a palette PNG is read as
its indices, never as its colours.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sceneray.errors import DataError

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
LABEL_FORMATS = ("PNG", "BMP", "TIFF", "GIF")
# Header first: a larger picture is refused before its pixels are decoded.
MAX_PIXELS = 180_000_000
_PAPER = (255, 255, 255)  # what a picture with holes lies on
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_WHOLE_NUMBERS = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B")


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """A photo as uint8 [height, width, 3] in RGB, as a viewer shows it.

    Turned upright as its EXIF orientation says; what is transparent lies over white; of an animation its first frame,
    and of 16 bits a channel the upper 8. Raises DataError where the bytes are no whole picture of a known format.
    """
    with _opened(data, PHOTO_FORMATS, "photo") as image:
        return _rgb(image)


def decode_label(data: bytes) -> NDArray[np.uint8]:
    """A label as uint8 [height, width] of class ids.

    Raises DataError where the bytes are no whole picture, or a picture in colours instead of ids.
    """
    with _opened(data, LABEL_FORMATS, "label") as image:
        if image.mode not in _WHOLE_NUMBERS:
            raise DataError(
                f"the label is a picture in colours (mode {image.mode}), but a label holds one class id a pixel: "
                "turn its colours into ids and save it as an 8-bit grey or palette PNG"
            )
        ids = np.asarray(image)
    if ids.dtype == np.uint8:
        return ids
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 255):
        raise DataError(f"the label holds ids from {ids.min()} to {ids.max()}, but an id is a number from 0 to 255")
    return ids.astype(np.uint8)


def encode_label(label: NDArray[np.uint8]) -> bytes:
    """`label` [height, width] as an 8-bit grey PNG whose values are the ids."""
    if label.dtype != np.uint8 or label.ndim != 2:
        raise DataError(f"a label is uint8 [height, width], got {label.dtype} {list(label.shape)}")
    return _encoded(Image.fromarray(label), "PNG")


def encode_jpeg(image: NDArray[np.uint8], quality: int = 92) -> bytes:
    """`image` [height, width, 3] as a JPEG with full colour resolution (4:4:4)."""
    return _encoded(Image.fromarray(image), "JPEG", quality=quality, subsampling=0)


def stored_photo(data: bytes) -> tuple[bytes, int, int]:
    """The bytes a store keeps for a photo, with its height and width.

    An upright 8-bit RGB JPEG or PNG stays as it is, byte for byte. Anything else is turned upright and encoded again:
    as JPEG (quality 95) where it was one, else as PNG, which loses nothing. The pixels are decoded in any case, so
    that a truncated file is found now and not in the middle of a training run.
    """
    with _opened(data, PHOTO_FORMATS, "photo") as image:
        height, width = image.height, image.width
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        if image.format in ("JPEG", "PNG") and image.mode == "RGB" and upright:
            return data, height, width
        pixels = _rgb(image)
        jpeg = image.format == "JPEG"
    kept = encode_jpeg(pixels, 95) if jpeg else _encoded(Image.fromarray(pixels), "PNG")
    return kept, pixels.shape[0], pixels.shape[1]


@contextlib.contextmanager
def _opened(data: bytes, formats: tuple[str, ...], kind: str) -> Iterator[Image.Image]:
    """A picture with its pixels loaded; what Pillow says of a broken one becomes a DataError."""
    try:
        with warnings.catch_warnings():
            # Odd metadata is no reason to refuse a picture whose pixels are whole.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"the {kind} has {image.width} × {image.height} pixels; at most {MAX_PIXELS} are read: "
                    "make it smaller"
                )
            image.load()
            if kind == "photo" and getattr(image, "default_image", False):
                image.seek(1)  # what stands first is for viewers that cannot play an animated PNG
                image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        known = ", ".join(formats)
        raise DataError(
            f"the {kind} cannot be read ({error}): it is truncated, damaged or none of {known}; replace it"
        ) from error
    with image:
        yield image


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip to 255, not scale
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        # Under transparent pixels may stand any colour, which nobody ever saw; convert("RGB") would bring it out.
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, _PAPER)
        paper.paste(image, mask=image)
        image = paper
    return np.asarray(image.convert("RGB"))


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
