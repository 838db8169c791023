"""The training loop: what it computes does not depend on how it is run, and what it did is never lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sceneray import checkpoint, runlog, steps, storage
from sceneray.config import TrainSettings
from sceneray.data import town
from sceneray.data.loader import Batch
from sceneray.dry_run import dry_run
from sceneray.errors import CheckpointError, DataError, TrainingError
from sceneray.steps import Data
from sceneray.training import Runtime, fit
from tests.ranks import first_step, process_group
from tests.stores import tiny_settings, town_store


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """fit sets the threads of the process: give the next test its own back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(run: str) -> dict[str, Tensor]:
    """The final weights of a run."""
    return checkpoint.load(storage.join(run, "last")).model


def stop_after(calls: int) -> Callable[[], bool]:
    """A `should_stop` that says yes from its `calls`-th call on."""
    counter = itertools.count(1)
    return lambda: next(counter) >= calls


def test_a_run_leaves_everything_behind(store: str, tmp_path: Path) -> None:
    """A finished run has its result, metrics, environment, pictures and a best checkpoint that can be built."""
    run = str(tmp_path / "run")
    result = fit(tiny_settings(store, run, "log.tensorboard=true"), Runtime())
    assert result["state"] == "finished"
    assert result["step"] == 6
    rows = runlog.read_metrics(run)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows if row["kind"] == "val"] == [1.0, 2.0]
    environment = storage.read_json(storage.join(run, "environment.json"))
    assert environment["store_digest"] == Data.open(tiny_settings(store, run)).store.digest
    assert environment["packages"]["torch"]
    for name in ("result.json", "pictures/curves.png", "pictures/contact_sheet.jpg"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert any((tmp_path / "run" / "tensorboard" / "attempt-0001").iterdir())
    lines = [path.read_text() for path in sorted((tmp_path / "run/logs/attempt-0001/rank-000").iterdir())]
    assert "committed checkpoints/step-00000006-a001" in "".join(lines)
    best = checkpoint.load(storage.join(run, "best"))
    assert best.metrics["miou"] == result["miou"]
    checkpoint.build(best)


def test_training_learns(tmp_path: Path) -> None:
    """Four scenes shown unchanged over and over: the loss falls below half of where it began."""
    town_store(str(tmp_path / "store"), train=4, shards=1)
    unchanged = "augment={crop: [48, 64], scale: [1, 1], flip: 0, brightness: 0, contrast: 0, saturation: 0}"
    network = ("model.output_stride=8", "model.head_width=32", "model.pool_width=16", "optimizer.lr=0.005")
    run = str(tmp_path / "run")
    fit(tiny_settings(str(tmp_path / "store"), run, "epochs=12", "eval_every=12", unchanged, *network), Runtime())
    losses = [row["loss"] for row in runlog.read_metrics(run) if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("extra", [(), ("accumulate=2",), ("optimizer.name=adamw",)])
def test_a_stopped_run_ends_with_the_same_bits(store: str, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Stopped in mid-epoch and started again, a run's final weights equal the uninterrupted run's bit for bit."""
    clean, stopped = str(tmp_path / "clean"), str(tmp_path / "stopped")
    fit(tiny_settings(store, clean, *extra), Runtime())
    first = fit(tiny_settings(store, stopped, *extra), Runtime(should_stop=stop_after(2)))
    assert first["state"] == "stopped"
    assert 0 < first["step"] < 6
    assert fit(tiny_settings(store, stopped, *extra), Runtime())["state"] == "finished"
    expected, found = weights(clean), weights(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(runlog.attempts(stopped)) == 2


def test_an_error_after_a_save_loses_nothing_before_it(store: str, tmp_path: Path) -> None:
    """A crash goes on from the last committed checkpoint, and the repeated steps' old metrics are superseded."""
    run = str(tmp_path / "run")
    settings = tiny_settings(store, run, "save.every_steps=2")

    def crash(row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(settings, Runtime(progress=crash))
    committed = checkpoint.load(storage.join(run, "last")).step
    assert committed in (3, 4), "what was handed over is committed; the scored one of step 3 is not overtaken by step 4"
    assert fit(settings, Runtime())["attempts"] == 2
    assert runlog.attempts(run)[1]["from_step"] == committed
    rows = [row["step"] for row in runlog.read_metrics(run) if row["kind"] == "train"]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(store: str, tmp_path: Path) -> None:
    """NaN names its step and samples, nothing after the last good checkpoint is saved, and that one stays."""
    run = str(tmp_path / "run")
    good = fit(tiny_settings(store, run, "epochs=1"), Runtime())
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d, samples train-\d+, train-\d+"):
        fit(tiny_settings(store, str(tmp_path / "bad"), "optimizer.lr=1e18", "epochs=3"), Runtime())
    assert not (tmp_path / "bad" / "last").exists()
    assert checkpoint.load(storage.join(run, "last")).step == good["step"]


def test_changed_data_is_refused(store: str, tmp_path: Path) -> None:
    """A run does not go on with a store whose content changed: its positions would mean other samples."""
    run = str(tmp_path / "run")
    fit(tiny_settings(store, run), Runtime(should_stop=stop_after(1)))
    town_store(str(tmp_path / "other"), train=8)
    with pytest.raises(CheckpointError, match="its data changed"):
        fit(tiny_settings(str(tmp_path / "other"), run), Runtime())


def test_fine_tuning_keeps_all_but_the_classifier(store: str, tmp_path: Path) -> None:
    """`init_from` starts from another run's network; with the same classes nothing is made anew."""
    first = str(tmp_path / "first")
    fit(tiny_settings(store, first, "epochs=0.3", "log.contact_sheet=0"), Runtime())
    settings = tiny_settings(store, str(tmp_path / "second"), f"init_from={first}/last")
    state = steps.create_state(settings, Runtime(), Data.open(settings))
    start = weights(first)
    assert all(torch.equal(tensor, start[name]) for name, tensor in state.model.state_dict().items())
    assert state.notes[0].endswith("made anew: nothing")
    renamed = [dataclasses.replace(info, name=f"new {info.name}") for info in town.CLASSES]
    anew = "head.classifier.weight, head.classifier.bias, aux_head.classifier.weight, aux_head.classifier.bias"
    assert steps.start_from(state.model, f"{first}/last", renamed).endswith(f"made anew: {anew}")


def test_a_missing_split_says_so(store: str, tmp_path: Path) -> None:
    """An unknown split names the known ones."""
    with pytest.raises(DataError, match="unknown split 'vall': did you mean 'val'"):
        fit(tiny_settings(store, str(tmp_path / "run"), "data.val_split=vall"), Runtime())


def test_a_dry_run_writes_nothing(store: str, tmp_path: Path) -> None:
    """Checking takes a step, estimates time and memory, and leaves no run folder."""
    found = dry_run(tiny_settings(store, str(tmp_path / "run")), Runtime())
    assert found["steps"] == 6
    assert found["seconds_per_step"] > 0
    assert found["peak_memory_bytes"] > 2**20
    assert not (tmp_path / "run").exists()


def gradients(settings: TrainSettings, runtime: Runtime) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a run's first step."""
    state, batches = first_step(settings, runtime)
    totals = steps.train_step(state, batches)
    return float(totals[0] / totals[1]), {
        n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None
    }


def test_accumulation_changes_nothing(store: str, tmp_path: Path) -> None:
    """Two passes of two samples give the gradient of one pass of four (frozen norm; sums differ by rounding only)."""
    found = []
    for accumulate in (1, 2):
        settings = tiny_settings(store, str(tmp_path), "model.norm=frozen", f"accumulate={accumulate}")
        found.append(gradients(settings, Runtime()))
    (loss, expected), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-6), name


def test_the_loss_is_normalised_over_the_valid_pixels_of_the_whole_batch(store: str, tmp_path: Path) -> None:
    """Samples with many ignored pixels do not weigh more: the step's loss is that of all valid pixels together."""
    settings = tiny_settings(store, str(tmp_path), "model.norm=frozen", "accumulate=2", "model.dropout=0")
    parts, batches = first_step(settings, Runtime())
    whole, _ = first_step(settings, Runtime())
    batches[0].labels[:, 4:] = 255
    joined = Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    totals = steps.train_step(parts, batches)
    expected = steps.train_step(whole, [joined])
    assert totals[1] == (joined.labels != 255).sum()
    assert torch.allclose(totals, expected)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def worker(rank: int, world: int, folder: str, settings: TrainSettings) -> None:
    """One gloo rank: the gradients of the first step, then a whole run."""
    torch.set_num_threads(1)
    runtime = Runtime(rank=rank, world_size=world)
    with process_group(rank, world, folder):
        loss, found = gradients(settings, runtime)
        result = fit(settings, runtime)
    if rank == 0:
        torch.save({"loss": loss, "gradients": found, "state": result["state"]}, f"{folder}/result.pt")


@pytest.mark.parametrize("norm", ["frozen", "sync"])
def test_workers_do_not_change_what_is_learned(store: str, tmp_path: Path, norm: str) -> None:
    """Two ranks take the step that one takes: same loss and gradients up to rounding, with a batch that splits
    unevenly; and their run finishes with a last batch that leaves a rank without samples."""
    extra = (f"model.norm={norm}", "batch_size=5", "epochs=1.75", "eval_every=1", "log.contact_sheet=0")
    alone = gradients(tiny_settings(store, str(tmp_path / "alone"), *extra), Runtime())
    settings = tiny_settings(store, str(tmp_path / "two"), *extra, "workers=2")
    torch.multiprocessing.spawn(worker, (2, str(tmp_path), settings), nprocs=2)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert found["state"] == "finished"
    assert found["loss"] == pytest.approx(alone[0], rel=1e-5)
    for name, gradient in alone[1].items():
        scale = gradient.abs().max().item()
        assert torch.allclose(found["gradients"][name], gradient, rtol=1e-2, atol=1e-4 * scale + 1e-7), name


def test_evaluation_counts_every_image_once(store: str, tmp_path: Path) -> None:
    """The val rows of a run count all pixels of all val images at their own sizes, whatever the batch size."""
    run = str(tmp_path / "run")
    fit(tiny_settings(store, run, "epochs=0.3", "log.contact_sheet=0"), Runtime())
    settings = tiny_settings(store, run)
    data = Data.open(settings)
    state = dataclasses.replace(steps.create_state(settings, Runtime(), data))
    shares = steps.evaluate(state, data).share
    assert sum(shares) == pytest.approx(1)
    counts = data.store.pixel_counts("val")
    assert shares == pytest.approx((counts / counts.sum()).tolist())
