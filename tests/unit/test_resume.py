"""Going on exactly where a run stopped: everything that changes is in the checkpoint or follows from the position."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sceneray import checkpoint, runlog, status, storage, training, votes
from sceneray.config import TrainSettings
from sceneray.errors import StorageError
from sceneray.training import Runtime, fit
from tests.ranks import process_group
from tests.stores import tiny_settings

RANKS = 4


def weights(run: str, pointer: str = "last") -> dict[str, Tensor]:
    """The weights of a run's newest or best checkpoint."""
    return checkpoint.load(storage.join(run, pointer)).model


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """True where two sets of tensors agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def at_step(step: int) -> Callable[[], bool]:
    """A wish that comes while step number `step` (from 1) is computed, and once only."""
    counter = itertools.count(1)
    return lambda: next(counter) == step


def interrupted_and_clean(rank: int, folder: str, clean: TrainSettings, rough: TrainSettings) -> None:
    """One of four plain processes: a run without interruption, and one that stops twice and goes on."""
    here = {"rank": rank, "world_size": RANKS, "workers_here": RANKS}
    with process_group(rank, RANKS, folder):
        assert fit(clean, Runtime(**here))["state"] == "finished"
        stops = (2, 1) if rank == 1 else (99, 99)  # one rank is asked, all stop
        for stop in stops:
            assert fit(rough, Runtime(**here, should_stop=at_step(stop)))["state"] == "stopped"
        assert fit(rough, Runtime(**here))["state"] == "finished"


def test_four_processes_end_with_the_same_bits(store: str, tmp_path: Path) -> None:
    """With four ranks DDP sums in another order after its first step: a resumed run must not notice."""
    extra = ("batch_size=4", "epochs=1.7", "eval_every=1", "log.contact_sheet=0", "workers=4", "ema=0.9")
    clean, rough = (tiny_settings(store, str(tmp_path / name), *extra) for name in ("clean", "rough"))
    torch.multiprocessing.spawn(interrupted_and_clean, (str(tmp_path), clean, rough), nprocs=RANKS)
    starts = [record["from_step"] for record in runlog.attempts(rough.run)]
    assert starts == [0, 2, 3]
    assert equal(weights(clean.run), weights(rough.run))
    ends = [checkpoint.load(storage.join(run.run, "last")) for run in (clean, rough)]
    assert equal(ends[0].optimizer, ends[1].optimizer)
    assert equal(ends[0].ema, ends[1].ema)


@pytest.mark.parametrize(
    "extra",
    [("ema=0.9",), ("precision=fp16",), pytest.param(("compile=true",), marks=pytest.mark.chaos)],  # two minutes
)
def test_what_else_changes_is_saved_too(store: str, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """The average of the weights and the scale of fp16's loss go on; a compiled network repeats itself."""
    common = ("epochs=1.4", "eval_every=1", "log.contact_sheet=0", *extra)
    clean, rough = str(tmp_path / "clean"), str(tmp_path / "rough")
    fit(tiny_settings(store, clean, *common), Runtime())
    fit(tiny_settings(store, rough, *common), Runtime(should_stop=at_step(2)))
    assert fit(tiny_settings(store, rough, *common), Runtime())["state"] == "finished"
    one, other = (checkpoint.load(storage.join(run, "last")) for run in (clean, rough))
    assert equal(one.model, other.model)
    assert equal(one.ema, other.ema)
    assert bool(one.ema) == ("ema=0.9" in extra)
    assert one.state["scaler"] == other.state["scaler"]
    assert bool(one.state["scaler"]) == ("precision=fp16" in extra)


def test_the_average_is_what_is_scored_and_built(store: str, tmp_path: Path) -> None:
    """With `ema` the network that `best` names and builds is the average, not the last step's weights."""
    run = str(tmp_path / "run")
    fit(tiny_settings(store, run, "ema=0.9", "epochs=1", "log.contact_sheet=0"), Runtime())
    best = checkpoint.load(storage.join(run, "best"))
    built = checkpoint.build(best).state_dict()
    assert equal({name: built[name] for name in best.ema}, best.ema)
    assert not equal(best.ema, best.model)


