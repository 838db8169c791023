"""The arguments of `serve.app:build`. Apart from it, so that they can be checked before Ray is imported."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.admission import UploadLimits
from serve.batching import Limits
from serve.schemas import InputRule, Mode, Precision, Rules

Positive = Annotated[int, Field(ge=1)]


class ServeArgs(BaseModel):
    """Arguments of `build`: what is served and how. Flat, for `serve run serve.app:build key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field(description="URL of the bundle, written by `sceneray export`")
    device: str | None = Field(None, description="as torch names it; default: CUDA where the replica has one")
    replicas: int = Field(1, ge=0, description="model replicas; the least of them when max_replicas is set, 0 too")
    max_replicas: int | None = Field(None, ge=1, description="autoscale up to so many replicas")
    target_pixels: int | None = Field(
        None, ge=1, description="autoscaling: pixels queued and on the model of one replica; default: two batches"
    )
    look_back_s: float = Field(10.0, gt=0, description="autoscaling: seconds over which the load is averaged")
    upscale_delay_s: float = Field(5.0, ge=0, description="autoscaling: seconds of too much before there are more")
    downscale_delay_s: float = Field(
        120.0, ge=0, description="autoscaling: seconds of too little before there are fewer"
    )
    idle_s: float = Field(
        600.0, ge=0, description="with replicas=0: seconds without a request before the last one ends"
    )
    ingress_replicas: Positive = Field(1, description="HTTP replicas: decoding and encoding")
    together: bool = Field(
        False, description="HTTP routes in the model replicas: less work a request, and no ingress to scale apart"
    )
    cpus: float = Field(1.0, ge=0, description="CPUs that a model replica asks of the cluster")
    gpus: float = Field(0.0, ge=0, description="GPUs that a model replica asks of the cluster")
    nice: int = Field(0, ge=0, le=19, description="niceness of a CPU's passes: above 0 HTTP beside them goes first")
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward pass; default: as many as cpus")
    max_batch_size: Positive = Field(8, description="images of one forward pass")
    max_batch_pixels: Positive = Field(4 * 2**20, description="pixels of one forward pass")
    mode: Mode = Field("exact", description="exact: the same bytes whatever runs beside; fast: ties may differ")
    exact_batch: int | None = Field(None, ge=1, description="images of an exact pass; default: CPU 1, GPU a batch")
    input: InputRule | None = Field(None, description="what the network is given; default: as the bundle says")
    long_side: int | None = Field(None, ge=1, description="of the network's input with input=resize")
    window: int | None = Field(None, ge=1, description="side of the square windows of input=window")
    warm: tuple[tuple[int, int], ...] | None = Field(
        None, description="shapes to run before the first request, as HxW,HxW; default: as the bundle says"
    )
    runtime: Literal["torch", "compile", "cuda_graph", "onnx"] | None = Field(
        None, description="what computes; default: onnx on a CPU for a bundle that has a graph, else torch"
    )
    precision: Precision = Field("auto", description="in what it computes; auto: bf16 on GPUs that have it, else fp32")
    follow_s: float = Field(10.0, gt=0, description="how often a replica looks where bundle=REPO/MODEL@champion leads")
    batch_wait_ms: float = Field(5.0, ge=0, description="the longest a first image waits for others of its shape")
    concurrent_batches: Positive = Field(1, description="forward passes at a time in one replica")
    max_queued_pixels: Positive = Field(64 * 2**20, description="pixels that may wait in one replica; above: 429")
    max_queue_s: float = Field(10.0, gt=0, description="what waits in a replica may take so long; above: 429")
    max_bytes: Positive = Field(20 * 2**20, description="largest request body")
    max_bytes_in_work: Positive = Field(
        256 * 2**20, description="request bodies that one HTTP process holds, in bytes; above: 429"
    )
    max_pixels: Positive = Field(16 * 2**20, description="largest image, in pixels")
    max_side: Positive = Field(8192, description="largest height or width of an image")
    deadline_s: float = Field(60.0, gt=0, le=3600, description="the longest a request may take; then: 504")
    api_keys: tuple[str, ...] = Field((), description="sha256 in hex of the keys that may enter; none: all may")
    api_keys_file: str | None = Field(None, description="URL of a key file, written by `sceneray keys`; read on change")
    require_keys: bool = Field(False, description="refuse to start where no key is asked for")
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may read answers; none: no CORS")
    access_log: bool = Field(True, description="a JSON line a request on the HTTP replica's stdout")

    @field_validator("warm", mode="before")
    @classmethod
    def _shapes(cls, value: Any) -> Any:
        # `serve run ... warm=480x640,720x1280` hands over one string.
        return tuple(part.split("x") for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        # `serve run ... api_keys=A,B` hands over one string.
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _digests(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if len(key) != 64 or set(key.lower()) - set("0123456789abcdef"):
                raise ValueError(
                    'api_keys takes sha256 digests (64 hex digits), never the keys: printf %s "$KEY" | sha256sum'
                )
        return tuple(key.lower() for key in keys)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
                raise ValueError(
                    f"cors_origins takes origins by name, as https://app.example.org without a path; got '{origin}'"
                )
        return origins

    @model_validator(mode="after")
    def _keys(self) -> ServeArgs:
        if self.require_keys and not self.api_keys and self.api_keys_file is None:
            raise ValueError(
                "require_keys is set and there is neither api_keys nor api_keys_file: write a key file with "
                "`sceneray keys new --file URL --id NAME` and give its URL as api_keys_file"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> ServeArgs:
        if self.max_queued_pixels < self.max_pixels:
            raise ValueError(
                f"max_queued_pixels ({self.max_queued_pixels}) must be at least max_pixels ({self.max_pixels}), or the "
                "largest image could never be queued"
            )
        if self.max_bytes_in_work < self.max_bytes:
            raise ValueError(
                f"max_bytes_in_work ({self.max_bytes_in_work}) must be at least max_bytes ({self.max_bytes}), or the "
                "largest body could never be read"
            )
        if self.max_replicas is None and self.replicas == 0:
            raise ValueError(
                "replicas=0 lets the model end while nobody asks: say with max_replicas how many may start"
            )
        if self.together and (self.ingress_replicas > 1 or self.replicas == 0):
            raise ValueError(
                "together=true puts the HTTP routes into the model replicas: leave ingress_replicas at 1 and keep at "
                f"least one of replicas, got {self.ingress_replicas} and {self.replicas}"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least replicas ({self.replicas})")
        return self

    @property
    def batching(self) -> Limits:
        """The batcher's limits, in pixels."""
        return Limits(
            max_items=self.max_batch_size,
            max_cost=self.max_batch_pixels,
            max_queued_cost=self.max_queued_pixels,
            max_wait_s=self.batch_wait_ms / 1000,
            workers=self.concurrent_batches,
            max_queue_s=self.max_queue_s,
        )

    @property
    def rules(self) -> Rules:
        """How the model is run."""
        return Rules(
            self.mode,
            self.exact_batch,
            self.input,
            self.long_side,
            self.window,
            self.warm,
            self.runtime,
            self.precision,
            self.nice,
        )

    @property
    def uploads(self) -> UploadLimits:
        """What one upload may be."""
        return UploadLimits(self.max_bytes, self.max_pixels, self.max_side)
