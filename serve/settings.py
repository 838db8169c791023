"""The arguments of `serve.app:build`. Apart from it, so that they can be checked before Ray is imported."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.admission import UploadLimits
from serve.batching import Limits

Positive = Annotated[int, Field(ge=1)]


class ServeArgs(BaseModel):
    """Arguments of `build`: what is served and how. Flat, for `serve run serve.app:build key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field(description="URL of the bundle, written by `sceneray export`")
    device: str | None = Field(None, description="as torch names it; default: CUDA where the replica has one")
    replicas: Positive = Field(1, description="model replicas; the least of them when max_replicas is set")
    max_replicas: int | None = Field(None, ge=1, description="autoscale up to so many replicas")
    ingress_replicas: Positive = Field(1, description="HTTP replicas: decoding and encoding")
    cpus: float = Field(1.0, ge=0, description="CPUs that a model replica asks of the cluster")
    gpus: float = Field(0.0, ge=0, description="GPUs that a model replica asks of the cluster")
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward pass; default: as many as cpus")
    max_batch_size: Positive = Field(8, description="images of one forward pass")
    max_batch_pixels: Positive = Field(4 * 2**20, description="pixels of one forward pass")
    batch_wait_ms: float = Field(5.0, ge=0, description="the longest a first image waits for others of its shape")
    concurrent_batches: Positive = Field(1, description="forward passes at a time in one replica")
    max_queued_pixels: Positive = Field(64 * 2**20, description="pixels that may wait in one replica; above: 429")
    max_bytes: Positive = Field(20 * 2**20, description="largest request body")
    max_pixels: Positive = Field(16 * 2**20, description="largest image, in pixels")
    max_side: Positive = Field(8192, description="largest height or width of an image")
    api_keys: tuple[str, ...] = Field((), description="sha256 in hex of the keys that may enter; none: all may")

    @field_validator("api_keys", mode="before")
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

    @model_validator(mode="after")
    def _consistent(self) -> ServeArgs:
        if self.max_queued_pixels < self.max_pixels:
            raise ValueError(
                f"max_queued_pixels ({self.max_queued_pixels}) must be at least max_pixels ({self.max_pixels}), or the "
                "largest image could never be queued"
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
        )

    @property
    def uploads(self) -> UploadLimits:
        """What one upload may be."""
        return UploadLimits(self.max_bytes, self.max_pixels, self.max_side)

    @property
    def ongoing(self) -> int:
        """Requests in one model replica: twice what the model holds, so that the next batch fills while one runs."""
        return max(16, 2 * self.max_batch_size * self.concurrent_batches)
