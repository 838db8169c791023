"""Which trials of a sweep are stopped early."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from tune.report import Record
from tune.settings import Trial, TuneSettings


def asha(settings: TuneSettings, epochs: float) -> Any:
    """Asynchronous successive halving: at epochs grace, grace × factor, ... only the best 1/factor go on.

    Li et al., "A system for massively parallel hyperparameter tuning", MLSys 2020.
    """
    from ray.tune.schedulers import ASHAScheduler

    grace: Any = settings.scheduler.grace_period
    if grace >= epochs:
        return none(settings, epochs)
    return ASHAScheduler(
        time_attr="epoch",
        metric=settings.metric,
        mode="max",
        grace_period=grace,
        reduction_factor=settings.scheduler.reduction_factor,
        # No rung at the very end, and no stop there: a trial that comes so far ends by itself.
        max_t=max(grace, 0.999 * epochs),
        stop_last_trials=False,
    )


def none(settings: TuneSettings, epochs: float) -> Any:  # noqa: ARG001 - one signature for all schedulers
    """Every trial runs to its end."""
    from ray.tune.schedulers import FIFOScheduler

    return FIFOScheduler()


SCHEDULERS: dict[str, Callable[[TuneSettings, float], Any]] = {"asha": asha, "none": none}


def scheduler_of(settings: TuneSettings, trials: Iterable[Trial], kept: Iterable[Record]) -> Any:
    """The sweep's scheduler, told what the trials `kept` from an earlier call scored: they still set the bar."""
    epochs = max(trial.settings.epochs for trial in trials)
    scheduler = SCHEDULERS[settings.scheduler.name](settings, epochs)
    for record in kept:
        trial = SimpleNamespace(trial_id=f"kept-{record.id}")
        scheduler.on_trial_add(None, trial)
        for row in record.history:
            scheduler.on_trial_result(None, trial, row)
    return scheduler