def test_a_going_node_makes_the_run_save_and_leave(store: str, tmp_path: Path) -> None:
    """Asked to leave, a run commits the very step it stands at, says "preempted", and goes on from there later."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "log.contact_sheet=0")
    left = fit(settings, Runtime(should_leave=at_step(4)))
    assert left == {"state": "preempted", "step": 4, "steps": 6}
    assert checkpoint.load(storage.join(run, "last")).step == 4
    assert fit(settings, Runtime())["attempts"] == 2
    first, second = status.read_all(run)
    assert (first.state, first.saved_step, second.state, second.from_step) == ("preempted", 4, "finished", 4)


def test_votes_of_a_gpu_are_heard_whatever_is_logged(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU votes are read two steps late. Logging every step, which reads totals too, must take none of them."""

    class Late(votes.Votes):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.lag = votes.GPU_LAG

    monkeypatch.setattr(training, "Votes", Late)
    run = str(tmp_path / "run")
    often = ("log={every_steps: 1, contact_sheet: 0, tensorboard: false}", "save.every_steps=1", "epochs=4")
    left = fit(tiny_settings(store, run, *often), Runtime(should_leave=at_step(2)))
    assert left == {"state": "preempted", "step": 4, "steps": 12}


def test_pointers_that_a_dead_writer_did_not_move(store: str, tmp_path: Path) -> None:
    """Killed between the manifest of its only scored checkpoint and the pointers, a run still finishes, and `best`
    names that checkpoint."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "epochs=1", "log.contact_sheet=0")
    fit(settings, Runtime())
    for name in ("last", "best", "result.json"):
        storage.remove(f"{run}/{name}")
    assert fit(settings, Runtime())["state"] == "finished"
    assert checkpoint.load(f"{run}/best").step == 3


def test_a_source_that_is_gone_is_not_missed_by_a_restart(store: str, tmp_path: Path) -> None:
    """Fine-tuning goes on after the checkpoint that it began from was removed."""
    source, run = str(tmp_path / "source"), str(tmp_path / "run")
    fit(tiny_settings(store, source, "epochs=0.3", "log.contact_sheet=0"), Runtime())
    settings = tiny_settings(store, run, f"init_from={source}/best", "log.contact_sheet=0")
    assert fit(settings, Runtime(should_stop=at_step(2)))["state"] == "stopped"
    storage.remove(source)
    assert fit(settings, Runtime())["state"] == "finished"


def test_a_damaged_status_stops_no_run(store: str, tmp_path: Path) -> None:
    """What an earlier attempt cost is not worth a run, unless there is a budget to keep."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "log.contact_sheet=0")
    fit(settings, Runtime(should_stop=at_step(2)))
    storage.write_json(f"{run}/status/0001.json", {"version": 2})
    with pytest.raises(StorageError, match="no status of version 1"):
        fit(tiny_settings(store, run, "cost={price_per_hour: {default: 1}, budget: 9}"), Runtime())
    assert fit(settings, Runtime())["state"] == "finished"


