"""The Serve application: an ingress with the HTTP routes, and replicas of the model behind it.

    serve run serve.app:build bundle=s3://models/town/3 max_batch_size=16

`build` is typed: an unknown or malformed argument is refused before anything starts.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` as it stands, and a string would
# leave the arguments an unchecked dict.

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from sceneray import storage
from sceneray.errors import ScenerayError
from sceneray.masks import Photo
from serve.api import ApiSettings, create_app
from serve.batching import Limits, Overloaded
from serve.schemas import Ask, Segmented
from serve.settings import ServeArgs

# The ingress decodes and encodes; it asks for little so that it fits beside the model on a small machine.
INGRESS_CPUS = 0.25


@serve.deployment(name="Segmenter")
class SegmenterReplica:
    """A model replica."""

    def __init__(self, bundle: str, limits: Limits, device: str | None, threads: int | None) -> None:
        from serve.segmenter import Segmenter  # torch: not in the ingress, not in the driver

        self._segmenter = Segmenter.load(bundle, limits, device, threads)

    async def segment(self, image: Photo, ask: Ask) -> Segmented | ScenerayError:
        """The answer, or why there is none: raised, it would be logged as a failure of the replica."""
        try:
            return await self._segmenter.segment(image, ask)
        except ScenerayError as error:
            return error

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return await self._segmenter.describe()


@serve.deployment(name="Ingress", ray_actor_options={"num_cpus": INGRESS_CPUS})
@serve.ingress()
class Ingress:
    """The HTTP routes; Serve asks for the app once the replica stands, so it is never pickled."""

    def __init__(self, segmenter: DeploymentHandle, settings: ApiSettings) -> None:
        self._backend = HandleBackend(segmenter)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._settings)


class HandleBackend:
    """The model replicas as the routes' backend (api.Backend)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of `image`. Raises what the replica answered in place of one, or Overloaded."""
        try:
            answer = await self._handle.segment.remote(image, ask)
        except BackPressureError as error:
            raise Overloaded("every model replica is busy; try again in 1 s.") from error
        if isinstance(answer, ScenerayError):
            raise answer
        segmented: Segmented = answer
        return segmented

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        about: dict[str, Any] = await self._handle.describe.remote()
        return about


def build(args: ServeArgs) -> Application:
    """The application that serves `args.bundle`."""
    most = args.max_replicas or args.replicas
    segmenter = SegmenterReplica.options(  # type: ignore[attr-defined]
        **_scale(args),
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=args.ongoing,
        max_queued_requests=args.ongoing * most,
        # A bundle that cannot be loaded is not loaded by the twentieth try (Serve's default) either.
        max_constructor_retry_count=2,
    ).bind(storage.absolute(args.bundle), args.batching, args.device, args.threads)
    settings = ApiSettings(args.uploads, args.max_queued_pixels * most, args.api_keys)
    ongoing = 2 * args.ongoing * most
    return Ingress.options(  # type: ignore[attr-defined]
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    ).bind(segmenter, settings)


def _scale(args: ServeArgs) -> dict[str, Any]:
    if args.max_replicas is None or args.max_replicas == args.replicas:
        return {"num_replicas": args.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": args.replicas,
            "max_replicas": args.max_replicas,
            # A full batch on the model and none waiting is what one replica handles well.
            "target_ongoing_requests": args.max_batch_size,
        }
    }
