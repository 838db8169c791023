"""Peer: LitServe, its own worker processes for the model, decoding and encoding in its hooks.

python -m benchmarks.endpoints.lit BUNDLE PORT THREADS PASSES
"""

# No `from __future__ import annotations` here: LitServe reads the annotation of `decode_request` as it stands.

import base64
import sys
from typing import Any

import litserve
from fastapi import Request, Response

from benchmarks.endpoints.work import Work


class Segment(litserve.LitAPI):
    """LitServe's four hooks, all but the answer's way back in its worker. Batches of one, as ours on a CPU."""

    def __init__(self, bundle: str, threads: int) -> None:
        super().__init__(api_path="/v1/segment")
        self.bundle, self.threads = bundle, threads

    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's signature
        """In the worker process."""
        self.work = Work(self.bundle, self.threads)

    def decode_request(self, request: Request) -> Any:
        """The field `image` of a JSON body, in base64: LitServe hands its worker nothing that cannot be pickled."""
        body: Any = request  # by now the parsed JSON
        return self.work.decode(base64.b64decode(body["image"]))

    def predict(self, image: Any) -> Any:
        """Its mask."""
        return self.work.predict([image])[0]

    def encode_response(self, mask: Any) -> Response:
        """The answer."""
        return Response(self.work.encode(mask), media_type="image/png")


if __name__ == "__main__":
    api = Segment(sys.argv[1], int(sys.argv[3]))
    litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[4]), timeout=120).run(
        port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="warning"
    )
