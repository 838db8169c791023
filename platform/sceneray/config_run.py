"""Settings of how a run is kept alive, watched and paid for: none of them changes what is learned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from sceneray.config_base import Positive, Settings


class SaveSettings(Settings):
    """When checkpoints are committed and how many stay. Every evaluation commits one; these come on top."""

    every_steps: int | None = Field(None, ge=1, description="also commit every so many steps")
    every_s: float | None = Field(600.0, gt=0, description="also commit when so many seconds passed since the last one")
    keep: Positive = Field(3, description="newest checkpoints kept; the best ones stay besides")
    keep_best: Positive = Field(1, description="best-scoring checkpoints kept")
    tolerate_s: float = Field(
        600.0, ge=0, description="train on while saving fails; after so many seconds without success the run ends"
    )


class LogSettings(Settings):
    """How often metrics are written, and where to."""

    every_steps: Positive = 10
    tensorboard: bool = True
    mlflow: str | None = Field(None, description="tracking URI of an MLflow server; needs the extra: sceneray[mlflow]")
    contact_sheet: int = Field(6, ge=0, description="rows of photo | truth | prediction in the pictures")
    pictures_every: int | None = Field(None, ge=1, description="also a contact sheet every so many evaluations")
    samples: bool = Field(
        False,
        description="record in RUN/samples which samples each worker used; costs a small collective a step",
    )

    @field_validator("mlflow")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "log.mlflow must hold no user or password, because settings are written into the run folder: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return uri


class ResourceSettings(Settings):
    """What one training worker asks of the cluster, and what is done when a worker or a node goes."""

    gpu: bool | None = Field(None, description="default: use GPUs where the cluster has enough")
    cpus: float = Field(1.0, gt=0)
    start_timeout_s: float = Field(20.0, gt=0, description="wait this long for a worker group to start, then try anew")
    start_attempts: Positive = Field(60, description="give up after so many failed starts")
    place_timeout_s: float = Field(900.0, gt=0, description="give up where no worker runs for so long")
    max_failures: int = Field(8, ge=-1, description="worker failures survived; -1: without end")
    max_preemptions: int = Field(-1, ge=-1, description="drained or preempted nodes survived; -1: without end")
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="a worker without progress for so long is started again; its first step may take 10 × as long",
    )
    resize_check_s: float = Field(60.0, gt=0, description="elastic: seconds between two looks for room to grow")
    resize_save_s: float = Field(60.0, ge=0, description="elastic: the most a resize waits for a checkpoint")


class CostSettings(Settings):
    """What the machines cost, and when to stop spending."""

    price_per_hour: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="by node type (its name in cluster.yaml); 'default' for any other node"
    )
    budget: float | None = Field(None, gt=0, description="save and stop once the run has cost so much")

    @model_validator(mode="after")
    def _priced(self) -> CostSettings:
        if self.budget is not None and not self.price_per_hour:
            raise ValueError("cost.budget needs prices: set cost.price_per_hour, for example {default: 1.2}")
        return self


def worker_range(workers: int | str) -> int | str:
    """A number of workers, or a range of them; raises ValueError otherwise."""
    low, dash, high = str(workers).partition("-")
    numbers = (low, high) if dash else (low, low)
    if not all(n.isascii() and n.isdigit() for n in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"workers must be a number from 1 on, or a range such as 1-8, got {workers}")
    return workers if dash else int(low)
