"""`sceneray tune`: search over training settings with Ray Tune; every trial is a training job like any other.

Tune decides when a trial starts and which ones stop early. What was tried and scored is in the sweep's folder alone:
the same command again reads it there, never from Ray's own (pickled) record, which goes to SWEEP/.ray and is not read.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.cli import main_of, say
from jobs.ray_session import ray_session
from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.errors import ConfigError, Interrupted, ScenerayError
from tune import report
from tune.report import Record
from tune.schedulers import scheduler_of
from tune.settings import CONTINUABLE_WITH_OTHER, Trial, TuneSettings, plan, run_of, with_full_paths

HELP = "search over training settings; ends in a table and best.yaml, which `sceneray train` takes"
EXAMPLE = "sceneray tune tune/configs/town.yaml sweep=runs/sweep train.data.store=stores/town"
AGAIN = """\
The same command again goes on with the sweep: trials that finished or were stopped early are kept, the others go on
from their last checkpoint. More trials=N extend it; other values in CONFIG.yaml need another sweep=URL."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{AGAIN}"
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings file (path or URL)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns the content of SWEEP/sweep.json."""
    from sceneray.data.store import Store
    from sceneray.devices import usable_cores

    settings = with_full_paths(config.load(TuneSettings, args.config, args.overrides))
    trials = plan(settings)
    # Nothing is started for data that is not there.
    for store in dict.fromkeys(trial.settings.data.store for trial in trials):
        Store.open(store)
    records = open_sweep(settings, trials)
    waiting = [trial for trial in trials if records[trial.id].state not in report.KEPT]
    interrupted = False
    if waiting:
        kept = len(trials) - len(waiting)
        say(f"{len(waiting)} trials to run" + (f", {kept} kept from before" if kept else ""))
        with ray_session(args.address, cpus=max(math.ceil(settings.cpus_per_trial), usable_cores())):
            if not (args.address or os.environ.get("RAY_ADDRESS")):
                _check_placement(settings)
            interrupted = not _run_trials(settings, waiting, records)
    return finish(settings, list(records.values()), interrupted)


def open_sweep(settings: TuneSettings, trials: Iterable[Trial]) -> dict[str, Record]:
    """The record of each trial, as an earlier call left it; writes SWEEP/config.yaml.

    Raises ConfigError where the sweep was started with other settings, with each difference.
    """
    url = storage.join(settings.sweep, "config.yaml")
    if storage.is_file(url):
        changed = config.differences(config.load(TuneSettings, url), settings, CONTINUABLE_WITH_OTHER)
        if changed:
            raise ConfigError(
                f"{settings.sweep} was started with other settings: {'; '.join(changed)}. Use those of {url}, or give "
                f"another sweep=URL. Free to change are: {', '.join(CONTINUABLE_WITH_OTHER)}."
            )
    storage.write_bytes(url, config.dump(settings).encode())
    found = {trial.id: report.load_record(settings.sweep, trial.id) for trial in trials}
    return {trial.id: found[trial.id] or Record(trial.id, trial.values) for trial in trials}


def train_trial(arguments: Mapping[str, Any]) -> None:
    """What the process of one trial runs: the very same `fit` as `sceneray train`."""
    from ray import tune

    from sceneray.run_folder import prepare_run
    from sceneray.status import RESULT
    from sceneray.training import Runtime, fit

    settings = TrainSettings.model_validate(arguments["trial"]["settings"])
    try:
        settings = prepare_run(settings)
        if not storage.is_file(storage.join(settings.run, RESULT)):
            fit(settings, Runtime(report=tune.report))
    except ScenerayError as error:
        # Raised, Tune would start the trial again, and it would fail again.
        tune.report({"failed": str(error)})


class Follower:
    """Writes down how each trial ends, and says so."""

    def __init__(self, settings: TuneSettings, records: dict[str, Record]) -> None:
        self.settings = settings
        self.records = records
        self.started_at = time.monotonic()

    @property
    def out_of_time(self) -> bool:
        """True once the time budget is used up."""
        budget = self.settings.time_budget_s
        return budget is not None and time.monotonic() - self.started_at >= budget

    def start(self, trial: str) -> None:
        """A trial's process was started, perhaps not for the first time."""
        record = self.records[trial]
        record.state, record.reason = report.RUNNING, None
        say(f"trial {trial}: {report.listed(record.values)}")

    def score(self, trial: str, row: Mapping[str, Any]) -> None:
        """A trial evaluated its network."""
        metric = self.settings.metric
        if metric in row:
            say(f"trial {trial}: epoch {report.short(row['epoch'])}, {metric} {row[metric]:.4f}")

    def end(self, trial: str, failure: str | None) -> None:
        """A trial ended: by itself, by the scheduler, or with a failure."""
        from sceneray.status import RESULT

        record = self.records[trial]
        if failure is not None:
            record.state = report.FAILED
        elif storage.is_file(storage.join(run_of(self.settings.sweep, trial), RESULT)):
            record.state = report.FINISHED
        else:
            record.state = report.STOPPED
        record.reason = failure
        self._write(record)

    def close(self) -> bool:
        """Tune has returned: what still runs was cut off by the clock (True) or by Ctrl-C (False)."""
        cut = [record for record in self.records.values() if record.state == report.RUNNING]
        for record in cut:
            record.state = report.OUT_OF_TIME if self.out_of_time else report.INTERRUPTED
            self._write(record)
        waiting = any(record.state == report.WAITING for record in self.records.values())
        if self.out_of_time and (cut or waiting):
            say(f"the time budget of {self.settings.time_budget_s:g} s is used up; the same command goes on")
        return self.out_of_time or not (cut or waiting)

    def _write(self, record: Record) -> None:
        record.history = report.val_history(run_of(self.settings.sweep, record.id))
        report.save_record(self.settings.sweep, record)
        say(f"trial {record.id}: {record.state}" + (f": {record.reason}" if record.reason else ""))


