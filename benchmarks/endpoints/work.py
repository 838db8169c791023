"""What every server here does with an upload, and the bare loop that nothing can beat.

    python -m benchmarks.endpoints.work BUNDLE PHOTOS SECONDS THREADS PASSES

The last is the limit: decode, predict, encode, in PASSES threads of one process, without any server.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from sceneray.masks import Mask, Photo, indexed_png
from sceneray.predictor import Predictor
from serve.admission import decode


class Work:
    """A predictor and its codecs, in the three steps that a server may run in different threads."""

    def __init__(self, bundle: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.predictor = Predictor.load(bundle, "cpu", runtime=None)  # as the endpoint chooses
        self.predictor.self_check()

    def decode(self, data: bytes) -> Photo:
        """A file's bytes as uint8 [H, W, 3]."""
        return decode(data)

    def predict(self, images: list[Photo]) -> list[Mask]:
        """Masks of images."""
        return self.predictor.predict(images)

    def encode(self, mask: Mask) -> bytes:
        """The answer that every server gives: an indexed PNG."""
        return indexed_png(mask, self.predictor.classes)


def read_photos(folder: str) -> list[bytes]:
    """The uploads, in the order of their names."""
    return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def main() -> None:
    """Run the bare loop and print what it did as JSON."""
    bundle, folder, seconds, threads, passes = sys.argv[1:]
    work, photos = Work(bundle, int(threads)), read_photos(folder)
    whole = [work.encode(work.predict([work.decode(data)])[0]) for data in photos]
    numbers = count()
    started_at = time.perf_counter()

    def loop(_: int) -> int:
        done = 0
        while time.perf_counter() - started_at < float(seconds):
            data = photos[next(numbers) % len(whole)]
            work.encode(work.predict([work.decode(data)])[0])
            done += 1
        return done

    with ThreadPoolExecutor(int(passes)) as pool:
        total = sum(pool.map(loop, range(int(passes))))
    print(json.dumps({"rate": total / (time.perf_counter() - started_at)}))


if __name__ == "__main__":
    main()
