"""Peer: FastAPI and uvicorn, the model in threads of its own, decoding and encoding in a pool.

python -m benchmarks.endpoints.plain BUNDLE PORT THREADS PASSES
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Response, UploadFile

from benchmarks.endpoints.work import Work


def create_app(bundle: str, threads: int, passes: int) -> FastAPI:
    """The app: nothing but the work. No limits, keys or checks, which cost the other side time."""
    work = Work(bundle, threads)
    model = ThreadPoolExecutor(passes)
    codecs = ThreadPoolExecutor(2)
    app = FastAPI()

    @app.post("/v1/segment")
    async def segment(image: UploadFile) -> Response:
        loop = asyncio.get_running_loop()
        photo = await loop.run_in_executor(codecs, work.decode, await image.read())
        masks = await loop.run_in_executor(model, work.predict, [photo])
        return Response(await loop.run_in_executor(codecs, work.encode, masks[0]), media_type="image/png")

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    served = create_app(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]))
    uvicorn.run(served, port=int(sys.argv[2]), log_level="warning")
