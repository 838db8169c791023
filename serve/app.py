"""The Serve application: an ingress with the HTTP routes, and replicas of the model behind it.

    serve run serve.app:build bundle=s3://models/town/3 max_batch_size=16

`build` is typed: an unknown or malformed argument is refused before anything starts.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` as it stands, and a string would
# leave the arguments an unchecked dict.

import asyncio
import logging
import warnings
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from sceneray import storage
from sceneray.errors import ScenerayError
from sceneray.masks import Photo
from serve import access_log
from serve.admission import Refused
from serve.api import ApiSettings, Backend, create_app
from serve.batching import Limits, Overloaded
from serve.priority import collect_garbage_seldom
from serve.quota_actor import shared_quotas
from serve.ray_telemetry import RayTelemetry
from serve.scaling import QueuedPixels
from serve.schemas import Ask, Rules, Segmented
from serve.settings import ServeArgs
from serve.shape_router import by_shape
from serve.telemetry import replica_state

if TYPE_CHECKING:
    from serve.versions import Versions  # torch: not in the ingress, not in the driver

# The ingress decodes and encodes; it asks for little so that it fits beside the model on a small machine.
INGRESS_CPUS = 0.25
HEALTH_TIMEOUT_S = 90.0
# Ray drops a gauge that was not set for about 15 s.
TELL_S = 5.0
# Requests that Serve lets into a replica. There are never so many: our own bounds on bytes, pixels and seconds decide
# who waits and who is refused. At Serve's bound requests would wait in its proxy, which reads their bodies without any,
# and its router, which asks full replicas now and again, let four requests a second through (measured).
ONGOING = 5000
QUEUED = 200  # requests that wait while no replica is there
HTTP = {
    "max_ongoing_requests": ONGOING,
    "max_queued_requests": QUEUED,
    "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
}
ATTEMPTS = 3  # replicas that may be lost over one image before it is given up
log = logging.getLogger("sceneray.serve")


class ModelReplica:
    """What every replica with a model does for Serve."""

    def __init__(
        self, bundle: str, limits: Limits, device: str | None, threads: int | None, rules: Rules, follow_s: float
    ) -> None:
        from serve.versions import Versions  # torch: not in the ingress, not in the driver

        self._telemetry = RayTelemetry()
        self._versions = Versions.start(bundle, limits, device, threads, rules, self._telemetry)
        self._workers = limits.workers
        self._load = self._versions.segmenter.meter.reader()
        self._follow_s = follow_s
        self._following: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Follow `user_config["bundle"]`, if it names one. Never raises: Serve would take the application down."""
        if self._following is None:
            self._following = asyncio.create_task(self._versions.follow(self._follow_s))
            self._telling = asyncio.create_task(self._tell())
        source = user_config.get("bundle")
        if isinstance(source, str) and source:
            self._changing = asyncio.create_task(self._versions.change_to(source))

    async def segment(self, image: Photo, ask: Ask) -> Segmented | ScenerayError:
        """The answer, or why there is none: raised, it would be logged as a failure of the replica."""
        try:
            return await self._versions.segmenter.segment(image, ask)
        except ScenerayError as error:
            return error

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return await self._versions.describe()

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises or does not answer."""
        await self._versions.segmenter.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueuedPixels decides on: means since Serve last asked."""
        load = self._load()
        busy = min(1.0, load.get("passes", 0.0) / self._workers)
        return {"pixels": load.get("pixels", 0.0), "requests": load.get("requests", 0.0), "busy": busy}

    async def _tell(self) -> None:
        load = self._versions.segmenter.meter.reader()
        while True:
            candidate = (await self._versions.describe())["candidate"]
            refused = candidate is not None and candidate["state"] == "refused"
            replica_state(self._telemetry, self._versions.segmenter.card, load().get("pixels", 0.0), refused)
            await asyncio.sleep(TELL_S)


@serve.deployment(name="Segmenter")
class SegmenterReplica(ModelReplica):
    """A model replica that the ingress asks."""


@serve.deployment(name="Segmenter")
@serve.ingress()
class WholeReplica(ModelReplica):
    """A model replica with HTTP routes of its own: no other process between a request and the model."""

    def __init__(
        self,
        bundle: str,
        limits: Limits,
        device: str | None,
        threads: int | None,
        rules: Rules,
        follow_s: float,
        settings: ApiSettings,
        replicas: int,
    ) -> None:
        super().__init__(bundle, limits, device, threads, rules, follow_s)
        self._front = Front(settings, replicas, self._telemetry)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._front.app(OwnModel(self._versions))


@serve.deployment(name="Ingress", ray_actor_options={"num_cpus": INGRESS_CPUS})
@serve.ingress()
class Ingress:
    """The HTTP routes; Serve asks for the app once the replica stands, so it is never pickled."""

    def __init__(self, segmenter: DeploymentHandle, settings: ApiSettings, replicas: int) -> None:
        self._backend = HandleBackend(segmenter)
        self._front = Front(settings, replicas, RayTelemetry())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._front.app(self._backend)


