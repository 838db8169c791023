"""One worker of a batch: photos of a part in, masks and a line for each photo out. Ray makes an actor of it.

Reading and decoding, the forward pass, and encoding and writing overlap: readers work ahead, writers behind, and two
parts may be under way in one worker, so that the network need not wait at the end of a part.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from jobs.batch_plan import MASK, OVERLAY, Done, Part, Photo, Row, Task, about, error_row, write_part
from sceneray import storage
from sceneray.errors import BundleError, DataError, UnreachableError

if TYPE_CHECKING:
    from sceneray.masks import Mask
    from sceneray.masks import Photo as Image
    from sceneray.predictor import Predictor

THREADS = 4  # that read, and that write
JPEG_QUALITY = 90
# What is handed to the predictor at once, and so what is in memory: each part under way holds up to two of these, one
# in the network and one being written, and THREADS photos that were read ahead.
HANDFUL, HANDFUL_PIXELS = 16, 8_388_608


class PredictWorker:
    """The network, and threads around it. Methods may run beside each other; the network does one call at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._network = threading.Lock()
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        self._predictor: Predictor | None = None

    def start(self) -> None:
        """Load the network. Raises BundleError where the bundle is not the one that the batch began with."""
        from sceneray.predictor import Predictor

        predictor = Predictor.load(self._task.bundle, self._task.device)
        if predictor.info["digest"] != self._task.model["digest"]:
            raise BundleError(
                f"the bundle at {self._task.bundle} was replaced while the batch ran: it has the digest "
                f"{predictor.info['digest'][:12]}, and the batch began with {self._task.model['digest'][:12]}. Put the "
                "old one back, or begin anew with --overwrite."
            )
        self._predictor = predictor

    def part(self, part: Part) -> Done:
        """Do a part and make it finished."""
        return write_part(self._task, part, self.rows(part.photos))

    def rows(self, photos: Sequence[Photo]) -> list[Row]:
        """Write the masks of `photos`; a row for each, in their order.

        What is wrong with a photo is its row's error. Raises StorageError where the store keeps failing.
        """
        rows: list[Row | Future[Row]] = []
        written: list[Future[Row]] = []
        for handful in _handfuls(self._read_ahead(photos)):
            masks = iter(self._segment([image for _, image in handful if not isinstance(image, str)]))
            wait(written)  # no more than one handful waits for the writers
            for photo, image in handful:
                result = image if isinstance(image, str) else next(masks)
                if isinstance(result, str):
                    rows.append(error_row(self._task, photo, result))
                else:
                    rows.append(self._writers.submit(self._write, photo, image, result))
            written = [row for row in rows if isinstance(row, Future)]
        return [row.result() if isinstance(row, Future) else row for row in rows]

    def _read_ahead(self, photos: Sequence[Photo]) -> Iterator[tuple[Photo, Image | str]]:
        """Each photo with its pixels, or with what is wrong with it; up to THREADS are read ahead."""
        ahead: deque[tuple[Photo, Future[Image | str]]] = deque()
        for photo in photos:
            if len(ahead) == THREADS:
                first, image = ahead.popleft()
                yield first, image.result()
            ahead.append((photo, self._readers.submit(self._read, photo)))
        for photo, image in ahead:
            yield photo, image.result()

    def _read(self, photo: Photo) -> Image | str:
        from sceneray.data.images import decode_image

        try:
            image: Image = decode_image(storage.read_bytes(photo.url))
            self._loaded.check(image)
        except UnreachableError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise  # the store's fault, not this photo's
            return str(error)
        except (FileNotFoundError, IsADirectoryError):
            return "no file is there: it went after the batch was listed, or this worker's machine does not see it"
        except DataError as error:
            return str(error)
        except MemoryError:
            return "this worker has too little memory to decode it"
        return image

    def _segment(self, images: list[Image]) -> list[Mask | str]:
        """A mask for each image; one by one where they are too much for the device together."""
        import torch

        try:
            with self._network:
                return list(self._loaded.predict(images))
        except torch.OutOfMemoryError:
            if len(images) == 1:
                height, width = images[0].shape[:2]
                return [f"the device has too little memory for its {height} × {width} pixels; make it smaller"]
        return [mask for image in images for mask in self._segment([image])]

    def _write(self, photo: Photo, image: Image, mask: Mask) -> Row:
        from sceneray.data.images import encode_jpeg
        from sceneray.masks import indexed_png, overlay, shares

        classes = self._loaded.classes
        data = indexed_png(mask, classes)
        row = about(self._task, photo) | {"mask": photo.name + MASK}
        self._put(row["mask"], data)
        if self._task.overlay:
            row["overlay"] = photo.name + OVERLAY
            self._put(row["overlay"], encode_jpeg(overlay(image, mask, classes), JPEG_QUALITY))
        present = [{key: entry[key] for key in ("id", "name", "share")} for entry in shares(mask, classes)]
        row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        row |= {"height": mask.shape[0], "width": mask.shape[1]}
        return row | {"classes": present}

    def _put(self, name: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self._task.out, name), data)

    @property
    def _loaded(self) -> Predictor:
        assert self._predictor is not None, "start() comes first"
        return self._predictor


def _handfuls(read: Iterator[tuple[Photo, Any]]) -> Iterator[list[tuple[Photo, Any]]]:
    """Consecutive photos, up to HANDFUL of them and HANDFUL_PIXELS pixels; a larger photo goes alone."""
    handful: list[tuple[Photo, Any]] = []
    pixels = 0
    for photo, image in read:
        more = 0 if isinstance(image, str) else image.shape[0] * image.shape[1]
        if handful and (len(handful) == HANDFUL or pixels + more > HANDFUL_PIXELS):
            yield handful
            handful, pixels = [], 0
        handful.append((photo, image))
        pixels += more
    if handful:
        yield handful