def _callback(follower: Follower) -> Any:
    """`follower` as Ray Tune calls it, in the driver."""
    from ray import tune

    def name(info: Mapping[str, Any]) -> str:
        return str(info["trial"].config["trial"]["id"])

    class Callback(tune.Callback):  # type: ignore[misc]  # Ray is untyped to mypy here
        def on_trial_start(self, *_: Any, **info: Any) -> None:
            follower.start(name(info))

        def on_trial_result(self, *_: Any, **info: Any) -> None:
            follower.score(name(info), info["result"])

        def on_trial_complete(self, *_: Any, **info: Any) -> None:
            follower.end(name(info), (info["trial"].last_result or {}).get("failed"))

        def on_trial_error(self, *_: Any, **info: Any) -> None:
            follower.end(name(info), _last_line(info["trial"].error_file))

    return Callback()


def _run_trials(settings: TuneSettings, trials: list[Trial], records: dict[str, Record]) -> bool:
    """Run `trials` on the Ray that this process is connected to; `records` says afterwards how each ended.

    Returns False after Ctrl-C: Tune has ended the trials' processes then.
    """
    import uuid

    import pyarrow.fs
    from ray import tune

    _configure_tune()
    filesystem, path = storage.filesystem(storage.join(settings.sweep, ".ray"))
    follower = Follower(settings, records)
    resources = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    space = [{"id": trial.id, "settings": trial.settings.model_dump(mode="json")} for trial in trials]
    kept = [record for record in records.values() if record.state in report.KEPT]
    tune.Tuner(
        tune.with_resources(train_trial, resources),
        param_space={"trial": tune.grid_search(space)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler_of(settings, trials, kept),
            max_concurrent_trials=settings.max_concurrent,
            time_budget_s=settings.time_budget_s,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']['id']}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']['id']}",
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[_callback(follower)],
            verbose=0,
        ),
    ).fit()
    return follower.close()


def _configure_tune() -> None:
    # Trials log for themselves, and one that fails reports that instead of a score.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # The newer output engine prints to stdout even when it is told to be silent.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # It misses those loggers' files.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


def finish(settings: TuneSettings, records: list[Record], interrupted: bool = False) -> dict[str, Any]:
    """Write sweep.json and best.yaml and print the table, of a part of the trials too.

    Raises Interrupted after Ctrl-C, ScenerayError where no trial has a score.
    """
    result = report.document(records, settings)
    storage.write_json(storage.join(settings.sweep, "sweep.json"), result)
    print(report.table(records, settings.metric))
    if result["best"] is not None:
        best = next(record for record in records if record.id == result["best"])
        storage.write_bytes(result["best_yaml"], report.best_yaml(best, settings).encode())
        print(f"\nbest: trial {best.id}. Train with its values: sceneray train {result['best_yaml']}")
    if interrupted:
        raise Interrupted("stopped before all trials ended. The same command goes on from there.")
    if result["best"] is None:
        raise ScenerayError(
            f"no trial has a {settings.metric}: see the reasons above and the logs in {settings.sweep}/trials. Mend "
            "the cause, or give more time, and run the same command again."
        )
    return result


def _check_placement(settings: TuneSettings) -> None:
    """Refuse a trial that this machine can never hold; a cluster may grow a node for it."""
    import ray

    have = ray.cluster_resources()
    wanted = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    if any(have.get(kind, 0) < amount for kind, amount in wanted.items()):
        has = ", ".join(f"{have.get(kind, 0):g} {kind}" for kind in wanted)
        raise ConfigError(
            f"a trial needs cpus_per_trial={settings.cpus_per_trial:g} and gpus_per_trial={settings.gpus_per_trial:g}; "
            f"this machine has {has}. Lower them, or connect to a cluster with --address."
        )


def _last_line(path: str | None) -> str:
    """The last line of the error text that Tune kept for a trial: the exception itself."""
    if path is None or not os.path.exists(path):
        return "its process ended without a word"
    with open(path) as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "its process ended without a word"


if __name__ == "__main__":
    raise SystemExit(main_of("tune"))