class Front:
    """What a process with HTTP routes has beside a backend."""

    def __init__(self, settings: ApiSettings, replicas: int, telemetry: RayTelemetry) -> None:
        self._settings = settings
        self._quotas = shared_quotas(replicas)
        self._telemetry = telemetry
        collect_garbage_seldom()
        if settings.access_log:
            access_log.to_stdout()

    def app(self, backend: Backend) -> FastAPI:
        """The routes over `backend`."""
        return create_app(backend, self._settings, self._quotas, self._telemetry)


class OwnModel:
    """The model of this process as the routes' backend (api.Backend)."""

    def __init__(self, versions: "Versions") -> None:
        self._versions = versions

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of `image`, by the version that answers now. Raises what Segmenter.segment does."""
        return await self._versions.segmenter.segment(image, ask)

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return await self._versions.describe()


class HandleBackend:
    """The model replicas as the routes' backend (api.Backend)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        # Images and masks straight from process to process (gRPC), not by way of the object store.
        self._handle = handle.options(
            _by_reference=False, request_serialization="pickle", response_serialization="pickle"
        )

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of `image`. Raises what the replica answered in place of one, Overloaded, or Refused (503)."""
        try:
            answer = await self._ask(self._handle.segment, image, ask)
        except BackPressureError as error:
            raise Overloaded("every model replica is busy; try again in 1 s.") from error
        if isinstance(answer, ScenerayError):
            raise answer
        segmented: Segmented = answer
        return segmented

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest. Raises Refused (503)."""
        about: dict[str, Any] = await self._ask(self._handle.describe)
        return about

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        """What a replica answers; another one is asked where it is lost, for asking changes nothing."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await method.remote(*arguments)
            except RayActorError as error:
                log.warning("a model replica was lost, attempt %d of %d: %s", attempt, ATTEMPTS, error)
        raise Refused(
            503,
            "replica_lost",
            f"{ATTEMPTS} model replicas ended while they worked on this: try again.",
            {"Retry-After": "1"},
        )


def build(args: ServeArgs) -> Application:
    """The application that serves `args.bundle`."""
    most = args.max_replicas or args.replicas
    settings = ApiSettings(
        uploads=args.uploads,
        max_pixels_in_work=args.max_queued_pixels * (1 if args.together else most),
        max_bytes_in_work=args.max_bytes_in_work,
        key_digests=args.api_keys,
        keys_file=None if args.api_keys_file is None else storage.absolute(args.api_keys_file),
        deadline_s=args.deadline_s,
        cors_origins=args.cors_origins,
        access_log=args.access_log,
        proxied=True,
    )
    model = (storage.absolute(args.bundle), args.batching, args.device, args.threads, args.rules, args.follow_s)
    if args.together:
        whole = WholeReplica.options(**_model_options(args), **HTTP)  # type: ignore[attr-defined]
        return whole.bind(*model, settings, most)
    segmenter = SegmenterReplica.options(  # type: ignore[attr-defined]
        **_model_options(args),
        **by_shape(args),
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
    ).bind(*model)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=args.ingress_replicas, **HTTP
    )
    return ingress.bind(segmenter, settings, args.ingress_replicas)


def _model_options(args: ServeArgs) -> dict[str, Any]:
    return {
        **_scale(args),
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
        "user_config": {},  # any at all, or Serve would not call `reconfigure`
        # Above the time in which a stuck model is noticed by `check_health` itself.
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        # A bundle that cannot be loaded is not loaded by the twentieth try (Serve's default) either.
        "max_constructor_retry_count": 2,
    }


def _scale(args: ServeArgs) -> dict[str, Any]:
    if args.max_replicas is None or args.max_replicas == args.replicas:
        return {"num_replicas": args.replicas}
    rule = {
        "target_pixels": args.target_pixels or 2 * args.max_batch_pixels,
        "up_delay_s": args.upscale_delay_s,
        "down_delay_s": args.downscale_delay_s,
        "zero_delay_s": args.idle_s,
    }
    with warnings.catch_warnings():
        # Ray names environment variables to use in place of the interval, and reads neither.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=args.replicas,
            initial_replicas=max(1, args.replicas),  # a bundle that cannot be loaded is noticed at once
            max_replicas=args.max_replicas,
            look_back_period_s=args.look_back_s,
            metrics_interval_s=args.look_back_s / 5,
            policy=AutoscalingPolicy(policy_function=QueuedPixels, policy_kwargs=rule),
            # The policy has delays of its own.
            upscale_delay_s=0,
            downscale_delay_s=0,
        )
    return {"autoscaling_config": config}
