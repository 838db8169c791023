"""`sceneray predict`: masks and overlays of photographs, from a bundle here or from a running endpoint."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jobs import batch_options
from jobs.batch_plan import SUFFIXES, add_shares
from jobs.cli import main_of, say
from sceneray.errors import DataError

if TYPE_CHECKING:
    from sceneray.client import Client
    from sceneray.data.store import ClassInfo
    from sceneray.masks import Mask, Photo
    from sceneray.predictor import Predictor

HELP = "write the masks and overlays of images, from a bundle or an endpoint"
EXAMPLE = "sceneray predict photo.jpg --bundle bundles/camvid --out out"
KEY_VARIABLE = "SCENERAY_API_KEY"
BATCH = 8
MANY = 200
JPEG_QUALITY = 90
TIMEOUT_S = 150.0  # above the endpoint's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{batch_options.NOTES}"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or a folder of images (any URL)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--bundle", help="URL of a bundle: run the model here")
    where.add_argument("--url", help=f"base URL of an endpoint (`sceneray serve`); its key in {KEY_VARIABLE}")
    parser.add_argument("--out", metavar="DIR", required=True, help="URL of the folder to write to")
    parser.add_argument("--device", help="with --bundle: cpu, cuda, ... (default: CUDA where there is one)")
    batch_options.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Segment every image; one that fails does not stop the others, but the verb then fails at its end."""
    from sceneray import storage

    if batch_options.is_batch(args):
        from jobs.batch_predict import predict_batch

        return predict_batch(args.images, args.bundle, args.out, batch_options.options_of(args))
    out = storage.absolute(args.out)
    urls = expand(args.images)
    if args.bundle and len(urls) > MANY:
        say(f"{len(urls)} images one after the other; --workers 1-8 does them as a batch, which can be gone on with")
    names = output_names(urls)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with _segmenter(args) as segmenter:
        for start in range(0, len(urls), BATCH):
            for result in _some(segmenter, urls[start : start + BATCH]):
                if isinstance(result, DataError):
                    failed.append(str(result))
                else:
                    rows.append(_save(out, names[result.url], result, segmenter.classes))
            say(f"{min(start + BATCH, len(urls))} of {len(urls)} images")
    print(share_table(add_shares(rows), len(rows), segmenter.classes))
    print(f"{len(rows)} masks and overlays in {out}")
    if failed:
        raise DataError(f"{len(failed)} of {len(urls)} images failed: " + " | ".join(failed))
    return {"out": out, "images": rows}


def expand(images: Sequence[str]) -> list[str]:
    """Absolute URLs of the images: files as they are, folders as the images directly in them; each once."""
    from sceneray import storage

    found: dict[str, None] = {}
    for image in images:
        url = storage.absolute(image)
        if storage.is_file(url):
            found[url] = None
            continue
        inside = [name for name in storage.list_names(url) if name.lower().endswith(SUFFIXES)]
        if not inside:
            raise DataError(f"no image at {url}: give a file, or a folder with {', '.join(SUFFIXES)} files in it.")
        found.update(dict.fromkeys(storage.join(url, name) for name in inside))
    return list(found)


def output_names(urls: Sequence[str]) -> dict[str, str]:
    """A name for each image's files: its own without the suffix, numbered where two would share one."""
    from sceneray import storage

    names: dict[str, str] = {}
    taken: set[str] = set()
    for url in urls:
        stem = storage.basename(url).rsplit(".", 1)[0]
        name, number = stem, 1
        while name.lower() in taken:  # a file system may not tell A from a
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[url] = name
    return names


def share_table(shares: Mapping[int, tuple[float, int]], images: int, classes: Sequence[ClassInfo]) -> str:
    """Text: each class's mean share of an image's pixels, and in how many images it is.

    `shares` has, by a class's id, the sum of its shares and the number of images it is in.
    """
    width = max(len("class"), *(len(entry.name) for entry in classes))
    lines = [f"{'class':<{width}}   share  images"]
    for entry in classes:
        total, count = shares.get(entry.id, (0.0, 0))
        lines.append(f"{entry.name:<{width}}  {total / max(1, images):6.1%}  {count:6d}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Opened:
    """An image as stored (`data`) and as seen (`image`, uint8 [H, W, 3])."""

    url: str
    data: bytes
    image: Photo


@dataclass(frozen=True)
class _Answered:
    url: str
    image: Photo
    mask: Mask


class _Segmenter(Protocol):
    """Where the masks come from."""

    classes: Sequence[ClassInfo]

    def __call__(self, images: Sequence[_Opened]) -> list[Mask | DataError]:
        """A mask, or why there is none, for each image."""


class _Local:
    """The bundle's network in this process."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.classes: Sequence[ClassInfo] = predictor.classes

    def __call__(self, images: Sequence[_Opened]) -> list[Mask | DataError]:
        results: list[Mask | DataError | None] = [self._fault(opened.image) for opened in images]
        fit = [index for index, fault in enumerate(results) if fault is None]
        for index, mask in zip(fit, self._predictor.predict([images[i].image for i in fit]), strict=True):
            results[index] = mask
        return [result for result in results if result is not None]

    def _fault(self, image: Photo) -> DataError | None:
        try:
            self._predictor.check(image)
        except DataError as error:
            return error
        return None


class _Remote:
    """A running endpoint."""

    def __init__(self, client: Client) -> None:
        from sceneray.checkpoint import classes_from_json

        self._client = client
        self.classes: Sequence[ClassInfo] = classes_from_json(client.model()["classes"])

    def __call__(self, images: Sequence[_Opened]) -> list[Mask | DataError]:
        answers = self._client.segment_many((opened.data for opened in images), errors="return")
        return [answer if isinstance(answer, DataError) else answer.mask for answer in answers]


@contextlib.contextmanager
def _segmenter(args: argparse.Namespace) -> Iterator[_Segmenter]:
    if args.bundle is not None:
        from sceneray.predictor import Predictor

        yield _Local(Predictor.load(args.bundle, args.device))
        return
    from sceneray.client import Client

    with Client(args.url, os.environ.get(KEY_VARIABLE) or None, TIMEOUT_S) as client:
        yield _Remote(client)


def _some(segmenter: _Segmenter, urls: Sequence[str]) -> Iterator[_Answered | DataError]:
    """For each image its mask, or a DataError that names the image."""
    opened = []
    for url in urls:
        try:
            opened.append(_open(url))
        except DataError as error:
            yield DataError(f"{url}: {error}")
    for item, result in zip(opened, segmenter(opened), strict=True):
        yield (
            DataError(f"{item.url}: {result}")
            if isinstance(result, DataError)
            else _Answered(item.url, item.image, result)
        )


def _open(url: str) -> _Opened:
    from sceneray import storage
    from sceneray.data.images import decode_image

    data = storage.read_bytes(url)
    return _Opened(url, data, decode_image(data))


def _save(out: str, name: str, result: _Answered, classes: Sequence[ClassInfo]) -> dict[str, Any]:
    from sceneray import storage
    from sceneray.data.images import encode_jpeg
    from sceneray.masks import indexed_png, overlay, shares

    mask_url, overlay_url = storage.join(out, f"{name}.mask.png"), storage.join(out, f"{name}.overlay.jpg")
    storage.write_bytes(mask_url, indexed_png(result.mask, classes))
    storage.write_bytes(overlay_url, encode_jpeg(overlay(result.image, result.mask, classes), JPEG_QUALITY))
    return {"image": result.url, "mask": mask_url, "overlay": overlay_url, "classes": shares(result.mask, classes)}


if __name__ == "__main__":
    raise SystemExit(main_of("predict"))
