"""Peer: the server that a tutorial writes: the model as it was trained (NCHW), one request at a time in one thread.

python -m benchmarks.endpoints.tutorial BUNDLE PORT THREADS PASSES

It has one pass at a time whatever PASSES says, with as many threads as all passes of the others have together.
"""

from __future__ import annotations

import io
import sys

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Response, UploadFile
from PIL import Image

from sceneray import bundle as bundles


def create_app(bundle: str, threads: int) -> FastAPI:
    """The app. Its codecs are Pillow with what Pillow does by itself."""
    torch.set_num_threads(threads)
    model = bundles.load(bundle).model.to(memory_format=torch.contiguous_format).eval()
    app = FastAPI()

    @app.post("/v1/segment")
    async def segment(image: UploadFile) -> Response:
        photo = Image.open(io.BytesIO(await image.read())).convert("RGB")
        batch = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].contiguous().float()
        with torch.no_grad():
            mask = model(batch).main.argmax(dim=1)[0]
        out = io.BytesIO()
        Image.fromarray(mask.to(torch.uint8).numpy()).save(out, "PNG")
        return Response(out.getvalue(), media_type="image/png")

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    served = create_app(sys.argv[1], int(sys.argv[3]) * int(sys.argv[4]))
    uvicorn.run(served, port=int(sys.argv[2]), log_level="warning")
