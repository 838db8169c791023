"""Settings of a sweep: what every trial trains, which settings are searched, and who may run how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.config_base import Positive, Settings, known_in
from sceneray.errors import ConfigError
from tune import spaces

# What may grow or shrink when a sweep goes on: none of it changes a trial's result.
CONTINUABLE_WITH_OTHER = ("trials", "max_concurrent", "cpus_per_trial", "gpus_per_trial", "time_budget_s", "retries")
OWN = ("run", "workers")


class TrialSettings(TrainSettings):
    """The settings all trials share: those of `sceneray train`, without the run's URL; a trial has one worker."""

    run: str = ""
    workers: Positive = 1

    @field_validator("run")
    @classmethod
    def _given_by_the_sweep(cls, run: str) -> str:
        if run:
            raise ValueError(f"every trial gets its own run folder below the sweep's: leave it out, got '{run}'")
        return run

    @field_validator("workers")
    @classmethod
    def _one(cls, workers: int) -> int:
        # The tree is often copied from a settings file for `sceneray train`; a trial is one process whatever it says.
        return min(workers, 1)


class SchedulerSettings(Settings):
    """Which trials are stopped early."""

    name: Annotated[str, AfterValidator(known_in("tune.schedulers:SCHEDULERS"))] = "asha"
    grace_period: float = Field(default=1.0, gt=0, description="epochs that every trial gets")
    reduction_factor: float = Field(default=3.0, gt=1, description="at each rung the best 1/this go on")


class TuneSettings(Settings):
    """Everything `sceneray tune` needs. The resolved tree is written to SWEEP/config.yaml."""

    sweep: str = Field(description="URL of the sweep's folder: trials, table, best.yaml")
    train: TrialSettings
    space: dict[str, Any] = Field(description="setting → distribution; see tune/spaces.py")
    trials: Positive = 8
    max_concurrent: int | None = Field(None, ge=1, description="default: as many as the cluster has room for")
    cpus_per_trial: float = Field(1.0, gt=0)
    gpus_per_trial: float = Field(0.0, ge=0)
    metric: Literal["miou", "pixel_accuracy", "mean_accuracy"] = Field(
        "miou", description="of the val split; highest wins"
    )
    scheduler: SchedulerSettings = SchedulerSettings()
    search: Literal["random"] = "random"
    seed: int = Field(0, ge=0, description="of the draws; a trial's own seed is train.seed")
    time_budget_s: float | None = Field(None, gt=0, description="stop all trials after so many seconds")
    retries: int = Field(2, ge=0, description="how often a trial whose process died goes on from its last checkpoint")

    @field_validator("space")
    @classmethod
    def _known_distributions(cls, space: dict[str, Any]) -> dict[str, Any]:
        spaces.read(space)
        return space


@dataclass(frozen=True)
class Trial:
    """One training job of a sweep."""

    id: str
    values: dict[str, Any]  # searched setting → drawn value
    settings: TrainSettings


def plan(settings: TuneSettings) -> list[Trial]:
    """All trials of a sweep, each with its validated training settings.

    Raises ConfigError where the space names an unknown setting or draws a value that training would refuse.
    """
    distributions = spaces.read(settings.space)
    for key in distributions:
        if key.split(".")[0] in OWN:
            raise ConfigError(f"space.{key} cannot be searched: a trial has its own run folder and one worker.")
    shared = settings.train.model_dump(mode="json")
    # What Tune reserves for a trial is what it uses: another trial may run beside it on the same machine.
    shared["resources"]["gpu"] = settings.gpus_per_trial > 0
    shared["threads"] = settings.train.threads or max(1, int(settings.cpus_per_trial))
    trials = []
    for index in range(settings.trials):
        name = f"{index:04d}"
        values = spaces.draw(distributions, settings.seed, index)
        tree = spaces.placed(shared | {"run": run_of(settings.sweep, name)}, values)
        train = config.validate(TrainSettings, tree, f"the space, as trial {name} draws it")
        trials.append(Trial(name, values, train))
    return trials


def with_full_paths(settings: TuneSettings) -> TuneSettings:
    """Relative paths made absolute: trials run in folders of their own."""
    train = config.map_files(settings.train, lambda _, url: storage.absolute(url))
    return settings.model_copy(update={"sweep": storage.absolute(settings.sweep), "train": train})


def run_of(sweep: str, trial: str) -> str:
    """URL of a trial's run folder."""
    return storage.join(sweep, "trials", trial)


def best_settings(settings: TuneSettings, values: Mapping[str, Any]) -> TrainSettings:
    """The training settings that `values` of the best trial make, for a run of its own below the sweep."""
    shared = settings.train.model_dump(mode="json") | {"run": storage.join(settings.sweep, "best")}
    return config.validate(TrainSettings, spaces.placed(shared, values), "the best trial")