@pytest.mark.parametrize("stop", [3, 6])
def test_stopped_where_an_evaluation_was_due(store: str, tmp_path: Path, stop: int) -> None:
    """Stopped at the step after which it would have evaluated, a run evaluates when it goes on: no score is missing,
    not even that of the last step."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "log.contact_sheet=0")
    assert fit(settings, Runtime(should_stop=at_step(stop)))["step"] == stop
    assert fit(settings, Runtime())["state"] == "finished"
    assert [row["step"] for row in runlog.read_metrics(run) if row["kind"] == "val"] == [3, 6]
    assert checkpoint.load(storage.join(run, "last")).metrics


def test_a_wish_to_save_is_answered_and_training_goes_on(store: str, tmp_path: Path) -> None:
    """Asked for a checkpoint between two others, rank 0 commits one, says so, and the run ends as ever."""
    run = str(tmp_path / "run")
    answered: list[int] = []
    asked = Runtime(save_wanted=lambda step: step == 2, on_saved=answered.append)
    fit(tiny_settings(store, run, "epochs=1", "eval_every=1", "save.keep=9", "log.contact_sheet=0"), asked)
    assert answered == [2, 3]
    assert [name[-8:-5] for name in checkpoint.names(run)] == ["002", "003"]


def test_a_checkpoint_by_time(store: str, tmp_path: Path) -> None:
    """With `save.every_s` a checkpoint follows whenever so much time has passed, here after every step."""
    run = str(tmp_path / "run")
    every = ("save={every_s: 1.0e-6, keep: 99}", "eval_every=9", "epochs=3", "log.contact_sheet=0")
    fit(tiny_settings(store, run, *every), Runtime())
    saved = [checkpoint.load(storage.join(run, name)).step for name in checkpoint.names(run)]
    assert saved[-1] == 9
    assert len(saved) > 2, "a save in flight may make the next one wait for a step"


def test_which_samples_were_used_is_recorded(store: str, tmp_path: Path) -> None:
    """`log.samples` writes the positions of every step; with those that a restart repeats left out, each came once."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "log.samples=true", "log.contact_sheet=0", "batch_size=5")

    def crash(row: dict[str, object]) -> None:
        if row.get("step") == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(settings, Runtime(progress=crash))
    fit(settings, Runtime())
    used, again = runlog.read_samples(run)
    assert sorted(used) == [1, 2, 3, 4, 5]
    assert [position for step in sorted(used) for position in used[step][0]] == list(range(24))
    assert again == 5, "step 4 was done twice"


def test_a_budget_ends_the_run_until_it_is_raised(store: str, tmp_path: Path) -> None:
    """A run whose price passes its budget saves and stops; with a larger budget the same command goes on."""
    run = str(tmp_path / "run")
    dear = ("cost.price_per_hour={default: 1000000}", "log.contact_sheet=0")
    first = fit(tiny_settings(store, run, *dear, "cost.budget=0.0001"), Runtime())
    assert first["state"] == "over_budget"
    assert checkpoint.load(storage.join(run, "last")).step == first["step"]
    assert fit(tiny_settings(store, run, *dear, "cost.budget=100000000"), Runtime())["state"] == "finished"
    rows = [row for row in runlog.read_metrics(run) if row["kind"] == "train"]
    assert all(later["cost"] > sooner["cost"] for sooner, later in itertools.pairwise(rows))


def test_a_profile_is_one_line_and_a_trace(store: str, tmp_path: Path) -> None:
    """`profile: true` says where a step's time goes, and leaves a trace that Chrome's viewer reads."""
    run = str(tmp_path / "run")
    said: list[str] = []
    hear = Runtime(progress=lambda row: said.append(row.get("text", "")))
    fit(tiny_settings(store, run, "profile=true", "epochs=5", "eval_every=5", "log.contact_sheet=0"), hear)
    line = next(text for text in said if text.startswith("profile of 10 steps"))
    assert all(f"{stage} " in line for stage in ("data", "forward", "backward", "optimizer", "communication"))
    found = next(row for row in runlog.read_metrics(run) if row["kind"] == "profile")
    stages = sum(found[stage] for stage in ("data", "forward", "backward", "optimizer", "communication", "checkpoint"))
    assert 0.5 * found["step_s"] < stages <= found["step_s"]
    assert (tmp_path / "run/profile/attempt-0001/trace.json.gz").stat().st_size > 1000


def test_pictures_on_the_way(store: str, tmp_path: Path) -> None:
    """`log.pictures_every: 2` leaves a contact sheet after every second evaluation."""
    run = str(tmp_path / "run")
    fit(tiny_settings(store, run, "epochs=4", "log.pictures_every=2", "log.contact_sheet=1"), Runtime())
    names = [name for name in storage.list_names(f"{run}/pictures") if name.startswith("step-")]
    assert names == ["step-00000006.jpg", "step-00000012.jpg"]
