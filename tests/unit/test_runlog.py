"""What a run leaves behind to be read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sceneray import runlog, storage


def test_metrics_of_one_attempt_come_back_in_order(tmp_path: Path) -> None:
    """Rows written over several flushes are read back as one list."""
    run = str(tmp_path)
    number = runlog.claim_attempt(run, {"from_step": 0})
    metrics = runlog.MetricsLog(run, number, tensorboard=False)
    for step in range(1, 6):
        metrics.add("train", {"step": step, "loss": 1 / step})
        if step % 2 == 0:
            metrics.flush()
    metrics.close()
    assert [row["step"] for row in runlog.read_metrics(run)] == [1, 2, 3, 4, 5]


def test_rows_past_the_restored_step_are_superseded(tmp_path: Path) -> None:
    """A later attempt that starts from step 2 replaces what an earlier one wrote after it."""
    run = str(tmp_path)
    for from_step, steps, loss in [(0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)]:
        metrics = runlog.MetricsLog(run, runlog.claim_attempt(run, {"from_step": from_step}), tensorboard=False)
        for step in steps:
            metrics.add("train", {"step": step, "loss": loss})
        metrics.close()
    assert [(row["step"], row["loss"]) for row in runlog.read_metrics(run)] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip


def test_attempt_numbers_are_never_shared(tmp_path: Path) -> None:
    """Groups that start at once get numbers of their own, 1, 2, 3, ..."""
    numbers = [runlog.claim_attempt(str(tmp_path), {"from_step": 0}) for _ in range(4)]
    assert numbers == [1, 2, 3, 4]
    assert [record["attempt"] for record in runlog.attempts(str(tmp_path))] == numbers


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    """The event files hold every scalar of the rows, under kind/name, at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = runlog.MetricsLog(str(tmp_path), 1, tensorboard=True)
    metrics.add("train", {"step": 10, "epoch": 1.0, "loss": 0.5, "lr": 0.01})
    metrics.add("val", {"step": 10, "epoch": 1.0, "miou": 0.25, "iou": [0.25]})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "attempt-0001"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr", "val/miou"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5)]


def test_worker_log_keeps_the_error_that_ended_it(tmp_path: Path) -> None:
    """Records of this project's loggers are in the run folder, the last exception included."""
    run = str(tmp_path)

    def work() -> None:
        with runlog.worker_log() as lines:
            logging.getLogger("sceneray.training").info("hello, said before the attempt was known")
            lines.folder = runlog.worker_folder(run, 3, rank=1)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work()
    folder = tmp_path / "logs" / "attempt-0003" / "rank-001"
    text = "".join(storage.read_bytes(str(path)).decode() for path in sorted(folder.iterdir()))
    assert "hello, said before the attempt was known" in text
    assert "RuntimeError: broken" in text


def test_parts_are_whole_lines(tmp_path: Path) -> None:
    """Every part can be parsed alone."""
    parts = runlog.Parts(str(tmp_path), "jsonl")
    for number in range(3):
        parts.add(json.dumps({"number": number}))
        parts.flush()
    parts.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-0000{i}.jsonl" for i in range(3)]
    assert json.loads((tmp_path / "part-00001.jsonl").read_text()) == {"number": 1}
